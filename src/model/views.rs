//! A stage's parameters as it computes with them.

use tch::Tensor;

use super::lora::Deltas;
use super::stage::linear;
use crate::error::Result;

/// Views of a stage's parameters, taken in the order in which the stage lists them.
#[derive(Debug)]
pub struct Views<'a> {
    tensors: &'a [Tensor],
    /// How many were taken.
    taken: usize,
    deltas: Option<Deltas<'a>>,
}

impl<'a> Views<'a> {
    /// From the first of `tensors` on.
    #[must_use]
    pub fn new(tensors: &'a [Tensor]) -> Self {
        Self { tensors, taken: 0, deltas: None }
    }

    /// The first `count` with the adapters behind them, which `deltas` makes of the rest.
    pub(super) fn adapted(
        self,
        count: usize,
        deltas: impl FnOnce(&'a [Tensor]) -> Deltas<'a>,
    ) -> Self {
        let (tensors, rest) = self.tensors.split_at(count);
        Self { tensors, taken: self.taken, deltas: Some(deltas(rest)) }
    }

    /// The next view.
    ///
    /// # Panics
    /// When a stage takes more than it lists.
    #[must_use]
    pub fn one(&mut self) -> &'a Tensor {
        let view = &self.tensors[self.taken];
        self.taken += 1;
        view
    }

    /// The next `N` views.
    #[must_use]
    pub fn take<const N: usize>(&mut self) -> [&'a Tensor; N] {
        std::array::from_fn(|_| self.one())
    }

    /// A linear layer: `x W^T`, `+ b` where there is a bias, and what its adapters add. `x` is
    /// `[.., in]`, the result `[.., out]`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    pub fn linear(&mut self, x: &Tensor, bias: bool) -> Result<Tensor> {
        let index = self.taken;
        let weight = self.one();
        let product = linear(x, weight, bias.then(|| self.one()))?;
        match &self.deltas {
            Some(deltas) => deltas.add(index, x, product),
            None => Ok(product),
        }
    }
}
