//! Checkpoints of the training job: when to save, where to go on from, and whether that is the
//! same run.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use rr_launch::contract::{WorkerEnv, heartbeat};
use serde_json::{Value, json};
use tracing::warn;

use super::inputs::Inputs;
use super::launch::{self, Attempt};
use super::origin::{
    LAUNCH, ORIGIN, begins_anew, check_mixture, comes_from_elsewhere, is_sent, origin, own_steps,
};
use super::report::METRICS;
use super::start::{Start, bring_best, find, named};
use super::{best, group, output, same, teacher};
use crate::atomic::{StagedDir, create_dir_synced};
use crate::checkpoint::model_dir::{MAX_SHARD_BYTES, ModelFiles};
use crate::checkpoint::training::{
    Identity, Lock, Manifest, Moment, Progress, SaveOptions, Saver, Store, agree_or, file_crc32,
    first_apart,
};
use crate::checkpoint::{Sidecar, tell_saving};
use crate::comm::{Groups, Reduction, reduce_values, work_together};
use crate::config::{Plan, Resume, SaveFailure};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::text::tokenizer_file;

/// The lock inside the directory of logs and metrics.
const LOCK: &str = ".lock";

/// The base weights in an identity.
const WEIGHTS: &str = "base weights (sum of bits)";

/// The contents of the training data in an identity.
const DATA: &str = "training data (CRC-32)";

/// Settings whose change makes no other run: where and when things are written or shown, how the
/// work is spread and computed, and what is counted in items per step instead.
const FREE: [&str; 10] = [
    "batch_size",
    "cache_dir",
    "deterministic",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    // Its weights, its configuration and its tokenizer are compared themselves.
    "model_name_or_path",
    "train_dataset",
    "val_dataset",
    "val_dataset_type",
    "val_label_key",
];

/// The checkpoints of a run, on one rank.
pub(super) struct Checkpoints<'a> {
    plan: &'a Plan,
    saver: Saver,
    /// Whether all ranks see one directory of checkpoints.
    shares_store: bool,
    /// What started the run's workers, if anything.
    launch: Value,
    /// The checkpoint that the run was sent to, if any.
    origin: Value,
    /// Rank 0 holds the output directory.
    _lock: Option<Lock>,
}

/// The checkpoints below an output directory.
pub(super) fn store(plan: &Plan) -> Store {
    Store::new(plan.saving.output_dir.join(output::CHECKPOINTS))
}

/// Takes the output directory for this run, on rank 0.
pub(super) fn lock(plan: &Plan, env: &WorkerEnv, groups: &Groups) -> Result<Option<Lock>> {
    if groups.world.rank() != 0 {
        return Ok(None);
    }
    let dir = plan.saving.output_dir.join(output::RUNS);
    create_dir_synced(&dir)?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let holder = format!(
        "run {} on {} (process {})",
        launch::id(env).unwrap_or("by hand"),
        host.trim(),
        std::process::id()
    );
    Lock::take(&dir.join(LOCK), &holder).map(Some)
}

/// Refuses an output directory that a run holds now.
fn check_free(plan: &Plan) -> Result<()> {
    Lock::check(&plan.saving.output_dir.join(output::RUNS).join(LOCK))
}

