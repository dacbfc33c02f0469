//! The CPU's packed attention against plain tensor arithmetic: outputs, gradients, dropout.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{floats, relative, worst};
use reranker::torch_ext::attention::{
    AttentionOptions, CuSeqlens, Projections, Window, packed_attention, per_sequence,
};
use tch::{Device, Kind, Tensor};

const DROPOUT: f64 = 0.3;

/// Packed sequences with their attention settings.
#[derive(Clone)]
struct Case {
    cu_seqlens: Vec<i64>,
    heads: i64,
    kv_heads: i64,
    dim: i64,
    window: Window,
}

impl Case {
    fn new(lengths: &[i64], heads: i64, dim: i64) -> Self {
        let mut cu_seqlens = vec![0];
        for length in lengths {
            cu_seqlens.push(cu_seqlens[cu_seqlens.len() - 1] + length);
        }
        Self { cu_seqlens, heads, kv_heads: heads, dim, window: Window::FULL }
    }

    fn with(self, kv_heads: i64, window: Window) -> Self {
        Self { kv_heads, window, ..self }
    }

    fn tokens(&self) -> i64 {
        self.cu_seqlens[self.cu_seqlens.len() - 1]
    }

    fn width(&self) -> i64 {
        self.heads * self.dim
    }

    /// Normal values `[T, (heads + 2 * kv_heads) * dim]`, the same for the same seed.
    fn qkv(&self, seed: i64) -> Tensor {
        random(&[self.tokens(), (self.heads + 2 * self.kv_heads) * self.dim], seed)
    }

