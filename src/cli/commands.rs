//! From parsed arguments to jobs.

use std::io::{self, IsTerminal, Write};

use rr_launch::contract::{LaunchPlan, WorkerEnv};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::ChronoUtc;

use super::output::print;
use super::{CheckArgs, Cli, Command, DeviceArg, DistillArgs, PlanArgs, convert, eval, score};
use crate::config::Plan;
use crate::error::{Error, Result};
use crate::train;

/// Does what the command line asks for.
///
/// # Errors
/// What the job reports; [`Error::exit_code`] tells the process's exit code.
pub fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Train(args) => train(args),
        Command::Distill(args) => distill(args),
        Command::Check(args) => check(args),
        Command::Score(args) => score::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Convert(args) => convert::run(args),
    }
}

fn train(args: &PlanArgs) -> Result<()> {
    as_worker(args, train::run)
}

fn distill(args: &DistillArgs) -> Result<()> {
    let job = if args.scores_only { train::teacher::run_scores } else { train::run };
    as_worker(&args.plan, |plan, env| match plan.data.teacher {
        Some(_) => job(plan, env),
        None => Err(train::teacher::missing(plan)),
    })
}

/// Runs a job of the plan as one of the workers that the environment describes.
fn as_worker(args: &PlanArgs, job: impl FnOnce(&Plan, &WorkerEnv) -> Result<()>) -> Result<()> {
    let env = WorkerEnv::from_env().map_err(|error| Error::Usage(error.to_string()))?;
    start_log(env.rank);
    // Every line of this worker carries its rank, also those of its libraries.
    let _rank = tracing::info_span!("worker", rank = env.rank).entered();
    job(&args.plan(Some(env.world_size), args.device)?, &env)
}

/// Rank 0 tells what happens; the others only what is wrong. `RUST_LOG` decides otherwise.
fn start_log(rank: usize) {
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
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.0.is_terminal() {
            self.0.write_all(b"\x1b[2K")?;
        }
        self.0.write_all(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn check(args: &CheckArgs) -> Result<()> {
    start_log(0);
    let device = args.gpus.map(|_| DeviceArg::Cuda).or(args.plan.device);
    let plan = args.plan.plan(args.gpus.or(args.nproc), device)?;
    train::check_output(&plan)?;
    let workers = plan.parallel.processes.unwrap_or(1);
    if args.for_launch {
        // rr-launch starts the workers of one machine.
        train::check_machines(&plan, workers, workers)?;
    }
    let inputs = train::Inputs::load(&plan, workers)?;
    train::check_resume(&plan, &inputs, workers)?;
    train::check_trackers(&plan)?;
    train::teacher::check(&plan)?;
    if args.for_launch {
        let launch = LaunchPlan {
            processes: plan.parallel.processes,
            device: plan.parallel.device.map(|device| device.to_string()),
            gpu_ids: plan.parallel.gpu_ids.clone(),
            text: plan.describe(),
        };
        return print(&serde_json::to_string(&launch).unwrap_or_default());
    }
    let mut lines = vec![plan.describe().trim_end().to_owned()];
    lines.extend(plan.notices.iter().map(|notice| format!("note: {notice}")));
    lines.push(inputs.describe(&plan, workers)?);
    print(&lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_one_line_for_the_launcher() {
        let plan =
            LaunchPlan { processes: Some(2), device: None, gpu_ids: None, text: "a\nb".to_owned() };
        assert!(!serde_json::to_string(&plan).unwrap_or_default().contains('\n'));
    }
}
