//! The environment contract between a launcher and its workers: names, exit codes, and the one
//! place where a worker learns who it is.
//!
//! `rr-launch` writes the contract with [`WorkerEnv::to_vars`]; a worker reads it with
//! [`WorkerEnv::from_env`], which also understands torchrun, Slurm's `srun` and Open MPI's
//! `mpirun`.

pub mod error_file;
pub mod heartbeat;
mod job;
pub mod nodes;
pub mod preemption;
mod slurm;

pub use crate::devices::gpu_is_visible;

use std::fmt::Display;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use self::job::Job;

/// Every environment variable that the launcher or a worker reads or writes.
pub mod vars {
    /// This worker's number among all workers, from 0.
    pub const RANK: &str = "RANK";
    /// This worker's number on its host, from 0; a GPU worker uses `cuda:LOCAL_RANK`.
    pub const LOCAL_RANK: &str = "LOCAL_RANK";
    /// The number of workers on all hosts.
    pub const WORLD_SIZE: &str = "WORLD_SIZE";
    /// The number of workers on this host.
    pub const LOCAL_WORLD_SIZE: &str = "LOCAL_WORLD_SIZE";
    /// This host's number among all hosts, from 0.
    pub const GROUP_RANK: &str = "GROUP_RANK";
    /// deepspeed's name of [`LOCAL_WORLD_SIZE`].
    pub const LOCAL_SIZE: &str = "LOCAL_SIZE";
    /// deepspeed's name of [`GROUP_RANK`].
    pub const CROSS_RANK: &str = "CROSS_RANK";
    /// The number of hosts; torchrun's name.
    pub const GROUP_WORLD_SIZE: &str = "GROUP_WORLD_SIZE";
    /// torchrun's name of the one role that there is.
    pub const ROLE_NAME: &str = "ROLE_NAME";
    /// torchrun's rank among workers of one role; there is one role, so it is [`RANK`].
    pub const ROLE_RANK: &str = "ROLE_RANK";
    /// torchrun's number of workers of one role; it is [`WORLD_SIZE`].
    pub const ROLE_WORLD_SIZE: &str = "ROLE_WORLD_SIZE";
    /// The host on which rank 0 listens for the rendezvous.
    pub const MASTER_ADDR: &str = "MASTER_ADDR";
    /// The TCP port on which rank 0 listens for the rendezvous.
    pub const MASTER_PORT: &str = "MASTER_PORT";
    /// The GPUs of all workers of this host, in the order of their local ranks; empty on the CPU.
    pub const CUDA_VISIBLE_DEVICES: &str = "CUDA_VISIBLE_DEVICES";
    /// Set to `PCI_BUS_ID`, so that CUDA counts GPUs as NVML and nvidia-smi do; another value is kept where GPUs
    /// are named by UUIDs alone.
    pub const CUDA_DEVICE_ORDER: &str = "CUDA_DEVICE_ORDER";
    /// Threads per worker; set when unset and there is more than one worker.
    pub const OMP_NUM_THREADS: &str = "OMP_NUM_THREADS";
    /// How OpenMP's threads wait for one another; set to `passive` for `reranker train` when unset.
    pub const OMP_WAIT_POLICY: &str = "OMP_WAIT_POLICY";
    /// The same, as libgomp's own setting: how often a thread looks before it sleeps.
    pub const GOMP_SPINCOUNT: &str = "GOMP_SPINCOUNT";
    /// Set to `1` for any program when unset, as by `python -u`, which torchrun runs: what a rank has
    /// printed is not lost with it.
    pub const PYTHONUNBUFFERED: &str = "PYTHONUNBUFFERED";
    /// Set to `1` for any program when unset, as by torchrun: NCCL's errors end a process.
    pub const TORCH_NCCL_ASYNC_ERROR_HANDLING: &str = "TORCH_NCCL_ASYNC_ERROR_HANDLING";
    /// One identifier for all workers of a launch, the same over restarts.
    pub const RR_RUN_ID: &str = "RR_RUN_ID";
    /// How often the workers of this run have been restarted.
    pub const RR_RESTART_COUNT: &str = "RR_RESTART_COUNT";
    /// `1` for the one worker that may draw a progress bar: status lines that end in `\r`.
    pub const RR_PROGRESS: &str = "RR_PROGRESS";
    /// `1` for workers that start after `reranker check` on their host: what it asked of others is not
    /// asked again.
    pub const RR_CHECKED: &str = "RR_CHECKED";
    /// Where this worker writes its heartbeats (see [`super::heartbeat`]).
    pub const RR_HEARTBEAT: &str = "RR_HEARTBEAT";
    /// A signal, such as `TERM`, that asks for a checkpoint and an end, beside USR1 and USR2.
    pub const RR_PREEMPT_SIGNAL: &str = "RR_PREEMPT_SIGNAL";
    /// The launcher that started a worker, one of its own on each node: what its guardian looks for.
    pub const RR_LAUNCHER: &str = "RR_LAUNCHER";
    /// Read by the launcher: the `reranker` program to run instead of the one beside it.
    pub const RR_RERANKER: &str = "RR_RERANKER";
    /// torchrun's name of [`RR_RUN_ID`]; its presence tells a program that it was launched.
    pub const TORCHELASTIC_RUN_ID: &str = "TORCHELASTIC_RUN_ID";
    /// torchrun's name of [`RR_RESTART_COUNT`].
    pub const TORCHELASTIC_RESTART_COUNT: &str = "TORCHELASTIC_RESTART_COUNT";
    /// How many restarts torchrun would allow.
    pub const TORCHELASTIC_MAX_RESTARTS: &str = "TORCHELASTIC_MAX_RESTARTS";
    /// `False`: rank 0 hosts the rendezvous store; `True`: torchrun's agent does.
    pub const TORCHELASTIC_USE_AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";
    /// Where a PyTorch program records its exception (see [`super::error_file`]).
    pub const TORCHELASTIC_ERROR_FILE: &str = "TORCHELASTIC_ERROR_FILE";
    /// Slurm: the rank of this task in the step.
    pub const SLURM_PROCID: &str = "SLURM_PROCID";
    /// Slurm: the rank of this task on its node.
    pub const SLURM_LOCALID: &str = "SLURM_LOCALID";
    /// Slurm: the number of tasks in the step.
    pub const SLURM_STEP_NUM_TASKS: &str = "SLURM_STEP_NUM_TASKS";
    /// Slurm: the number of this node in the step.
    pub const SLURM_NODEID: &str = "SLURM_NODEID";
    /// Slurm: tasks on each node of this step, such as `4(x2),3`.
    pub const SLURM_STEP_TASKS_PER_NODE: &str = "SLURM_STEP_TASKS_PER_NODE";
    /// Slurm: the hosts of the job, such as `node[003-005,9]`.
    pub const SLURM_JOB_NODELIST: &str = "SLURM_JOB_NODELIST";
    /// Slurm: the number of the job.
    pub const SLURM_JOB_ID: &str = "SLURM_JOB_ID";
    /// Slurm: the number of nodes of this step.
    pub const SLURM_STEP_NUM_NODES: &str = "SLURM_STEP_NUM_NODES";
    /// Slurm: the number of nodes of the job.
    pub const SLURM_NNODES: &str = "SLURM_NNODES";
    /// Slurm: its newer name.
    pub const SLURM_JOB_NUM_NODES: &str = "SLURM_JOB_NUM_NODES";
    /// Slurm: the hosts of this step, such as `node[003-005,9]`.
    pub const SLURM_STEP_NODELIST: &str = "SLURM_STEP_NODELIST";
    /// Slurm: the number of the step in the job. The batch script itself has none.
    pub const SLURM_STEP_ID: &str = "SLURM_STEP_ID";
    /// Kubernetes' `PyTorchJob`: the number of pods.
    pub const PET_NNODES: &str = "PET_NNODES";
    /// Kubernetes' `PyTorchJob`: the number of this pod.
    pub const PET_NODE_RANK: &str = "PET_NODE_RANK";
    /// Kubernetes' `PyTorchJob`: the host of pod 0.
    pub const PET_MASTER_ADDR: &str = "PET_MASTER_ADDR";
    /// Kubernetes' `PyTorchJob`: a port of pod 0.
    pub const PET_MASTER_PORT: &str = "PET_MASTER_PORT";
    /// Open MPI: the rank of this process.
    pub const OMPI_COMM_WORLD_RANK: &str = "OMPI_COMM_WORLD_RANK";
    /// Open MPI: the number of processes.
    pub const OMPI_COMM_WORLD_SIZE: &str = "OMPI_COMM_WORLD_SIZE";
    /// Open MPI: the rank of this process on its host.
    pub const OMPI_COMM_WORLD_LOCAL_RANK: &str = "OMPI_COMM_WORLD_LOCAL_RANK";
    /// Open MPI: the number of processes on this host.
    pub const OMPI_COMM_WORLD_LOCAL_SIZE: &str = "OMPI_COMM_WORLD_LOCAL_SIZE";
    /// Open MPI 4 and earlier: the identifier of the job.
    pub const OMPI_MCA_ESS_BASE_JOBID: &str = "OMPI_MCA_ess_base_jobid";
    /// `PMIx` (Open MPI 5 and later): the identifier of the job.
    pub const PMIX_NAMESPACE: &str = "PMIX_NAMESPACE";
}

