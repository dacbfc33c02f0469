//! The training job of one worker.

mod best;
mod checkpoints;
mod group;
pub mod inputs;
mod launch;
mod memory;
mod origin;
mod output;
mod page;
mod preflight;
mod report;
mod same;
mod start;
mod status;
pub mod teacher;
mod trackers;
mod validate;
mod worst;

use std::sync::Arc;
use std::time::Instant;

use rr_launch::contract::{WorkerEnv, heartbeat, preemption};
use serde_json::{Value, json};
use tch::{Device, Tensor};
use tracing::{info, warn};

pub use checkpoints::check as check_resume;
pub use group::check_machines;
pub use inputs::Inputs;
pub use output::check as check_output;
pub use preflight::{DataSummary, ModelSummary, Preflight, Steps};
pub use trackers::check as check_trackers;
pub use validate::Validation;

use crate::checkpoint::model_dir::MAX_SHARD_BYTES;
use crate::checkpoint::training::{Progress, agree};
use crate::checkpoint::{SavedModel, Sidecar, save_model};
use crate::comm::{Communicator, Groups, Reduction, reduce_values};
use crate::config::{self, Plan, SaveFailure};
use crate::data::{Augment, Dataset, StepPlan};
use crate::engine::{Engine, EngineOptions, StepOptions, StepReport, TrainBatch};
use crate::error::{Error, Result};
use crate::loss;
use crate::optim::Schedule;
use crate::score::pack;
use crate::shard::{FlatUnit, Offload, ParameterGroups, Sharding, Share};
use crate::text::{PipelineOptions, TokenBatch, WorkItem, token_batches};
use crate::torch_ext::{runtime, storage};

use best::{Best, Verdict};
use checkpoints::Checkpoints;
use group::join;
use launch::Attempt;
use memory::Memory;
use page::About;
use report::Reporter;

/// Micro-batches that may be tokenized ahead of the step.
const BATCHES_AHEAD: usize = 4;

/// How a run ended, if not with an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The model is there.
    Done,
    /// The ranks were asked to make room: a checkpoint is saved, from which the next start goes on.
    Preempted,
}

/// Trains as one of the workers that `env` describes.
///
/// # Errors
/// User errors before any worker trains; afterwards what training, a peer or the disk reports.
pub fn run(plan: &Plan, env: &WorkerEnv) -> Result<Ending> {
    heartbeat::working(format_args!("reading what the run needs"));
    output::check_early(plan, env)?;
    check_machines(plan, env.world_size, env.local_world_size)?;
    if env.rank == 0 {
        trackers::check(plan)?;
    }
    // What is wrong with the data is known before the ranks meet; a teacher's scores are data that
    // they make together.
    let inputs = match plan.data.teacher {
        None => {
            if env.world_size == 1 {
                inputs::settle(plan);
            }
            Some(Inputs::load(plan, env.world_size, false)?)
        }
        Some(_) => None,
    };
    let device = runtime::device(plan.parallel.device, env.local_rank)?;
    if plan.training.deterministic && device.is_cuda() {
        let set = runtime::use_deterministic_algorithms();
        set.map_err(|trouble| plan.error("deterministic", trouble))?;
    }
    heartbeat::waiting(format_args!("joining the group"));
    let groups = join(plan, env, device)?;
    let outcome = train(plan, env, inputs, device, &groups);
    if outcome.is_err() {
        // A rank that fails keeps its connections until its process ends: the others, who fail for
        // want of it, must not end before it and be taken for the cause.
        std::mem::forget(groups);
    }
    outcome
}