/// Looks, before any worker starts, at what the run would go on from: whether there is something
/// that it must not go on from. Whether every byte is as written is seen later.
///
/// # Errors
/// [`Error::Config`] that says what differs and what to do.
pub fn check(plan: &Plan, inputs: &Inputs, world_size: usize) -> Result<()> {
    check_free(plan)?;
    let attempt = &Attempt::alone(plan, world_size, world_size);
    check_mixture(attempt)?;
    let (store, steps) = match &plan.saving.resume {
        Resume::Path(path) if is_sent(attempt) => {
            let (store, step) = named(plan, path)?;
            (store, vec![step])
        }
        Resume::Path(_) => (store(plan), own_steps(attempt)?),
        _ if begins_anew(attempt) => return Ok(()),
        _ => (store(plan), store(plan).steps()?),
    };
    let read = |&step: &usize| match Manifest::read(&store.path(step)) {
        Ok(manifest) => Some(Ok((store.path(step), manifest))),
        Err(error @ Error::OtherVersion { .. }) => Some(Err(error)),
        Err(_) => None,
    };
    let Some((path, manifest)) = steps.iter().find_map(read).transpose()? else { return Ok(()) };
    let mut identity = identity(plan, inputs, None)?;
    // The weights, and a teacher's scores where they have to be made again, are compared later.
    for late in [WEIGHTS, DATA] {
        let there = manifest.identity.0.get(late);
        let entry = identity.0.entry(late.to_owned());
        there.map(|there| entry.or_insert_with(|| there.clone()));
    }
    compare(plan, &identity, &path, &manifest, world_size).map(|_| ())
}

/// Compares a checkpoint's run with this one; returns what to warn of.
pub(super) fn compare(
    plan: &Plan,
    identity: &Identity,
    path: &Path,
    manifest: &Manifest,
    world_size: usize,
) -> Result<Vec<String>> {
    let mut there = manifest.identity.clone();
    // Earlier versions kept it.
    without_place_of_teacher(&mut there.0);
    let mut differences = there.differences(identity, |name| {
        // What the version that wrote it did not know yet was as it is by default.
        let is_new = !manifest.identity.0.contains_key(name) && !plan.origins.contains_key(name);
        !is_new && !FREE.contains(&name)
    });
    let mut notes = Vec::new();
    let (there, here) = (manifest.items_per_step, items_per_step(plan, world_size));
    if there != here {
        let change = format!("items per optimizer step: {there} there, {here} here");
        if manifest.world_size == world_size {
            differences.push(change);
        } else {
            notes
                .push(format!("other workers than before: {change}; lr was chosen for the former"));
        }
    }
    if differences.is_empty() {
        return Ok(notes);
    }
    let list = differences.join("; ");
    if plan.sources.resume_anyway {
        notes.push(format!("going on although the run differs: {list}"));
        return Ok(notes);
    }
    let message = format!(
        "{} is from another run: {list}; go on all the same with --resume-anyway, or begin anew with \
         --resume never --overwrite",
        path.display()
    );
    Err(plan.error("resume", message))
}

/// What is to be said before a run about an earlier one in its output directory.
///
/// # Errors
/// [`Error::Io`] when the checkpoints cannot be looked at.
pub(super) fn outlook(attempt: &Attempt<'_>) -> Result<Option<String>> {
    let plan = attempt.plan;
    let dir = plan.saving.output_dir.display();
    if let (Resume::Path(path), true) = (&plan.saving.resume, is_sent(attempt)) {
        return Ok(Some(format!("goes on from {}", path.display())));
    }
    if !output::unfinished(plan) {
        return Ok(None);
    }
    let newest = store(plan).steps()?.first().copied();
    if newest.is_none() && !plan.saving.output_dir.join(output::RUNS).join(METRICS).exists() {
        // The lock of this very run, or a teacher's scores.
        return Ok(None);
    }
    Ok(Some(match (newest, &plan.saving.resume) {
        (Some(step), Resume::Auto | Resume::Path(_)) => {
            format!(
                "{dir} holds an unfinished run, which goes on from its checkpoint of step {step}"
            )
        }
        _ => format!("{dir} holds an unfinished run, which begins anew"),
    }))
}

/// Items (pairs, or groups) of one optimizer step over all ranks.
pub(super) fn items_per_step(plan: &Plan, world_size: usize) -> usize {
    plan.training.batch_size * plan.training.accumulation * world_size
}