/// Whether the environment says how OpenMP's threads wait for one another. Nobody overrules it.
#[must_use]
pub fn says_how_threads_wait() -> bool {
    let is_set = |name| std::env::var_os(name).is_some();
    [vars::OMP_WAIT_POLICY, vars::GOMP_SPINCOUNT].into_iter().any(is_set)
}

/// Exit codes of the launcher and of its workers. 40 to 63 are the launcher's own outcomes, which
/// programs hardly use.
pub mod exit_code {
    /// Everything was done.
    pub const OK: u8 = 0;
    /// A worker, or the launcher, failed for a reason that is not the user's. A worker's own code
    /// other than 0 becomes the launcher's.
    pub const FAILURE: u8 = 1;
    /// The command line, a file or the machine cannot give what was asked for. Never restarted.
    pub const USER_ERROR: u8 = 2;
    /// A worker could not save a checkpoint, and ended over it; earlier ones are whole.
    pub const CANNOT_SAVE: u8 = 4;
    /// No worker made progress for as long as `--hang-timeout` allows.
    pub const HANG: u8 = 40;
    /// The workers were asked to make room, have saved a checkpoint, and can go on from it.
    pub const PREEMPTED: u8 = 41;
    /// A failure after the last restart that `--max-restarts` allows.
    pub const OUT_OF_RESTARTS: u8 = 42;
    /// Starting again would end the same way. A worker that exits so is not restarted.
    pub const DO_NOT_REQUEUE: u8 = 43;
    /// Another node was lost: its launcher, or the network to it. Or it never came.
    pub const NODE_LOST: u8 = 44;
    /// Added to a signal's number when a signal ended a worker or the launcher.
    pub const SIGNAL_BASE: u8 = 128;

