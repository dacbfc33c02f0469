//! The command line of `reranker`. Parsing here, deciding in [`crate::config`], doing in the jobs.

mod commands;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config;
use crate::data::RecordForm;
use crate::error::Result;

pub use commands::run;

/// Trains text rerankers, and scores with them.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The jobs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train as one worker; rr-launch, torchrun, srun or a hand starts it
    Train(PlanArgs),
    /// Check a configuration and everything it names, and print the plan
    Check(CheckArgs),
    /// Score query-document pairs
    Score(ScoreArgs),
    /// Measure nDCG@10, MRR@10 and MAP on grouped data
    Eval(EvalArgs),
    /// Convert data between pointwise, grouped and pos/neg records, or merge an adapter
    Convert(ConvertArgs),
}

/// Where the plan of a run comes from.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Training YAML
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Parallel YAML in accelerate's schema
    #[arg(long, value_name = "FILE", aliases = ["config-file", "config_file"])]
    pub parallel: Option<PathBuf>,
    /// Override a key of the YAML files (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Continue an unfinished run: auto, never, or a checkpoint's path
    #[arg(long, value_name = "WHAT")]
    pub resume: Option<String>,
    /// Go on from a checkpoint although the run differs
    #[arg(long)]
    pub resume_anyway: bool,
    /// Replace a finished run in the output directory
    #[arg(long)]
    pub overwrite: bool,
    /// Drop bad records and report them, instead of stopping
    #[arg(long)]
    pub skip_bad_records: bool,
    /// The longest wait for another worker, in seconds [default: 600]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
    /// Kind of device; by default a GPU where there is one
    #[arg(long, value_enum)]
    pub device: Option<DeviceArg>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|&seconds: &f64| seconds >= 0.001);
    seconds
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "expected a number of seconds above 0, such as 600".to_owned())
}

/// Arguments of `check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    plan: PlanArgs,
    /// Number of workers the plan is for
    #[arg(long, value_name = "N", default_value = None)]
    nproc: Option<usize>,
    /// Number of workers the plan is for, each on a GPU; none need be here
    #[arg(long, value_name = "N", conflicts_with_all = ["nproc", "device"])]
    gpus: Option<usize>,
    /// Print one JSON line for rr-launch instead of the plan
    #[arg(long, hide = true)]
    for_launch: bool,
}

/// Arguments of `score`.
#[derive(Debug, Args)]
pub struct ScoreArgs {
    /// Model directory or hub id
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,
    /// Pairs to score, `-` for standard input: JSON lines with query and content, or TSV
    #[arg(long, value_name = "FILE", default_value = "-")]
    input: PathBuf,
    /// Form of the input; by default from its name, JSON lines where that does not say
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// Where the scores go, `-` for standard output: a JSON line for each pair, in order
    #[arg(long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Repeat the texts in the output
    #[arg(long)]
    echo: bool,
    #[command(flatten)]
    options: ModelArgs,
}

/// Arguments of `eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Model directory or hub id
    #[arg(long, value_name = "MODEL", required_unless_present = "bm25")]
    model: Option<PathBuf>,
    /// Grouped data, or pointwise data that is gathered by query
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Key of the labels
    #[arg(long, value_name = "KEY", default_value = "label")]
    label_key: String,
    /// Rank by BM25 as well
    #[arg(long)]
    bm25: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    options: ModelArgs,
}

/// Arguments of `convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Records of any form, plain, gzip or zstd; `-` for standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    input: PathBuf,
    /// Where the records go, compressed where the name ends in .gz or .zst; `-` for standard output
    #[arg(long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Form of the output
    #[arg(long, value_enum, required_unless_present = "merge")]
    to: Option<RecordFormArg>,
    /// An adapter (directory or hub id) to merge into its base model; --output is the directory of
    /// the whole model, and data is left alone
    #[arg(long, value_name = "MODEL", requires = "output", conflicts_with_all = [
        "input", "to", "label_key", "max_label", "min_label", "positive_from", "gather", "lossy",
    ])]
    merge: Option<String>,
    /// Key of the labels
    #[arg(long, value_name = "KEY", default_value = "label")]
    label_key: String,
    /// Label of positives without scores
    #[arg(long, value_name = "LABEL", default_value_t = 1.0, allow_negative_numbers = true)]
    max_label: f64,
    /// Label of negatives without scores
    #[arg(long, value_name = "LABEL", default_value_t = 0.0, allow_negative_numbers = true)]
    min_label: f64,
    /// The least label of a positive, for pos/neg records of graded labels
    #[arg(long, value_name = "LABEL", allow_negative_numbers = true)]
    positive_from: Option<f64>,
    /// Gather pointwise records by query in memory; without it those of a query have to stand
    /// together
    #[arg(long)]
    gather: bool,
    /// Leave out what the output's form cannot hold, instead of stopping
    #[arg(long)]
    lossy: bool,
}

/// How a model is run.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Pairs per forward pass
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch_size: usize,
    /// The most tokens of a pair; by default what the model was trained with
    #[arg(long, value_name = "N")]
    max_len: Option<usize>,
    /// How to ask a language model without a score head: qwen3-reranker or bge-reranker-gemma
    #[arg(long, value_name = "NAME")]
    prompt: Option<String>,
    /// Kind of device; by default a GPU where there is one
    #[arg(long, value_enum)]
    device: Option<DeviceArg>,
}

/// The kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    /// The host's processors
    Cpu,
    /// An NVIDIA GPU
    Cuda,
}

/// The forms of scoring input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// {"query": …, "content": …} a line
    Jsonl,
    /// query, a tab, content
    Tsv,
}

/// The forms of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RecordFormArg {
    /// {"query", "content", "label"}: a document a line
    Pointwise,
    /// {"query", "hits": [{"content", "label"}]}: a query a line
    Grouped,
    /// {"query", "pos", "neg"}, with scores where labels need them
    Posneg,
}

impl From<RecordFormArg> for RecordForm {
    fn from(form: RecordFormArg) -> Self {
        match form {
            RecordFormArg::Pointwise => Self::Pointwise,
            RecordFormArg::Grouped => Self::Grouped,
            RecordFormArg::Posneg => Self::PosNeg,
        }
    }
}

impl From<DeviceArg> for config::Device {
    fn from(device: DeviceArg) -> Self {
        match device {
            DeviceArg::Cpu => Self::Cpu,
            DeviceArg::Cuda => Self::Cuda,
        }
    }
}

impl PlanArgs {
    /// The validated plan for a world of `processes` workers on `device`.
    fn plan(&self, processes: Option<usize>, device: Option<DeviceArg>) -> Result<config::Plan> {
        config::Plan::load(&config::Sources {
            training: self.config.clone(),
            parallel: self.parallel.clone(),
            overrides: self.overrides.clone(),
            resume: self.resume.clone(),
            overwrite: self.overwrite,
            skip_bad_records: self.skip_bad_records,
            processes,
            device: device.map(Into::into),
            resume_anyway: self.resume_anyway,
            timeout: self.timeout,
        })
    }
}
