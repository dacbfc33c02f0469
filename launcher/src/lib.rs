//! The launcher library: what a worker is told ([`contract`]), and how workers are started,
//! watched and ended ([`run`]).
//!
//! The way of a launch, one module a step: [`args`] (flags) → `preflight` (`reranker check`) →
//! `devices` (which GPUs) and `binding` (which CPUs) → `plan` (each worker's command and environment)
//! → `nodes` (under `requests`, the signals to the launcher, from here on; the launchers of several nodes meet) → `fleet` (processes, and `error_files` for their exceptions) → `supervise` (the event loop over `attempt` after attempt) with `lifecycle`
//! and `restarts` (what to do when something happens), `hang`, `oom` and `procfs` (what there is to
//! know), `stacks` (where workers that hang are), `report` and `summary` (what is told), `output` (lines) and `guardian` (what happens if the
//! launcher itself is killed).

pub mod args;
mod attempt;
mod binding;
pub mod contract;
mod devices;
mod error;
mod error_files;
mod fleet;
mod guardian;
mod hang;
mod lifecycle;
pub mod manual;
mod nodes;
mod oom;
mod output;
mod plan;
mod preflight;
mod procfs;
mod report;
mod requests;
mod restarts;
mod stacks;
mod summary;
mod supervise;
mod sys;

use std::ffi::OsString;
use std::io::Write as _;

use args::{Args, DeviceRequest, Invocation, Work, WorkerCommand};
use contract::{preemption, vars};
use devices::Placement;
use error::LaunchError;
use nodes::{Meeting, Place};
use output::Output;
use plan::{Plan, Rendezvous};
use requests::Requests;

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

/// What is settled before the nodes meet, or the workers start.
struct Prepared {
    command: WorkerCommand,
    placement: Placement,
    /// What the check said the run will do.
    text: String,
}

/// From flags to the job's exit code.
fn launch(args: &Args) -> Result<u8, LaunchError> {
    sys::wait_for_own_children();
    sys::outlive_file_size_limit();
    let mut options = args.supervision()?;
    let requests = Requests::take_over(options.preempt_signal)?;
    let place = place(args)?;
    let (nnodes, node) = place.as_ref().map_or((1, 0), |place| (place.nnodes, place.node_rank));
    if args.dry_run {
        let mut plan = plan(
            args,
            prepare(args, nnodes, node, &requests)?,
            Rendezvous::once_more(args.master_port)?,
        )?;
        if let Some(place) = &place {
            plan.imagine(place);
        }
        // As above: whoever closes stdout has read enough.
        let _ = write!(std::io::stdout(), "{plan}");
        return Ok(contract::exit_code::OK);
    }
    let Some(place) = place else {
        let prepared = prepare(args, nnodes, node, &requests)?;
        // A free port is chosen last, to leave others little time to take it.
        let plan = plan(args, prepared, Rendezvous::on_this_host(args.master_port)?)?;
        let output = Output::open(options.output.clone())?;
        requests.heed()?;
        return supervise::run(plan, options, requests, output, None);
    };
    options.output.log_dir = options.output.log_dir.map(|dir| dir.join(format!("node-{node}")));
    let meeting = Meeting::open(place)?;
    let prepared = prepare(args, nnodes, node, &requests).and_then(|prepared| {
        let terms = args.terms(nnodes, prepared.placement.device())?;
        let plan = plan(args, prepared, Rendezvous::nowhere())?;
        // What keeps this node from starting is known before the others begin.
        Ok((plan, terms, Output::open(options.output.clone())?))
    });
    let (mut plan, terms, output) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            let code = fail(&error);
            meeting.decline(code, &requests);
            return Ok(code);
        }
    };
    let cluster =
        meeting.meet(plan.workers(), terms, plan.run_id(), args.master_port, &requests)?;
    plan.name(cluster.world().run_id.clone());
    plan.restart(0, cluster.rendezvous());
    plan.join(cluster.standing());
    supervise::run(plan, options, requests, output, Some(cluster))
}

