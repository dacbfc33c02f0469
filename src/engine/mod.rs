//! The step: forward, backward, reduce, update. One loop for one rank and for many, for whole and
//! for divided buffers, in every precision.
//!
//! A model is a list of stages; the engine walks them itself. Each stage has an autograd graph of
//! its own, from a detached input to its output, and the backward pass hands gradients from one
//! graph to the one below. Between two stages is where everything else happens: parameters of the
//! next stage are gathered while this one computes, those of the last one are given back, and
//! reductions start as soon as a stage's gradients are whole.

mod forecast;
mod reader;
mod step;
mod walk;

use std::sync::Arc;

use tch::{Device, Kind};

pub use forecast::MemoryForecast;
pub use reader::Reader;
pub use step::{StepOptions, StepReport, TrainBatch};

use crate::error::Result;
use crate::model::weights::WeightFiles;
use crate::model::{ModelConfig, Stage};
use crate::optim::LossScale;
use crate::shard::{FlatUnit, HeldBytes, Offload, ParameterGroups, Share, UnitOptions};
use crate::torch_ext::runtime;

/// How an engine keeps and computes a model.
#[derive(Debug, Clone, Copy)]
pub struct EngineOptions {
    /// Where the parameters live.
    pub device: Device,
    /// Precision that stages compute in: fp32, bf16 or fp16.
    pub kind: Kind,
    /// What this rank holds.
    pub share: Share,
    /// Keep only each stage's input, and compute its activations again in the backward pass.
    pub recompute: bool,
    /// What the host's memory holds in place of the device's.
    pub offload: Offload,
    /// Reduce gradients of low precision in fp32.
    pub reduce_fp32: bool,
    /// Whether anything is to learn: a lower precision then has fp32 master weights beside it.
    pub trains: bool,
}

impl EngineOptions {
    /// One rank that holds everything in fp32.
    #[must_use]
    pub fn whole(device: Device) -> Self {
        Self {
            device,
            kind: Kind::Float,
            share: Share::whole(),
            recompute: false,
            offload: Offload::default(),
            reduce_fp32: false,
            trains: true,
        }
    }
}

/// A model with its parameters, on one device.
#[derive(Debug)]
pub struct Engine {
    stages: Vec<Box<dyn Stage>>,
    /// The stages' names.
    names: Vec<Arc<str>>,
    units: Vec<FlatUnit>,
    /// The first stage of which something learns.
    lowest: usize,
    options: EngineOptions,
    loss_scale: Option<LossScale>,
    /// The most bytes that units held at once, seen between two stages of a step.
    peak: HeldBytes,
}

impl Engine {
    /// Loads the model that `config` describes.
    ///
    /// # Errors
    /// What reading the weights reports, or [`crate::Error::Torch`] when there is no room.
    pub fn load(
        config: &ModelConfig,
        weights: &WeightFiles,
        seed: u64,
        groups: &ParameterGroups,
        options: EngineOptions,
    ) -> Result<Self> {
        runtime::settle_vector_functions();
        let stages = crate::model::stages(config);
        let EngineOptions { device, kind, share, offload, reduce_fp32, trains, .. } = options;
        let unit_options = UnitOptions { device, kind, share, offload, reduce_fp32, trains };
        let units = stages
            .iter()
            .map(|stage| FlatUnit::load(stage.as_ref(), weights, seed, groups, unit_options))
            .collect::<Result<Vec<_>>>()?;
        let loss_scale = (kind == Kind::Half).then(LossScale::default);
        let names = stages.iter().map(|stage| stage.name().into()).collect();
        let lowest = units.iter().position(FlatUnit::is_trained).unwrap_or(0);
        let peak = HeldBytes::default();
        Ok(Self { stages, names, units, lowest, options, loss_scale, peak })
    }

    /// Makes room for gradients and optimizer states.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] when there is none.
    pub fn prepare_training(&mut self) -> Result<()> {
        self.units.iter_mut().try_for_each(FlatUnit::prepare_training)
    }

    /// Where the parameters live.
    #[must_use]
    pub fn device(&self) -> Device {
        self.options.device
    }

    /// The flat units, in the order of the stages.
    #[must_use]
    pub fn units(&self) -> &[FlatUnit] {
        &self.units
    }

    /// Bytes that all units hold on this rank now.
    #[must_use]
    pub fn held_bytes(&self) -> HeldBytes {
        self.units
            .iter()
            .map(FlatUnit::held_bytes)
            .fold(HeldBytes::default(), |sum, unit| sum + unit)
    }

    /// The most bytes that units have held at once during steps so far, by kind.
    #[must_use]
    pub fn peak_held_bytes(&self) -> HeldBytes {
        self.peak
    }

    /// Takes up the loss scale of a checkpoint; only an fp16 run has one.
    pub fn set_loss_scale(&mut self, loss_scale: LossScale) {
        if let Some(own) = &mut self.loss_scale {
            *own = loss_scale;
        }
    }

    /// The loss scale of an fp16 run.
    #[must_use]
    pub fn loss_scale(&self) -> Option<&LossScale> {
        self.loss_scale.as_ref()
    }
}