/// The settings whose change makes another run.
pub(super) fn settings(plan: &Plan) -> BTreeMap<String, Value> {
    let json = plan.to_json();
    let mut all = BTreeMap::from([("loss_type".to_owned(), json["loss_type"].clone())]);
    for section in ["model", "data", "training"] {
        let settings = json[section].as_object().into_iter().flatten();
        let bound = settings.filter(|(name, _)| !FREE.contains(&name.as_str()));
        all.extend(bound.map(|(name, value)| (name.clone(), value.clone())));
    }
    without_place_of_teacher(&mut all);
    all
}

/// The same teacher may lie elsewhere: the scores that it gives are compared themselves.
fn without_place_of_teacher(settings: &mut BTreeMap<String, Value>) {
    if let Some(Value::Object(teacher)) = settings.get_mut("teacher") {
        teacher.remove("model_name_or_path");
    }
}

/// What makes the run the run that it is: its settings and the contents of what it reads, the base
/// weights once they are in an engine.
fn identity(plan: &Plan, inputs: &Inputs, engine: Option<&Engine>) -> Result<Identity> {
    let mut all = settings(plan);
    // Of a teacher's scores, before they are there, nothing is known.
    if let Some(data) = teacher::labelled(plan) {
        all.insert(DATA.into(), contents(&data)?);
    }
    let config = inputs.config.raw.to_string();
    all.insert(
        "model configuration (CRC-32)".into(),
        json!(format!("{:08x}", crc32fast::hash(config.as_bytes()))),
    );
    if let Some(file) = tokenizer_file(&inputs.model_dir) {
        all.insert("tokenizer (CRC-32)".into(), contents(&file)?);
    }
    all.insert(
        "tokenizer's settings (CRC-32)".into(),
        json!(format!("{:08x}", tokenizer_settings(inputs)?)),
    );
    if let Some(engine) = engine {
        let sums = engine.units().iter().map(crate::shard::FlatUnit::fingerprint);
        all.insert(WEIGHTS.into(), json!(sums.fold(0_i64, i64::wrapping_add)));
    }
    Ok(Identity(all))
}

/// The contents of a file in an identity.
fn contents(path: &Path) -> Result<Value> {
    Ok(json!(format!("{:08x}", file_crc32(path)?)))
}

/// What a tokenizer does beside what is in its first file: how it joins the texts of a pair, whether it
/// tells them apart, and the padding.
fn tokenizer_settings(inputs: &Inputs) -> Result<u32> {
    let sample =
        inputs.tokenizer.encode_pair("a query", "a document", inputs.config.max_positions())?;
    let mut sum = crc32fast::Hasher::new();
    for id in sample.input_ids.iter().copied().chain([inputs.padding.unwrap_or(u32::MAX)]) {
        sum.update(&id.to_le_bytes());
    }
    sum.update(&sample.type_ids);
    Ok(sum.finalize())
}

impl<'a> Checkpoints<'a> {
    /// Finds what to go on from, takes it up in `engine`, and makes ready for saving. All ranks call
    /// it together.
    pub(super) fn open(
        attempt: &Attempt<'a>,
        inputs: &Inputs,
        engine: &mut Engine,
        groups: &Groups,
        lock: Option<Lock>,
    ) -> Result<(Self, Option<Manifest>)> {
        let plan = attempt.plan;
        let identity = identity(plan, inputs, Some(engine))?;
        let mut facts = identity.0.clone();
        if let Some(data) = &plan.data.validation {
            facts.insert("validation data (CRC-32)".into(), contents(data)?);
        }
        same::check(&facts, groups.world.as_ref())?;
        let mut start = find(attempt, &identity, groups)?;
        let shares_store = shares_store(attempt, groups)?;
        if let Some(start) = &mut start
            && !has_best(attempt, inputs, start, groups)?
        {
            start.manifest.job["best"] = Value::Null;
        }
        if let Some(Start { path, manifest, .. }) = &start {
            manifest.restore(path, engine.units(), groups)?;
            if let Some(loss_scale) = manifest.loss_scale {
                engine.set_loss_scale(loss_scale);
            }
        }
        let mut this = Self::new(attempt, inputs, identity, groups, lock)?;
        this.shares_store = shares_store;
        if groups.world.rank() == 0 {
            let is_sent = is_sent(attempt);
            let job = start.as_ref().map_or(&Value::Null, |start| &start.manifest.job);
            this.origin = if is_sent { json!(origin(attempt)) } else { job[ORIGIN].clone() };
            // A best model from before the run was sent elsewhere is of another past.
            let has_no_best = start.is_none() || (is_sent && job["best"]["found"].is_null());
            output::begin(plan, &attempt.launch, has_no_best)?;
            if let Some(Start { path, manifest, passed }) = &mut start {
                this.saver.trim(path, manifest.progress.step);
                this.saver.spare(std::mem::take(passed));
            }
        }
        Ok((this, start.map(|start| start.manifest)))
    }

