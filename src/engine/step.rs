//! One optimizer step over several micro-batches and ranks.

use tch::{Kind, Tensor};

use super::Engine;
use super::walk::DropoutSeeds;
use crate::comm::{Groups, Pending, Reduction, reduce_values};
use crate::config::LossKind;
use crate::error::{Error, Result};
use crate::loss;
use crate::model::PackedBatch;
use crate::optim::LossScale;
use crate::shard::FlatUnit;

/// A micro-batch with what the loss needs.
#[derive(Debug)]
pub struct TrainBatch {
    /// The packed tokens.
    pub packed: PackedBatch,
    /// Labels `[B]`, fp32.
    pub labels: Tensor,
    /// Boundaries of the groups `[G + 1]` on the host; unused by pointwise losses.
    pub cu_groups: Vec<i64>,
    /// What to call each pair in an error: `file:line`.
    pub origins: Vec<String>,
}

/// What one step is to do.
#[derive(Debug, Clone, Copy)]
pub struct StepOptions {
    /// The loss.
    pub loss: LossKind,
    /// What the summed loss of all ranks and micro-batches is divided by ([`loss::weight`]).
    pub weight: f64,
    /// Index of the step, from 0.
    pub step: usize,
    /// The schedule's factor on every learning rate.
    pub lr_factor: f64,
    /// Global gradient-norm bound.
    pub max_grad_norm: Option<f64>,
    /// The run's seed.
    pub seed: u64,
    /// Whether this rank was asked to end the run after this step.
    pub stop: bool,
}

impl StepOptions {
    /// From a summed loss to the mean. A step without any usable item (ranknet over equal labels)
    /// has weight 0, and no loss and no gradient.
    fn scale(&self) -> f64 {
        if self.weight > 0.0 { 1.0 / self.weight } else { 0.0 }
    }
}

/// What one step did; the same on every rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// Mean loss over the global batch, before the update.
    pub loss: f64,
    /// Norm of the mean gradient over all parameters, before clipping.
    pub grad_norm: f64,
    /// Tokens of all ranks and micro-batches.
    pub tokens: u64,
    /// Whether any rank was asked to end the run after this step.
    pub stop: bool,
}

impl Engine {
    /// Takes one optimizer step: [`Engine::gradients`], then [`Engine::update`].
    ///
    /// # Errors
    /// Those of the two.
    pub fn train_step(
        &mut self,
        batches: impl ExactSizeIterator<Item = Result<TrainBatch>>,
        options: StepOptions,
        groups: &Groups,
    ) -> Result<StepReport> {
        let report = self.gradients(batches, options, groups)?;
        self.update(&report, options, groups)?;
        Ok(report)
    }

    /// Adds up the gradients of one step in the units, over micro-batches and ranks. Every rank of
    /// `groups` calls it with its own micro-batches, as many on each rank; a micro-batch without
    /// sequences takes part with nothing.
    ///
    /// # Errors
    /// What the batches yield; [`Error::Diverged`] when the loss or the gradient is not finite;
    /// [`Error::Comm`] when a peer went away.
    pub fn gradients(
        &mut self,
        batches: impl ExactSizeIterator<Item = Result<TrainBatch>>,
        options: StepOptions,
        groups: &Groups,
    ) -> Result<StepReport> {
        let count = batches.len();
        assert!(count > 0, "a step has at least one micro-batch");
        let mut tokens = 0;
        let (mut losses, mut origins) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for (micro_batch, batch) in batches.enumerate() {
            let batch = batch?;
            let last = micro_batch + 1 == count;
            losses.push(self.micro_step(&batch, micro_batch, last, options, groups)?);
            tokens += batch.packed.tokens();
            origins.push(batch.origins);
        }
        groups.set_place(None);
        let squared_norm = self.squared_gradient_norm(groups)?;
        // The host looks at the device's results here only, once a step: until then it can queue
        // work ahead of the device.
        losses.push(squared_norm);
        let results = Vec::<f64>::try_from(Tensor::f_stack(&losses, 0)?)?;
        let (squared_norm, losses) = results.split_last().expect("the norm was just added");
        // Ranks agree on whether this step is the last by a sum that they need anyway.
        let mut totals = [losses.iter().sum(), tokens as f64, f64::from(u8::from(options.stop))];
        reduce_values(groups.world.as_ref(), &mut totals, Reduction::Sum)?;
        let report = StepReport {
            loss: totals[0] * options.scale(),
            grad_norm: squared_norm.sqrt() / self.scale(),
            tokens: totals[1] as u64,
            stop: totals[2] > 0.0,
        };
        let overflowed = !report.grad_norm.is_finite() && self.loss_scale.is_some();
        if report.loss.is_finite() && (report.grad_norm.is_finite() || overflowed) {
            return Ok(report);
        }
        let suspects: Vec<String> = losses
            .iter()
            .zip(origins)
            .filter(|(loss, _)| !loss.is_finite())
            .flat_map(|(_, origins)| origins)
            .collect();
        Err(not_finite(&report, &suspects, options.step, groups.world.rank()))
    }

