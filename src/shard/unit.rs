//! The buffers of one stage, whole or divided among ranks.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::layout::{ParameterGroups, UnitLayout};
use super::sharding::{Sharding, Share};
use super::values::{Keeping, Source, Values, cut, views_of};
use crate::comm::{Communicator, Pending, Reduction};
use crate::error::Result;
use crate::model::weights::WeightFiles;
use crate::model::{Parameter, Stage};
use crate::optim::{Moments, Segment, adamw, pieces};
use crate::torch_ext::autograd::set_grad;
use crate::torch_ext::storage;

/// Where and how a unit's buffers are kept.
#[derive(Debug, Clone, Copy)]
pub struct UnitOptions {
    /// Where they live.
    pub device: Device,
    /// Precision that stages compute in; master weights and moments are fp32 whatever it is.
    pub kind: Kind,
    /// What this rank holds.
    pub share: Share,
    /// What the host's memory holds in place of the device's.
    pub offload: Offload,
    /// Reduce gradients of low precision in fp32, and keep the result in it.
    pub reduce_fp32: bool,
    /// Whether anything is to learn.
    pub trains: bool,
}

impl UnitOptions {
    /// Whether gradients are reduced in another precision than they are computed in.
    fn widens(&self) -> bool {
        self.reduce_fp32 && self.kind != Kind::Float
    }

    /// How parameters that learn are kept: with fp32 master weights, where the buffer does not hold
    /// them at all times in fp32, or where they are offloaded.
    fn trained(&self) -> Keeping {
        let Self { device, kind, share, offload, trains, .. } = *self;
        let has_masters = trains && (kind != Kind::Float || offload.states);
        let separate = has_masters || share.sharding.parameters;
        let home = if offload.states || offload.parameters { Device::Cpu } else { device };
        Keeping { device, kind, share, part: separate.then_some((Kind::Float, home)) }
    }

    /// How frozen parameters are kept: in the computing precision, divided where those that learn
    /// are.
    fn frozen(&self) -> Keeping {
        let Self { device, kind, share, offload, .. } = *self;
        let divided = share.sharding.parameters;
        let sharding = Sharding { states: divided, gradients: false, parameters: divided };
        let home = if offload.parameters { Device::Cpu } else { device };
        let part = divided.then_some((kind, home));
        Keeping { device, kind, share: Share { sharding, ..share }, part }
    }
}

/// What is kept in the host's memory between two uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// Moments and master weights; the host then also updates them.
    pub states: bool,
    /// This rank's part of divided parameters.
    pub parameters: bool,
}

/// Bytes that a unit holds on this rank now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct HeldBytes {
    /// Parameters that stages compute with, and this rank's part where they are divided.
    pub parameters: usize,
    /// Gradients.
    pub gradients: usize,
    /// Moments, and master weights beside parameters of another precision.
    pub states: usize,
    /// Of all kinds, what is offloaded to the host's memory.
    pub host: usize,
}

/// A stage's parameters, with views that the stage computes with. Those that learn are in one
/// buffer; while training also their gradients and the optimizer's states, in the same layout.
/// Frozen ones are in another, of which there is nothing else.
#[derive(Debug)]
pub struct FlatUnit {
    options: UnitOptions,
    trained: Values,
    frozen: Option<Values>,
    /// In the stage's order.
    views: Vec<Tensor>,
    /// Which of the views those of trained parameters are.
    places: Vec<usize>,
    training: Option<Training>,
}

#[derive(Debug)]
struct Training {
    /// `[length]` in the computing precision; absent between two uses where gradients are divided.
    grads: Tensor,
    /// The gradients of the step so far, where those of a backward pass are not added to each other:
    /// `[slice]`, reduced, where they are divided, else `[length]` in the precision that they are
    /// reduced in, where that is another.
    reduced: Option<Tensor>,
    moments: Moments,
}

/// A reduction under way, with the buffer that it works on.
#[must_use = "FlatUnit::end_reduction takes it"]
pub struct Reducing {
    pending: Pending,
    /// None where no reduction is due.
    buffer: Option<Tensor>,
}

impl std::ops::Add for HeldBytes {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            parameters: self.parameters + other.parameters,
            gradients: self.gradients + other.gradients,
            states: self.states + other.states,
            host: self.host + other.host,
        }
    }
}

impl HeldBytes {
    /// The larger of each kind.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            parameters: self.parameters.max(other.parameters),
            gradients: self.gradients.max(other.gradients),
            states: self.states.max(other.states),
            host: self.host.max(other.host),
        }
    }
}