    /// Makes ready for saving. What earlier runs left half-built is removed, and with a run that
    /// begins anew their checkpoints as well. All ranks call it together.
    fn new(
        attempt: &Attempt<'a>,
        inputs: &Inputs,
        identity: Identity,
        groups: &Groups,
        lock: Option<Lock>,
    ) -> Result<Self> {
        let plan = attempt.plan;
        let store = store(plan);
        if groups.world.rank() == 0 {
            store.clear_leftovers();
            for model in [output::BEST, output::MODEL] {
                StagedDir::clear_leftovers(&plan.saving.output_dir.join(model))?;
            }
            let is_named = matches!(plan.saving.resume, Resume::Path(_));
            if (begins_anew(attempt) && !is_named) || comes_from_elsewhere(attempt) {
                // Where there are any, check_mixture has seen that this is wanted.
                store.remove_all()?;
            }
        }
        let sidecar = Sidecar::of_run(plan, inputs.model_revision.clone(), Value::Null);
        let (config, dir) = (&inputs.config, &inputs.model_dir);
        let model = ModelFiles::read(config, dir, Some(sidecar), MAX_SHARD_BYTES)?;
        let options = SaveOptions {
            identity,
            items_per_step: items_per_step(plan, groups.world.world_size()),
            keep: plan.saving.max_checkpoints,
            timeout: group::timeout(plan),
            model,
        };
        let saver = Saver::new(store, options, groups)?;
        let launch = attempt.launch.name();
        Ok(Self { plan, saver, shares_store: true, launch, origin: Value::Null, _lock: lock })
    }

    /// Saves where it is due after a step. Without `async_save`, and where it was `asked` for because
    /// the run makes room, returns only when the checkpoint is on the disk. All ranks call it together.
    pub(super) fn after_step(
        &mut self,
        progress: Progress,
        job: impl FnOnce() -> Value,
        engine: &Engine,
        groups: &Groups,
        asked: bool,
    ) -> Result<()> {
        let saving = &self.plan.saving;
        // The next step's epoch has used nothing yet.
        let last_of_epoch = progress.items == 0;
        let is_due = saving.save_steps.is_some_and(|every| progress.step.is_multiple_of(every))
            || (saving.save_on_epoch_end && last_of_epoch);
        if asked && !self.shares_store {
            let message = "not the same directory on all machines".into();
            let path = self.plan.saving.output_dir.clone();
            return Err(cannot_save(Error::File { path, message }));
        }
        if is_due || asked {
            heartbeat::working(format_args!("saving a checkpoint"));
            let began = Instant::now();
            let earlier = self.saver.finish(groups);
            self.judge(earlier)?;
            let mut job = job();
            job[LAUNCH] = self.launch.clone();
            job[ORIGIN] = self.origin.clone();
            let loss_scale = engine.loss_scale().copied();
            let now = Moment { began, progress, loss_scale, job };
            let outcome = self.saver.save(now, engine.units(), groups);
            if saving.async_save && !asked {
                return self.judge(outcome);
            }
            let outcome = outcome.and_then(|()| self.saver.finish(groups));
            return if asked { outcome.map_err(cannot_save) } else { self.judge(outcome) };
        }
        // A run that ends over a failed save ends as soon as it is known.
        if saving.save_failure == SaveFailure::Stop {
            let outcome = self.saver.poll();
            return self.judge(outcome);
        }
        Ok(())
    }

