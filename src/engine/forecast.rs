//! What a run will hold in memory, computed before anything is loaded.

use std::fmt;

use serde::Serialize;
use tch::{Device, Kind};

use super::EngineOptions;
use crate::model::{ModelConfig, Parameter, Stage, Width};
use crate::optim;
use crate::shard::{HeldBytes, ParameterGroups, Share, UnitLayout};

/// Bytes that one rank needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct MemoryForecast {
    /// Parameters, gradients and states between two steps: the formulas of the ZeRO paper
    /// (Rajbhandari et al., 2020, section 3).
    pub held: HeldBytes,
    /// What is whole around its use only: two stages' divided parameters and gradients.
    pub working: usize,
    /// The most that a step needs beside these: activations of a micro-batch of the longest sequences,
    /// kept for the backward pass, and gradients on their way.
    pub activations: usize,
}

impl MemoryForecast {
    /// The forecast for training the model of `config` with micro-batches of up to `tokens` tokens
    /// on this rank.
    #[must_use]
    pub fn new(config: &ModelConfig, options: &EngineOptions, tokens: usize) -> Self {
        let EngineOptions { kind, share: Share { sharding, .. }, .. } = *options;
        let width = kind.elt_size_in_bytes();
        let stages = crate::model::stages(config);
        let lengths: Vec<Lengths> =
            stages.iter().map(|stage| Lengths::of(stage.as_ref(), options)).collect();
        let gathered = |l: &Lengths| if sharding.parameters { l.trained + l.frozen } else { 0 };
        let reduced = |l: &Lengths| if sharding.gradients { l.trained } else { 0 };
        // Below the lowest stage that learns, nothing is kept.
        let lowest = lengths.iter().position(|l| l.trained > 0).unwrap_or(0);
        let backward = backward_bytes(config, &stages[lowest..], options, tokens);
        let largest = lengths.iter().map(|l| l.trained).max().unwrap_or(0);
        // In fp32: gradients of an update, a piece at a time; a stage's weights while they are saved.
        let update = if kind == Kind::Float { 0 } else { largest.min(optim::PIECE) };
        let saved = if sharding.states { largest } else { 0 };
        let between = update.max(saved) * size_of::<f32>();
        Self {
            held: held(&lengths, options),
            working: (of_two_stages(&lengths, gathered) + of_two_stages(&lengths, reduced)) * width,
            activations: backward.max(between),
        }
    }

    /// All of it, except what is offloaded.
    #[must_use]
    pub fn total(&self) -> usize {
        let HeldBytes { parameters, gradients, states, .. } = self.held;
        parameters + gradients + states + self.working + self.activations
    }
}

/// The most that two stages in a row hold: one that computes, and one that is on its way.
fn of_two_stages(lengths: &[Lengths], of: impl Fn(&Lengths) -> usize) -> usize {
    let pairs = lengths.windows(2).map(|pair| of(&pair[0]) + of(&pair[1]));
    pairs.max().unwrap_or_else(|| lengths.first().map_or(0, of))
}

/// The most bytes of activations and of gradients on their way while `tokens` tokens go back through
/// `stages`.
fn backward_bytes(
    config: &ModelConfig,
    stages: &[Box<dyn Stage>],
    options: &EngineOptions,
    tokens: usize,
) -> usize {
    let fp32 = size_of::<f32>();
    let width = options.kind.elt_size_in_bytes();
    let on_host = options.device == Device::Cpu;
    let kept = Width {
        // The fp32 copies that `model::linear` multiplies are what its graph keeps.
        value: if on_host && options.kind == Kind::Half { fp32 } else { width },
        attention: if on_host { fp32 } else { width },
        normed: if on_host { fp32 } else { width },
    };
    // Gradients of a parameter come in a tensor of their own before they are added to the others.
    let largest = |stage: &dyn Stage| {
        let parameters = stage.parameters().into_iter().filter(|parameter| parameter.trained);
        let lengths = parameters.map(|p| p.shape().iter().product::<i64>() as usize);
        lengths.max().unwrap_or(0) * width
    };
    let going_back =
        |stage: &dyn Stage| stage.backward_bytes_per_token(kept) * tokens + largest(stage);
    let saved = |stage: &dyn Stage| stage.saved_bytes_per_token(kept) * tokens;
    let mut below = 0;
    let with_those_below = stages.iter().map(|stage| {
        below += saved(stage.as_ref());
        below + going_back(stage.as_ref())
    });
    if !options.recompute {
        return with_those_below.max().unwrap_or(0);
    }
    // Every stage's input, and one stage in full.
    let inputs = config.hidden() * width * stages.len() * tokens;
    let alone = stages.iter().map(|stage| saved(stage.as_ref()) + going_back(stage.as_ref()));
    inputs + alone.max().unwrap_or(0)
}

