//! The plan of a launch: what every worker runs and in which environment. Only a plan starts
//! workers, and `--dry-run` prints exactly it.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::io::{self, IsTerminal as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::args::WorkerCommand;
use crate::binding::Share;
use crate::contract::{DERIVED_PORTS, LOOPBACK, WorkerEnv, vars};
use crate::devices::Placement;
use crate::error::LaunchError;
use crate::nodes::Place;
use crate::report::ranges;

/// torchrun's name of the role that all workers have.
const ROLE: &str = "default";

/// Where the workers meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendezvous {
    /// Host of rank 0.
    pub addr: String,
    /// Port of rank 0.
    pub port: u16,
}

impl Rendezvous {
    /// Not known yet.
    pub fn nowhere() -> Self {
        Self { addr: String::new(), port: 0 }
    }

    /// A rendezvous on the loopback address, at `port` or at a free one. Refuses a taken port. The
    /// port is let go again for rank 0 to take; nothing can hold it for another process.
    pub fn on_this_host(port: Option<u16>) -> Result<Self, LaunchError> {
        let free = port.map_or_else(free_port, |port| listen(port).map(|_| port));
        match (free, port) {
            (Ok(port), _) => Ok(Self { addr: loopback(), port }),
            (Err(error), Some(port)) if error.kind() == io::ErrorKind::AddrInUse => {
                Err(LaunchError::Usage(format!(
                    "--master-port: port {port} is taken by another program; choose another, or \
                     leave the flag out to get a free one"
                )))
            }
            (Err(error), Some(port)) => Err(LaunchError::Usage(format!(
                "--master-port: cannot listen on port {port}: {error}"
            ))),
            (Err(source), None) => {
                Err(LaunchError::System { action: "find a free port".to_owned(), source })
            }
        }
    }

    /// As [`Self::on_this_host`] for a restart, or a plan to look at. A port that the user has named and that
    /// another program has taken since is not refused any more: it may be free again when rank 0 needs it, and
    /// else rank 0 says so, which is one more failure.
    pub fn once_more(port: Option<u16>) -> Result<Self, LaunchError> {
        match (Self::on_this_host(port), port) {
            (Err(_), Some(port)) => Ok(Self { addr: loopback(), port }),
            (found, _) => found,
        }
    }
}

/// The loopback address: IPv4's, but on a host that has only IPv6's.
fn loopback() -> String {
    let has = |address: IpAddr| TcpListener::bind((address, 0)).is_ok();
    let six = IpAddr::V6(Ipv6Addr::LOCALHOST);
    if !has(IpAddr::V4(Ipv4Addr::LOCALHOST)) && has(six) {
        return six.to_string();
    }
    LOOPBACK.to_owned()
}

/// Listens on all addresses, as rank 0 will.
pub fn listen(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).or_else(|error| match error.kind() {
        io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => Err(error),
        // A host without IPv6.
        _ => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
    })
}

/// A port that nothing listens on, chosen at random among those that Linux gives to nobody by itself:
/// rank 0 takes it seconds later, when on a busy host an outgoing connection may have got one that was
/// free before. One of the system's choice where so many are taken.
fn free_port() -> io::Result<u16> {
    const TRIES: usize = 64;
    let count = DERIVED_PORTS.end - DERIVED_PORTS.start;
    for _ in 0..TRIES {
        let random = RandomState::new().build_hasher().finish();
        let port = DERIVED_PORTS.start + (random % u64::from(count)) as u16;
        if listen(port).is_ok() {
            return Ok(port);
        }
    }
    Ok(listen(0)?.local_addr()?.port())
}

/// Where the workers of a node stand among those of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// The node's number.
    pub node: usize,
    /// The number of nodes.
    pub nodes: usize,
    /// The rank of its first worker.
    pub first_rank: usize,
    /// Workers on all nodes.
    pub world_size: usize,
}

/// Everything that is decided before the first worker starts.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What every worker runs.
    pub command: WorkerCommand,
    placement: Placement,
    rendezvous: Rendezvous,
    run_id: String,
    /// Of this launcher alone, on whatever node.
    launcher_id: String,
    /// Where its workers stand among those of all nodes.
    standing: Standing,
    restart_count: u32,
    /// Variables that all workers share.
    shared: Vec<(&'static str, String)>,
    /// The CPUs of each worker, where they are bound.
    shares: Option<Vec<Share>>,
    /// Signals that wait until a worker listens to them.
    held_back: Vec<i32>,
    /// Whether rank 0 may draw a progress bar.
    progress: bool,
    /// What the check said the run will do.
    text: String,
}

