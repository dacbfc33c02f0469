//! What rank 0 tells while it trains: log lines, a status line, `metrics.jsonl`.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rr_launch::contract::WorkerEnv;
use serde_json::{Value, json};
use tracing::{Level, debug, enabled, info};

use super::best::Best;
use super::memory::Memory;
use super::output::{BEST, RUNS};
use super::trackers::Trackers;
use super::validate::Validation;
use crate::atomic::{create_dir, remove_dir};
use crate::config::Plan;
use crate::data::{MicroBatchPlan, StepPlan};
use crate::engine::StepReport;
use crate::error::{Error, Result};

/// The file of metrics, one JSON object a line.
pub(super) const METRICS: &str = "metrics.jsonl";

/// The least time between two drawings of the status line.
const REDRAW: Duration = Duration::from_millis(100);

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
}

struct Sink {
    path: PathBuf,
    file: File,
    trackers: Trackers,
    status: Option<Status>,
}

/// A line that is drawn over itself.
struct Status {
    drawn: Instant,
    /// Whether stderr is the terminal itself, rather than the launcher's pipe.
    direct: bool,
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
    /// Creates the run's directory on rank 0. A run that goes on keeps the metrics of its first
    /// `done` steps.
    pub(super) fn new(
        plan: &Plan,
        env: &WorkerEnv,
        total_steps: usize,
        done: usize,
    ) -> Result<Self> {
        let sink = if env.rank == 0 {
            let dir = plan.saving.output_dir.join(RUNS);
            create_dir(&dir)?;
            let path = dir.join(METRICS);
            let earlier = metrics_until(&path, done);
            let create = |source| Error::Io { path: path.clone(), action: "create", source };
            let mut file = File::create(&path).map_err(create)?;
            file.write_all(earlier.as_bytes()).map_err(create)?;
            let direct = std::io::stderr().is_terminal();
            let status = (direct || env.progress).then(|| Status { drawn: Instant::now(), direct });
            let trackers = Trackers::start(plan, &dir, done)?;
            Some(Sink { path, file, trackers, status })
        } else {
            None
        };
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
        })
    }

    /// Training begins now.
    pub(super) fn start(&mut self) {
        self.started = Instant::now();
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
    ) -> Result<()> {
        self.last_step = step;
        self.pairs += pairs;
        self.tokens += report.tokens;
        self.window.steps += 1;
        self.window.loss += report.loss;
        self.window.pairs += pairs;
        self.window.tokens += report.tokens;
        self.window.last = Last { step, epoch, lr, grad_norm: report.grad_norm };
        let elapsed = self.elapsed();
        if let Some(Status { drawn, .. }) = self.sink.as_ref().and_then(|s| s.status.as_ref())
            && drawn.elapsed() >= REDRAW
        {
            self.draw(&self.status_line(step, report.loss, lr, elapsed));
        }
        if step.is_multiple_of(self.interval) || step == self.total_steps {
            self.flush()?;
        }
        Ok(())
    }

    /// Tells of the steps since the last time.
    fn flush(&mut self) -> Result<()> {
        let elapsed = self.elapsed();
        let window = std::mem::take(&mut self.window);
        self.window.since = elapsed;
        if self.sink.is_none() || window.steps == 0 {
            return Ok(());
        }
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
        self.write(&json!({
            "type": "train",
            "step": step,
            "epoch": epoch + 1,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "pairs": self.pairs,
            "tokens": self.tokens,
            "elapsed_s": elapsed,
            "pairs_per_s": pairs_per_s,
            "tokens_per_s": tokens_per_s,
        }))
    }

    /// A validation came out, perhaps the best so far where that matters; `took` is not counted as
    /// training.
    pub(super) fn validation(
        &mut self,
        step: usize,
        epoch: usize,
        result: &Validation,
        is_best: Option<bool>,
        took: Duration,
    ) -> Result<()> {
        self.paused += took;
        if self.sink.is_none() {
            return Ok(());
        }
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
        self.write(&line)
    }

    /// The last words of a run: where training ended, and what the workers held.
    pub(super) fn finish(&mut self, memory: &Memory) -> Result<()> {
        self.flush()?;
        if self.sink.is_some() {
            if self.last_step < self.total_steps {
                info!("stopped early, after {} of {} steps", self.last_step, self.total_steps);
            }
            let seconds = self.elapsed();
            info!("trained {} pairs ({} tokens) in {seconds:.1} s", self.pairs, self.tokens);
            info!("{memory}");
        }
        self.write(&memory.to_json())?;
        if let Some(sink) = &mut self.sink {
            sink.trackers.finish();
        }
        Ok(())
    }

    /// Names the best model, once the final one is saved; without one, what an earlier run that
    /// this one replaces left in its place is removed.
    pub(super) fn best(&self, plan: &Plan, best: Option<Best>) -> Result<()> {
        if self.sink.is_none() {
            return Ok(());
        }
        let dir = plan.saving.output_dir.join(BEST);
        match best.and_then(|best| Some((best.metric, best.found?))) {
            Some((metric, (value, step))) => {
                info!(
                    "the best model, {metric} {value:.4} after step {step}, is {}",
                    dir.display()
                );
                Ok(())
            }
            None if dir.exists() => remove_dir(&dir),
            None => Ok(()),
        }
    }

    fn write(&mut self, line: &Value) -> Result<()> {
        let Some(sink) = &mut self.sink else { return Ok(()) };
        sink.trackers.log(line);
        writeln!(sink.file, "{line}").map_err(|source| Error::Io {
            path: sink.path.clone(),
            action: "write",
            source,
        })
    }

    fn status_line(&self, step: usize, loss: f64, lr: f64, elapsed: f64) -> String {
        let left = elapsed / (step - self.done).max(1) as f64 * (self.total_steps - step) as f64;
        format!(
            "step {step}/{}  loss {loss:.4}  lr {lr:.1e}  {:.0} pairs/s  {} left",
            self.total_steps,
            self.pairs as f64 / elapsed.max(1e-9),
            clock(left)
        )
    }

    /// Draws a status line. Text that ends in a carriage return is what the launcher keeps below
    /// the log and draws over; on a terminal of our own the rest of the line is cleared.
    fn draw(&mut self, text: &str) {
        let Some(Sink { status: Some(status), .. }) = &mut self.sink else { return };
        status.drawn = Instant::now();
        let end = if status.direct { "\x1b[K\r" } else { "\r" };
        // Whoever closed stderr does not want to see progress; training goes on.
        let _ = std::io::stderr().write_all(format!("{text}{end}").as_bytes());
    }
}

/// The lines of an earlier part of the run, up to its step `done`: what it wrote after its last
/// checkpoint comes again.
fn metrics_until(path: &Path, done: usize) -> String {
    let text =
        if done > 0 { std::fs::read_to_string(path).unwrap_or_default() } else { String::new() };
    let is_kept = |line: &&str| {
        let step = serde_json::from_str::<Value>(line).ok().and_then(|line| line["step"].as_u64());
        step.is_some_and(|step| step as usize <= done)
    };
    text.lines().filter(is_kept).flat_map(|line| [line, "\n"]).collect()
}

/// `1:02:03` or `2:03`.
fn clock(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::clock;

    #[test]
    fn clocks() {
        assert_eq!(clock(3.9), "0:03");
        assert_eq!(clock(125.0), "2:05");
        assert_eq!(clock(3723.0), "1:02:03");
    }
}
