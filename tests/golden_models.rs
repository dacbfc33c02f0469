//! Every family of models against transformers: logits, gradients, training curves. The golden files
//! come from `scripts/make_golden.py`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;

use common::{Golden, floats, named, options, relative, worst};
use reranker::config::LossKind;
use reranker::engine::StepOptions;
use reranker::optim::Schedule;
use tch::{Kind, Tensor};

/// Classifiers of each family.
const CLASSIFIERS: [&str; 14] = [
    "bert_tiny",
    "bert_odd",
    "roberta_tiny",
    "xlm_roberta_odd",
    "modernbert_tiny",
    "modernbert_odd",
    "qwen2_tiny",
    "qwen3_odd",
    "llama_odd",
    "llama_yarn",
    "qwen2_yarn",
    "qwen2_bidirectional",
    "mistral_tiny",
    "gemma_tiny",
];

/// Those with a training curve of 20 steps.
const CURVES: [&str; 10] = [
    "bert_tiny",
    "roberta_tiny",
    "xlm_roberta_odd",
    "modernbert_tiny",
    "modernbert_odd",
    "qwen2_tiny",
    "qwen3_odd",
    "llama_odd",
    "mistral_tiny",
    "gemma_tiny",
];

fn all_pairs(golden: &Golden) -> Vec<usize> {
    (0..golden.pairs()).collect()
}

fn logits(golden: &Golden, kind: Kind) -> Vec<f64> {
    let engine = golden.engine_of(1e-3, kind);
    floats(&engine.score(&golden.batch(&all_pairs(golden)).packed, &common::solo()).unwrap())
}

#[test]
fn logits_equal_transformers() {
    for case in CLASSIFIERS {
        let golden = Golden::load(case);
        let difference = worst(&logits(&golden, Kind::Float), &golden.floats("logits"));
        assert!(difference <= 1e-5, "{case}: logits differ by {difference}");
    }
}

/// Over all pairs together: weights as large as these models' put single logits of transformers in
/// bf16 up to 3e-2 from the exact ones too.
#[test]
fn logits_in_bf16_are_close() {
    for case in CLASSIFIERS {
        let golden = Golden::load(case);
        let difference = relative(&logits(&golden, Kind::BFloat16), &golden.floats("logits"));
        assert!(difference <= 2e-2, "{case}: logits differ by {difference}");
    }
}

#[test]
fn a_row_scores_the_same_alone_and_in_any_batch() {
    for case in CLASSIFIERS {
        let golden = Golden::load(case);
        let engine = golden.engine(1e-3);
        let score = |pairs: &[usize]| {
            floats(&engine.score(&golden.batch(pairs).packed, &common::solo()).unwrap())
        };
        let together = score(&all_pairs(&golden));
        for pair in all_pairs(&golden) {
            let alone = score(&[pair])[0];
            let between = score(&[3, pair, 7])[1];
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b.abs().max(1.0);
            assert!(
                close(alone, together[pair]),
                "{case}: pair {pair} alone {alone} {}",
                together[pair]
            );
            assert!(close(between, together[pair]), "{case}: pair {pair} between others");
        }
    }
}

fn check_gradients(case: &str, loss: LossKind, prefix: &str) {
    let golden = Golden::load(case);
    let mut engine = golden.engine(1e-3);
    let pairs = all_pairs(&golden);
    let batch = golden.batch(&pairs);
    let report = engine
        .gradients(std::iter::once(Ok(batch)), options(loss, pairs.len() as f64), &common::solo())
        .unwrap();
    let name = if prefix.is_empty() { "loss".into() } else { format!("{prefix}loss") };
    let expected = golden.floats(&name)[0];
    assert!((report.loss - expected).abs() <= 1e-5, "{case}: loss {} vs {expected}", report.loss);
    let ours = named(&engine, true);
    let scale = ours.values().flatten().fold(0.0_f64, |m, v| m.max(v.abs()));
    let mut checked = 0;
    for (name, grad) in &ours {
        let theirs = golden.floats(&format!("{prefix}grad.{name}"));
        // A key bias has gradient 0 up to rounding: measured against the largest gradient.
        let zero = theirs.iter().all(|v| v.abs() < 1e-6 * scale);
        let difference = if zero { worst(grad, &theirs) / scale } else { relative(grad, &theirs) };
        assert!(difference <= 1e-5, "{case}: gradient of {name} differs by {difference}");
        checked += 1;
    }
    let expected =
        golden.tensors.keys().filter(|k| k.starts_with(&format!("{prefix}grad."))).count();
    assert_eq!(checked, expected, "{case}: every parameter has a golden gradient");
}

