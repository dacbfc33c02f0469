//! How the workers of a run meet.

use std::time::Duration;

use rr_launch::contract::WorkerEnv;
use tch::Device;

use super::same;
use crate::comm::{Communicator, Gloo, Groups, Nccl, Solo, TIMEOUT};
use crate::config::{Plan, Strategy, ZeroStage};
use crate::error::{Error, Result};
use crate::torch_ext::nccl;

/// The longest wait for another rank.
pub(super) fn timeout(plan: &Plan) -> Duration {
    plan.sources.timeout.unwrap_or(TIMEOUT)
}

/// Meets the other ranks, sees that they were told the same, and forms the groups that the strategy works
/// over.
pub(super) fn join(plan: &Plan, env: &WorkerEnv, device: Device) -> Result<Groups> {
    let timeout = timeout(plan);
    let world: Box<dyn Communicator> = match (env.world_size, device) {
        (1, _) => Box::new(Solo),
        (_, Device::Cuda(_)) => {
            let library = nccl::Nccl::load(nccl::LIBRARY).map_err(|message| {
                Error::Usage(format!("cannot load {}: {message}", nccl::LIBRARY))
            })?;
            Box::new(Nccl::join(Gloo::join(env, timeout)?, library, device, timeout)?)
        }
        _ => Box::new(Gloo::join(env, timeout)?),
    };
    if let Err(error) = same::check(&same::settings(plan), world.as_ref()) {
        // As at the end of a run that fails: no other rank is to take the end of this one for the cause.
        std::mem::forget(world);
        return Err(error);
    }
    match plan.parallel.strategy {
        Strategy::Hybrid { .. } => Groups::hybrid(world, env.local_world_size),
        Strategy::Ddp | Strategy::Zero { .. } => Ok(Groups::flat(world)),
    }
}

/// Compares the machines that the plan speaks of with those that `world_size` workers, of which
/// `local` are on this machine, are on.
///
/// # Errors
/// [`Error::Config`] that names the setting and what works.
pub fn check_machines(plan: &Plan, world_size: usize, local: usize) -> Result<()> {
    let machines = world_size.div_ceil(local.max(1));
    let asked = plan.parallel.machines;
    if asked > 1 && asked != machines {
        let message = format!(
            "{asked}, but these {world_size} worker(s) are on {machines}; start the workers of \
             every machine: rr-launch --nnodes {asked}, torchrun or srun"
        );
        return Err(plan.error("num_machines", message));
    }
    if let Strategy::Hybrid { stage } = plan.parallel.strategy
        && (machines < 2 || !world_size.is_multiple_of(local))
    {
        let flat = if stage == ZeroStage::Three { "FULL_SHARD" } else { "SHARD_GRAD_OP" };
        let message = format!(
            "hybrid sharding divides inside a machine and repeats over machines of one size, but \
             these {world_size} worker(s) are on {machines}; use {flat}"
        );
        return Err(plan.error("strategy", message));
    }
    Ok(())
}