    /// The exit code for an end by `signal`: 139 for SIGSEGV (11).
    #[must_use]
    pub const fn of_signal(signal: i32) -> u8 {
        SIGNAL_BASE | (signal as u8 & 0x7f)
    }
}

/// Where rank 0 listens when `MASTER_PORT` is unset: below Linux's range of outgoing ports (32768 and
/// up), so that no outgoing connection can sit on the port, and below what Kubernetes gives to services (30000).
pub(crate) const DERIVED_PORTS: std::ops::Range<u16> = 15_000..30_000;

/// The only address that a world on one host needs.
pub(crate) const LOOPBACK: &str = "127.0.0.1";

/// Why a worker cannot tell who it is. `Display` is one line for the user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ContractError {
    /// A variable holds no number in the expected range.
    #[error("environment variable {name} is `{value}`, expected {expected}")]
    Invalid {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold.
        expected: String,
    },
    /// A variable that the others call for is not set.
    #[error("environment variable {name} is not set, but {because}; set it on every worker")]
    Missing {
        /// The variable.
        name: &'static str,
        /// What calls for it.
        because: String,
    },
    /// A Slurm job has several nodes, but this runs on the first of them alone.
    #[error(
        "the job has {nodes} nodes, but srun did not start this: put srun --ntasks-per-node 1 before it"
    )]
    NotOfSrun {
        /// Nodes of the job.
        nodes: usize,
    },
    /// The thread that receives signals cannot be started.
    #[error("signals that ask to make room cannot be received: {0}")]
    Signals(String),
}

