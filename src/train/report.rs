//! What rank 0 tells while it trains: log lines, a status line, `metrics.jsonl`, the report page.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tracing::{Level, debug, enabled, info, warn};

use super::best::Best;
use super::inputs::Inputs;
use super::memory::Memory;
use super::origin::comes_from_elsewhere;
use super::output::{BEST, RUNS};
use super::page::{self, About, Page};
use super::status::{Progress, StatusLine};
use super::trackers::{RESUMED_AFTER, Trackers};
use super::validate::Validation;
use super::worst::QueryReport;
use crate::atomic::{StagedFile, create_dir};
use crate::checkpoint::training::fail_point;
use crate::config::Plan;
use crate::data::{MicroBatchPlan, StepPlan};
use crate::engine::StepReport;
use crate::error::{Error, Result};
use crate::optim::LossScale;
use crate::torch_ext::runtime;

/// The file of metrics, one JSON object a line.
pub(super) const METRICS: &str = "metrics.jsonl";

/// Collects what happened since the last line of metrics. Silent on all ranks but 0.
pub(super) struct Reporter {
    sink: Option<Sink>,
    interval: usize,
    total_steps: usize,
    /// Steps that were taken before this start.
    done: usize,
    started: Instant,
    paused: Duration,
    last_step: usize,
    pairs: usize,
    tokens: u64,
    window: Window,
    /// In fp16, as it was behind the last step.
    loss_scale: Option<LossScale>,
}

struct Sink {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines in it.
    length: u64,
    trackers: Trackers,
    status: Option<StatusLine>,
    page: Page,
    device: tch::Device,
}

impl Sink {
    /// Creates the run's directory. A run that goes on keeps the metrics of its first `done` steps.
    fn create(inputs: &Inputs, about: &About<'_>, done: usize) -> Result<Self> {
        let dir = about.attempt.plan.saving.output_dir.join(RUNS);
        create_dir(&dir)?;
        let path = dir.join(METRICS);
        // What another run has left here is not the past of one whose checkpoint was elsewhere.
        let kept = if comes_from_elsewhere(about.attempt) { 0 } else { done };
        let earlier = metrics_until(&path, kept)?;
        // A run that is killed here has lost none of its lines.
        let staged = StagedFile::new(&path)?;
        let mut file = staged.writer()?;
        file.write_all(earlier.as_bytes()).map_err(|source| Error::Io {
            path: path.clone(),
            action: "write",
            source,
        })?;
        fail_point("before_metrics");
        staged.publish()?;
        Ok(Self {
            file,
            length: earlier.len() as u64,
            trackers: Trackers::start(about.attempt.plan, &dir, kept)?,
            status: StatusLine::new(about.env.progress),
            page: Page::new(&dir, &earlier, inputs, about),
            device: about.device,
            path,
        })
    }

    /// The most bytes that this worker has held: of its GPU, or of the host.
    fn memory(&self) -> Option<usize> {
        runtime::peak_gpu_memory(self.device).or_else(runtime::peak_host_memory)
    }

    /// A line that cannot be written, on a full disk for example, is left out whole: training is
    /// worth more, and whether the run ends is said by what it cannot save.
    fn write(&mut self, line: &Value) {
        self.trackers.log(line);
        self.page.line(line);
        let line = format!("{line}\n");
        let Err(error) = self.file.write_all(line.as_bytes()) else {
            self.length += line.len() as u64;
            return;
        };
        warn!("{}: cannot write: {error}; a line of metrics is left out", self.path.display());
        // The next line does not begin behind a torn one; where not even that can be done, a reader
        // sees one line that is none.
        let _ = self.file.set_len(self.length);
        let _ = self.file.seek(SeekFrom::Start(self.length));
    }
}

/// Since the last line of metrics.
#[derive(Default)]
struct Window {
    steps: usize,
    loss: f64,
    pairs: usize,
    tokens: u64,
    /// When it began, in seconds of training.
    since: f64,
    last: Last,
}

/// The last step of a window.
#[derive(Default, Clone, Copy)]
struct Last {
    step: usize,
    epoch: usize,
    lr: f64,
    grad_norm: f64,
}

/// The pairs of a micro-batch over all ranks; those of a group are a list of their own.
fn pairs_of(micro: &MicroBatchPlan) -> Value {
    let of_rank = |(rank, pairs): (usize, &Vec<u32>)| -> Vec<Value> {
        match micro.cu_groups.get(rank) {
            Some(offsets) => offsets
                .windows(2)
                .map(|bounds| json!(pairs[bounds[0] as usize..bounds[1] as usize]))
                .collect(),
            None => pairs.iter().map(|pair| json!(pair)).collect(),
        }
    };
    micro.per_rank.iter().enumerate().flat_map(of_rank).collect()
}