/// Elements of a stage's buffers, padding included.
#[derive(Debug, Clone, Copy)]
struct Lengths {
    trained: usize,
    frozen: usize,
}

impl Lengths {
    fn of(stage: &dyn Stage, options: &EngineOptions) -> Self {
        let rates = ParameterGroups { lr: 0.0, weight_decay: 0.0, special: Vec::new() };
        let (trained, frozen): (Vec<_>, Vec<_>) =
            stage.parameters().into_iter().partition(|parameter| parameter.trained);
        let length = |parameters: &[Parameter]| {
            UnitLayout::new(parameters, &rates, options.share.world_size).length
        };
        Self { trained: length(&trained), frozen: length(&frozen) }
    }
}

/// What stages of these `lengths` hold between two steps.
fn held(lengths: &[Lengths], options: &EngineOptions) -> HeldBytes {
    let EngineOptions { kind, share, offload, reduce_fp32, .. } = *options;
    let Share { sharding, world_size, .. } = share;
    let width = kind.elt_size_in_bytes();
    let elements: usize = lengths.iter().map(|length| length.trained).sum();
    let frozen: usize = lengths.iter().map(|length| length.frozen).sum();
    let divisor = |divided: bool| if divided { world_size } else { 1 };
    let part = |divided: bool| elements / divisor(divided);
    let low = kind != Kind::Float;
    let wide = low && reduce_fp32;
    let mut held = HeldBytes {
        // What is divided is kept as the master weights alone.
        parameters: if sharding.parameters { 0 } else { elements * width },
        gradients: match (sharding.gradients, wide) {
            (true, _) => part(true) * if wide { 4 } else { width },
            (false, true) => elements * (width + 4),
            (false, false) => elements * width,
        },
        ..HeldBytes::default()
    };
    let moments = part(sharding.states) * 8;
    *(if offload.states { &mut held.host } else { &mut held.states }) += moments;
    if low || sharding.parameters || offload.states {
        let home = match (offload.states || offload.parameters, low) {
            (true, _) => &mut held.host,
            (false, true) => &mut held.states,
            (false, false) => &mut held.parameters,
        };
        *home += part(sharding.states) * 4;
    }
    // Frozen parameters are kept as they are computed with.
    let frozen = frozen / divisor(sharding.parameters) * width;
    let is_offloaded = sharding.parameters && offload.parameters;
    *(if is_offloaded { &mut held.host } else { &mut held.parameters }) += frozen;
    held
}

impl fmt::Display for MemoryForecast {
    /// One line, in MB of 10^6 bytes.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: usize| bytes as f64 / 1e6;
        write!(
            out,
            "memory per worker: parameters {:.0} MB, gradients {:.0} MB, optimizer states {:.0} MB, \
             gathered {:.0} MB, activations up to {:.0} MB; {:.0} MB in all, beside the program",
            mb(self.held.parameters),
            mb(self.held.gradients),
            mb(self.held.states),
            mb(self.working),
            mb(self.activations),
            mb(self.total())
        )?;
        if self.held.host > 0 {
            write!(out, ", and {:.0} MB offloaded to the host's memory", mb(self.held.host))?;
        }
        Ok(())
    }
}