/// Who a worker is and where its peers meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerEnv {
    /// Number among all workers, from 0.
    pub rank: usize,
    /// Number on this host, from 0.
    pub local_rank: usize,
    /// Workers on all hosts.
    pub world_size: usize,
    /// Workers on this host.
    pub local_world_size: usize,
    /// Number of this host, from 0.
    pub group_rank: usize,
    /// Host of the rendezvous.
    pub master_addr: String,
    /// Port of the rendezvous; 0 in a world of one, which needs none.
    pub master_port: u16,
    /// Identifier of the launch, where a launcher gave one.
    pub run_id: Option<String>,
    /// Restarts before this start.
    pub restart_count: u32,
    /// Whether this worker may draw a progress bar (status lines that end in `\r`).
    pub progress: bool,
}

impl WorkerEnv {
    /// Reads the process environment.
    ///
    /// # Errors
    /// [`ContractError`] when a variable is malformed, contradicts another or is missing.
    pub fn from_env() -> Result<Self, ContractError> {
        Self::from_lookup(|name| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()))
    }

    /// Reads variables through `lookup`: `RANK` and its companions if `RANK` is set, else Open
    /// MPI's, else those of a step of `srun`, else a world of one. A `RANK` that repeats one of the
    /// others counts as that.
    ///
    /// Open MPI goes before Slurm because under `mpirun` inside a Slurm job a worker also
    /// inherits the Slurm variables of the daemon that started it.
    ///
    /// # Errors
    /// [`ContractError`] when a variable is malformed, contradicts another or is missing.
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, ContractError> {
        let lookup = Lookup(&lookup);
        let mut worker = if lookup.has(vars::RANK) && !job::is_repeated(&lookup)? {
            Self::from_torchrun(&lookup)?
        } else if lookup.has(vars::OMPI_COMM_WORLD_RANK) {
            Self::from_open_mpi(&lookup)?
        } else if job::is_of_srun(&lookup)? {
            Self::from_slurm(&lookup)?
        } else {
            Self::alone()
        };
        worker.run_id =
            lookup.get(vars::RR_RUN_ID).or_else(|| lookup.get(vars::TORCHELASTIC_RUN_ID));
        worker.restart_count = match lookup.optional(vars::RR_RESTART_COUNT)? {
            Some(count) => count,
            None => lookup.optional(vars::TORCHELASTIC_RESTART_COUNT)?.unwrap_or(0),
        };
        worker.progress = lookup.get(vars::RR_PROGRESS).is_some_and(|value| value == "1");
        Ok(worker)
    }

    /// The variables that tell a worker all this, torchrun's own names included.
    #[must_use]
    pub fn to_vars(&self) -> Vec<(&'static str, String)> {
        let mut list = vec![
            (vars::RANK, self.rank.to_string()),
            (vars::LOCAL_RANK, self.local_rank.to_string()),
            (vars::WORLD_SIZE, self.world_size.to_string()),
            (vars::LOCAL_WORLD_SIZE, self.local_world_size.to_string()),
            (vars::GROUP_RANK, self.group_rank.to_string()),
            (vars::ROLE_RANK, self.rank.to_string()),
            (vars::ROLE_WORLD_SIZE, self.world_size.to_string()),
            (vars::MASTER_ADDR, self.master_addr.clone()),
            (vars::MASTER_PORT, self.master_port.to_string()),
            (vars::RR_RESTART_COUNT, self.restart_count.to_string()),
            (vars::TORCHELASTIC_RESTART_COUNT, self.restart_count.to_string()),
            (vars::TORCHELASTIC_USE_AGENT_STORE, "False".to_owned()),
        ];
        if let Some(run_id) = &self.run_id {
            list.push((vars::RR_RUN_ID, run_id.clone()));
            list.push((vars::TORCHELASTIC_RUN_ID, run_id.clone()));
        }
        if self.progress {
            list.push((vars::RR_PROGRESS, "1".to_owned()));
        }
        list
    }

    /// A worker that nobody launched.
    fn alone() -> Self {
        Self {
            rank: 0,
            local_rank: 0,
            world_size: 1,
            local_world_size: 1,
            group_rank: 0,
            master_addr: LOOPBACK.to_owned(),
            master_port: 0,
            run_id: None,
            restart_count: 0,
            progress: false,
        }
    }

    /// `RANK` and its companions, as torchrun, rr-launch or a Kubernetes `PyTorchJob` set them. The
    /// last gives no local rank, and runs one worker per host. deepspeed's launcher calls the workers
    /// of a host `LOCAL_SIZE`; where both are missing, all workers are on this host.
    fn from_torchrun(lookup: &Lookup<'_>) -> Result<Self, ContractError> {
        let world_size = lookup.require_size(vars::WORLD_SIZE, || format!("{} is", vars::RANK))?;
        let rank = lookup.require_rank(vars::RANK, vars::WORLD_SIZE, world_size)?;
        let local_names = [vars::LOCAL_WORLD_SIZE, vars::LOCAL_SIZE];
        let local_size = local_names.into_iter().find(|name| lookup.has(name));
        let local_world_size = if let Some(name) = local_size {
            lookup.require_size(name, String::new)?
        } else if lookup.has(vars::LOCAL_RANK) {
            world_size
        } else {
            1
        };
        let local_rank = if lookup.has(vars::LOCAL_RANK) {
            let size = local_size.unwrap_or(vars::WORLD_SIZE);
            lookup.require_rank(vars::LOCAL_RANK, size, local_world_size)?
        } else {
            0
        };
        if !lookup.has(vars::LOCAL_RANK) {
            // A PyTorchJob of several processes a pod (nprocPerNode) counts those, but starts pods.
            let pods = lookup.get(vars::PET_NNODES).and_then(|pods| pods.parse::<usize>().ok());
            let expected = "PET_NNODES: one worker a pod (rr-launch --nnodes auto starts several)";
            let fits = |&size: &usize| pods.is_none_or(|pods| pods == size);
            lookup.parse(vars::WORLD_SIZE, expected, fits)?;
        }
        let group_rank = match lookup.optional(vars::GROUP_RANK)? {
            None => lookup.optional(vars::CROSS_RANK)?.unwrap_or(0),
            Some(rank) => rank,
        };
        let because = || format!("{} is {world_size}", vars::WORLD_SIZE);
        let mut worker =
            Self { rank, local_rank, world_size, local_world_size, group_rank, ..Self::alone() };
        match lookup.get(vars::MASTER_ADDR).filter(|host| !host.is_empty()) {
            Some(host) => worker.master_addr = host,
            None if world_size == 1 => {}
            None => {
                return Err(ContractError::Missing { name: vars::MASTER_ADDR, because: because() });
            }
        }
        match lookup.port(vars::MASTER_PORT)? {
            Some(port) => worker.master_port = port,
            None if world_size == 1 => {}
            None => {
                return Err(ContractError::Missing { name: vars::MASTER_PORT, because: because() });
            }
        }
        Ok(worker)
    }

    /// A task of `srun`. `SLURM_NTASKS` and its like may be the job's: only those of the step count.
    fn from_slurm(lookup: &Lookup<'_>) -> Result<Self, ContractError> {
        let because = || format!("{} is", vars::SLURM_STEP_ID);
        let world_size = lookup.require_size(vars::SLURM_STEP_NUM_TASKS, because)?;
        let rank =
            lookup.require_rank(vars::SLURM_PROCID, vars::SLURM_STEP_NUM_TASKS, world_size)?;
        let group_rank = lookup.optional(vars::SLURM_NODEID)?.unwrap_or(0);
        let local_rank: usize = lookup.optional(vars::SLURM_LOCALID)?.unwrap_or(0);
        let local_world_size = lookup
            .get(vars::SLURM_STEP_TASKS_PER_NODE)
            .and_then(|list| slurm::tasks_on_node(&list, group_rank))
            // Every node that Slurm does not describe holds at least this task.
            .unwrap_or(local_rank + 1)
            .max(local_rank + 1);
        let worker =
            Self { rank, local_rank, world_size, local_world_size, group_rank, ..Self::alone() };
        worker.meet(lookup, Job::of_slurm_step(lookup)?)
    }

    /// A process of Open MPI's `mpirun`.
    fn from_open_mpi(lookup: &Lookup<'_>) -> Result<Self, ContractError> {
        let world_size = lookup.require_size(vars::OMPI_COMM_WORLD_SIZE, || {
            format!("{} is", vars::OMPI_COMM_WORLD_RANK)
        })?;
        let rank = lookup.require_rank(
            vars::OMPI_COMM_WORLD_RANK,
            vars::OMPI_COMM_WORLD_SIZE,
            world_size,
        )?;
        let local_world_size = if lookup.has(vars::OMPI_COMM_WORLD_LOCAL_SIZE) {
            lookup.require_size(vars::OMPI_COMM_WORLD_LOCAL_SIZE, String::new)?
        } else {
            world_size
        };
        let local_rank = if lookup.has(vars::OMPI_COMM_WORLD_LOCAL_RANK) {
            lookup.require_rank(
                vars::OMPI_COMM_WORLD_LOCAL_RANK,
                vars::OMPI_COMM_WORLD_LOCAL_SIZE,
                local_world_size,
            )?
        } else {
            rank
        };
        let worker = Self {
            rank,
            local_rank,
            world_size,
            local_world_size,
            group_rank: rank / local_world_size,
            ..Self::alone()
        };
        worker.meet(lookup, Job::of_open_mpi(lookup)?)
    }

    /// Fills in the rendezvous of a job whose scheduler names none: rank 0's host, and a port derived
    /// from the job's name. `MASTER_ADDR` and `MASTER_PORT` win.
    fn meet(mut self, lookup: &Lookup<'_>, job: Job) -> Result<Self, ContractError> {
        if self.world_size == 1 {
            return Ok(self);
        }
        let because = || format!("the job has {} workers", self.world_size);
        let missing = |name| ContractError::Missing { name, because: because() };
        let port = lookup.port(vars::MASTER_PORT)?.or(job.port(""));
        self.master_port = port.ok_or_else(|| missing(vars::MASTER_PORT))?;
        let host = lookup.get(vars::MASTER_ADDR).filter(|host| !host.is_empty());
        if let Some(host) = host {
            self.master_addr = host;
        } else if self.local_world_size < self.world_size {
            self.master_addr = job.host.ok_or_else(|| missing(vars::MASTER_ADDR))?;
        }
        Ok(self)
    }
}