impl Reporter {
    /// A reporter of a run that took `done` of `total_steps` before; rank 0, which knows what the
    /// run is about, creates its directory.
    pub(super) fn new(
        plan: &Plan,
        inputs: &Inputs,
        about: Option<&About<'_>>,
        (done, total_steps): (usize, usize),
    ) -> Result<Self> {
        let sink = about.map(|about| Sink::create(inputs, about, done)).transpose()?;
        Ok(Self {
            sink,
            interval: plan.logging.log_interval,
            total_steps,
            done,
            started: Instant::now(),
            paused: Duration::ZERO,
            last_step: done,
            pairs: 0,
            tokens: 0,
            window: Window::default(),
            loss_scale: None,
        })
    }

    /// The losses that no line has told of yet: a checkpoint keeps them, so that the lines of a run that
    /// goes on are those of one never interrupted.
    pub(super) fn untold(&self) -> Value {
        json!({"steps": self.window.steps, "loss": self.window.loss})
    }

    /// Takes up the [`Reporter::untold`] of a checkpoint; nothing from one that has none.
    pub(super) fn take_up(&mut self, untold: &Value) {
        if let (Some(steps), Some(loss)) = (untold["steps"].as_u64(), untold["loss"].as_f64()) {
            self.window = Window { steps: steps as usize, loss, ..Window::default() };
        }
    }

    /// Training begins now, in fp16 with this loss scale.
    pub(super) fn start(&mut self, loss_scale: Option<&LossScale>) {
        self.loss_scale = loss_scale.copied();
        self.started = Instant::now();
    }

    /// The loss scale behind the step after `step`. The first that was skipped is told: the line of metrics
    /// shows the last step of an interval alone.
    pub(super) fn scaled(&mut self, step: usize, loss_scale: Option<&LossScale>) {
        let before = self.skipped();
        self.loss_scale = loss_scale.copied();
        let (Some(now), true) = (self.loss_scale, self.sink.is_some()) else { return };
        if before == 0 && now.skipped() > 0 {
            warn!(
                "step {}: a gradient overflows in fp16, so the step is skipped and the loss scale halved to \
                 {}; a few of them at the start are usual, and the end tells how many there were",
                step + 1,
                now.scale()
            );
        }
    }

    /// Steps of the whole run that were skipped because a gradient overflowed in fp16.
    fn skipped(&self) -> usize {
        self.loss_scale.as_ref().map_or(0, LossScale::skipped)
    }

    /// Time spent training since [`Reporter::start`], validation left out.
    fn elapsed(&self) -> f64 {
        self.started.elapsed().saturating_sub(self.paused).as_secs_f64()
    }

    /// The pairs of the step after `step`, by their index in the data, at the debug level: a list
    /// for each micro-batch, in which groups are lists of their own.
    pub(super) fn order(&self, step: usize, plan: &StepPlan) {
        if self.sink.is_none() || !enabled!(Level::DEBUG) {
            return;
        }
        let pairs: Value = plan.micro_batches.iter().map(pairs_of).collect();
        debug!(step = step + 1, %pairs, "order");
    }

    /// One optimizer step was taken; `step` counts from 1, `lr` is the one it used.
    pub(super) fn step(
        &mut self,
        step: usize,
        epoch: usize,
        lr: f64,
        pairs: usize,
        report: &StepReport,
    ) {
        self.last_step = step;
        self.pairs += pairs;
        self.tokens += report.tokens;
        self.window.steps += 1;
        self.window.loss += report.loss;
        self.window.pairs += pairs;
        self.window.tokens += report.tokens;
        self.window.last = Last { step, epoch, lr, grad_norm: report.grad_norm };
        self.draw(step, report.loss, lr);
        if step.is_multiple_of(self.interval) || step == self.total_steps {
            self.flush();
        }
    }

    /// Tells of the steps since the last time.
    fn flush(&mut self) {
        let elapsed = self.elapsed();
        let window = std::mem::take(&mut self.window);
        self.window.since = elapsed;
        let left_s = self.left(elapsed);
        let Some(sink) = self.sink.as_mut().filter(|_| window.steps > 0) else { return };
        let Last { step, epoch, lr, grad_norm } = window.last;
        let seconds = (elapsed - window.since).max(1e-9);
        let loss = window.loss / window.steps as f64;
        let (pairs_per_s, tokens_per_s) =
            (window.pairs as f64 / seconds, window.tokens as f64 / seconds);
        info!(
            step,
            epoch = epoch + 1,
            loss = format_args!("{loss:.4}"),
            lr = format_args!("{lr:.3e}"),
            grad_norm = format_args!("{grad_norm:.3}"),
            pairs_per_s = format_args!("{pairs_per_s:.1}"),
            "trained"
        );
        let memory = sink.memory();
        let mut line = json!({
            "type": "train",
            "step": step,
            "epoch": epoch + 1,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "pairs": self.pairs,
            "tokens": self.tokens,
            "elapsed_s": elapsed,
            "left_s": left_s,
            "pairs_per_s": pairs_per_s,
            "tokens_per_s": tokens_per_s,
            "memory_bytes": memory,
        });
        if self.done > 0 && self.pairs == window.pairs {
            line[RESUMED_AFTER] = json!(self.done);
        }
        if let Some(loss_scale) = self.loss_scale {
            line["loss_scale"] = json!(loss_scale.scale());
            line["skipped_steps"] = json!(loss_scale.skipped());
        }
        sink.write(&line);
    }

