//! A flat buffer of parameters, whole or divided among ranks.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::layout::{ParameterGroups, UnitLayout};
use super::sharding::Share;
use crate::comm::{Communicator, Pending};
use crate::error::Result;
use crate::model::Parameter;
use crate::model::weights::{WeightFiles, initialise};
use crate::torch_ext::storage;

/// Where parameters come from: files, or a seed for what is not there.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    pub(super) weights: &'a WeightFiles,
    pub(super) seed: u64,
}

/// How a buffer of parameters is kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keeping {
    /// Where stages compute with it.
    pub(super) device: Device,
    /// Precision that they compute in.
    pub(super) kind: Kind,
    /// What this rank holds; a buffer of divided parameters is whole only around its use.
    pub(super) share: Share,
    /// Precision and place of this rank's part, where that is kept beside the buffer.
    pub(super) part: Option<(Kind, Device)>,
}

/// The parameters of a layout in one buffer.
#[derive(Debug)]
pub(super) struct Values {
    pub(super) layout: UnitLayout,
    keeping: Keeping,
    /// Elements that this rank keeps, of those that are divided.
    pub(super) slice: Range<usize>,
    /// `[length]` in the computing precision; its memory is absent between two uses where
    /// parameters are divided.
    pub(super) flat: Tensor,
    /// `[slice]`, where it is kept by itself.
    pub(super) part: Option<Tensor>,
    /// The sum of the loaded parameters' bits as integers.
    pub(super) fingerprint: i64,
}

impl Values {
    /// Reads `parameters`.
    pub(super) fn load(
        parameters: &[Parameter],
        source: Source<'_>,
        groups: &ParameterGroups,
        keeping: Keeping,
    ) -> Result<Self> {
        let Keeping { device, kind, share, part } = keeping;
        let layout = UnitLayout::new(parameters, groups, share.world_size);
        let slice = share.slice(layout.length);
        let _no_grad = tch::no_grad_guard();
        let whole = Tensor::f_zeros([layout.length as i64], (Kind::Float, device))?;
        for (spec, range) in layout.places.iter().flat_map(|place| &place.parts) {
            let value = match source.weights.read(spec)? {
                Some(value) => value,
                None => initialise(spec, source.seed)?,
            };
            cut(&whole, range)?.f_copy_(&value.f_reshape([-1])?)?;
        }
        let bits = whole.f_view_dtype(Kind::Int)?;
        let fingerprint = bits.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        let part = part
            .map(|(kind, home)| -> Result<Tensor> {
                Ok(cut(&whole, &slice)?.f_detach_copy()?.f_to_kind(kind)?.f_to_device(home)?)
            })
            .transpose()?;
        let flat = if kind == Kind::Float { whole } else { whole.f_to_kind(kind)? };
        Ok(Self { layout, keeping, slice, flat, part, fingerprint })
    }

    /// The parameters in the layout's order. Their version counter is not the buffer's: gathering
    /// writes into the same memory between a forward and a backward pass, with the same values.
    pub(super) fn views(&self) -> Result<Vec<Tensor>> {
        views_of(&self.layout, &self.flat)
    }

    /// Starts making the buffer whole; nothing to wait for where it is.
    pub(super) fn gather(&self, comm: &dyn Communicator) -> Result<Pending> {
        let Some(part) = &self.part else { return Ok(Pending::done()) };
        let is_whole = !self.keeping.share.sharding.parameters || self.is_empty();
        if is_whole || storage::held_bytes(&self.flat) > 0 {
            return Ok(Pending::done());
        }
        let _no_grad = tch::no_grad_guard();
        storage::take(&self.flat)?;
        cut(&self.flat, &self.slice)?.f_copy_(part)?;
        comm.all_gather(&self.flat)
    }

    /// Gives the memory of a gathered buffer back; nothing where it is not divided.
    pub(super) fn release(&self) -> Result<()> {
        if self.keeping.share.sharding.parameters {
            storage::give_back(&self.flat)?;
        }
        Ok(())
    }

    /// The whole parameters in fp32 `[length]`, collected from all ranks, which all call it.
    pub(super) fn whole_fp32(&self, comm: &dyn Communicator) -> Result<Tensor> {
        let Some(part) = &self.part else { return Ok(self.flat.f_to_kind(Kind::Float)?) };
        if !self.keeping.share.sharding.states {
            return Ok(part.shallow_clone());
        }
        let _no_grad = tch::no_grad_guard();
        let length = self.layout.length as i64;
        let whole = Tensor::f_zeros([length], (Kind::Float, self.keeping.device))?;
        cut(&whole, &self.slice)?.f_copy_(part)?;
        if !self.is_empty() {
            comm.all_gather(&whole)?.wait()?;
        }
        Ok(whole)
    }

    /// Whether there are no parameters: nothing to communicate.
    pub(super) fn is_empty(&self) -> bool {
        self.layout.length == 0
    }
}

/// Elements `range` of a flat tensor, as a view.
pub(super) fn cut(flat: &Tensor, range: &Range<usize>) -> Result<Tensor> {
    Ok(flat.f_narrow(0, range.start as i64, range.len() as i64)?)
}

/// Views of the parameters of `layout` in `flat`, with a version counter of their own.
pub(super) fn views_of(layout: &UnitLayout, flat: &Tensor) -> Result<Vec<Tensor>> {
    let flat = flat.f_data()?;
    layout
        .places
        .iter()
        .map(|place| Ok(cut(&flat, &place.range)?.f_view(&place.shape[..])?))
        .collect()
}