/// Which node of how many this is; `None` for one alone.
fn place(args: &Args) -> Result<Option<Place>, LaunchError> {
    let place = args.nodes.place()?;
    match place.as_ref().map(|place| place.port).filter(|&port| args.master_port == Some(port)) {
        Some(port) => Err(LaunchError::Usage(format!(
            "--master-port: node 0 listens on port {port} for the other nodes (--rdzv); choose another, or \
             leave the flag out to get a free one"
        ))),
        None => Ok(place),
    }
}

/// What is checked, and decided by this machine alone.
fn prepare(
    args: &Args,
    nnodes: usize,
    node: usize,
    requests: &Requests,
) -> Result<Prepared, LaunchError> {
    // What was asked for by name is checked before anything is started, the check step included. Rank 0,
    // which listens, is on node 0.
    if args.master_port.is_some() && node == 0 {
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
    match args.work()? {
        Work::Program(command) => {
            preflight::require_program(&command.program)?;
            let placement = place(&contract::LaunchPlan::default())?;
            Ok(Prepared { command, placement, text: String::new() })
        }
        Work::Train(flags) => {
            let reranker = preflight::find_reranker()?;
            let advice =
                preflight::check(&reranker, &flags, asked.as_ref(), args.cpu, nnodes, requests)?;
            let advice = devices::share_of_node(advice, nnodes)?;
            let placement = place(&advice)?;
            let command = flags.train_command(&reranker, placement.device());
            Ok(Prepared { command, placement, text: advice.text })
        }
    }
}

/// Each worker's command and environment.
fn plan(args: &Args, prepared: Prepared, rendezvous: Rendezvous) -> Result<Plan, LaunchError> {
    let Prepared { command, placement, text } = prepared;
    for warning in placement.warnings(std::env::var(vars::CUDA_DEVICE_ORDER).ok().as_deref()) {
        let _ = writeln!(std::io::stderr(), "rr-launch: {warning}");
    }
    let shares = binding::shares(&binding::topology(), &placement.nodes(), args.bind);
    let shares = shares.map_err(LaunchError::Usage)?;
    let mut plan = Plan::new(command, placement, rendezvous, text);
    plan.bind(shares);
    if let Some(run_id) = &args.nodes.run_id {
        plan.name(run_id.clone());
    }
    plan.share(vars::TORCHELASTIC_MAX_RESTARTS, args.max_restarts.to_string());
    // Our own workers only: how a program of the user waits is the user's affair.
    let is_ours = matches!(args.work()?, Work::Train(_));
    if is_ours {
        plan.share(vars::RR_CHECKED, "1".to_owned());
    }
    if is_ours && !contract::says_how_threads_wait() {
        plan.share(vars::OMP_WAIT_POLICY, "passive".to_owned());
    }
    if !is_ours {
        let names = [vars::PYTHONUNBUFFERED, vars::TORCH_NCCL_ASYNC_ERROR_HANDLING];
        for name in names.into_iter().filter(|name| std::env::var_os(name).is_none()) {
            plan.share(name, "1".to_owned());
        }
    }
    let options = args.supervision()?;
    let highest = options.output.show.highest().filter(|_| args.nodes.nnodes.is_none());
    if let Some(rank) = highest.filter(|&rank| rank >= plan.workers()) {
        let last = plan.workers() - 1;
        let trouble = format!("--show: there is no rank {rank}; ranks go from 0 to {last}");
        return Err(LaunchError::Usage(trouble));
    }
    if is_ours {
        // They listen as soon as they run; libtorch takes a second to load, or many from a cold disk.
        plan.hold_back(preemption::signals(options.preempt_signal));
    }
    if let Some(signal) = options.preempt_signal {
        plan.share(vars::RR_PREEMPT_SIGNAL, preemption::value(signal));
    }
    Ok(plan)
}
