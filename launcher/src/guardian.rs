//! The guardian: a second process that outlives a launcher killed with SIGKILL just long enough to
//! kill what the launcher can no longer kill.
//!
//! The kernel kills the workers themselves when the launcher dies (`PR_SET_PDEATHSIG`), but not
//! what they have started: data workers, side processes. The guardian sees every worker's process
//! group in memory that it shares with the launcher, holds one end of a socket whose other end only the
//! launcher has, and kills the groups when that end closes without a farewell. What has left its group (`setsid`, a daemon) is known
//! by the launcher's identifier in its environment, and what has cleared that (`env -i`) by a mark that
//! the kernel hands down. The guardian sleeps in one system call for the whole run. If it is itself
//! killed, the launcher starts another.
//!
//! A scheduler may kill a job by a walk over its processes, from parent to child. What a worker starts
//! while that goes on is in no list, and a guardian that is would not be there to find it. So it is
//! nobody's descendant, wherever the process that adopts it is known to collect what has ended.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use crate::contract::{fnv1a, vars};
use crate::error_files::{self, ErrorDir};
use crate::procfs;
use crate::sys::{self, Pid, Roster};

/// Its name in process lists.
const NAME: &std::ffi::CStr = c"rr-guardian";

/// Programs that are made to be a machine's or a container's first process.
const INITS: [&str; 8] =
    ["systemd", "init", "tini", "dumb-init", "docker-init", "catatonit", "s6-svscan", "runit"];

/// Between two searches for processes of the run.
const SEARCH: Duration = Duration::from_millis(20);

/// Searches at most; each kills what it finds, so that only what forks faster than it dies is left.
const SEARCHES: u32 = 50;

/// Groups for each worker that may be there at a time: the worker's, that of the tool which looks at its
/// stacks, and of earlier attempts those that could not be killed.
const GROUPS_A_WORKER: usize = 8;

/// How often a guardian that was killed is replaced: somebody may mean it.
const SUCCESSORS: u32 = 10;

/// Sent as the last number: all is well.
const FAREWELL: i32 = 0;

/// The launcher's hold on its guardian. Dropped without [`Guardian::dismiss`], on whatever way out
/// of the launcher, it lets the guardian do its work first.
pub struct Guardian {
    pid: Pid,
    pidfd: Option<OwnedFd>,
    socket: Option<OwnedFd>,
    roster: Roster,
    launcher_id: String,
    error_dir: ErrorDir,
    /// Guardians before this one.
    predecessors: u32,
    /// Children that this process had before it became a launcher: a script has started them, and
    /// then `exec`ed it.
    bystanders: Vec<Pid>,
}

impl Guardian {
    /// Starts the guardian of the launcher `launcher_id` of so many `workers`. To be called before any of
    /// them, by a process of one thread.
    pub fn start(launcher_id: &str, workers: usize) -> io::Result<Self> {
        let bystanders = procfs::children();
        let roster = Roster::new(workers * GROUPS_A_WORKER)?;
        let mut error_dir = ErrorDir::new(launcher_id);
        let (pid, socket) = fork(launcher_id, roster, &error_dir)?;
        error_dir.make();
        Ok(Self {
            pid,
            pidfd: sys::pidfd(pid),
            socket: Some(socket),
            roster,
            launcher_id: launcher_id.to_owned(),
            error_dir,
            predecessors: 0,
            bystanders,
        })
    }

    /// Starts another in the place of one that has ended.
    pub fn replace(&mut self) -> io::Result<()> {
        if self.predecessors == SUCCESSORS {
            return Err(io::Error::other(format!("{SUCCESSORS} were replaced before")));
        }
        self.predecessors += 1;
        // Nothing to wait for where it is no child.
        sys::wait_for(self.pid);
        (self.pidfd, self.socket) = (None, None);
        let (pid, socket) = fork(&self.launcher_id, self.roster, &self.error_dir)?;
        (self.pid, self.pidfd, self.socket) = (pid, sys::pidfd(pid), Some(socket));
        Ok(())
    }

    /// What becomes readable when it ends.
    pub fn end_of_life(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(OwnedFd::as_fd)
    }

