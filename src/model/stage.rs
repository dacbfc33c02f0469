//! What a model is made of: stages, each a pure function of its parameters and its input.
//!
//! A stage owns no tensors. It says which parameters it has ([`Stage::parameters`]) and computes
//! with the views that it is handed, so that whoever holds the parameters may gather, free,
//! offload or replace them between two stages.

use tch::{Device, Kind, Tensor};

use super::rotary::{AngleCache, Angles, Rotary};
use super::views::Views;
use crate::error::{Error, Result};
use crate::torch_ext::attention::CuSeqlens;
use crate::torch_ext::storage;

/// How a parameter that no checkpoint holds is initialised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// The same, drawn again beyond `cutoff` standard deviations on either side.
    TruncatedNormal {
        /// Standard deviation before truncation.
        std: f64,
        /// Where it is truncated, in standard deviations.
        cutoff: f64,
    },
    /// Uniform between the negative of this and this.
    Uniform(f64),
    /// All ones.
    Ones,
    /// All zeros.
    Zeros,
    /// One row `[1, H]`: that of one token in a table `[rows, H]`, less that of another. The
    /// checkpoint must hold one of the tables, which are tried in order.
    TokenRows {
        /// Names of the tables.
        tables: [&'static str; 2],
        /// Rows of the table.
        rows: i64,
        /// The row that counts.
        positive: i64,
        /// The row that is taken away.
        negative: Option<i64>,
    },
    /// Must come from a checkpoint.
    FromCheckpoint,
}

/// One tensor of a Hugging Face checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Its name in the checkpoint, such as `bert.encoder.layer.0.output.dense.weight`.
    pub name: String,
    /// Its shape.
    pub shape: Vec<i64>,
    /// What it holds where the checkpoint lacks it.
    pub init: Init,
}

impl TensorSpec {
    /// A tensor that the checkpoint must hold.
    #[must_use]
    pub fn new(name: impl Into<String>, shape: &[i64]) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), init: Init::FromCheckpoint }
    }

    /// The same with an initial value for checkpoints without it.
    #[must_use]
    pub fn or_init(mut self, init: Init) -> Self {
        self.init = init;
        self
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape.iter().product::<i64>() as usize
    }
}

/// One parameter as a stage computes with it: one or more checkpoint tensors, stacked along their
/// first dimension (query, key and value projections become one matrix), so that one product
/// serves them all.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// The checkpoint tensors, in stacking order.
    pub parts: Vec<TensorSpec>,
    /// Whether weight decay applies: not to biases and normalisation weights.
    pub decayed: bool,
    /// Whether it is the weight `[out, in]` of a linear layer, which [`super::Views::linear`]
    /// multiplies by.
    pub linear: bool,
    /// Whether it learns; otherwise it has neither gradients nor optimizer states.
    pub trained: bool,
}

impl Parameter {
    /// A parameter that is one checkpoint tensor.
    #[must_use]
    pub fn one(part: TensorSpec, decayed: bool) -> Self {
        Self::stacked(vec![part], decayed)
    }

    /// A parameter of several checkpoint tensors.
    #[must_use]
    pub fn stacked(parts: Vec<TensorSpec>, decayed: bool) -> Self {
        Self { parts, decayed, linear: false, trained: true }
    }

    /// The weights of linear layers over one input, as one product.
    #[must_use]
    pub fn linear(parts: Vec<TensorSpec>) -> Self {
        Self { linear: true, ..Self::stacked(parts, true) }
    }

    /// The stacked shape.
    ///
    /// # Panics
    /// When a parameter was built without parts.
    #[must_use]
    pub fn shape(&self) -> Vec<i64> {
        let mut shape =
            self.parts.first().expect("a parameter has at least one part").shape.clone();
        shape[0] = self.parts.iter().map(|part| part.shape[0]).sum();
        shape
    }

    /// Number of elements.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.parts.iter().map(TensorSpec::elements).sum()
    }
}

/// A packed batch on the device: `T` tokens of `B` sequences, no padding.
#[derive(Debug)]
pub struct PackedBatch {
    /// Token ids `[T]`, int64.
    pub input_ids: Tensor,
    /// Positions inside the own sequence `[T]`, int64, from 0.
    pub position_ids: Tensor,
    /// Segment ids `[T]`, int64.
    pub type_ids: Tensor,
    /// Sequence boundaries `[B + 1]`, rising from 0 to `T`.
    pub cu_seqlens: CuSeqlens,
    /// Row of each sequence's first token `[B]`, int64.
    pub first_rows: Tensor,
    /// Row of each sequence's last token `[B]`, int64.
    pub last_rows: Tensor,
    rotary: AngleCache,
}