/// Trains in a group of ranks.
fn train(
    plan: &Plan,
    env: &WorkerEnv,
    inputs: Option<Inputs>,
    device: Device,
    groups: &Groups,
) -> Result<Ending> {
    heartbeat::working(format_args!("loading the model"));
    let lock = checkpoints::lock(plan, env, groups)?;
    let attempt = &Attempt::meet(plan, env, groups.world.as_ref())?;
    if is_complete(attempt, groups)? {
        return Ok(Ending::Done);
    }
    if let Some(teacher) = &plan.data.teacher {
        inputs::settle_together(plan, env, groups.world.as_ref())?;
        teacher::teach(plan, teacher, device, groups.world.as_ref())?;
    }
    let inputs = &match inputs {
        Some(inputs) => inputs,
        None => Inputs::load(plan, env.world_size, true)?,
    };
    let preflight = (env.rank == 0).then(|| tell(attempt, inputs)).transpose()?;
    let rates = parameter_groups(plan);
    let shard = groups.shard();
    let options = engine_options(plan, device, shard.rank(), shard.world_size());
    let mut engine =
        Engine::load(&inputs.config, &inputs.weights, plan.training.seed, &rates, options)?;
    check_same_model(&engine, groups.world.as_ref())?;
    engine.prepare_training()?;
    let (checkpoints, earlier) = Checkpoints::open(attempt, inputs, &mut engine, groups, lock)?;
    let progress = earlier.as_ref().map_or_else(Progress::default, |manifest| manifest.progress);
    let schedule = inputs.schedule_from(progress, plan.training.epochs);
    let about = preflight.as_ref().map(|preflight| About { attempt, env, preflight, device });
    let mut best = Best::new(&plan.validation);
    if let (Some(best), Some(manifest)) = (&mut best, &earlier) {
        best.take_up(&manifest.job["best"]);
    }
    let validation_data = best::data(plan, inputs)?;
    let mut reporter =
        Reporter::new(plan, inputs, about.as_ref(), (progress.step, schedule.total()))?;
    if let Some(manifest) = &earlier {
        reporter.take_up(&manifest.job["untold"]);
    }
    let mut job = Job {
        plan,
        inputs,
        groups,
        reporter,
        schedule,
        best,
        validation_data,
        checkpoints,
        progress,
        metrics: earlier.map_or(Value::Null, |manifest| manifest.job["metrics"].clone()),
        engine,
    };
    if job.train()? == Ending::Preempted {
        return job.leave(Ending::Preempted);
    }
    heartbeat::working(format_args!("saving the last checkpoint"));
    job.checkpoints.finish(groups)?;
    let saving = job.save(output::MODEL)?;
    let memory = Memory::gather(&job.engine, saving, groups.world.as_ref())?;
    job.reporter.finish(&memory);
    job.reporter.best(plan, job.best);
    job.leave(Ending::Done)
}

/// Whether rank 0 finds the final model, saved by an earlier attempt of this launch. All ranks call
/// it together.
///
/// # Errors
/// [`Error::Config`] on rank 0, [`Error::Usage`] on the others, where it finds another run's.
fn is_complete(attempt: &Attempt<'_>, groups: &Groups) -> Result<bool> {
    let Attempt { plan, launch, .. } = attempt;
    let mut verdict = Ok(false);
    if groups.world.rank() == 0 {
        // Before the ranks met nobody knew for sure whose it is, and another run may have ended here.
        verdict =
            output::check_in(plan, launch.has_begun).map(|()| output::is_complete(plan, launch));
    }
    let mut found = [verdict.as_ref().map_or(2.0, |&is_complete| f64::from(u8::from(is_complete)))];
    reduce_values(groups.world.as_ref(), &mut found, Reduction::Max)?;
    if verdict? {
        let model = plan.saving.output_dir.join(output::MODEL);
        info!("{} was saved before this restart; nothing is left to do", model.display());
    }
    if found[0] > 1.0 {
        return Err(Error::Usage("rank 0 refuses output_dir; its own message says why".into()));
    }
    if found[0] > 0.0 {
        groups.world.leave()?;
    }
    Ok(found[0] > 0.0)
}

/// Logs the plan's notices and what lies ahead, a line at a time.
fn tell(attempt: &Attempt<'_>, inputs: &Inputs) -> Result<Preflight> {
    let preflight = Preflight::of(inputs, attempt)?;
    for line in attempt.plan.notices.iter().map(String::as_str).chain(preflight.to_string().lines())
    {
        info!("{line}");
    }
    Ok(preflight)
}

