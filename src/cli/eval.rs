//! `reranker eval`: from arguments to the job.

use std::path::PathBuf;

use clap::Args;
use rr_launch::contract::WorkerEnv;

use super::model::ModelArgs;
use super::output::print;
use crate::error::{Error, Result};
use crate::eval;

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

/// Ranks and measures.
///
/// # Errors
/// What reading or scoring reports.
pub(super) fn run(args: &EvalArgs) -> Result<()> {
    let env = WorkerEnv::from_env().map_err(|error| Error::Usage(error.to_string()))?;
    let dataset = eval::load(&args.data, &args.label_key)?;
    let model = args.model.as_deref().map(|dir| args.options.load(dir, &env)).transpose()?;
    let options = args.options.score_options();
    let evaluation = eval::evaluate(model.as_ref(), &dataset, &options, args.bm25)?;
    if args.json { print(&evaluation.to_json().to_string()) } else { print(&evaluation.table()) }
}
