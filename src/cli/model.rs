//! How a model is run: what `score` and `eval` have in common.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use rr_launch::contract::WorkerEnv;

use super::{DeviceArg, seconds};
use crate::comm::Communicator;
use crate::config::Precision;
use crate::error::{Error, Result, tell};
use crate::score::{CrossEncoder, DEFAULT_BATCH_SIZE, GivenTexts, LoadOptions, ScoreOptions};
use crate::torch_ext::runtime;

/// A precision, as the command line spells it.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum PrecisionArg {
    Fp32,
    Bf16,
    Fp16,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::Fp32 => Self::Fp32,
            PrecisionArg::Bf16 => Self::Bf16,
            PrecisionArg::Fp16 => Self::Fp16,
        }
    }
}

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
    /// What stands around the query, in place of what the model was trained with: a text with one {}
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    query_format: Option<String>,
    /// What stands around the document, in the same way
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    document_format: Option<String>,
    /// What stands between query and document, for decoders
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    seq: Option<String>,
    /// What stands after the document, for decoders
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    special_token: Option<String>,
    /// What to compute in: fp32, or bf16 and fp16, which take half the memory and are faster on GPUs
    #[arg(long, value_enum, default_value_t = PrecisionArg::Fp32)]
    precision: PrecisionArg,
    /// The longest wait for another worker, in seconds [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(super) timeout: Option<Duration>,
    /// Kind of device; by default a GPU where there is one
    #[arg(long, value_enum)]
    device: Option<DeviceArg>,
}

impl ModelArgs {
    /// Completes models that other programs have fetched from the hub, before any is examined or loaded: on
    /// each host one worker of `comm`'s does, for which the others wait.
    ///
    /// # Errors
    /// [`Error::Comm`] from `comm`.
    pub(super) fn settle<'a>(
        models: impl IntoIterator<Item = &'a PathBuf>,
        env: &WorkerEnv,
        comm: &dyn Communicator,
    ) -> Result<()> {
        if env.local_rank == 0 {
            models.into_iter().for_each(CrossEncoder::settle);
        }
        comm.barrier()
    }

    /// The model for the worker `env`, once options that cannot work are refused: before any output
    /// is opened. Rank 0 says what a user may not expect of it.
    pub(super) fn load(&self, dir: &Path, env: &WorkerEnv) -> Result<CrossEncoder> {
        self.check_batch_size()?;
        let device = runtime::device(self.device.map(Into::into), env.local_rank)?;
        let model = CrossEncoder::load(dir, LoadOptions { device, ..self.load_options() })?;
        model.checked_max_len(self.max_len)?;
        if env.rank != 0 {
            return Ok(model);
        }
        if let Some(prompt) = model.assumed_prompt() {
            tell(format_args!(
                "note: {} is a language model without a score head; asked by the prompt {} (--prompt)",
                dir.display(),
                prompt.name
            ));
        }
        if model.is_bare() {
            tell(format_args!(
                "note: {} is a decoder without reranker.json; query and document are put together as \
                 they are (--query-format, --document-format, --seq, --special-token)",
                dir.display()
            ));
        }
        if !model.initialised().is_empty() {
            tell(format_args!(
                "note: {} has no {}; random values stand in, so its scores mean nothing yet",
                dir.display(),
                model.initialised().join(", ")
            ));
        }
        Ok(model)
    }

    /// Whether the model could be loaded, as far as that can be told without its weights.
    pub(super) fn examine(&self, dir: &Path) -> Result<()> {
        self.check_batch_size()?;
        CrossEncoder::examine(dir, self.load_options(), self.max_len).map(drop)
    }

    fn load_options(&self) -> LoadOptions<'_> {
        LoadOptions {
            precision: self.precision.into(),
            prompt: self.prompt.as_deref(),
            texts: GivenTexts {
                query_format: self.query_format.as_deref(),
                document_format: self.document_format.as_deref(),
                seq: self.seq.as_deref(),
                special_token: self.special_token.as_deref(),
            },
            ..LoadOptions::default()
        }
    }

    fn check_batch_size(&self) -> Result<()> {
        if self.batch_size == 0 {
            return Err(Error::Usage("--batch-size is 0, expected at least 1".into()));
        }
        Ok(())
    }

    /// The library's options.
    pub(super) fn score_options(&self) -> ScoreOptions {
        ScoreOptions { batch_size: self.batch_size, max_len: self.max_len, normalize: true }
    }
}
