//! From parsed arguments to jobs.

use std::io::{self, IsTerminal, Write};

use clap::CommandFactory as _;
use rr_launch::contract::{WorkerEnv, exit_code, preemption};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::ChronoUtc;

use super::output::print;
use super::{CheckArgs, Cli, Command, DistillArgs, PlanArgs, check, convert, eval, score};
use crate::config::Plan;
use crate::error::{Error, Result};
use crate::torch_ext::runtime;
use crate::train;

/// Does what the command line asks for; returns the process's exit code.
///
/// # Errors
/// What the job reports; [`Error::exit_code`] tells the process's exit code.
pub fn run(cli: &Cli) -> Result<u8> {
    let done = match &cli.command {
        Command::Train(args) => return train(args),
        Command::Distill(args) => return distill(args),
        // Under a launcher every rank runs the command, but one plan and one conversion are enough.
        // What the launcher itself asks for is its own, whatever rank Slurm gives it.
        Command::Check(CheckArgs { for_launch: false, .. }) | Command::Convert(_)
            if WorkerEnv::from_env().is_ok_and(|env| env.rank > 0) =>
        {
            Ok(())
        }
        Command::Check(args) => check::run(args),
        Command::Score(args) => score::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Generate { kind } => print(&kind.text(Cli::command())),
    };
    done.map(|()| exit_code::OK)
}

fn train(args: &PlanArgs) -> Result<u8> {
    as_worker(args, train_or_make_room)
}

fn distill(args: &DistillArgs) -> Result<u8> {
    as_worker(&args.plan, |plan, env| match (&plan.data.teacher, args.scores_only) {
        (None, _) => Err(train::teacher::missing(plan)),
        (Some(_), true) => {
            heed_preemption()?;
            train::teacher::run_scores(plan, env).map(|()| exit_code::OK)
        }
        (Some(_), false) => train_or_make_room(plan, env),
    })
}

/// From now on requests to make room are remembered, and no longer end this process.
pub(super) fn heed_preemption() -> Result<()> {
    preemption::listen().map_err(|error| Error::Usage(error.to_string()))
}

/// Trains, and heeds requests to make room.
fn train_or_make_room(plan: &Plan, env: &WorkerEnv) -> Result<u8> {
    heed_preemption()?;
    Ok(match train::run(plan, env)? {
        train::Ending::Done => exit_code::OK,
        train::Ending::Preempted => exit_code::PREEMPTED,
    })
}

/// Runs a job of the plan as one of the workers that the environment describes.
fn as_worker(args: &PlanArgs, job: impl FnOnce(&Plan, &WorkerEnv) -> Result<u8>) -> Result<u8> {
    let env = WorkerEnv::from_env().map_err(|error| Error::Usage(error.to_string()))?;
    start_log(env.rank);
    // Every line of this worker carries its rank, also those of its libraries.
    let _rank = tracing::info_span!("worker", rank = env.rank).entered();
    let plan = args.plan(Some(env.world_size), args.device)?;
    if plan.training.deterministic {
        runtime::keep_switches_from_reducing();
    }
    job(&plan, &env)
}

/// Rank 0 tells what happens; the others only what is wrong. `RUST_LOG` decides otherwise.
pub(super) fn start_log(rank: usize) {
    let default = if rank == 0 { "info" } else { "warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(ChronoUtc::new("%FT%TZ".to_owned()))
        .with_writer(|| LogLine(io::stderr()))
        .with_target(false)
        .with_ansi(false)
        .init();
}

/// Log lines on stderr. On a terminal each first clears what a status line left there.
struct LogLine(io::Stderr);

impl Write for LogLine {
    /// A line that cannot be written, to a full disk or a reader that has left, is lost: the job goes on.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.0.is_terminal() {
            let _ = self.0.write_all(b"\x1b[2K");
        }
        let _ = self.0.write_all(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
