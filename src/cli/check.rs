//! `reranker check`: whether a run would start, and what it would do.

use rr_launch::contract::{LaunchPlan, WorkerEnv};
use serde_json::{Map, Value, json};

use super::commands::start_log;
use super::output::print;
use super::{CheckArgs, DeviceArg};
use crate::config::{Origin, Plan};
use crate::error::Result;
use crate::torch_ext::runtime;
use crate::train;

/// Checks a configuration and everything it names, and prints the plan.
pub(super) fn run(args: &CheckArgs) -> Result<()> {
    start_log(0);
    let device = args.gpus.map(|_| DeviceArg::Cuda).or(args.plan.device);
    let asked = args.gpus.or(args.nproc);
    let launch = launch().filter(|_| asked.is_none() && !args.for_launch);
    let plan = args.plan.plan(asked.or(launch.as_ref().map(|env| env.world_size)), device)?;
    train::check_output(&plan)?;
    let workers = plan.parallel.processes.unwrap_or(1);
    // rr-launch knows on how many machines it starts workers, and looks after their GPUs itself.
    let machines = if args.for_launch { args.nnodes.max(1) } else { plan.parallel.machines };
    let local = launch.map_or(workers.div_ceil(machines), |env| env.local_world_size);
    train::check_machines(&plan, workers, local)?;
    if !args.for_launch && args.gpus.is_none() {
        runtime::device(plan.parallel.device, 0)?;
    }
    train::check_trackers(&plan)?;
    train::inputs::settle(&plan);
    let inputs = train::Inputs::load(&plan, workers, false)?;
    train::check_resume(&plan, &inputs, workers)?;
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
    let preflight = train::Preflight::new(&inputs, &plan, workers, local)?;
    if args.json {
        return print(&checked_json(&plan, &preflight).to_string());
    }
    let mut lines = vec![plan.describe().trim_end().to_owned()];
    lines.extend(plan.notices.iter().map(|notice| format!("note: {notice}")));
    lines.push(preflight.chart());
    print(&lines.join("\n"))
}

/// The launch that this is part of, where it has several workers.
fn launch() -> Option<WorkerEnv> {
    WorkerEnv::from_env().ok().filter(|env| env.world_size > 1)
}

/// What `check --json` prints: the plan, where its settings were given, and what lies ahead.
fn checked_json(plan: &Plan, preflight: &train::Preflight) -> Value {
    let place = |(key, origin): (&String, &Origin)| (key.clone(), json!(origin.place.to_string()));
    json!({
        "plan": plan.to_json(),
        "origins": plan.origins.iter().map(place).collect::<Map<_, _>>(),
        "notices": plan.notices,
        "preflight": preflight,
    })
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
