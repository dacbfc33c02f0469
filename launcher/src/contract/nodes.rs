//! Which of several nodes this one is, and where they meet, as a scheduler tells it: what
//! `--nnodes auto` reads. Each node runs one launcher.

use super::job::{Job, is_of_srun, is_repeated};
use super::{ContractError, Lookup, vars};

/// One node of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeEnv {
    /// The number of nodes, at least 1.
    pub nnodes: usize,
    /// This node's number, from 0.
    pub node_rank: usize,
    /// The host of node 0, where the scheduler tells it.
    pub addr: Option<String>,
    /// The port on which the launchers meet there.
    pub port: Option<u16>,
}

impl NodeEnv {
    /// Reads the process environment; `None` where no scheduler is known to have started this.
    ///
    /// # Errors
    /// [`ContractError`] when a variable is malformed, contradicts another or is missing.
    pub fn from_env() -> Result<Option<Self>, ContractError> {
        Self::from_lookup(|name| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()))
    }

    /// Reads variables through `lookup`: those of a Kubernetes `PyTorchJob` (`PET_*`, or `RANK` and
    /// `WORLD_SIZE`, which count pods), else Open MPI's, else Slurm's, also where `RANK` repeats one of
    /// these. `MASTER_ADDR` wins over the host that Slurm's list begins with.
    ///
    /// # Errors
    /// As [`Self::from_env`].
    pub fn from_lookup(
        lookup: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, ContractError> {
        let lookup = Lookup(&lookup);
        let node = if lookup.has(vars::PET_NNODES) {
            Self::from_pytorch_job(&lookup)?
        } else if lookup.has(vars::RANK) && !is_repeated(&lookup)? {
            Self::from_pods(&lookup)?
        } else if lookup.has(vars::OMPI_COMM_WORLD_RANK) {
            Self::from_open_mpi(&lookup)?
        } else if lookup.has(vars::SLURM_JOB_ID) {
            Self::from_slurm(&lookup)?
        } else {
            return Ok(None);
        };
        Ok(Some(node))
    }

    fn new(lookup: &Lookup<'_>, nnodes: usize, node_rank: usize) -> Result<Self, ContractError> {
        let addr = lookup.get(vars::MASTER_ADDR).filter(|host| !host.is_empty());
        Ok(Self { nnodes, node_rank, addr, port: lookup.port(vars::MASTER_PORT)? })
    }

    /// torchrun's own variables, which the training operator sets for each pod.
    fn from_pytorch_job(lookup: &Lookup<'_>) -> Result<Self, ContractError> {
        let nnodes = lookup.require_size(vars::PET_NNODES, String::new)?;
        let name = if lookup.has(vars::PET_NODE_RANK) { vars::PET_NODE_RANK } else { vars::RANK };
        let node_rank = lookup.require_rank(name, vars::PET_NNODES, nnodes)?;
        let mut node = Self::new(lookup, nnodes, node_rank)?;
        if let Some(host) = lookup.get(vars::PET_MASTER_ADDR).filter(|host| !host.is_empty()) {
            node.addr = Some(host);
        }
        node.port = lookup.port(vars::PET_MASTER_PORT)?.or(node.port);
        Ok(node)
    }

    /// Older training operators: `RANK` and `WORLD_SIZE` of pods.
    fn from_pods(lookup: &Lookup<'_>) -> Result<Self, ContractError> {
        if let Some(value) = lookup.get(vars::LOCAL_RANK) {
            // A worker of a launcher has one; nodes of nodes would double every worker.
            let expected = "no such variable: one rr-launch for each node".to_owned();
            return Err(ContractError::Invalid { name: vars::LOCAL_RANK, value, expected });
        }
        let nnodes = lookup.require_size(vars::WORLD_SIZE, || format!("{} is", vars::RANK))?;
        let node_rank = lookup.require_rank(vars::RANK, vars::WORLD_SIZE, nnodes)?;
        Self::new(lookup, nnodes, node_rank)
    }

    fn from_open_mpi(lookup: &Lookup<'_>) -> Result<Self, ContractError> {
        let because = || format!("{} is", vars::OMPI_COMM_WORLD_RANK);
        let nnodes = lookup.require_size(vars::OMPI_COMM_WORLD_SIZE, because)?;
        let node_rank =
            lookup.require_rank(vars::OMPI_COMM_WORLD_RANK, vars::OMPI_COMM_WORLD_SIZE, nnodes)?;
        lookup.parse(
            vars::OMPI_COMM_WORLD_LOCAL_SIZE,
            "1: one rr-launch for each node (mpirun --map-by ppr:1:node)",
            |&count: &usize| count == 1,
        )?;
        Ok(Self::new(lookup, nnodes, node_rank)?.in_job(Job::of_open_mpi(lookup)?))
    }

    /// A task of `srun`, or a job of one node.
    fn from_slurm(lookup: &Lookup<'_>) -> Result<Self, ContractError> {
        if !is_of_srun(lookup)? {
            let names = [vars::SLURM_NNODES, vars::SLURM_JOB_NUM_NODES];
            let name = names.into_iter().find(|name| lookup.has(name)).unwrap_or(names[0]);
            let because = || format!("{} is", vars::SLURM_JOB_ID);
            return match lookup.require_size(name, because)? {
                1 => Self::new(lookup, 1, 0),
                nodes => Err(ContractError::NotOfSrun { nodes }),
            };
        }
        let name = vars::SLURM_STEP_NUM_NODES;
        let nnodes = lookup.require_size(name, || format!("{} is", vars::SLURM_STEP_ID))?;
        let node_rank = lookup.require_rank(vars::SLURM_NODEID, name, nnodes)?;
        lookup.parse(
            vars::SLURM_LOCALID,
            "0: one rr-launch for each node (srun --ntasks-per-node 1)",
            |&rank: &usize| rank == 0,
        )?;
        Ok(Self::new(lookup, nnodes, node_rank)?.in_job(Job::of_slurm_step(lookup)?))
    }

    /// Fills in where the launchers of the job meet. Their workers have a port of their own.
    fn in_job(mut self, job: Job) -> Self {
        self.port = self.port.or(job.port(" launchers"));
        self.addr = self.addr.or(job.host);
        self
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<NodeEnv>, ContractError> {
        NodeEnv::from_lookup(|name| {
            let found = variables.iter().find(|(other, _)| *other == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn nothing_is_known_without_a_scheduler() {
        assert_eq!(read(&[("MASTER_ADDR", "a")]), Ok(None));
    }

    #[test]
    fn slurm_tells_its_first_host_and_a_port_of_its_job() {
        let task = |node, step| {
            read(&[
                ("SLURM_NODEID", node),
                ("SLURM_STEP_NUM_NODES", "3"),
                ("SLURM_LOCALID", "0"),
                ("SLURM_JOB_NODELIST", "node[003-005]"),
                ("SLURM_JOB_ID", "77"),
                ("SLURM_STEP_ID", step),
            ])
            .unwrap()
            .unwrap()
        };
        let (first, last) = (task("0", "0"), task("2", "0"));
        assert_eq!((first.node_rank, last.node_rank, last.nnodes), (0, 2, 3));
        assert_eq!(last.addr.as_deref(), Some("node003"));
        assert!(first.port.is_some() && first.port == last.port);
        assert_ne!(task("0", "1").port, first.port, "another step of the job");
    }

    #[test]
    fn outside_of_srun_a_slurm_job_has_to_be_of_one_node() {
        // As Slurm 22.05 sets them for a batch script, and for the shell of salloc.
        let job = |nodes, step: Option<&'static str>| {
            let mut variables = vec![
                ("SLURM_JOB_ID", "77"),
                ("SLURM_NNODES", nodes),
                ("SLURM_JOB_NODELIST", "node[0-1]"),
                ("SLURM_NODEID", "0"),
            ];
            variables.extend(step.map(|step| ("SLURM_STEP_ID", step)));
            variables.extend(step.map(|_| ("SLURM_STEP_NUM_NODES", "1")));
            read(&variables)
        };
        for step in [None, Some("4294967290")] {
            assert_eq!(job("1", step).unwrap().unwrap().nnodes, 1);
            let error = job("2", step).unwrap_err();
            assert_eq!(error, ContractError::NotOfSrun { nodes: 2 });
        }
    }

    #[test]
    fn slurm_is_read_also_where_its_ranks_have_torchruns_names() {
        // enroot's hook for images with PyTorch.
        let mut task = vec![
            ("SLURM_JOB_ID", "77"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_NUM_NODES", "2"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_NODEID", "1"),
            ("SLURM_PROCID", "1"),
            ("SLURM_LOCALID", "0"),
            ("MASTER_ADDR", "node0"),
            ("MASTER_PORT", "61077"),
        ];
        let plain = read(&task).unwrap().unwrap();
        assert_eq!((plain.nnodes, plain.node_rank, plain.port), (2, 1, Some(61077)));
        task.extend([("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")]);
        assert_eq!(read(&task), Ok(Some(plain)));
    }

    #[test]
    fn mpiruns_daemons_leave_their_own_slurm_steps_behind() {
        // On the node of mpirun there is none.
        let task = |rank, step: &[(&'static str, &'static str)]| {
            let mut variables = vec![
                ("OMPI_COMM_WORLD_RANK", rank),
                ("OMPI_COMM_WORLD_SIZE", "2"),
                ("PMIX_NAMESPACE", "1976434689"),
                ("SLURM_JOB_ID", "77"),
                ("SLURM_JOB_NODELIST", "node[0-1]"),
            ];
            variables.extend(step);
            read(&variables).unwrap().unwrap()
        };
        let first = task("0", &[]);
        let second = task("1", &[("SLURM_STEP_ID", "0"), ("SLURM_STEP_NODELIST", "node1")]);
        assert_eq!(second.addr.as_deref(), Some("node0"));
        assert_eq!((first.addr, first.port), (second.addr, second.port));
    }

    #[test]
    fn several_launchers_on_a_node_are_refused() {
        let slurm = [
            ("SLURM_JOB_ID", "7"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_NODEID", "0"),
            ("SLURM_STEP_NUM_NODES", "2"),
            ("SLURM_LOCALID", "1"),
        ];
        assert!(read(&slurm).unwrap_err().to_string().contains("--ntasks-per-node 1"));
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        assert!(read(&mpi).unwrap_err().to_string().contains("ppr:1:node"));
        let worker = [("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")];
        assert!(read(&worker).unwrap_err().to_string().contains("LOCAL_RANK"));
    }

    #[test]
    fn kubernetes_and_open_mpi_are_read() {
        let job = [
            ("PET_NNODES", "2"),
            ("PET_NODE_RANK", "1"),
            ("PET_MASTER_ADDR", "job-master-0"),
            ("PET_MASTER_PORT", "23456"),
            ("WORLD_SIZE", "16"),
            ("RANK", "1"),
        ];
        let node = NodeEnv {
            nnodes: 2,
            node_rank: 1,
            addr: Some("job-master-0".to_owned()),
            port: Some(23456),
        };
        assert_eq!(read(&job), Ok(Some(node.clone())));
        let pods = [
            ("RANK", "1"),
            ("WORLD_SIZE", "2"),
            ("MASTER_ADDR", "job-master-0"),
            ("MASTER_PORT", "23456"),
        ];
        assert_eq!(read(&pods), Ok(Some(node)));
        let elastic = [("PET_NNODES", "1:3"), ("PET_NODE_RANK", "0")];
        assert!(read(&elastic).unwrap_err().to_string().contains("PET_NNODES"));
        let mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
            ("PMIX_NAMESPACE", "prterun-a-1"),
            ("MASTER_ADDR", "a"),
            // mpirun inside a Slurm job: its daemons' variables are left alone.
            ("SLURM_NODEID", "0"),
            ("SLURM_NNODES", "9"),
        ];
        let node = read(&mpi).unwrap().unwrap();
        assert_eq!((node.nnodes, node.node_rank, node.addr.as_deref()), (2, 1, Some("a")));
        assert!(node.port.is_some());
    }
}