    /// Calls `attend` with this case's options.
    fn options<R>(&self, dropout: f64, seed: i64, attend: impl Fn(AttentionOptions<'_>) -> R) -> R {
        let cu_seqlens = CuSeqlens::new(&self.cu_seqlens, Device::Cpu).unwrap();
        attend(AttentionOptions {
            cu_seqlens: &cu_seqlens,
            heads: self.heads,
            kv_heads: self.kv_heads,
            window: self.window,
            scale: 1.0 / (self.dim as f64).sqrt(),
            dropout,
            seed,
        })
    }

    fn ours(&self, qkv: &Tensor, dropout: f64, seed: i64) -> Tensor {
        self.options(dropout, seed, |o| packed_attention(Projections::Fused(qkv), o).unwrap())
    }

    /// Queries, keys and values by themselves: views whose rows stand apart.
    fn ours_split(&self, qkv: &Tensor, dropout: f64, seed: i64) -> Tensor {
        let [query, key, value] = self.split(qkv);
        let split = Projections::Split { query: &query, key: &key, value: &value };
        self.options(dropout, seed, |o| packed_attention(split, o).unwrap())
    }

    fn split(&self, qkv: &Tensor) -> [Tensor; 3] {
        let heads = [self.heads, self.kv_heads, self.kv_heads];
        let all = qkv.view([self.tokens(), heads.iter().sum(), self.dim]);
        all.split_with_sizes(heads, 1).try_into().unwrap()
    }

    /// softmax(q kᵀ / √d) v of every sequence in the precision of `qkv`; where given, `keep` holds
    /// for every sequence what the probabilities `[heads, L, L]` are multiplied by.
    fn plain(&self, qkv: &Tensor, keep: Option<&[Tensor]>) -> Tensor {
        let mut parts = vec![Tensor::zeros([0, self.width()], (qkv.kind(), Device::Cpu))];
        for (i, bounds) in self.cu_seqlens.windows(2).enumerate() {
            let length = bounds[1] - bounds[0];
            if length == 0 {
                continue;
            }
            // [L, heads, dim] -> [heads, L, dim], keys and values repeated for their group
            let [q, k, v] = self.split(qkv).map(|x| {
                let x = x.narrow(0, bounds[0], length).transpose(0, 1);
                x.repeat_interleave_self_int(self.heads / x.size()[0], 0, None)
            });
            let scores = q.matmul(&k.transpose(1, 2)) / (self.dim as f64).sqrt();
            let scores = scores.masked_fill(&self.hidden(length), f64::NEG_INFINITY);
            let softmax = scores.softmax(-1, None::<Kind>);
            let weights = keep.map_or_else(|| softmax.shallow_clone(), |keep| &softmax * &keep[i]);
            parts.push(weights.matmul(&v).permute([1, 0, 2]).reshape([length, self.width()]));
        }
        Tensor::cat(&parts, 0)
    }

    /// `[L, L]`: the keys that the query of a row does not see.
    fn hidden(&self, length: i64) -> Tensor {
        let Window { left, right } = self.window;
        let see = |i, j| left.is_none_or(|left| i - j <= left) && right.is_none_or(|r| j - i <= r);
        let all: Vec<bool> = (0..length * length).map(|n| !see(n / length, n % length)).collect();
        Tensor::from_slice(&all).view([length, length])
    }

    /// What dropout multiplies every probability by, `[heads, L, L]` for every sequence. With the
    /// unit vectors as values, the output of a row is its probabilities; the pattern depends on
    /// seed, head and position alone, so that it holds for other queries, keys and values too.
    fn pattern(&self, seed: i64) -> Vec<Tensor> {
        let longest = self.cu_seqlens.windows(2).map(|b| b[1] - b[0]).max().unwrap();
        let wide = Self { dim: longest, window: Window::FULL, ..self.clone() };
        let width = wide.qkv(0).size()[1];
        let qkv = Tensor::zeros([wide.tokens(), width], (Kind::Float, Device::Cpu));
        for bounds in self.cu_seqlens.windows(2) {
            for token in bounds[0]..bounds[1] {
                for head in 0..self.kv_heads {
                    let values = (self.heads + self.kv_heads) * longest;
                    let at = values + head * longest + (token - bounds[0]);
                    let _ = qkv.get(token).get(at).fill_(1.0);
                }
            }
        }
        let out = wide.ours(&qkv, DROPOUT, seed);
        let sequence = |bounds: &[i64]| {
            let length = bounds[1] - bounds[0];
            // Queries are 0, so that every probability is 1 / L before dropout.
            out.narrow(0, bounds[0], length)
                .view([length, self.heads, longest])
                .narrow(2, 0, length)
                .permute([1, 0, 2])
                * length as f64
        };
        self.cu_seqlens.windows(2).map(sequence).collect()
    }
}

fn random(shape: &[i64], seed: i64) -> Tensor {
    // The generator is global and tests run at the same time: a table of its own instead.
    let mut state = seed.cast_unsigned().wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (state >> 40) as f64 / f64::from(1 << 24)
    };
    let count = shape.iter().product::<i64>();
    // The sum of twelve uniform values is close to normal.
    let values: Vec<f32> =
        (0..count).map(|_| ((0..12).map(|_| uniform()).sum::<f64>() - 6.0) as f32).collect();
    Tensor::from_slice(&values).view(shape)
}

/// The output, and the gradient of `sum(output * weights)`.
fn with_gradient(
    qkv: &Tensor,
    weights: &Tensor,
    attend: impl Fn(&Tensor) -> Tensor,
) -> (Vec<f64>, Vec<f64>) {
    let leaf = qkv.detach().copy().set_requires_grad(true);
    let out = attend(&leaf);
    (&out * weights).sum(None::<Kind>).backward();
    (floats(&out), floats(&leaf.grad()))
}

