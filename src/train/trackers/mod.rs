//! Further places for the lines of `metrics.jsonl`: `TensorBoard` and Weights & Biases.

mod tensorboard;
mod wandb;

use std::path::Path;

use serde_json::Value;
use tracing::warn;

use crate::config::{Plan, Tracker};
use crate::error::Result;

use tensorboard::EventFile;
use wandb::Bridge;

/// In the first line of training that a start writes which goes on from a checkpoint: its step.
pub(super) const RESUMED_AFTER: &str = "resumed_after";

/// What a plan's metrics go to besides, on rank 0.
#[derive(Debug, Default)]
pub(super) struct Trackers {
    events: Option<EventFile>,
    bridge: Option<Bridge>,
}

/// Checks, before any worker starts, that what the plan logs with is there.
///
/// # Errors
/// [`crate::Error::Config`] that says what to install.
pub fn check(plan: &Plan) -> Result<()> {
    if plan.logging.trackers.contains(&Tracker::Wandb) {
        wandb::check(plan)?;
    }
    Ok(())
}

impl Trackers {
    /// Begins to track a run into `dir`, after its first `done` steps.
    pub(super) fn start(plan: &Plan, dir: &Path, done: usize) -> Result<Self> {
        let uses = |tracker| plan.logging.trackers.contains(&tracker);
        Ok(Self {
            events: uses(Tracker::Tensorboard).then(|| EventFile::create(dir, done)).transpose()?,
            bridge: uses(Tracker::Wandb).then(|| Bridge::start(plan, dir, done)).transpose()?,
        })
    }

    /// Hands on a line of metrics. A tracker that fails is let go of: training is worth more.
    pub(super) fn log(&mut self, line: &Value) {
        let Some(step) = line["step"].as_u64() else { return };
        let figures = figures(line);
        if let Some(Err(error)) = self.events.as_mut().map(|file| file.log(step, &figures)) {
            warn!("TensorBoard gets no more metrics: {error}");
            self.events = None;
        }
        if let Some(Err(error)) = self.bridge.as_mut().map(|bridge| bridge.log(step, &figures)) {
            warn!("wandb gets no more metrics: {error}");
            self.bridge = None;
        }
    }

    /// The run is over: what is under way arrives first, as far as it does where there is haste.
    pub(super) fn finish(&mut self, in_haste: bool) {
        if let Some(Err(error)) = self.bridge.take().map(|bridge| bridge.finish(in_haste)) {
            warn!("wandb may lack the last metrics: {error}");
        }
    }
}

/// The numbers of a line, as `train/loss`, without those that say where in the run it is.
pub(super) fn figures(line: &Value) -> Vec<(String, f64)> {
    let kind = line["type"].as_str().unwrap_or("metrics");
    let all = line.as_object().into_iter().flatten();
    all.filter(|(key, _)| !matches!(key.as_str(), "step" | "type" | RESUMED_AFTER))
        .filter_map(|(key, value)| Some((format!("{kind}/{key}"), value.as_f64()?)))
        .collect()
}
