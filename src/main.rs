//! The `reranker` binary.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use reranker::Error;
use reranker::cli::{Cli, run};
use reranker::error::tell;
use reranker::torch_ext::runtime;

/// A rank that lost another lets it end first: the kernel closes a process's connections a moment
/// before its parent can see that it has ended, and the first to end is taken for the cause.
const CAUSE_FIRST: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    runtime::keep_freed_memory();
    runtime::outlive_file_size_limit();
    let cli = Cli::parse();
    if cli.command.computes() {
        runtime::sleep_while_waiting();
        runtime::fix_cublas_workspace();
    }
    match run(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let kind = if matches!(error, Error::Preempted) { "note" } else { "error" };
            tell(format_args!("{kind}: {error}"));
            if matches!(error, Error::Comm { .. }) {
                std::thread::sleep(CAUSE_FIRST);
            }
            ExitCode::from(error.exit_code())
        }
    }
}