impl PackedBatch {
    /// Moves packed token lists to `device`.
    ///
    /// # Errors
    /// [`Error::Usage`] for a sequence without tokens, which has no score; [`Error::Torch`] when the
    /// device has no room.
    pub fn new(
        input_ids: &[i64],
        position_ids: &[i64],
        type_ids: &[i64],
        cu_seqlens: &[i64],
        device: Device,
    ) -> Result<Self> {
        let put = |values: &[i64]| -> Result<Tensor> {
            storage::upload(&Tensor::f_from_slice(values)?, device)
        };
        if let Some(empty) = cu_seqlens.windows(2).position(|bounds| bounds[0] == bounds[1]) {
            return Err(Error::Usage(format!(
                "pair {empty} of a batch has no tokens: its query and document are empty; put text \
                 into query_format or special_token, or leave the record out"
            )));
        }
        let first_rows: Vec<i64> = cu_seqlens.windows(2).map(|bounds| bounds[0]).collect();
        let last_rows: Vec<i64> = cu_seqlens.windows(2).map(|bounds| bounds[1] - 1).collect();
        Ok(Self {
            input_ids: put(input_ids)?,
            position_ids: put(position_ids)?,
            type_ids: put(type_ids)?,
            first_rows: put(&first_rows)?,
            last_rows: put(&last_rows)?,
            cu_seqlens: CuSeqlens::new(cu_seqlens, device)?,
            rotary: AngleCache::default(),
        })
    }

    /// The angles of `rotary` for this batch's positions in `kind`, computed once for all layers.
    ///
    /// # Errors
    /// [`Error::Torch`] from libtorch.
    pub fn angles(&self, rotary: &Rotary, kind: Kind) -> Result<Angles> {
        self.rotary.get(rotary, &self.position_ids, kind)
    }

    /// Number of tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.cu_seqlens.tokens()
    }

    /// Number of sequences.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.cu_seqlens.sequences()
    }
}

/// What a stage's forward pass is given beside its parameters and input.
#[derive(Debug, Clone, Copy)]
pub struct ForwardContext<'a> {
    /// The batch the input belongs to.
    pub batch: &'a PackedBatch,
    /// Seed of this stage's dropout while training; `None` switches dropout off. The same seed
    /// gives the same result, so a forward pass can be run again.
    pub dropout_seed: Option<i64>,
}

/// Bytes of an element of what a graph keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Width {
    /// Of an activation.
    pub value: usize,
    /// Of what attention keeps: fp32 where it is this crate's own kernel.
    pub attention: usize,
    /// Of what layer normalisation keeps of its input: fp32 where [`layer_norm`] computes in it.
    pub normed: usize,
}

/// One link of the chain that is a model.
pub trait Stage: std::fmt::Debug + Send {
    /// A short name for reports: `embeddings`, `layer 3`, `head`.
    fn name(&self) -> String;

    /// The parameters, in the order in which [`Stage::forward`] takes their views.
    fn parameters(&self) -> Vec<Parameter>;

    /// Bytes for each token that the stage's graph keeps for its backward pass, its output
    /// included: an estimate for forecasts.
    fn saved_bytes_per_token(&self, width: Width) -> usize;

    /// Bytes for each token of the gradients that stand at once in the stage's backward pass, beside
    /// what its graph keeps: an estimate for forecasts.
    fn backward_bytes_per_token(&self, width: Width) -> usize;

    /// Computes the stage's output from `input`: `[T, H]` between layers, nothing for the first
    /// stage, `[B]` fp32 scores out of the last.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] when libtorch refuses (out of memory, for example).
    fn forward(
        &self,
        views: Views<'_>,
        input: Option<&Tensor>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor>;
}

/// The padding index of an embedding table without one.
pub const NO_PADDING: i64 = -1;

/// Whether the gradient of `parameter` would be added up in too low a precision: libtorch's kernels for
/// embeddings and layer normalisation do so on the CPU, one token after the other in the parameter's
/// dtype, in which the sum soon stops growing.
fn sums_coarsely(parameter: &Tensor) -> Result<bool> {
    let is_low = matches!(parameter.f_kind()?, Kind::BFloat16 | Kind::Half);
    Ok(is_low && parameter.device() == Device::Cpu && parameter.requires_grad())
}

/// Rows `ids` `[T]` of `table`. The row `padding` gets no gradient, as in `torch.nn.Embedding`.
///
/// # Errors
/// [`crate::Error::Torch`] from libtorch.
pub fn embedding(table: &Tensor, ids: &Tensor, padding: i64) -> Result<Tensor> {
    let rows_of = |table: &Tensor, ids: &Tensor, padding| {
        Tensor::f_embedding(table, ids, padding, false, false)
    };
    if !sums_coarsely(table)? {
        return Ok(rows_of(table, ids, padding)?);
    }
    // Each row once, so that the table gets one gradient of it, which was added up in fp32.
    let (distinct, places, _) = ids.f_internal_unique2(true, true, false)?;
    let rows = to_fp32(&rows_of(table, &distinct, padding)?)?;
    Ok(rows_of(&rows, &places, NO_PADDING)?.f_to_kind(table.f_kind()?)?)
}

/// `x W^T`, `+ b` where there is a bias.
///
/// fp16 on the CPU is multiplied in fp32 and rounded: libtorch's own product of that dtype takes 5
/// to 40 times as long there (4096 x 384 by 384 x 1536, forward and backward), and is no more exact.
///
/// # Errors
/// [`crate::Error::Torch`] from libtorch.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    if x.f_kind()? == Kind::Half && x.device() == Device::Cpu {
        let bias = bias.map(to_fp32).transpose()?;
        let product = to_fp32(x)?.f_linear(&to_fp32(weight)?, bias.as_ref())?;
        return Ok(product.f_to_kind(Kind::Half)?);
    }
    Ok(x.f_linear(weight, bias)?)
}

