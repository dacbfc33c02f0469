//! Low-rank adapters (Hu et al., 2021, "LoRA"): beside a frozen weight `W [out, in]` stand
//! `A [r, in]` and `B [out, r]`, and the layer computes `x W^T + alpha / r * drop(x) A^T B^T`.
//!
//! Names, defaults and initial values are those of the Python package peft, whose files these
//! adapters are saved as.

use std::collections::BTreeSet;
use std::sync::Arc;

use tch::Tensor;

use super::stage::{ForwardContext, Init, Parameter, Stage, TensorSpec, Width, dropout, linear};
use super::views::Views;
use crate::config::TargetModules;
use crate::error::Result;

pub mod peft;
mod targets;

pub use targets::{BadModules, resolve};

/// What adapters a model has. Modules are named by their whole path, as in
/// `bert.encoder.layer.0.attention.self.query`.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// Rank.
    pub r: i64,
    /// Products with adapters are multiplied by `alpha / r`.
    pub alpha: f64,
    /// Dropout on the adapters' input while training.
    pub dropout: f64,
    /// Linear layers with adapters.
    pub targets: BTreeSet<String>,
    /// Modules that are trained whole: the head, and those that were asked for.
    pub saved: BTreeSet<String>,
    /// What peft is told to adapt.
    pub target_names: TargetModules,
    /// What peft is told to save whole.
    pub saved_names: BTreeSet<String>,
}

/// The module that the tensor `name` belongs to.
#[must_use]
pub fn module_of(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(module, _)| module)
}

/// The names of the adapter tensors A and B of a module.
#[must_use]
pub fn adapter_names(module: &str) -> [String; 2] {
    ["A", "B"].map(|side| format!("{module}.lora_{side}.weight"))
}

impl Lora {
    /// Whether a tensor is trained whole.
    fn is_saved(&self, name: &str) -> bool {
        self.saved.contains(module_of(name))
    }

    /// Puts adapters beside the layers of `stages`, and freezes what is not trained.
    pub(super) fn adapt(&self, stages: Vec<Box<dyn Stage>>) -> Vec<Box<dyn Stage>> {
        let lora = Arc::new(self.clone());
        let adapt = |stage| -> Box<dyn Stage> { Box::new(Adapted::new(stage, &lora)) };
        stages.into_iter().map(adapt).collect()
    }
}

/// A stage with adapters. Its parameters are the stage's own, then A and B of each adapted product.
#[derive(Debug)]
struct Adapted {
    stage: Box<dyn Stage>,
    lora: Arc<Lora>,
    /// How many parameters the stage has by itself.
    own: usize,
    adapters: Vec<Adapter>,
}

/// The adapters of one parameter.
#[derive(Debug)]
struct Adapter {
    /// Its index in the stage's list.
    parameter: usize,
    /// Output width of each of its parts, and whether that has an adapter.
    parts: Vec<(i64, bool)>,
    /// The stacked A `[n r, in]` and B `[sum of adapted outs, r]`.
    sides: [Parameter; 2],
}

impl Adapter {
    /// The adapters of parameter number `index`; `None` where it has none.
    fn new(index: usize, parameter: &Parameter, lora: &Lora) -> Option<Self> {
        let adapted =
            |part: &TensorSpec| parameter.linear && lora.targets.contains(module_of(&part.name));
        let parts: Vec<_> =
            parameter.parts.iter().map(|part| (part.shape[0], adapted(part))).collect();
        if !parts.iter().any(|(_, adapted)| *adapted) {
            return None;
        }
        let side = |side: usize| {
            let specs = parameter.parts.iter().filter(|part| adapted(part)).map(|part| {
                let [out, width] = [part.shape[0], part.shape[1]];
                let name = &adapter_names(module_of(&part.name))[side];
                match side {
                    // As torch.nn.init.kaiming_uniform_ with a = sqrt(5) draws it.
                    0 => TensorSpec::new(name, &[lora.r, width])
                        .or_init(Init::Uniform((width as f64).sqrt().recip())),
                    _ => TensorSpec::new(name, &[out, lora.r]).or_init(Init::Zeros),
                }
            });
            Parameter::stacked(specs.collect(), true)
        };
        Some(Self { parameter: index, parts, sides: [side(0), side(1)] })
    }
}

