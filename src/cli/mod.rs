//! The command line of `reranker`. Parsing here, deciding in [`crate::config`], doing in the jobs.

mod check;
mod commands;
mod convert;
mod eval;
mod model;
mod output;
mod score;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use rr_launch::manual::Manual;

use crate::config;
use crate::error::Result;

pub use commands::run;
pub use convert::ConvertArgs;
pub use eval::EvalArgs;
pub use score::ScoreArgs;

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
    /// Train as one worker on a teacher's scores of the training data
    Distill(DistillArgs),
    /// Check a configuration and everything it names, and print the plan
    Check(CheckArgs),
    /// Score query-document pairs
    Score(ScoreArgs),
    /// Measure nDCG, MRR, MAP and recall of models, or of rankings in TREC files
    Eval(EvalArgs),
    /// Convert data between pointwise, grouped and pos/neg records, or merge an adapter
    Convert(ConvertArgs),
    /// Print the man page or a shell's completions
    #[command(hide = true)]
    Generate {
        /// What to print
        #[arg(value_enum, value_name = "KIND")]
        kind: Manual,
    },
}

impl Command {
    /// Whether it runs models.
    #[must_use]
    pub fn computes(&self) -> bool {
        match self {
            Self::Train(_) | Self::Distill(_) | Self::Score(_) | Self::Eval(_) => true,
            Self::Check(_) | Self::Convert(_) | Self::Generate { .. } => false,
        }
    }
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

/// Arguments of `distill`.
#[derive(Debug, Args)]
pub struct DistillArgs {
    #[command(flatten)]
    plan: PlanArgs,
    /// End when the teacher has scored the training data
    #[arg(long)]
    scores_only: bool,
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
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Print one JSON line for rr-launch instead of the plan
    #[arg(long, hide = true)]
    for_launch: bool,
    /// Number of machines that rr-launch starts them on
    #[arg(long, value_name = "N", default_value = "1", requires = "for_launch", hide = true)]
    nnodes: usize,
}

/// The kinds of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceArg {
    /// The host's processors
    Cpu,
    /// An NVIDIA GPU
    Cuda,
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