    /// Forward and backward of one micro-batch. When it is the `last`, the step's gradients are
    /// reduced afterwards. Returns the summed loss, a scalar in fp64 on the device.
    fn micro_step(
        &mut self,
        batch: &TrainBatch,
        micro_batch: usize,
        last: bool,
        options: StepOptions,
        groups: &Groups,
    ) -> Result<Tensor> {
        let seeds = DropoutSeeds {
            seed: options.seed,
            step: options.step,
            micro_batch,
            rank: groups.world.rank(),
        };
        let (pass, scores) = self.forward(&batch.packed, seeds, groups)?;
        let (loss, gradient) = match scores {
            Some(scores) => {
                let scores = scores.f_detach()?.f_set_requires_grad(true)?;
                let loss = loss::sum(options.loss, &scores, &batch.labels, &batch.cu_groups)?;
                loss.f_mul_scalar(options.scale() * self.scale())?.f_backward()?;
                (loss.f_detach()?.f_to_kind(Kind::Double)?, Some(scores.f_grad()?))
            }
            None => (Tensor::f_zeros([], (Kind::Double, self.device()))?, None),
        };
        self.backward(pass, gradient, last, groups)?.finish(self, groups, last)?;
        Ok(loss)
    }

    /// The factor on the loss: 1 except in fp16.
    fn scale(&self) -> f64 {
        self.loss_scale.as_ref().map_or(1.0, LossScale::scale)
    }

    /// The squared norm of the reduced gradients over all ranks' parts, still scaled: a scalar in
    /// fp64 on the device.
    fn squared_gradient_norm(&self, groups: &Groups) -> Result<Tensor> {
        let units = self.units.iter().map(FlatUnit::squared_gradient_norm);
        let sum = Tensor::f_stack(&units.collect::<Result<Vec<_>>>()?, 0)?.f_sum(Kind::Double)?;
        if self.options.share.sharding.states {
            groups.shard().all_reduce(&sum, Reduction::Sum)?.wait()?;
        }
        Ok(sum)
    }

    /// Updates the parameters from the gradients in the units, clipped to the bound, and clears
    /// the gradients. An fp16 step whose gradients overflowed is skipped instead.
    ///
    /// # Errors
    /// [`Error::Torch`] from libtorch, [`Error::Comm`] from the communicator, [`Error::Diverged`]
    /// when no loss scale is small enough.
    pub fn update(
        &mut self,
        report: &StepReport,
        options: StepOptions,
        groups: &Groups,
    ) -> Result<()> {
        let scale = self.scale();
        if let Some(loss_scale) = &mut self.loss_scale {
            loss_scale.record(report.grad_norm.is_finite());
            if loss_scale.exhausted() {
                return Err(Error::Diverged(format!(
                    "step {}: gradients overflow in fp16 at any loss scale; lower lr, or use bf16",
                    options.step + 1
                )));
            }
            if !report.grad_norm.is_finite() {
                return self.units.iter().try_for_each(FlatUnit::clear_gradients);
            }
        }
        // As torch.nn.utils.clip_grad_norm_: never scales up.
        let clip = options.max_grad_norm.map_or(1.0, |bound| bound / (report.grad_norm + 1e-6));
        let factor = clip.min(1.0) / scale;
        let grad_scale = (factor < 1.0).then_some(factor);
        // Adam counts the updates that were made.
        let skipped = self.loss_scale.as_ref().map_or(0, LossScale::skipped);
        let step = Tensor::f_from_slice(&[(options.step + 1 - skipped) as f32])?
            .f_reshape([] as [i64; 0])?
            .f_to_device(self.device())?;
        let mut sharing = Vec::with_capacity(self.units.len());
        for (index, unit) in self.units.iter().enumerate() {
            unit.update(options.lr_factor, grad_scale, &step)?;
            groups.set_place(Some(&self.place(index, Some(options.step))));
            sharing.push(unit.share_update(groups.shard())?);
        }
        groups.set_place(None);
        sharing.into_iter().try_for_each(Pending::wait)
    }
}

fn not_finite(report: &StepReport, suspects: &[String], step: usize, rank: usize) -> Error {
    let step = step + 1;
    let what = format!("loss {}, gradient norm {}", report.loss, report.grad_norm);
    if suspects.is_empty() {
        Error::Diverged(format!(
            "step {step}: not finite ({what}), though rank {rank}'s own loss was; lower lr or set \
             max_grad_norm"
        ))
    } else {
        Error::Diverged(format!(
            "step {step}: rank {rank}'s loss is not finite ({what}); its records were {}",
            suspects.join(", ")
        ))
    }
}