    /// The mark of what workers start.
    pub fn mark(&self) -> u64 {
        mark_of(&self.launcher_id)
    }

    /// Whether a child of this process is the guardian itself, or older than the launch.
    pub fn spares(&self, pid: Pid) -> bool {
        pid == self.pid || self.bystanders.contains(&pid)
    }

    /// Where workers record exceptions; removed with this, or by the guardian.
    pub fn error_dir(&self) -> Option<&Path> {
        self.error_dir.path()
    }

    /// Where a worker enters itself before it becomes its program.
    pub fn roster(&self) -> Roster {
        self.roster
    }

    /// A group has ended: its number may come to mean another one.
    pub fn forget(&self, group: Pid) {
        self.roster.strike(group);
    }

    /// Nothing is left to guard.
    pub fn dismiss(&self) {
        if let Some(socket) = &self.socket {
            // One that was itself killed needs no farewell.
            let _ = sys::send_number(socket.as_raw_fd(), FAREWELL);
        }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        drop(self.socket.take());
        if let Some(guardian) = &self.pidfd {
            sys::wait_for_end(guardian);
        }
        // Nothing to wait for where it is no child.
        sys::wait_for(self.pid);
    }
}

/// Starts a guardian; its process id, and this process's end of the connection to it.
fn fork(launcher_id: &str, roster: Roster, error_dir: &ErrorDir) -> io::Result<(Pid, OwnedFd)> {
    let (ours, theirs) = sys::message_pair()?;
    let (own_end, their_end) = (ours.as_raw_fd(), theirs.as_raw_fd());
    let has_pidfds = sys::pidfd(sys::own_pid()).is_some();
    let child = sys::fork_aside(NAME, has_pidfds && orphans_are_collected(), || {
        // Its copy of the launcher's end would keep the connection open for ever, as those of other
        // connections would theirs.
        sys::close_inherited(own_end, their_end);
        if sys::send_number(their_end, sys::own_pid()).is_ok() {
            watch(&theirs, launcher_id, roster, error_dir);
        }
    })?;
    drop(theirs);
    let pid = sys::receive_number(&ours);
    if pid != Some(child) {
        sys::wait_for(child);
    }
    let pid = pid.ok_or_else(|| io::Error::other("it ended at once"))?;
    Ok((pid, ours))
}

fn mark_of(launcher_id: &str) -> u64 {
    sys::mark(fnv1a(launcher_id.as_bytes()))
}

/// Whether an orphan that ends does not stay as a zombie: in a container the first process may be any
/// program. Nodes of Slurm are whole machines.
fn orphans_are_collected() -> bool {
    let first = procfs::name(1);
    std::env::var_os(vars::SLURM_JOB_ID).is_some()
        || first.is_some_and(|name| INITS.contains(&&*name))
}

/// The guardian's whole life.
fn watch(launcher: &OwnedFd, launcher_id: &str, roster: Roster, error_dir: &ErrorDir) {
    if sys::receive_number(launcher) != Some(FAREWELL) {
        kill_all(launcher_id, roster);
        error_dir.place().into_iter().for_each(error_files::remove);
    }
}

/// Kills what workers have started, wherever it is.
fn kill_all(launcher_id: &str, roster: Roster) {
    for group in roster.groups() {
        sys::signal_group(group, libc::SIGKILL);
    }
    let (variable, mark) = (format!("{}={launcher_id}", vars::RR_LAUNCHER), mark_of(launcher_id));
    let is_left =
        |&pid: &Pid| procfs::is_marked(pid, mark) || procfs::was_started_with(pid, &variable);
    for _ in 0..SEARCHES {
        let left: Vec<Pid> = procfs::processes().filter(is_left).collect();
        for &pid in &left {
            // The guardian of a launcher inside this run ends by itself, after its own workers.
            if procfs::name(pid).is_none_or(|name| name.as_bytes() != NAME.to_bytes()) {
                sys::signal_process(pid, libc::SIGKILL);
            }
        }
        if left.is_empty() {
            return;
        }
        std::thread::sleep(SEARCH);
    }
}
