//! How the workers of a run meet.

use std::sync::Arc;
use std::time::Duration;

use rr_launch::contract::WorkerEnv;
use serde_json::json;
use tch::Device;

use super::same;
use crate::comm::{Communicator, Gloo, Groups, Nccl, Reduction, Solo, TIMEOUT, reduce_values};
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
    if env.world_size == 1 {
        return Ok(Groups::flat(Box::new(Solo)));
    }
    // A rank that lacks the library says so before the others wait for it.
    let library = device.is_cuda().then(load_nccl).transpose()?;
    let timeout = timeout(plan);
    let host = Gloo::join(env, timeout)?;
    if let Err(error) = check_alike(plan, env, device, &host) {
        // As at the end of a run that fails: no other rank is to take the end of this one for the cause.
        std::mem::forget(host);
        return Err(error);
    }
    let world: Box<dyn Communicator> = match library {
        Some(library) => Box::new(Nccl::join(host, library, device, timeout)?),
        None => Box::new(host),
    };
    match plan.parallel.strategy {
        Strategy::Hybrid { .. } => Groups::hybrid(world, env.local_world_size),
        Strategy::Ddp | Strategy::Zero { .. } => Ok(Groups::flat(world)),
    }
}

fn load_nccl() -> Result<Arc<nccl::Nccl>> {
    nccl::Nccl::load(nccl::LIBRARY)
        .map_err(|message| Error::Usage(format!("cannot load {}: {message}", nccl::LIBRARY)))
}

/// Compares what the ranks of `host` were told, what they compute on and how they are numbered. It comes
/// before any other collective: ranks that differ do not go on to the same ones.
fn check_alike(plan: &Plan, env: &WorkerEnv, device: Device, host: &Gloo) -> Result<()> {
    let mut facts = same::settings(plan);
    facts.insert("device".to_owned(), json!(if device.is_cuda() { "cuda" } else { "cpu" }));
    if !matches!(plan.parallel.strategy, Strategy::Hybrid { .. }) {
        return same::check(&facts, host);
    }
    let local = env.local_world_size;
    facts.insert("the number of workers on a machine".to_owned(), json!(local));
    same::check(&facts, host)?;
    let mut hosts = vec![0.0; env.world_size];
    hosts[env.rank] = own_host();
    reduce_values(host, &mut hosts, Reduction::Max)?;
    if !is_mixed(&hosts, local) {
        return Ok(());
    }
    let message = "hybrid sharding divides inside a machine, over ranks that follow each other, but those \
                   are on different machines here; number them machine by machine (srun \
                   --distribution=block, mpirun --map-by slot)";
    Err(plan.error("strategy", message))
}

/// A number that other hosts do not have; 0 where this one does not say.
fn own_host() -> f64 {
    let boot = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    f64::from(crc32fast::hash(&boot))
}

/// Whether a block of `local` ranks that follow each other is on more than one of `hosts`, those of all
/// ranks.
fn is_mixed(hosts: &[f64], local: usize) -> bool {
    hosts.chunks(local).any(|block| {
        let mut known = block.iter().filter(|&&host| host != 0.0);
        known.next().is_some_and(|first| known.any(|host| host != first))
    })
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use std::net::TcpListener;

    use super::*;
    use crate::config::Sources;

    #[test]
    fn a_rank_without_the_gpu_that_others_have_is_told_apart_when_they_meet() {
        let dir = tempfile::tempdir().unwrap();
        let training = dir.path().join("t.yaml");
        let text = "model_name_or_path: m\nmodel_type: bert_encoder\ntrain_dataset: d.jsonl\n";
        std::fs::write(&training, text).unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let start = |rank: usize, device| {
            let sources = Sources { training: training.clone(), ..Sources::default() };
            std::thread::spawn(move || {
                let plan = Plan::resolve(&sources).unwrap();
                let env = WorkerEnv::from_lookup(|name| match name {
                    "RANK" | "LOCAL_RANK" => Some(rank.to_string()),
                    "WORLD_SIZE" | "LOCAL_WORLD_SIZE" => Some("2".to_owned()),
                    "MASTER_ADDR" => Some("127.0.0.1".to_owned()),
                    "MASTER_PORT" => Some(port.to_string()),
                    _ => None,
                });
                let env = env.unwrap();
                let host = Gloo::join(&env, TIMEOUT).unwrap();
                // Its connections outlive the other's look at them.
                (check_alike(&plan, &env, device, &host).unwrap_err().to_string(), host)
            })
        };
        let ranks = [start(0, Device::Cuda(0)), start(1, Device::Cpu)];
        let ends = ranks.map(|rank| rank.join().unwrap());
        for ((error, _), device) in ends.iter().zip(["cuda", "cpu"]) {
            let says =
                format!("were given different things: device is \"{device}\" here; give all");
            assert!(error.contains(&says), "{error}");
        }
    }

    #[test]
    fn ranks_that_go_round_the_machines_are_told_from_those_that_fill_one_by_one() {
        assert!(own_host() > 0.0);
        assert!(!is_mixed(&[5.0, 5.0, 7.0, 7.0], 2));
        assert!(is_mixed(&[5.0, 7.0, 5.0, 7.0], 2));
        assert!(is_mixed(&[5.0, 5.0, 7.0, 5.0], 2));
        // Two that share a machine, as in a rehearsal, and hosts that do not say.
        assert!(!is_mixed(&[5.0; 4], 2));
        assert!(!is_mixed(&[0.0, 5.0, 7.0, 0.0], 2));
    }
}