    /// A validation came out, perhaps the best so far where that matters; `took` is not counted as
    /// training.
    pub(super) fn validation(
        &mut self,
        step: usize,
        epoch: usize,
        (result, queries): (&Validation, &QueryReport),
        is_best: Option<bool>,
        took: Duration,
    ) {
        self.paused += took;
        let Some(sink) = &mut self.sink else { return };
        let mark = if is_best == Some(true) { ", the best so far" } else { "" };
        info!(step, epoch = epoch + 1, "validated: {result}{mark}");
        let mut line = result.to_json();
        if let Value::Object(fields) = &mut line {
            fields.insert("type".into(), json!("validation"));
            fields.insert("step".into(), json!(step));
            fields.insert("epoch".into(), json!(epoch + 1));
            fields.insert("seconds".into(), json!(took.as_secs_f64()));
            fields.extend(is_best.map(|is_best| ("best".to_owned(), json!(is_best))));
        }
        sink.page.queries(step, queries);
        sink.write(&line);
    }

    /// The last words of a run that makes room: the next start goes on with the next line.
    pub(super) fn preempted(&mut self) {
        self.flush();
        if let Some(sink) = &mut self.sink {
            info!("preempted: step {} is saved; start again to go on", self.last_step);
            sink.page.finish(page::Status::Preempted);
        }
    }

    /// Hands over to trackers what they may lack yet, which takes a while unless there is haste. No rank
    /// waits for this one any more.
    pub(super) fn close(&mut self, in_haste: bool) {
        if let Some(sink) = &mut self.sink {
            sink.trackers.finish(in_haste);
        }
    }

    /// The last words of a run: where training ended, and what the workers held.
    pub(super) fn finish(&mut self, memory: &Memory) {
        self.flush();
        let (last, total, seconds) = (self.last_step, self.total_steps, self.elapsed());
        let skipped = self.skipped();
        let Some(sink) = &mut self.sink else { return };
        if last < total {
            info!("stopped early, after {last} of {total} steps");
        }
        if skipped > 0 && skipped == last {
            warn!(
                "all {last} steps were skipped, as gradients overflowed in fp16: the model is what it was; \
                 lower lr, or use bf16"
            );
        } else if skipped > 0 {
            info!("{skipped} of {last} steps were skipped, as gradients overflowed in fp16");
        }
        info!("trained {} pairs ({} tokens) in {seconds:.1} s", self.pairs, self.tokens);
        info!("{memory}");
        sink.write(&memory.to_json());
        let status = if last < total { page::Status::StoppedEarly } else { page::Status::Finished };
        sink.page.finish(status);
    }

    /// Names the best model, once the final one is saved.
    pub(super) fn best(&self, plan: &Plan, best: Option<Best>) {
        let found = best.and_then(|best| Some((best.metric, best.found?)));
        if let (Some((metric, (value, step))), true) = (found, self.sink.is_some()) {
            let dir = plan.saving.output_dir.join(BEST);
            info!("the best model, {metric} {value:.4} after step {step}, is {}", dir.display());
        }
    }

    /// Seconds to the end at the rate so far, after `elapsed` of them.
    fn left(&self, elapsed: f64) -> f64 {
        let taken = self.last_step - self.done;
        let left = self.total_steps.saturating_sub(self.last_step);
        elapsed / taken.max(1) as f64 * left as f64
    }

    /// Draws the status line where one is due.
    fn draw(&mut self, step: usize, loss: f64, lr: f64) {
        let elapsed = self.elapsed();
        let left_s = self.left(elapsed);
        let Some(sink) = &mut self.sink else { return };
        if !sink.status.as_ref().is_some_and(StatusLine::is_due) {
            return;
        }
        let (total, memory) = (self.total_steps, sink.memory());
        let pairs_per_s = self.pairs as f64 / elapsed.max(1e-9);
        let line = Progress { step, total, loss, lr, pairs_per_s, left_s, memory };
        if let Some(status) = &mut sink.status {
            status.draw(&line);
        }
    }
}

/// The lines of an earlier part of the run, up to its step `done`: what it wrote after its last
/// checkpoint comes again.
///
/// # Errors
/// [`Error::Io`] when they are there and cannot be read.
fn metrics_until(path: &Path, done: usize) -> Result<String> {
    if done == 0 {
        return Ok(String::new());
    }
    let text = match std::fs::read(path) {
        // What is no text stands in a line that a failure tore, which is left out.
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(source) => return Err(Error::Io { path: path.to_owned(), action: "read", source }),
    };
    let is_kept = |line: &&str| {
        let step = serde_json::from_str::<Value>(line).ok().and_then(|line| line["step"].as_u64());
        step.is_some_and(|step| step as usize <= done)
    };
    Ok(text.lines().filter(is_kept).flat_map(|line| [line, "\n"]).collect())
}