impl FlatUnit {
    /// Reads the parameters of `stage` from `weights`; what is not there is initialised from
    /// `seed`.
    ///
    /// # Errors
    /// What [`WeightFiles::read`] reports, or [`crate::Error::Torch`] when there is no room.
    pub fn load(
        stage: &dyn Stage,
        weights: &WeightFiles,
        seed: u64,
        groups: &ParameterGroups,
        options: UnitOptions,
    ) -> Result<Self> {
        let parameters = stage.parameters();
        let which = |trained: bool| -> Vec<usize> {
            (0..parameters.len()).filter(|&index| parameters[index].trained == trained).collect()
        };
        let (places, rest) = (which(true), which(false));
        let load = |which: &[usize], keeping| {
            let parameters: Vec<Parameter> =
                which.iter().map(|&index| parameters[index].clone()).collect();
            Values::load(&parameters, Source { weights, seed }, groups, keeping)
        };
        let trained = load(&places, options.trained())?;
        let frozen = match &rest[..] {
            [] => None,
            rest => Some(load(rest, options.frozen())?),
        };
        let mut views: Vec<_> = places.iter().copied().zip(trained.views()?).collect();
        if let Some(frozen) = &frozen {
            views.extend(rest.into_iter().zip(frozen.views()?));
        }
        views.sort_by_key(|(index, _)| *index);
        let views = views.into_iter().map(|(_, view)| view).collect();
        let unit = Self { options, trained, frozen, views, places, training: None };
        unit.release()?;
        Ok(unit)
    }

    /// Makes room for gradients and moments, and lets backward passes accumulate into it.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] when there is no room.
    pub fn prepare_training(&mut self) -> Result<()> {
        let UnitOptions { device, kind, share: Share { sharding, .. }, offload, .. } = self.options;
        let zeros = |length: usize, kind| Tensor::f_zeros([length as i64], (kind, device));
        let layout = &self.trained.layout;
        let grads = zeros(layout.length, kind)?;
        for (&place, grad) in self.places.iter().zip(views_of(layout, &grads)?) {
            let view = &mut self.views[place];
            *view = view.f_detach()?.f_set_requires_grad(true)?;
            set_grad(view, &grad)?;
        }
        let widens = self.options.widens();
        let slice = self.trained.slice.len();
        let length = if sharding.gradients { slice } else { layout.length };
        let reduced = if sharding.gradients || widens {
            Some(zeros(length, if widens { Kind::Float } else { kind })?)
        } else {
            None
        };
        if sharding.gradients {
            storage::give_back(&grads)?;
        }
        let moments = Moments::zeros(slice, if offload.states { Device::Cpu } else { device })?;
        self.training = Some(Training { grads, reduced, moments });
        Ok(())
    }

    /// The sum of the loaded parameters' bits as integers: equal on hosts that read the same
    /// weights, however their processors add floats.
    #[must_use]
    pub fn fingerprint(&self) -> i64 {
        self.buffers().map(|values| values.fingerprint).fold(0, i64::wrapping_add)
    }

    /// Where each parameter that learns lies.
    #[must_use]
    pub fn layout(&self) -> &UnitLayout {
        &self.trained.layout
    }

    /// Whether anything learns.
    #[must_use]
    pub fn is_trained(&self) -> bool {
        !self.trained.is_empty()
    }

    /// The parameters in the stage's order, as the stage computes with them; valid between
    /// [`FlatUnit::gather`] and [`FlatUnit::release`].
    #[must_use]
    pub fn views(&self) -> &[Tensor] {
        &self.views
    }

    /// The flat buffer `[length]` of parameters that learn, valid as [`FlatUnit::views`].
    #[must_use]
    pub fn values(&self) -> &Tensor {
        &self.trained.flat
    }

    /// The buffers of parameters.
    fn buffers(&self) -> impl Iterator<Item = &Values> {
        std::iter::once(&self.trained).chain(&self.frozen)
    }

