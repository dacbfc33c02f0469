//! Walking the stages: forward, backward, and what stands between them.

use std::collections::VecDeque;
use std::sync::Arc;

use tch::Tensor;

use super::Engine;
use crate::comm::{Groups, Pending, Place};
use crate::error::Result;
use crate::model::{ForwardContext, PackedBatch, Views};
use crate::seed;
use crate::shard::Reducing;
use crate::torch_ext::autograd::backward;

/// Seeds of dropout for one forward pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct DropoutSeeds {
    /// The run's seed.
    pub seed: u64,
    /// The optimizer step, from 0.
    pub step: usize,
    /// The micro-batch inside the step, from 0.
    pub micro_batch: usize,
    /// This rank.
    pub rank: usize,
}

/// One stage's graph: its leaf input (none for the first stage) and its output, or only the input
/// where the output is computed again later.
pub(super) struct Link {
    input: Option<Tensor>,
    output: Option<Tensor>,
}

/// A forward pass that a backward pass follows. Without sequences it holds nothing, but the rank
/// still takes part in the collectives.
pub(super) struct Pass<'a> {
    batch: &'a PackedBatch,
    seeds: DropoutSeeds,
    links: Vec<Link>,
}

impl Engine {
    /// The scores `[B]` (logits, fp32) of a batch, without gradients or dropout. Every rank of
    /// `groups` calls it as often, where parameters are divided; a batch without sequences takes
    /// part and gives no scores.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch, [`crate::Error::Comm`] from the communicator.
    pub fn score(&self, batch: &PackedBatch, groups: &Groups) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let mut x: Option<Tensor> = None;
        let mut gathering = self.gather_at(0, None, groups)?;
        for (index, (stage, unit)) in self.stages.iter().zip(&self.units).enumerate() {
            gathering.wait()?;
            gathering = self.gather_at(index + 1, None, groups)?;
            if batch.sequences() > 0 {
                let context = ForwardContext { batch, dropout_seed: None };
                x = Some(stage.forward(Views::new(unit.views()), x.as_ref(), context)?);
            }
            unit.release()?;
        }
        match x {
            Some(scores) => Ok(scores),
            None => Ok(Tensor::f_zeros([0], (tch::Kind::Float, self.device()))?),
        }
    }

    /// Runs the stages, keeping each one's graph (or input). Returns the scores beside the pass.
    pub(super) fn forward<'a>(
        &self,
        batch: &'a PackedBatch,
        seeds: DropoutSeeds,
        groups: &Groups,
    ) -> Result<(Pass<'a>, Option<Tensor>)> {
        let mut pass = Pass { batch, seeds, links: Vec::with_capacity(self.stages.len()) };
        let mut below: Option<Tensor> = None;
        let step = Some(seeds.step);
        let mut gathering = self.gather_at(0, step, groups)?;
        for index in 0..self.stages.len() {
            gathering.wait()?;
            gathering = self.gather_at(index + 1, step, groups)?;
            if batch.sequences() > 0 {
                // Nothing flows back below the lowest stage that learns.
                let learns = index >= self.lowest;
                let input = match &below {
                    Some(output) => {
                        Some(output.f_detach()?.f_set_requires_grad(index > self.lowest)?)
                    }
                    None => None,
                };
                let output = if self.options.recompute || !learns {
                    let _no_grad = tch::no_grad_guard();
                    self.run_stage(index, input.as_ref(), &pass)?
                } else {
                    self.run_stage(index, input.as_ref(), &pass)?
                };
                below = Some(output.shallow_clone());
                if learns {
                    let kept = (!self.options.recompute).then_some(output);
                    pass.links.push(Link { input, output: kept });
                }
            }
            // The backward pass begins with the last stage: its parameters stay.
            if index + 1 < self.stages.len() {
                self.units[index].release()?;
            }
        }
        Ok((pass, below))
    }

    /// Walks the graphs from the last stage to the lowest that learns, starting with the gradient of
    /// the scores. Each stage's reduction starts when its gradients are whole and runs while the stage
    /// below computes; returns those still under way, oldest first.
    pub(super) fn backward(
        &mut self,
        mut pass: Pass<'_>,
        mut gradient: Option<Tensor>,
        last: bool,
        groups: &Groups,
    ) -> Result<Reductions> {
        let mut reductions = Reductions::default();
        let step = Some(pass.seeds.step);
        let mut gathering = self.gather_at(self.units.len() - 1, step, groups)?;
        for index in (self.lowest..self.units.len()).rev() {
            gathering.wait()?;
            gathering = if index > self.lowest {
                self.gather_at(index - 1, step, groups)?
            } else {
                Pending::done()
            };
            self.units[index].begin_backward()?;
            self.note_held_bytes();
            if let Some(link) = pass.links.pop() {
                let output = match &link.output {
                    Some(output) => output.shallow_clone(),
                    None => self.run_stage(index, link.input.as_ref(), &pass)?,
                };
                let above = gradient.take().expect("a stage above, or the loss, gave a gradient");
                backward(&output, &above)?;
                let input = link.input.filter(|_| index > self.lowest);
                gradient = input.map(|input| input.f_grad()).transpose()?;
            }
            self.units[index].release()?;
            // Divided gradients are whole for at most two stages: this one and the one above.
            if self.options.share.sharding.gradients {
                reductions.finish(self, groups, last)?;
            }
            groups.set_place(Some(&self.place(index, step)));
            let reducing = self.units[index].start_reduction(groups.shard(), last)?;
            reductions.0.push_back((index, reducing));
        }
        Ok(reductions)
    }

    fn run_stage(&self, index: usize, input: Option<&Tensor>, pass: &Pass<'_>) -> Result<Tensor> {
        let DropoutSeeds { seed, step, micro_batch, rank } = pass.seeds;
        let dropout_seed = seed::of_stage(seed, step, micro_batch, rank, index);
        tch::manual_seed(dropout_seed);
        let context = ForwardContext { batch: pass.batch, dropout_seed: Some(dropout_seed) };
        self.stages[index].forward(Views::new(self.units[index].views()), input, context)
    }

    /// Starts gathering unit `index`; nothing beyond the last.
    fn gather_at(&self, index: usize, step: Option<usize>, groups: &Groups) -> Result<Pending> {
        let Some(unit) = self.units.get(index) else { return Ok(Pending::done()) };
        groups.set_place(Some(&self.place(index, step)));
        unit.gather(groups.shard())
    }

    /// What collectives on unit `index` are called in an error.
    pub(super) fn place(&self, index: usize, step: Option<usize>) -> Place {
        Place { stage: Arc::clone(&self.names[index]), step }
    }

    fn note_held_bytes(&mut self) {
        self.peak = self.peak.max(self.held_bytes());
    }
}

/// Reductions under way, by unit, oldest first.
#[derive(Default)]
pub(super) struct Reductions(VecDeque<(usize, Reducing)>);

impl Reductions {
    /// Waits for all of them.
    pub(super) fn finish(&mut self, engine: &Engine, groups: &Groups, last: bool) -> Result<()> {
        while let Some((index, reducing)) = self.0.pop_front() {
            engine.units[index].end_reduction(reducing, groups.replicas().filter(|_| last))?;
        }
        Ok(())
    }
}
