//! The launcher library: what a worker is told ([`contract`]), and how workers are started,
//! watched and ended ([`run`]).
//!
//! The way of a launch, one module a step: [`args`] (flags) → `preflight` (`reranker check`) →
//! `devices` (which GPUs) and `binding` (which CPUs) → `plan` (each worker's command and environment)
//! → `fleet` (processes) → `supervise` (the event loop over `attempt` after attempt) with `lifecycle`
//! and `restarts` (what to do when something happens), `hang`, `oom` and `procfs` (what there is to
//! know), `report` and `summary` (what is told), `output` (lines) and `guardian` (what happens if the
//! launcher itself is killed).

pub mod args;
mod attempt;
mod binding;
pub mod contract;
mod devices;
mod error;
mod fleet;
mod guardian;
mod hang;
mod lifecycle;
pub mod manual;
mod oom;
mod output;
mod plan;
mod preflight;
mod procfs;
mod report;
mod restarts;
mod summary;
mod supervise;
mod sys;

use std::ffi::OsString;
use std::io::Write as _;

use args::{Args, DeviceRequest, Invocation, Work};
use contract::vars;
use devices::Placement;
use error::LaunchError;
use plan::{Plan, Rendezvous};

/// Runs the launcher with the process's command line and returns its exit code (see
/// [`contract::exit_code`]). Errors are one line on stderr.
#[must_use]
pub fn run(command_line: impl IntoIterator<Item = OsString>) -> u8 {
    let invocation = match Args::read(command_line) {
        Ok(Invocation::Launch(args)) => args,
        Ok(Invocation::Show(text)) => {
            // A closed stdout (`--help | head`) is no reason to complain.
            let _ = write!(std::io::stdout(), "{text}");
            return contract::exit_code::OK;
        }
        Err(error) => return fail(&error),
    };
    launch(&invocation).unwrap_or_else(|error| fail(&error))
}

fn fail(error: &LaunchError) -> u8 {
    if let Some(line) = error.line() {
        let _ = writeln!(std::io::stderr(), "rr-launch: {line}");
    }
    error.exit_code()
}

/// From flags to the job's exit code.
fn launch(args: &Args) -> Result<u8, LaunchError> {
    sys::wait_for_own_children();
    // What was asked for by name is checked before anything is started, the check step included.
    if args.master_port.is_some() {
        Rendezvous::on_this_host(args.master_port)?;
    }
    let asked = match args.devices() {
        DeviceRequest::Gpus(request) => Some(devices::place_on_gpus(&request)?),
        DeviceRequest::Cpu { workers: Some(workers) } => Some(Placement::Cpu { workers }),
        DeviceRequest::Cpu { workers: None } | DeviceRequest::Unsaid => None,
    };
    let place = |advice: &contract::LaunchPlan| match &asked {
        Some(placement) => Ok(placement.clone()),
        None => devices::place_as_advised(advice, args.cpu),
    };
    let (command, placement, advice) = match args.work()? {
        Work::Program(command) => {
            preflight::require_program(&command.program)?;
            let advice = contract::LaunchPlan::default();
            (command, place(&advice)?, advice)
        }
        Work::Train(flags) => {
            let reranker = preflight::find_reranker()?;
            let advice = preflight::check(&reranker, &flags, asked.as_ref(), args.cpu)?;
            let placement = place(&advice)?;
            (flags.train_command(&reranker, placement.device()), placement, advice)
        }
    };
    // A free port is chosen last, to leave others little time to take it.
    let rendezvous = Rendezvous::on_this_host(args.master_port)?;
    for warning in placement.warnings() {
        let _ = writeln!(std::io::stderr(), "rr-launch: {warning}");
    }
    let shares = binding::shares(&binding::topology(), &placement.nodes(), args.bind);
    let shares = shares.map_err(LaunchError::Usage)?;
    let mut plan = Plan::new(command, placement, rendezvous, advice.text);
    plan.bind(shares);
    plan.share(vars::TORCHELASTIC_MAX_RESTARTS, args.max_restarts.to_string());
    let options = args.supervision()?;
    if let Some(rank) = options.output.show.highest().filter(|&rank| rank >= plan.workers()) {
        let last = plan.workers() - 1;
        let trouble = format!("--show: there is no rank {rank}; ranks go from 0 to {last}");
        return Err(LaunchError::Usage(trouble));
    }
    if let Some(signal) = options.preempt_signal {
        plan.share(vars::RR_PREEMPT_SIGNAL, sys::signal_name(signal));
    }
    if args.dry_run {
        // As above: whoever closes stdout has read enough.
        let _ = write!(std::io::stdout(), "{plan}");
        return Ok(contract::exit_code::OK);
    }
    supervise::run(plan, options)
}