/// The learning rates and decay that the plan asks for.
fn parameter_groups(plan: &Plan) -> ParameterGroups {
    let training = &plan.training;
    let special = training.special_lr_groups.iter();
    ParameterGroups {
        lr: training.lr,
        weight_decay: training.weight_decay,
        special: special.map(|group| (group.keywords.clone(), group.lr)).collect(),
    }
}

/// How a rank keeps and computes the model.
fn engine_options(plan: &Plan, device: Device, rank: usize, world_size: usize) -> EngineOptions {
    EngineOptions {
        trains: true,
        device,
        kind: runtime::kind_of(plan.training.precision),
        share: Share { sharding: Sharding::of(plan.parallel.strategy), rank, world_size },
        recompute: plan.training.gradient_checkpointing || plan.parallel.activation_checkpointing,
        offload: Offload {
            states: plan.parallel.offload_optimizer,
            parameters: plan.parallel.offload_parameters,
        },
        reduce_fp32: plan.training.reduce_in_fp32,
    }
}

/// Ranks that read different files would train a model that nobody asked for.
fn check_same_model(engine: &Engine, comm: &dyn Communicator) -> Result<()> {
    let sums = engine.units().iter().map(FlatUnit::fingerprint);
    let sum = sums.fold(0_i64, i64::wrapping_add);
    // In halves, which an f64 holds exactly.
    let halves = [(sum & 0xFFFF_FFFF) as f64, (sum >> 32) as f64];
    let mut bounds = [halves[0], -halves[0], halves[1], -halves[1]];
    reduce_values(comm, &mut bounds, Reduction::Max)?;
    if bounds[0] == -bounds[1] && bounds[2] == -bounds[3] {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "rank {}: the ranks read different weights; give every host the same model directory",
        comm.rank()
    )))
}

/// What the training loop works with.
struct Job<'a> {
    plan: &'a Plan,
    inputs: &'a Inputs,
    groups: &'a Groups,
    reporter: Reporter,
    schedule: Schedule,
    /// Where the plan keeps the best model.
    best: Option<Best>,
    /// What it is judged by.
    validation_data: Option<String>,
    checkpoints: Checkpoints<'a>,
    /// How far the run is.
    progress: Progress,
    /// The last validation, null before the first.
    metrics: Value,
    engine: Engine,
}