/// Layer normalisation over the last dimension.
///
/// # Errors
/// [`crate::Error::Torch`] from libtorch.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let width = weight.size();
    if sums_coarsely(weight)? {
        let bias = bias.map(to_fp32).transpose()?;
        let weight = to_fp32(weight)?;
        let normed = to_fp32(x)?.f_layer_norm(&width, Some(&weight), bias.as_ref(), eps, false)?;
        return Ok(normed.f_to_kind(x.f_kind()?)?);
    }
    Ok(x.f_layer_norm(&width, Some(weight), bias, eps, false)?)
}

/// Root-mean-square normalisation over the last dimension (Zhang & Sennrich, 2019), computed in
/// fp32. The result is multiplied by `weight` after it was rounded to the dtype of `x`, as Llama
/// does it, or by `1 + weight` before, as Gemma does.
///
/// # Errors
/// [`crate::Error::Torch`] from libtorch.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64, adds_one: bool) -> Result<Tensor> {
    let (kind, width) = (x.f_kind()?, weight.size());
    let normed = to_fp32(x)?.f_rms_norm(&width, None::<&Tensor>, eps)?;
    if adds_one {
        let factor = to_fp32(weight)?.f_add_scalar(1.0)?;
        return Ok(normed.f_mul(&factor)?.f_to_kind(kind)?);
    }
    Ok(normed.f_to_kind(kind)?.f_mul(weight)?)
}

/// Dropout with probability `p` while `train`; the identity otherwise.
///
/// # Errors
/// [`crate::Error::Torch`] from libtorch.
pub fn dropout(x: Tensor, p: f64, train: bool) -> Result<Tensor> {
    if train && p > 0.0 { Ok(x.f_dropout(p, true)?) } else { Ok(x) }
}

/// The input of a stage that is not the first.
///
/// # Panics
/// When the engine hands no input to an inner stage.
#[must_use]
pub fn inner(input: Option<&Tensor>) -> &Tensor {
    input.expect("an inner stage always has an input")
}

/// fp32, whatever came in; scores and statistics are kept in it.
///
/// # Errors
/// [`crate::Error::Torch`] from libtorch.
pub fn to_fp32(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_to_kind(Kind::Float)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    const TOKENS: i64 = 2048;
    const WIDTH: i64 = 4;

    /// The gradients of `parameters` that `forward` gives where that of its output `[T, H]` is 1, in fp32.
    fn gradients(
        parameters: &[Tensor],
        kind: Kind,
        forward: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Vec<Tensor> {
        let leaf = |values: &Tensor| values.to_kind(kind).detach().set_requires_grad(true);
        let leaves: Vec<Tensor> = parameters.iter().map(leaf).collect();
        let output = forward(&leaves).unwrap();
        assert_eq!(output.kind(), kind);
        output.sum(Kind::Float).backward();
        leaves.iter().map(|leaf| leaf.grad().to_kind(Kind::Float)).collect()
    }

    /// A sum in bf16 that adds one token after the other ends at 256, where adding 1 changes nothing.
    #[test]
    fn gradients_of_many_tokens_are_added_up_in_fp32() {
        let options = (Kind::Float, Device::Cpu);
        let (ones, zeros) = (Tensor::ones([WIDTH], options), Tensor::zeros([WIDTH], options));
        let row = Tensor::from_slice(&[-1.0_f32, 0.5, 2.0, -1.5]);
        let x = row.expand([TOKENS, WIDTH], false).contiguous();
        let ids = Tensor::arange(TOKENS, (Kind::Int64, Device::Cpu)).remainder(3);
        let table = Tensor::stack(&[&zeros, &ones, &row], 0);
        for kind in [Kind::BFloat16, Kind::Half] {
            let close = |ours: &[Tensor], exact: &[Tensor]| {
                for (ours, exact) in ours.iter().zip(exact) {
                    let difference = (ours - exact).norm() / exact.norm();
                    assert!(difference.double_value(&[]) <= 4e-3, "{kind:?}: {ours} {exact}");
                }
            };
            let norm = |kind| {
                let x = x.to_kind(kind);
                gradients(&[ones.shallow_clone(), zeros.shallow_clone()], kind, |views| {
                    layer_norm(&x, &views[0], Some(&views[1]), 1e-5)
                })
            };
            close(&norm(kind), &norm(Kind::Float));
            let rows = |kind| {
                gradients(&[table.shallow_clone()], kind, |views| embedding(&views[0], &ids, 0))
            };
            close(&rows(kind), &rows(Kind::Float));
            let values = table.to_kind(kind);
            let looked_up = embedding(&values.copy().set_requires_grad(true), &ids, 0).unwrap();
            assert!(looked_up.equal(&values.index_select(0, &ids)), "{kind:?}");
        }
    }
}
