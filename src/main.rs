//! The `reranker` binary.

use std::process::ExitCode;

use clap::Parser;
use reranker::Error;
use reranker::cli::{Cli, run};
use reranker::torch_ext::runtime;

fn main() -> ExitCode {
    runtime::keep_freed_memory();
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let kind = if matches!(error, Error::Preempted) { "note" } else { "error" };
            eprintln!("{kind}: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