fn lengths() -> [(&'static str, Vec<i64>); 6] {
    [
        ("one token", vec![1]),
        ("around a block of query rows", vec![127, 128, 129]),
        ("three blocks", vec![300]),
        ("all together", vec![1, 127, 3, 128, 129, 1, 300, 17]),
        ("with empty sequences", vec![0, 5, 0, 0, 9, 0]),
        ("short ones", vec![2; 40]),
    ]
}

/// Windows of every kind, smaller and larger than a block of query rows.
fn windows() -> [Window; 9] {
    [
        Window::FULL,
        Window::CAUSAL,
        Window::causal(1),
        Window::causal(7),
        Window::causal(130),
        Window::local(0),
        Window::local(5),
        Window::local(150),
        Window { left: Some(3), right: None },
    ]
}

/// Outputs and gradients of both layouts of the projections against fp64.
fn check_against_plain(name: &str, case: &Case) {
    let (qkv, weights) = (case.qkv(1), random(&[case.tokens(), case.width()], 2));
    let fused = with_gradient(&qkv, &weights, |x| case.ours(x, 0.0, 0));
    let split = with_gradient(&qkv, &weights, |x| case.ours_split(x, 0.0, 0));
    let (qkv, weights) = (qkv.to_kind(Kind::Double), weights.to_kind(Kind::Double));
    let (plain, plain_grad) = with_gradient(&qkv, &weights, |x| case.plain(x, None));
    let name =
        format!("{name}, {}/{} x {}, {:?}", case.heads, case.kv_heads, case.dim, case.window);
    for (out, grad) in [fused, split] {
        let largest = out.iter().zip(&plain).map(|(a, b)| (a - b).abs()).fold(0.0_f64, f64::max);
        assert!(largest <= 1e-5, "{name}: outputs differ by {largest}");
        let difference = relative(&grad, &plain_grad);
        assert!(difference <= 1e-5, "{name}: gradients by {difference}");
    }
}

#[test]
fn outputs_and_gradients_equal_plain_attention() {
    for (name, lengths) in lengths() {
        for (heads, dim) in [(1, 8), (3, 5), (4, 32)] {
            check_against_plain(name, &Case::new(&lengths, heads, dim));
        }
    }
}

#[test]
fn windows_and_grouped_heads_equal_plain_attention() {
    for (name, lengths) in lengths() {
        for window in windows() {
            for (heads, kv_heads, dim) in [(3, 3, 5), (4, 2, 8), (3, 1, 7)] {
                check_against_plain(name, &Case::new(&lengths, heads, dim).with(kv_heads, window));
            }
        }
    }
}

/// The way of other devices and precisions gives the same.
#[test]
fn attention_by_sequence_equals_plain_attention() {
    for (name, lengths) in lengths() {
        for window in windows() {
            let case = Case::new(&lengths, 4, 5).with(2, window);
            let qkv = case.qkv(1).to_kind(Kind::Double);
            let weights = random(&[case.tokens(), case.width()], 2).to_kind(Kind::Double);
            let (out, grad) = with_gradient(&qkv, &weights, |x| {
                case.options(0.0, 0, |o| per_sequence(Projections::Fused(x), o).unwrap())
            });
            let (plain, plain_grad) = with_gradient(&qkv, &weights, |x| case.plain(x, None));
            assert!(worst(&out, &plain) <= 1e-10, "{name}, {window:?}: outputs");
            assert!(relative(&grad, &plain_grad) <= 1e-10, "{name}, {window:?}: gradients");
        }
    }
}

#[test]
fn scores_far_from_zero_stay_finite() {
    let case = Case::new(&[1, 130], 2, 8);
    let qkv = case.qkv(3) * 40.0;
    let weights = random(&[case.tokens(), case.width()], 4);
    let (out, grad) = with_gradient(&qkv, &weights, |x| case.ours(x, 0.0, 0));
    let (qkv, weights) = (qkv.to_kind(Kind::Double), weights.to_kind(Kind::Double));
    let (plain, plain_grad) = with_gradient(&qkv, &weights, |x| case.plain(x, None));
    assert!(relative(&out, &plain) <= 1e-3);
    assert!(relative(&grad, &plain_grad) <= 1e-2);
    assert!(out.iter().chain(&grad).all(|value| value.is_finite()));
}

#[test]
fn an_empty_batch_is_empty() {
    let case = Case::new(&[], 2, 4);
    let (out, grad) =
        with_gradient(&case.qkv(1), &random(&[0, case.width()], 1), |x| case.ours(x, DROPOUT, 1));
    assert!(out.is_empty() && grad.is_empty());
    assert_eq!(case.ours(&case.qkv(1), 0.0, 0).size(), [0, 8]);
}

#[test]
fn what_does_not_fit_is_an_error() {
    let case = Case::new(&[4, 3], 2, 4);
    let qkv = case.qkv(1);
    let fails = |case: &Case, qkv: &Tensor, dropout| {
        case.options(dropout, 0, |o| packed_attention(Projections::Fused(qkv), o).is_err())
    };
    let cut_at = |cu_seqlens: &[i64]| Case { cu_seqlens: cu_seqlens.to_vec(), ..case.clone() };
    assert!(!fails(&case, &qkv, 0.0));
    assert!(fails(&cut_at(&[0, 4]), &qkv, 0.0), "boundaries end early");
    assert!(fails(&cut_at(&[0, 5, 4, 7]), &qkv, 0.0), "boundaries fall");
    assert!(fails(&cut_at(&[]), &qkv, 0.0), "no boundaries");
    assert!(fails(&Case { heads: 5, kv_heads: 5, ..case.clone() }, &qkv, 0.0), "the width");
    assert!(fails(&Case { heads: 3, kv_heads: 2, ..case.clone() }, &qkv, 0.0), "uneven groups");
    assert!(fails(&case, &qkv, 1.0), "nothing is kept");
    assert!(fails(&case, &qkv.view([-1]), 0.0), "no rows");
    let [query, key, value] = case.split(&qkv);
    let split = Projections::Split { query: &query, key: &key.narrow(0, 0, 6), value: &value };
    assert!(case.options(0.0, 0, |o| packed_attention(split, o).is_err()), "keys are missing");
}

#[test]
fn dropout_is_a_function_of_its_seed() {
    let case = Case::new(&[7, 130, 64], 3, 8);
    let qkv = case.qkv(5);
    let out = |seed| floats(&case.ours(&qkv, DROPOUT, seed));
    assert_eq!(out(1), out(1));
    assert_ne!(out(1), out(2));
    assert_ne!(out(1), floats(&case.ours(&qkv, 0.0, 1)));
}

#[test]
fn dropout_drops_its_share_and_scales_the_rest() {
    let case = Case::new(&[100, 150], 4, 8);
    let patterns = case.pattern(9);
    let scale = 1.0 / (1.0 - DROPOUT);
    let (mut dropped, mut all) = (0_usize, 0_usize);
    for pattern in &patterns {
        for value in floats(pattern) {
            assert!(value == 0.0 || (value - scale).abs() <= 1e-4, "kept with {value}");
            dropped += usize::from(value == 0.0);
            all += 1;
        }
    }
    let share = dropped as f64 / all as f64;
    // Five standard deviations of a share of so many independent draws.
    let tolerance = 5.0 * (DROPOUT * (1.0 - DROPOUT) / all as f64).sqrt();
    assert!((share - DROPOUT).abs() <= tolerance, "{share} of {all} dropped");
}

/// Rows, heads, sequences and seeds have patterns of their own: two of them agree on as many
/// elements as independent draws do.
#[test]
fn dropout_patterns_are_independent() {
    let case = Case::new(&[120, 120], 2, 8);
    let (a, b) = (case.pattern(1), case.pattern(2));
    let (low, high) = (a[0].narrow(1, 0, 119), a[0].narrow(1, 1, 119));
    for (name, one, other) in [
        ("neighbouring rows", &low, &high),
        ("heads", &a[0].get(0), &a[0].get(1)),
        ("sequences", &a[0], &a[1]),
        ("neighbouring seeds", &a[0], &b[0]),
    ] {
        let agree = floats(one).iter().zip(floats(other)).filter(|(x, y)| **x == *y).count();
        let all = one.numel() as f64;
        let expected = DROPOUT * DROPOUT + (1.0 - DROPOUT) * (1.0 - DROPOUT);
        let tolerance = 5.0 * (expected * (1.0 - expected) / all).sqrt();
        let share = agree as f64 / all;
        assert!((share - expected).abs() <= tolerance, "{name} agree on {share}, not {expected}");
    }
}

#[test]
fn the_mean_over_seeds_is_the_output_without_dropout() {
    const SEEDS: i64 = 3000;
    let case = Case::new(&[3, 20], 2, 4);
    let qkv = case.qkv(6);
    let mut mean = vec![0.0; (case.tokens() * case.width()) as usize];
    let mut squares = mean.clone();
    for seed in 0..SEEDS {
        for (i, value) in floats(&case.ours(&qkv, DROPOUT, seed)).into_iter().enumerate() {
            mean[i] += value / SEEDS as f64;
            squares[i] += value * value / SEEDS as f64;
        }
    }
    for ((mean, squares), expected) in mean.iter().zip(squares).zip(floats(&case.plain(&qkv, None)))
    {
        let deviation = ((squares - mean * mean).max(0.0) / SEEDS as f64).sqrt();
        assert!((mean - expected).abs() <= 5.0 * deviation + 1e-6, "{mean} for {expected}");
    }
}

#[test]
fn dropout_uses_one_pattern_forward_and_backward() {
    for (kv_heads, window) in [(2, Window::FULL), (1, Window::CAUSAL), (2, Window::local(70))] {
        check_dropout(&Case::new(&[5, 130, 1, 128], 2, 6).with(kv_heads, window));
    }
}

fn check_dropout(case: &Case) {
    let keep: Vec<Tensor> = case.pattern(11).iter().map(|k| k.to_kind(Kind::Double)).collect();
    let (qkv, weights) = (case.qkv(7), random(&[case.tokens(), case.width()], 8));
    let (out, grad) = with_gradient(&qkv, &weights, |x| case.ours(x, DROPOUT, 11));
    let (qkv, weights) = (qkv.to_kind(Kind::Double), weights.to_kind(Kind::Double));
    let (plain, plain_grad) = with_gradient(&qkv, &weights, |x| case.plain(x, Some(&keep)));
    assert!(relative(&out, &plain) <= 1e-5, "outputs: {}", relative(&out, &plain));
    assert!(relative(&grad, &plain_grad) <= 1e-5, "{}", relative(&grad, &plain_grad));
}

#[test]
fn gradients_with_dropout_are_slopes() {
    const STEP: f64 = 1e-2;
    let case = Case::new(&[4, 131], 2, 4);
    let (qkv, weights) = (case.qkv(9), random(&[case.tokens(), case.width()], 10));
    let value = |x: &Tensor| -> f64 {
        let out = case.ours(x, DROPOUT, 12);
        floats(&out).iter().zip(floats(&weights)).map(|(o, w)| o * w).sum()
    };
    let (_, grad) = with_gradient(&qkv, &weights, |x| case.ours(x, DROPOUT, 12));
    for seed in 20..26 {
        let direction = random(&qkv.size(), seed);
        let (up, down) = (&qkv + &direction * STEP, &qkv - &direction * STEP);
        let slope = (value(&up) - value(&down)) / (2.0 * STEP);
        let expected: f64 = grad.iter().zip(floats(&direction)).map(|(g, d)| g * d).sum();
        let norm = grad.iter().map(|g| g * g).sum::<f64>().sqrt();
        assert!((slope - expected).abs() <= 1e-3 * norm, "{slope} for {expected}, norm {norm}");
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let case = Case::new(&[200, 3, 129], 4, 16);
    let (qkv, weights) = (case.qkv(13), random(&[case.tokens(), case.width()], 14));
    let run = |threads| {
        tch::set_num_threads(threads);
        with_gradient(&qkv, &weights, |x| case.ours(x, DROPOUT, 15))
    };
    assert_eq!(run(1), run(2));
}