    /// This rank's gradients of the step: `[slice]`, reduced once the step's reductions are done.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    pub fn grads(&self) -> Result<Tensor> {
        let Training { grads, reduced, .. } = self.training();
        match reduced {
            Some(part) if self.options.share.sharding.gradients => Ok(part.shallow_clone()),
            whole => cut(whole.as_ref().unwrap_or(grads), &self.trained.slice),
        }
    }

    /// Starts making the parameters whole; nothing to wait for where they are.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] from the communicator, [`crate::Error::Torch`] when there is no room.
    pub fn gather(&self, comm: &dyn Communicator) -> Result<Pending> {
        let gathering = self.buffers().map(|values| values.gather(comm));
        Ok(Pending::all(gathering.collect::<Result<_>>()?))
    }

    /// Gives the memory of gathered parameters back; nothing where they are not divided.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    pub fn release(&self) -> Result<()> {
        self.buffers().try_for_each(Values::release)
    }

    /// Makes room for the gradients of a backward pass.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] when there is none.
    pub fn begin_backward(&self) -> Result<()> {
        let grads = &self.training().grads;
        if self.options.share.sharding.gradients {
            storage::take(grads)?;
            let _ = grads.shallow_clone().f_zero_()?;
        }
        Ok(())
    }

    /// Starts the reduction that is due after a backward pass: none before the `last` micro-batch
    /// of a step where whole gradients can be kept until then, in the precision of the reduction.
    /// [`FlatUnit::end_reduction`] follows once it is done.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] from the communicator, [`crate::Error::Torch`] when there is no room.
    pub fn start_reduction(&self, comm: &dyn Communicator, last: bool) -> Result<Reducing> {
        let sharding = self.options.share.sharding;
        let Training { grads, reduced, .. } = self.training();
        let buffer = match reduced {
            Some(whole) if !sharding.gradients => {
                let _ = whole.shallow_clone().f_add_(grads)?;
                let _ = grads.shallow_clone().f_zero_()?;
                whole.shallow_clone()
            }
            _ if self.options.widens() => grads.f_to_kind(Kind::Float)?,
            _ => grads.shallow_clone(),
        };
        if !((sharding.gradients || last) && self.is_trained()) {
            return Ok(Reducing { pending: Pending::done(), buffer: None });
        }
        let pending = if sharding.states {
            comm.reduce_scatter(&buffer, Reduction::Sum)?
        } else {
            comm.all_reduce(&buffer, Reduction::Sum)?
        };
        Ok(Reducing { pending, buffer: Some(buffer) })
    }

    /// Waits for a reduction. Keeps this rank's part and gives the rest back, where gradients are
    /// divided; then adds up the parts of its `replicas`, where they are given.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch, [`crate::Error::Comm`] from the communicator.
    pub fn end_reduction(
        &self,
        reducing: Reducing,
        replicas: Option<&dyn Communicator>,
    ) -> Result<()> {
        let training = self.training();
        reducing.pending.wait()?;
        if let (Some(part), Some(buffer)) = (&training.reduced, &reducing.buffer)
            && self.options.share.sharding.gradients
        {
            let _ = part.shallow_clone().f_add_(&cut(buffer, &self.trained.slice)?)?;
            storage::give_back(&training.grads)?;
        }
        if let Some(replicas) = replicas.filter(|_| self.is_trained()) {
            replicas.all_reduce(&self.grads()?, Reduction::Sum)?.wait()?;
        }
        Ok(())
    }

    /// The sum of squares of this rank's gradients, a scalar in fp64, on the device.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    pub fn squared_gradient_norm(&self) -> Result<Tensor> {
        let grads = self.grads()?;
        let mut sum = Tensor::f_zeros([], (Kind::Double, grads.device()))?;
        for piece in pieces(0, grads.size1()? as usize) {
            let piece = cut(&grads, &piece)?.f_to_kind(Kind::Float)?;
            let _ = sum.f_add_(&piece.f_dot(&piece)?.f_to_kind(Kind::Double)?)?;
        }
        Ok(sum)
    }

    /// Updates this rank's part of the parameters from its gradients times `grad_scale`, and clears
    /// the gradients. `factor` is the schedule's, `step` a scalar tensor that counts from 1.
    /// [`FlatUnit::share_update`] follows.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    pub fn update(&self, factor: f64, grad_scale: Option<f64>, step: &Tensor) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let moments = &self.training().moments;
        // The update happens where the moments are.
        let place = moments.exp_avg.device();
        let grads = self.grads()?;
        let Values { layout, slice, flat, part: master, .. } = &self.trained;
        let values = match master {
            Some(master) => master.f_to_device(place)?,
            None => cut(flat, slice)?,
        };
        let step = &step.f_to_device(place)?;
        for run in &layout.runs {
            let start = run.range.start.max(slice.start);
            let end = run.range.end.min(slice.end);
            if start >= end {
                continue;
            }
            for piece in pieces(start - slice.start, end - slice.start) {
                let segment = Segment {
                    start: piece.start as i64,
                    length: piece.len() as i64,
                    lr: run.lr * factor,
                    weight_decay: run.weight_decay,
                };
                let mut grads = cut(&grads, &piece)?.f_to_device(place)?.f_to_kind(Kind::Float)?;
                if let Some(scale) = grad_scale {
                    let _ = grads.f_mul_scalar_(scale)?;
                }
                adamw(&values, &grads, moments, segment, step)?;
            }
        }
        if let Some(master) = master.as_ref().filter(|master| master.device() != place) {
            master.shallow_clone().f_copy_(&values)?;
        }
        self.clear_gradients()
    }

    /// Clears the gradients of the step.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    pub fn clear_gradients(&self) -> Result<()> {
        let training = self.training();
        let held = training.reduced.as_ref().unwrap_or(&training.grads);
        let _ = held.shallow_clone().f_zero_()?;
        Ok(())
    }

    /// Starts handing this rank's updated part to the others, where parameters are whole.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] from the communicator.
    pub fn share_update(&self, comm: &dyn Communicator) -> Result<Pending> {
        let sharding = self.options.share.sharding;
        if sharding.parameters || !self.is_trained() {
            return Ok(Pending::done());
        }
        let _no_grad = tch::no_grad_guard();
        let Values { slice, flat, part: master, .. } = &self.trained;
        if let Some(master) = master {
            cut(flat, slice)?.f_copy_(master)?;
        }
        if sharding.states { comm.all_gather(flat) } else { Ok(Pending::done()) }
    }

    /// The whole parameters that learn, in fp32 `[length]`, collected from all ranks, which all call
    /// it.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] from the communicator, [`crate::Error::Torch`] when there is no room.
    pub fn whole_fp32(&self, comm: &dyn Communicator) -> Result<Tensor> {
        self.trained.whole_fp32(comm)
    }

    /// Elements whose optimizer states this rank holds.
    #[must_use]
    pub fn slice(&self) -> &Range<usize> {
        &self.trained.slice
    }

    /// This rank's equal part of the buffer, of those of all ranks that divide, or could divide,
    /// it: its slice where states are divided, and a part of the slice where every rank has all.
    #[must_use]
    pub fn own_part(&self) -> Range<usize> {
        let Share { rank, world_size, .. } = self.options.share;
        let part = self.trained.layout.length / world_size;
        rank * part..(rank + 1) * part
    }

    /// Copies weights, first and second moments of [`FlatUnit::own_part`] to fp32 tensors of its
    /// length in the host's memory.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    pub fn copy_states(&self, target: &[Tensor; 3]) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let own = self.own_part();
        let first = self.trained.slice.start;
        let part = own.start - first..own.end - first;
        for (source, target) in self.states()?.iter().zip(target) {
            target.shallow_clone().f_copy_(&cut(source, &part)?)?;
        }
        Ok(())
    }

    /// Takes up weights, first and second moments of [`FlatUnit::slice`].
    /// [`FlatUnit::share_update`] follows.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    pub fn restore_states(&self, source: &[Tensor; 3]) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for (mut target, source) in self.states()?.into_iter().zip(source) {
            target.f_copy_(source)?;
        }
        Ok(())
    }

    /// fp32 `[slice]`: weights, first and second moments, as they are kept.
    fn states(&self) -> Result<[Tensor; 3]> {
        let Values { slice, flat, part: master, .. } = &self.trained;
        let weights = match master {
            Some(master) => master.shallow_clone(),
            None => cut(flat, slice)?,
        };
        let Moments { exp_avg, exp_avg_sq } = &self.training().moments;
        Ok([weights, exp_avg.shallow_clone(), exp_avg_sq.shallow_clone()])
    }

    /// Bytes held on this rank now.
    #[must_use]
    pub fn held_bytes(&self) -> HeldBytes {
        let bytes = storage::held_bytes;
        let Values { flat, part: master, .. } = &self.trained;
        let master = master.as_ref().map_or(0, bytes);
        let offload = self.options.offload;
        let mut held = HeldBytes { parameters: bytes(flat), ..HeldBytes::default() };
        if let Some(Values { flat, part, .. }) = &self.frozen {
            held.parameters += bytes(flat);
            let part = part.as_ref().map_or(0, bytes);
            *(if offload.parameters { &mut held.host } else { &mut held.parameters }) += part;
        }
        if offload.states || offload.parameters {
            held.host += master;
        } else if self.options.kind == Kind::Float {
            // Divided fp32 parameters are the master weights themselves.
            held.parameters += master;
        } else {
            held.states += master;
        }
        if let Some(Training { grads, reduced, moments }) = &self.training {
            held.gradients = bytes(grads) + reduced.as_ref().map_or(0, bytes);
            let moments = bytes(&moments.exp_avg) + bytes(&moments.exp_avg_sq);
            *(if offload.states { &mut held.host } else { &mut held.states }) += moments;
        }
        held
    }

    fn training(&self) -> &Training {
        self.training.as_ref().expect("prepare_training comes before training")
    }
}
