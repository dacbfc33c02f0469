//! How a model is run: what `score` and `eval` have in common.

use std::path::Path;
use std::time::Duration;

use clap::Args;
use rr_launch::contract::WorkerEnv;

use super::{DeviceArg, seconds};
use crate::error::{Error, Result};
use crate::score::{CrossEncoder, DEFAULT_BATCH_SIZE, ScoreOptions};
use crate::torch_ext::runtime;

/// How a model is run.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Pairs per forward pass, at most
    #[arg(long, value_name = "N", default_value_t = DEFAULT_BATCH_SIZE)]
    batch_size: usize,
    /// The most tokens of a pair; by default what the model was trained with
    #[arg(long, value_name = "N")]
    max_len: Option<usize>,
    /// How to ask a language model without a score head: qwen3-reranker or bge-reranker-gemma
    #[arg(long, value_name = "NAME")]
    prompt: Option<String>,
    /// The longest wait for another worker, in seconds [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(super) timeout: Option<Duration>,
    /// Kind of device; by default a GPU where there is one
    #[arg(long, value_enum)]
    device: Option<DeviceArg>,
}

impl ModelArgs {
    /// The model for the worker `env`, once options that cannot work are refused: before any output
    /// is opened. Rank 0 says what a user may not expect of it.
    pub(super) fn load(&self, dir: &Path, env: &WorkerEnv) -> Result<CrossEncoder> {
        if self.batch_size == 0 {
            return Err(Error::Usage("--batch-size is 0, expected at least 1".into()));
        }
        let device = runtime::device(self.device.map(Into::into), env.local_rank)?;
        let model = CrossEncoder::with_prompt(dir, device, self.prompt.as_deref())?;
        model.checked_max_len(self.max_len)?;
        if env.rank != 0 {
            return Ok(model);
        }
        if let Some(prompt) = model.assumed_prompt() {
            eprintln!(
                "note: {} is a language model without a score head; asked by the prompt {} (--prompt)",
                dir.display(),
                prompt.name
            );
        }
        if !model.initialised().is_empty() {
            eprintln!(
                "note: {} has no {}; random values stand in, so its scores mean nothing yet",
                dir.display(),
                model.initialised().join(", ")
            );
        }
        Ok(model)
    }

    /// The library's options.
    pub(super) fn score_options(&self) -> ScoreOptions {
        ScoreOptions { batch_size: self.batch_size, max_len: self.max_len, normalize: true }
    }
}