#[test]
fn gradients_equal_transformers() {
    for case in CLASSIFIERS {
        check_gradients(case, LossKind::PointwiseBce, "");
        if case.starts_with("bert") {
            check_gradients(case, LossKind::PointwiseMse, "mse.");
        }
    }
}

fn check_curve(case: &str, curve: &str) {
    let golden = Golden::load(case);
    let plan = &golden.info["curves"][curve];
    let steps = plan["steps"].as_u64().unwrap() as usize;
    let accumulation = plan["gradient_accumulation_steps"].as_u64().unwrap() as usize;
    let max_grad_norm = plan["max_grad_norm"].as_f64();
    let batches: Vec<Vec<usize>> = serde_json::from_value(plan["batches"].clone()).unwrap();
    let lr = golden.info["optimizer"]["lr"].as_f64().unwrap();
    let schedule = Schedule::new(steps, 0.1, 0.0);
    let mut engine = golden.engine(lr);
    let (mut losses, mut rates, mut norms) = (vec![], vec![], vec![]);
    for step in 0..steps {
        let micro = &batches[step * accumulation..(step + 1) * accumulation];
        let weight = micro.iter().map(Vec::len).sum::<usize>() as f64;
        let options = StepOptions {
            step,
            lr_factor: schedule.factor(step),
            max_grad_norm,
            ..options(LossKind::PointwiseBce, weight)
        };
        let report = engine
            .train_step(micro.iter().map(|pairs| Ok(golden.batch(pairs))), options, &common::solo())
            .unwrap();
        losses.push(report.loss);
        rates.push(lr * schedule.factor(step));
        norms.push(report.grad_norm);
    }
    let curve_of = |what: &str| golden.floats(&format!("{curve}.{what}"));
    assert!(worst(&rates, &curve_of("lr")) <= 1e-9, "{case}, {curve}: rates");
    let difference = worst(&losses, &curve_of("loss"));
    assert!(difference <= 1e-4, "{case}, {curve}: losses differ by {difference}");
    let difference = worst(&norms, &curve_of("grad_norm"));
    assert!(difference <= 1e-3, "{case}, {curve}: gradient norms differ by {difference}");
    let values = named(&engine, false);
    let prefix = if curve == "curve" { "final.".into() } else { format!("{curve}.final.") };
    for (name, theirs) in golden.tensors.iter().filter(|(name, _)| name.starts_with(&prefix)) {
        let ours = &values[&name[prefix.len()..]];
        let difference = relative(ours, &floats(theirs));
        assert!(difference <= 1e-4, "{case}, {curve}: {name} ends up {difference} away");
    }
}

#[test]
fn twenty_steps_follow_a_plain_pytorch_loop() {
    for case in CURVES {
        check_curve(case, "curve");
    }
}

#[test]
fn accumulation_and_clipping_follow_a_plain_pytorch_loop() {
    check_curve("bert_tiny", "curve_clip");
}

/// Every checkpoint tensor of the engine for `case`, twice loaded, and those in its file.
fn loaded_and_stored(case: &str) -> [BTreeMap<String, Vec<f64>>; 2] {
    let golden = Golden::load(case);
    let first = named(&golden.engine(1e-3), false);
    assert_eq!(first, named(&golden.engine(1e-3), false), "the same seed gives the same head");
    let stored = Tensor::read_safetensors(golden.dir.join("model.safetensors")).unwrap();
    [first, stored.into_iter().map(|(name, values)| (name, floats(&values))).collect()]
}

#[test]
fn a_trunk_without_prefix_or_head_gets_a_seeded_head() {
    let [loaded, stored] = loaded_and_stored("bert_nohead");
    let head = &loaded["classifier.weight"];
    assert!(head.iter().any(|v| v.abs() > 1e-4), "the head is not zero");
    assert_eq!(loaded["classifier.bias"], [0.0]);
    assert_eq!(loaded["bert.pooler.dense.weight"], stored["pooler.dense.weight"]);
}

/// As transformers initialises it: a normal distribution of `hidden^-0.5`, cut at twice that.
#[test]
fn what_a_language_model_has_of_the_head_is_used() {
    let [loaded, stored] = loaded_and_stored("modernbert_nohead");
    for name in ["head.dense.weight", "head.norm.weight", "model.final_norm.weight"] {
        assert_eq!(loaded[name], stored[name], "{name}");
    }
    let std = 32_f64.powf(-0.5);
    let largest = loaded["classifier.weight"].iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    assert!(largest > std / 2.0 && largest <= 2.0 * std, "{largest}");
    assert_eq!(loaded["classifier.bias"], [0.0]);
}