impl Job<'_> {
    /// All epochs that are left, or fewer where validations stop getting better or the ranks are
    /// asked to make room.
    fn train(&mut self) -> Result<Ending> {
        self.reporter.start(self.engine.loss_scale());
        // An earlier start stopped early, and was interrupted before it ended.
        if self.best.as_ref().is_some_and(Best::is_over) {
            return Ok(Ending::Done);
        }
        let mut batches = self.batches()?;
        for epoch in self.progress.epoch..self.plan.training.epochs {
            let steps = self.inputs.sampler.epoch_from(epoch, self.progress.items);
            let mut steps = steps.peekable();
            // What is left of the first epoch may be nothing, where the data has become less.
            if steps.peek().is_none() {
                self.progress = Progress { epoch: epoch + 1, items: 0, ..self.progress };
            }
            while let Some(step_plan) = steps.next() {
                let step = self.progress.step;
                self.reporter.order(step, &step_plan);
                let report = self.step(step, &step_plan, &mut batches)?;
                let lr = self.plan.training.lr * self.schedule.factor(step);
                let ends_epoch = steps.peek().is_none();
                self.progress.advance(step_plan.items(), ends_epoch);
                let step = self.progress.step;
                self.reporter.scaled(step - 1, self.engine.loss_scale());
                self.reporter.step(step, epoch, lr, step_plan.pairs(), &report);
                let is_over = self.validate_where_due(epoch, ends_epoch)? == Verdict::Stop;
                let (reporter, data) = (&self.reporter, self.validation_data.as_ref());
                let kept = || kept(self.best, data, &self.metrics, reporter);
                let (progress, engine, groups) = (self.progress, &self.engine, self.groups);
                self.checkpoints.after_step(progress, kept, engine, groups, report.stop)?;
                if report.stop {
                    self.reporter.preempted();
                    return Ok(Ending::Preempted);
                }
                if is_over {
                    return Ok(Ending::Done);
                }
            }
        }
        Ok(Ending::Done)
    }

    /// Validates where the plan asks for it after this step.
    fn validate_where_due(&mut self, epoch: usize, ends_epoch: bool) -> Result<Verdict> {
        let Some(data) = &self.inputs.validation else { return Ok(Verdict::Worse) };
        let step = self.progress.step;
        let is_due = match self.plan.validation.interval {
            Some(interval) => step.is_multiple_of(interval) || step == self.schedule.total(),
            None => ends_epoch,
        };
        if is_due { self.validate(data, step, epoch) } else { Ok(Verdict::Worse) }
    }

    /// Validates on all ranks, and keeps the model where it is the best so far.
    fn validate(&mut self, data: &Arc<Dataset>, step: usize, epoch: usize) -> Result<Verdict> {
        let started = Instant::now();
        let (plan, groups) = (self.plan, self.groups);
        let (result, queries) =
            validate::validate(&self.engine, &self.inputs.tokenizer, data, plan, groups)?;
        self.metrics = result.to_json();
        let before = self.best;
        let mut verdict = match &mut self.best {
            Some(best) => best.judge(step, &result)?,
            None => Verdict::Worse,
        };
        if verdict == Verdict::Best && !self.keep_best()? {
            (self.best, verdict) = (before, Verdict::Worse);
        }
        let is_best = self.best.is_some().then_some(verdict == Verdict::Best);
        self.reporter.validation(step, epoch, (&result, &queries), is_best, started.elapsed());
        Ok(verdict)
    }

    /// Saves the best model so far. False where that failed and the run goes on regardless: the one
    /// before it stays the best that there is.
    fn keep_best(&self) -> Result<bool> {
        match self.save(output::BEST) {
            Ok(_) => Ok(true),
            Err(error @ Error::SaveModel(_))
                if self.plan.saving.save_failure == SaveFailure::Continue =>
            {
                warn!("{error}; the best model is left out, and training goes on");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Ends the work of the ranks, and only then this rank's own.
    fn leave(mut self, ending: Ending) -> Result<Ending> {
        let left = self.groups.world.leave();
        self.reporter.close(ending == Ending::Preempted);
        left.map(|()| ending)
    }

    /// This rank's micro-batches of the whole run, tokenized in the background.
    fn batches(&self) -> Result<impl Iterator<Item = Result<TokenBatch>> + use<>> {
        let rank = self.groups.world.rank();
        let sampler = Arc::clone(&self.inputs.sampler);
        let Progress { epoch: first, items: used, .. } = self.progress;
        let items = (first..self.plan.training.epochs).flat_map(move |epoch| {
            sampler
                .epoch_from(epoch, if epoch == first { used } else { 0 })
                .flat_map(|step| step.micro_batches)
                .map(move |micro| WorkItem::of_rank(&micro, rank, epoch))
        });
        let data = &self.plan.data;
        let options = PipelineOptions {
            threads: tokenizer_threads(),
            ahead: BATCHES_AHEAD,
            max_len: data.max_len,
            augment: (data.shuffle_rate > 0.0).then_some(Augment {
                shuffle_rate: data.shuffle_rate,
                seed: self.plan.training.seed,
            }),
        };
        let (train, tokenizer) = (&self.inputs.train, &self.inputs.tokenizer);
        token_batches(Arc::clone(train), Arc::clone(tokenizer), items, options)
    }

    fn step(
        &mut self,
        step: usize,
        step_plan: &StepPlan,
        batches: &mut impl Iterator<Item = Result<TokenBatch>>,
    ) -> Result<StepReport> {
        let training = &self.plan.training;
        let options = StepOptions {
            loss: self.plan.loss,
            weight: self.inputs.weight(self.plan.loss, step_plan),
            step,
            lr_factor: self.schedule.factor(step),
            max_grad_norm: training.max_grad_norm,
            seed: training.seed,
            stop: preemption::is_requested(),
        };
        heartbeat::enter_step(step as u64 + 1);
        let (device, inputs) = (self.engine.device(), self.inputs);
        let micro = (0..step_plan.micro_batches.len()).map(|_| {
            heartbeat::working(format_args!("reading data"));
            let tokens = batches.next().expect("the pipeline yields every planned micro-batch")?;
            heartbeat::working(format_args!("computing"));
            to_device(&tokens, inputs, device)
        });
        self.engine.train_step(micro, options, self.groups)
    }

    /// Saves the model as the directory `name` of the output directory, with the metrics of the last
    /// validation; returns the most bytes of parameters that this rank held meanwhile.
    fn save(&self, name: &str) -> Result<usize> {
        heartbeat::working(format_args!("saving the model"));
        self.groups.set_place(None);
        let started = Instant::now();
        let target = self.plan.saving.output_dir.join(name);
        let metrics = self.metrics.clone();
        let model = SavedModel {
            units: self.engine.units(),
            config: &self.inputs.config,
            base: &self.inputs.model_dir,
            sidecar: &Sidecar::of_run(self.plan, self.inputs.model_revision.clone(), metrics),
            max_shard_bytes: MAX_SHARD_BYTES,
        };
        let is_end = name == output::MODEL && self.groups.world.rank() == 0;
        let mut saved = save_model(model, &target, self.groups);
        if is_end {
            let has_best = self.best.is_some_and(|best| best.found.is_some());
            saved = saved.and_then(|held| output::end(self.plan, has_best).map(|()| held));
        } else if self.groups.world.rank() == 0 {
            saved = saved.and_then(|held| output::has_own_best(self.plan).map(|()| held));
        }
        let saved = agree(saved, self.groups);
        let most_held = saved.map_err(|error| match error {
            Error::Comm { .. } => error,
            other => Error::SaveModel(Box::new(other)),
        })?;
        let seconds = started.elapsed().as_secs_f64();
        if self.groups.world.rank() == 0 {
            info!("saved {} in {seconds:.1} s", target.display());
        }
        Ok(most_held)
    }
}

/// What a checkpoint keeps beside states and progress.
fn kept(best: Option<Best>, data: Option<&String>, metrics: &Value, reporter: &Reporter) -> Value {
    let mut best = best.map_or(Value::Null, Best::to_json);
    if let Some(data) = data {
        best[best::DATA] = json!(data);
    }
    json!({"best": best, "metrics": metrics, "untold": reporter.untold()})
}

/// One thread keeps up with a CPU worker many times over; a GPU step needs two.
fn tokenizer_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| if cores.get() > 4 { 2 } else { 1 })
}