impl Adapted {
    fn new(stage: Box<dyn Stage>, lora: &Arc<Lora>) -> Self {
        let parameters = stage.parameters();
        let adapters = parameters
            .iter()
            .enumerate()
            .filter_map(|(index, parameter)| Adapter::new(index, parameter, lora))
            .collect();
        Self { stage, lora: Arc::clone(lora), own: parameters.len(), adapters }
    }
}

impl Stage for Adapted {
    fn name(&self) -> String {
        self.stage.name()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let mut all = self.stage.parameters();
        for parameter in &mut all {
            parameter.trained = parameter.parts.iter().all(|part| self.lora.is_saved(&part.name));
        }
        all.extend(self.adapters.iter().flat_map(|adapter| adapter.sides.clone()));
        all
    }

    fn saved_bytes_per_token(&self, width: Width) -> usize {
        let dropped = if self.lora.dropout > 0.0 { width.value + 1 } else { 0 };
        let of_adapter = |adapter: &Adapter| {
            let parts = adapter.parts.iter().filter(|(_, adapted)| *adapted).count();
            let input = adapter.sides[0].shape()[1] as usize;
            // The product with A before and after scaling; the input after dropout, and its mask.
            parts * (2 * self.lora.r as usize * width.value + input * dropped)
        };
        let adapters: usize = self.adapters.iter().map(of_adapter).sum();
        self.stage.saved_bytes_per_token(width) + adapters
    }

    fn backward_bytes_per_token(&self, width: Width) -> usize {
        self.stage.backward_bytes_per_token(width)
    }

    fn forward(
        &self,
        views: Views<'_>,
        input: Option<&Tensor>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let train = context.dropout_seed.is_some();
        let deltas = |sides| Deltas { stage: self, sides, train };
        self.stage.forward(views.adapted(self.own, deltas), input, context)
    }
}

/// What adapters add to a stage's products.
#[derive(Debug)]
pub(super) struct Deltas<'a> {
    stage: &'a Adapted,
    /// A and B of each adapter in turn.
    sides: &'a [Tensor],
    train: bool,
}

impl Deltas<'_> {
    /// Adds to `product`, which the parameter number `index` made of `x`, what its adapters make
    /// of it.
    pub(super) fn add(&self, index: usize, x: &Tensor, mut product: Tensor) -> Result<Tensor> {
        let Adapted { adapters, lora, .. } = self.stage;
        let Some(which) = adapters.iter().position(|adapter| adapter.parameter == index) else {
            return Ok(product);
        };
        let (a, b) = (&self.sides[2 * which], &self.sides[2 * which + 1]);
        let (mut place, mut row) = (0, 0);
        let mut deltas = Vec::new();
        for &(out, adapted) in &adapters[which].parts {
            if !adapted {
                let mut shape = product.size();
                if let Some(last) = shape.last_mut() {
                    *last = out;
                }
                deltas.push(Tensor::f_zeros(&shape[..], (product.f_kind()?, product.device()))?);
                continue;
            }
            // As in peft, every adapter drops elements of its own.
            let dropped = dropout(x.shallow_clone(), lora.dropout, self.train)?;
            let inner = linear(&dropped, &a.f_narrow(0, place, lora.r)?, None)?;
            let outer = b.f_narrow(0, row, out)?;
            let inner = inner.f_mul_scalar(lora.alpha / lora.r as f64)?;
            deltas.push(linear(&inner, &outer, None)?);
            (place, row) = (place + lora.r, row + out);
        }
        let delta = match deltas.len() {
            1 => deltas.remove(0),
            _ => Tensor::f_cat(&deltas, -1)?,
        };
        Ok(product.f_add_(&delta)?)
    }
}