    /// Waits until the last checkpoint is on the disk. All ranks call it together.
    pub(super) fn finish(&mut self, groups: &Groups) -> Result<()> {
        let outcome = self.saver.finish(groups);
        self.judge(outcome)
    }

    /// What a failed save means for the run.
    fn judge(&self, outcome: Result<()>) -> Result<()> {
        match outcome {
            Err(error)
                if self.plan.saving.save_failure == SaveFailure::Continue
                    && !matches!(error, Error::Comm { .. }) =>
            {
                warn!("{error}; the checkpoint is left out, and training goes on");
                Ok(())
            }
            outcome => outcome.map_err(cannot_save),
        }
    }
}

/// Whether rank 0 has the best model that a checkpoint speaks of, as far as it matters: where validations
/// cannot be compared, it does not. All ranks call it together.
fn has_best(
    attempt: &Attempt<'_>,
    inputs: &Inputs,
    start: &Start,
    groups: &Groups,
) -> Result<bool> {
    let (plan, comm) = (attempt.plan, groups.world.as_ref());
    let is_first = comm.rank() == 0;
    let compared = if is_first { is_comparable(inputs, plan, &start.manifest) } else { Ok(true) };
    // A large one is copied for longer than a rank waits for another.
    let bring = || compared.and_then(|same| Ok(same && (!is_first || bring_best(attempt, start)?)));
    let is_there =
        agree_or(work_together(comm, bring, tell_saving)?, groups, Error::PeerCannotLoad)?;
    let mut missing = [f64::from(u8::from(!is_there))];
    reduce_values(comm, &mut missing, Reduction::Max)?;
    Ok(missing[0] == 0.0)
}

/// Whether checkpoints can be saved: every rank writes its part, and rank 0 puts them together, in a
/// directory that all machines see. All ranks call it together.
///
/// # Errors
/// [`Error::Config`] where the plan asks for checkpoints that cannot be.
fn shares_store(attempt: &Attempt<'_>, groups: &Groups) -> Result<bool> {
    let plan = attempt.plan;
    if attempt.local_world_size >= attempt.world_size {
        return Ok(true);
    }
    let Some(rank) = first_apart(&store(plan), groups, group::timeout(plan))? else {
        return Ok(true);
    };
    let saving = &plan.saving;
    let what = format!(
        "{} is not the same directory for rank {rank} as for rank 0, which is on another machine",
        saving.output_dir.display()
    );
    if saving.save_steps.is_some() || saving.save_on_epoch_end {
        let message = format!(
            "{what}; checkpoints need one that all machines share: mount it on all of them, or leave out \
             save_steps and save_on_epoch_end"
        );
        return Err(plan.error("output_dir", message));
    }
    if groups.world.rank() == 0 {
        warn!(
            "{what}: the model is saved on rank 0's machine alone, and a run that is asked to make room can \
             save no checkpoint"
        );
    }
    Ok(false)
}

/// Whether validations of the checkpoint's run can be compared with those to come: over the same data.
fn is_comparable(inputs: &Inputs, plan: &Plan, manifest: &Manifest) -> Result<bool> {
    let there = manifest.job["best"][best::DATA].as_str();
    let (Some(here), Some(there)) = (best::data(plan, inputs)?, there) else { return Ok(true) };
    // Earlier versions kept the contents alone.
    let is_same = here == there || here.split(' ').next() == Some(there);
    if !is_same {
        warn!("val_dataset is another than before; the next validation is the best again");
    }
    Ok(is_same)
}

/// What a failed save is called, unless it failed for want of a peer.
fn cannot_save(error: Error) -> Error {
    match error {
        Error::Comm { .. } => error,
        other => Error::Save(Box::new(other)),
    }
}