impl Plan {
    /// Settles what the machine and the inherited environment decide: threads, run id, progress.
    pub fn new(
        command: WorkerCommand,
        placement: Placement,
        rendezvous: Rendezvous,
        text: String,
    ) -> Self {
        // Counts the cores of this process's affinity mask, and a container's quota of them.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let standing =
            Standing { node: 0, nodes: 1, first_rank: 0, world_size: placement.workers() };
        let run_id = new_run_id();
        let shared = shared_vars(&placement, cores, |name| std::env::var_os(name));
        Self {
            command,
            placement,
            rendezvous,
            launcher_id: run_id.clone(),
            run_id,
            standing,
            restart_count: 0,
            shares: None,
            shared,
            held_back: Vec::new(),
            progress: io::stderr().is_terminal(),
            text,
        }
    }

    /// The number of workers.
    pub fn workers(&self) -> usize {
        self.placement.workers()
    }

    /// The rank and the local rank of each worker of this host.
    pub fn ranks(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let first = self.standing.first_rank;
        (0..self.workers()).map(move |index| (first + index, index))
    }

    /// The identifier of the launch, the same over restarts.
    pub fn run_id(&self) -> &str {
        &self.run_id
    }

    /// The identifier of this launcher: what its guardian finds its processes by.
    pub fn launcher_id(&self) -> &str {
        &self.launcher_id
    }

    /// The rank of this node's first worker.
    pub fn first_rank(&self) -> usize {
        self.standing.first_rank
    }

    /// The number of workers on all nodes.
    pub fn world_size(&self) -> usize {
        self.standing.world_size
    }

    /// Gives the launch the user's identifier.
    pub fn name(&mut self, run_id: String) {
        self.run_id = run_id;
    }

    /// Makes the workers part of a world of several nodes.
    pub fn join(&mut self, standing: Standing) {
        self.standing = standing;
    }

    /// As [`Self::join`] for a plan that is only shown: every node is taken to start as many workers,
    /// and the port to be the one that is free here.
    pub fn imagine(&mut self, place: &Place) {
        let (node, workers) = (place.node_rank, self.workers());
        let (first_rank, world_size) = (node * workers, place.nnodes * workers);
        self.standing = Standing { node, nodes: place.nnodes, first_rank, world_size };
        self.rendezvous.addr.clone_from(&place.addr);
    }

    /// Sets a variable for all workers.
    pub fn share(&mut self, name: &'static str, value: String) {
        self.shared.push((name, value));
    }

    /// Has these signals wait until a worker listens to them, rather than end it.
    pub fn hold_back(&mut self, signals: Vec<i32>) {
        self.held_back = signals;
    }

    /// Signals that wait until a worker listens to them.
    pub fn held_back(&self) -> &[i32] {
        &self.held_back
    }

    /// Binds workers to CPUs.
    pub fn bind(&mut self, shares: Option<Vec<Share>>) {
        self.shares = shares;
    }

    /// The CPUs of the worker of this index, where it is bound.
    pub fn cpus(&self, index: usize) -> Option<&[usize]> {
        self.shares.as_ref().map(|shares| shares[index].cpus.as_slice())
    }

    /// Plans the restart of this number, with another rendezvous: what an earlier attempt left in
    /// flight must not reach this one.
    pub fn restart(&mut self, number: u32, rendezvous: Rendezvous) {
        (self.restart_count, self.rendezvous) = (number, rendezvous);
    }

    /// The variables to set for this node's worker of this index, in a stable order.
    pub fn worker_vars(&self, index: usize) -> Vec<(&'static str, String)> {
        let rank = self.standing.first_rank + index;
        let worker = WorkerEnv {
            rank,
            local_rank: index,
            world_size: self.standing.world_size,
            local_world_size: self.workers(),
            group_rank: self.standing.node,
            master_addr: self.rendezvous.addr.clone(),
            master_port: self.rendezvous.port,
            run_id: Some(self.run_id.clone()),
            restart_count: self.restart_count,
            progress: self.progress && rank == 0,
        };
        let mut list = worker.to_vars();
        list.push((vars::GROUP_WORLD_SIZE, self.standing.nodes.to_string()));
        list.push((vars::ROLE_NAME, ROLE.to_owned()));
        list.push((vars::RR_LAUNCHER, self.launcher_id.clone()));
        list.extend(self.shared.iter().cloned());
        let threads = list.iter_mut().find(|(name, _)| *name == vars::OMP_NUM_THREADS);
        if let (Some(shares), Some((_, threads))) = (&self.shares, threads) {
            *threads = shares[index].threads.to_string();
        }
        list
    }
}

