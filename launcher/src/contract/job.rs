//! The job that a process is one of, as a scheduler tells it to all of them alike: where rank 0 is, and
//! a name from which they derive the port on which to meet.

use super::{ContractError, Lookup, port_of_job, slurm, vars};

/// Slurm's numbers from here on are of what runs beside the steps of `srun`: the batch script, the
/// shell of `salloc`.
const NOT_OF_SRUN: u32 = 0xffff_fffa;

/// What the processes of a job know alike.
pub struct Job {
    /// The host of rank 0, or of node 0, where the scheduler tells it.
    pub host: Option<String>,
    /// What tells this job from others that may run at a time.
    name: Option<String>,
}

impl Job {
    /// A step of `srun`: another one of the same job may run at a time, on other hosts.
    pub fn of_slurm_step(lookup: &Lookup<'_>) -> Result<Self, ContractError> {
        let host = match first_host(lookup, vars::SLURM_STEP_NODELIST)? {
            Some(host) => Some(host),
            None => first_host(lookup, vars::SLURM_JOB_NODELIST)?,
        };
        let step = lookup.get(vars::SLURM_STEP_ID).unwrap_or_default();
        let name = lookup.get(vars::SLURM_JOB_ID).map(|job| format!("{job}.{step}"));
        Ok(Self { host, name })
    }

    /// A run of `mpirun`. In a Slurm job rank 0 is on the job's first host. Slurm's step is left alone:
    /// it is of the daemon that started a process, which is another one on each host.
    pub fn of_open_mpi(lookup: &Lookup<'_>) -> Result<Self, ContractError> {
        let names = [vars::PMIX_NAMESPACE, vars::OMPI_MCA_ESS_BASE_JOBID, vars::SLURM_JOB_ID];
        Ok(Self {
            host: first_host(lookup, vars::SLURM_JOB_NODELIST)?,
            name: names.iter().find_map(|name| lookup.get(name)),
        })
    }

    /// A port for `purpose`, the same for all processes of the job.
    pub fn port(&self, purpose: &str) -> Option<u16> {
        self.name.as_ref().map(|name| port_of_job(&format!("{name}{purpose}")))
    }
}

/// Whether `srun` started this process. The batch script itself and the shell of `salloc` have ranks and
/// numbers of tasks in their environment too, but are alone.
pub fn is_of_srun(lookup: &Lookup<'_>) -> Result<bool, ContractError> {
    let step = lookup.optional::<u32>(vars::SLURM_STEP_ID)?;
    Ok(step.is_some_and(|number| number < NOT_OF_SRUN))
}

/// Whether `RANK` and its companions only repeat what the scheduler says, as enroot's hook for images with
/// PyTorch and many scripts set them (`RANK=$SLURM_PROCID`). Unlike a launcher's they do not tell how many
/// workers this host has, and under `srun` with one task a node they count nodes.
pub fn is_repeated(lookup: &Lookup<'_>) -> Result<bool, ContractError> {
    let of_launchers =
        [vars::LOCAL_WORLD_SIZE, vars::LOCAL_SIZE, vars::TORCHELASTIC_RUN_ID, vars::RR_LAUNCHER];
    if of_launchers.into_iter().any(|name| lookup.has(name)) {
        return Ok(false);
    }
    let (rank, size, local_rank) = if lookup.has(vars::OMPI_COMM_WORLD_RANK) {
        let local_rank = vars::OMPI_COMM_WORLD_LOCAL_RANK;
        (vars::OMPI_COMM_WORLD_RANK, vars::OMPI_COMM_WORLD_SIZE, local_rank)
    } else if is_of_srun(lookup)? {
        (vars::SLURM_PROCID, vars::SLURM_STEP_NUM_TASKS, vars::SLURM_LOCALID)
    } else {
        return Ok(false);
    };
    let repeats = |name, other| lookup.get(name) == lookup.get(other);
    let is_local = !lookup.has(vars::LOCAL_RANK) || repeats(vars::LOCAL_RANK, local_rank);
    Ok(repeats(vars::RANK, rank) && repeats(vars::WORLD_SIZE, size) && is_local)
}

fn first_host(lookup: &Lookup<'_>, name: &'static str) -> Result<Option<String>, ContractError> {
    let Some(value) = lookup.get(name) else { return Ok(None) };
    match slurm::first_host(&value) {
        Some(host) => Ok(Some(host)),
        None => Err(ContractError::Invalid {
            name,
            value,
            expected: "a list of hosts such as node[003-005,9]".to_owned(),
        }),
    }
}