fn to_device(tokens: &TokenBatch, inputs: &Inputs, device: Device) -> Result<TrainBatch> {
    let path = inputs.train.path.display();
    let line = |&pair: &u32| format!("{path}:{}", inputs.train.pair(pair).line);
    Ok(TrainBatch {
        packed: pack(tokens, device)?,
        labels: storage::upload(&Tensor::f_from_slice(&tokens.labels)?, device)?,
        cu_groups: tokens.cu_groups.clone(),
        origins: tokens.pairs.iter().map(line).collect(),
    })
}

impl Inputs {
    /// What a step's summed loss is divided by, over all ranks and micro-batches.
    fn weight(&self, loss: config::LossKind, step: &StepPlan) -> f64 {
        let mut weight = 0.0;
        for micro in &step.micro_batches {
            for (rank, pairs) in micro.per_rank.iter().enumerate() {
                let label = |&pair: &u32| self.train.pair(pair).label;
                let labels: Vec<f32> = pairs.iter().map(label).collect();
                let groups = micro.cu_groups.get(rank).map_or(&[][..], Vec::as_slice);
                let cu_groups: Vec<i64> = groups.iter().copied().map(i64::from).collect();
                weight += loss::weight(loss, &labels, &cu_groups);
            }
        }
        weight
    }
}