/// Variables that do not depend on the rank. Every worker sees all GPUs of the job and takes
/// `cuda:LOCAL_RANK`, as programs written for torchrun do.
fn shared_vars(
    placement: &Placement,
    cores: usize,
    inherited: impl Fn(&str) -> Option<OsString>,
) -> Vec<(&'static str, String)> {
    let mut list = Vec::new();
    match placement {
        Placement::Cpu { .. } => list.push((vars::CUDA_VISIBLE_DEVICES, String::new())),
        Placement::Cuda { gpus } => {
            list.push((
                vars::CUDA_VISIBLE_DEVICES,
                gpus.iter().map(|gpu| gpu.entry.as_str()).collect::<Vec<_>>().join(","),
            ));
            let order = inherited(vars::CUDA_DEVICE_ORDER);
            let order = placement.device_order(order.as_deref().and_then(OsStr::to_str));
            list.extend(order.map(|order| (vars::CUDA_DEVICE_ORDER, order.to_owned())));
        }
    }
    let workers = placement.workers();
    if workers > 1 && inherited(vars::OMP_NUM_THREADS).is_none() {
        list.push((vars::OMP_NUM_THREADS, (cores / workers).max(1).to_string()));
    }
    list
}

/// Distinct for every launcher on a host: the second it began and the launcher's process id.
fn new_run_id() -> String {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}", since_epoch.as_secs(), std::process::id())
}

impl fmt::Display for Plan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.text.is_empty() {
            writeln!(out, "{}\n", self.text.trim_end())?;
        }
        let words = std::iter::once(&self.command.program).chain(&self.command.args);
        let command = words.map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
        let plural = if self.workers() == 1 { "" } else { "s" };
        writeln!(out, "{} worker{plural} on {}", self.workers(), self.placement.device())?;
        for index in 0..self.workers() {
            let variables: Vec<_> = self
                .worker_vars(index)
                .into_iter()
                .map(|(name, value)| format!("{name}={}", quoted(&OsString::from(value))))
                .collect();
            writeln!(out, "\nrank {}", self.standing.first_rank + index)?;
            writeln!(out, "  environment: {}", variables.join(" "))?;
            writeln!(out, "  command:     {command}")?;
            if let Some(cpus) = self.cpus(index) {
                writeln!(out, "  cpus:        {}", ranges(cpus))?;
            }
        }
        Ok(())
    }
}

/// A word as a shell would read it back.
fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "-_=+./,:@%".contains(c);
    if word.chars().all(plain) {
        // An empty value reads well in NAME=, and an empty argument is rare enough to be quoted.
        return if word.is_empty() { "''".to_owned() } else { word.into_owned() };
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use super::*;
    use crate::devices::Gpu;

    fn threads(workers: usize, cores: usize, set: bool) -> Option<String> {
        shared_vars(&Placement::Cpu { workers }, cores, |_| set.then(OsString::new))
            .into_iter()
            .find(|(name, _)| *name == vars::OMP_NUM_THREADS)
            .map(|(_, value)| value)
    }

    #[test]
    fn threads_are_shared_out_only_among_several_workers() {
        assert_eq!(threads(4, 16, false).as_deref(), Some("4"));
        assert_eq!(threads(4, 2, false).as_deref(), Some("1"));
        assert_eq!(threads(1, 16, false), None);
        assert_eq!(threads(4, 16, true), None);
    }

    #[test]
    fn every_worker_sees_all_gpus_of_the_job() {
        let gpu = |entry: &str| {
            let mut gpu = Gpu::default();
            gpu.entry = entry.to_owned();
            gpu
        };
        let placement = Placement::Cuda { gpus: vec![gpu("3"), gpu("1")] };
        let list = shared_vars(&placement, 8, |_| None);
        assert!(list.contains(&(vars::CUDA_VISIBLE_DEVICES, "3,1".to_owned())));
        assert!(list.contains(&(vars::CUDA_DEVICE_ORDER, "PCI_BUS_ID".to_owned())));
        let list = shared_vars(&Placement::Cpu { workers: 1 }, 8, |_| None);
        assert_eq!(list, [(vars::CUDA_VISIBLE_DEVICES, String::new())]);
    }

    #[test]
    fn a_free_port_is_found_and_a_taken_one_refused() {
        let free = Rendezvous::on_this_host(None).unwrap().port;
        assert!(DERIVED_PORTS.contains(&free), "no outgoing connection gets it");
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = Rendezvous::on_this_host(Some(port)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(&port.to_string()));
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted(OsStr::new("lr=2e-5")), "lr=2e-5");
        assert_eq!(quoted(OsStr::new("a b'c")), r"'a b'\''c'");
        assert_eq!(quoted(OsStr::new("")), "''");
    }
}
