//! AdamW on flat slices, the learning-rate schedule, and the loss scale of fp16.

mod loss_scale;
pub mod schedule;

use std::ops::Range;

use tch::{Device, Kind, Tensor};

pub use loss_scale::LossScale;
pub use schedule::Schedule;

use crate::error::Result;
use crate::torch_ext::autograd::{AdamWSlices, AdamWStep, fused_adamw};

/// Decay of the first moment.
pub const BETA1: f64 = 0.9;
/// Decay of the second moment.
pub const BETA2: f64 = 0.999;
/// Added to the square root of the second moment.
pub const EPS: f64 = 1e-8;

/// Elements that an update takes at a time, so that what it converts or fetches for them needs little
/// room: 64 MB in fp32.
pub const PIECE: usize = 1 << 24;

/// `start..end` in pieces of [`PIECE`] elements.
pub fn pieces(start: usize, end: usize) -> impl Iterator<Item = Range<usize>> {
    (start..end).step_by(PIECE).map(move |at| at..end.min(at + PIECE))
}

/// Moments of a flat slice of parameters, fp32, zero before the first step.
#[derive(Debug)]
pub struct Moments {
    /// First moment (mean of gradients).
    pub exp_avg: Tensor,
    /// Second moment (mean of squared gradients).
    pub exp_avg_sq: Tensor,
}

impl Moments {
    /// Zero moments for `length` parameters.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] when there is no room.
    pub fn zeros(length: usize, device: Device) -> Result<Self> {
        let zeros = || Tensor::f_zeros([length as i64], (Kind::Float, device));
        Ok(Self { exp_avg: zeros()?, exp_avg_sq: zeros()? })
    }
}

/// One AdamW step on part of a flat slice, in place.
///
/// `values` is 1-d fp32 of the length of the moments; `start..start + length` of each is updated by `grads`,
/// fp32 `[length]`, with this `lr` and `weight_decay`. `step` counts from 1.
///
/// # Errors
/// [`crate::Error::Torch`] from libtorch.
pub fn adamw(
    values: &Tensor,
    grads: &Tensor,
    moments: &Moments,
    segment: Segment,
    step: &Tensor,
) -> Result<()> {
    let cut = |x: &Tensor| x.f_narrow(0, segment.start, segment.length);
    let slices = AdamWSlices {
        param: &cut(values)?,
        grad: grads,
        exp_avg: &cut(&moments.exp_avg)?,
        exp_avg_sq: &cut(&moments.exp_avg_sq)?,
        step,
    };
    let options = AdamWStep {
        lr: segment.lr,
        beta1: BETA1,
        beta2: BETA2,
        weight_decay: segment.weight_decay,
        eps: EPS,
    };
    fused_adamw(slices, options)
}

/// A run of a flat slice that shares its learning rate and decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Segment {
    /// First element.
    pub start: i64,
    /// Number of elements.
    pub length: i64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_a_range_once() {
        let all = |start, end| pieces(start, end).collect::<Vec<_>>();
        assert!(all(3, 3).is_empty());
        assert_eq!(all(3, 5), vec![3..5]);
        assert_eq!(all(1, 2 * PIECE), vec![1..PIECE + 1, PIECE + 1..2 * PIECE]);
    }
}