/// FNV-1a, the same on every machine.
pub(crate) fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A port that all workers of a job derive alike: a hash of its identifier, folded into
/// [`DERIVED_PORTS`].
fn port_of_job(id: &str) -> u16 {
    let hash = fnv1a(id.as_bytes());
    let span = u64::from(DERIVED_PORTS.end - DERIVED_PORTS.start);
    DERIVED_PORTS.start + (hash % span) as u16
}

/// Typed access to environment variables.
struct Lookup<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Lookup<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name)
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    fn parse<T: FromStr>(
        &self,
        name: &'static str,
        expected: impl Display,
        accept: impl Fn(&T) -> bool,
    ) -> Result<Option<T>, ContractError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.trim().parse().ok().filter(accept) {
            Some(number) => Ok(Some(number)),
            None => Err(ContractError::Invalid { name, value, expected: expected.to_string() }),
        }
    }

    fn optional<T: FromStr>(&self, name: &'static str) -> Result<Option<T>, ContractError> {
        self.parse(name, "a whole number from 0", |_| true)
    }

    fn port(&self, name: &'static str) -> Result<Option<u16>, ContractError> {
        self.parse(name, "a port from 1 to 65535", |&port| port != 0)
    }

    /// A number of workers, at least 1.
    fn require_size(
        &self,
        name: &'static str,
        because: impl Fn() -> String,
    ) -> Result<usize, ContractError> {
        self.parse(name, "a whole number from 1", |&size| size != 0)?
            .ok_or_else(|| ContractError::Missing { name, because: because() })
    }

    /// A rank below the size that the variable `size_name` gives.
    fn require_rank(
        &self,
        name: &'static str,
        size_name: &str,
        size: usize,
    ) -> Result<usize, ContractError> {
        let expected = format!("a whole number below {size_name}, which is {size}");
        self.parse(name, expected, |&rank| rank < size)?
            .ok_or_else(|| ContractError::Missing { name, because: format!("{size_name} is") })
    }
}

/// What `reranker check --for-launch` prints as one JSON line on stdout: what the configuration
/// asks of the launcher, and a description for people.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LaunchPlan {
    /// The number of workers that the configuration names.
    pub processes: Option<usize>,
    /// `"cpu"` or `"cuda"`, where the configuration says.
    pub device: Option<String>,
    /// The GPUs that the configuration names: indices or UUIDs.
    pub gpu_ids: Option<Vec<String>>,
    /// What the run will do, in lines for people.
    pub text: String,
}

#[cfg(test)]
mod tests;
