//! The workers as processes: started, signalled as whole process groups, and collected; and the
//! strays, processes that left their worker's group and outlived it.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant, SystemTime};
use std::{env, io, iter};

use crate::contract::error_file::WorkerError;
use crate::contract::heartbeat::{self, Beat};
use crate::contract::vars;
use crate::error::LaunchError;
use crate::error_files::ErrorFile;
use crate::guardian::Guardian;
use crate::lifecycle::Exit;
use crate::output::Stream;
use crate::plan::Plan;
use crate::procfs;
use crate::sys::{self, Pid};

/// What a worker leaves behind in its process group gets a TERM and, this much later, a KILL.
const LEFTOVER_GRACE: Duration = Duration::from_secs(1);

/// How long killed leftovers may take to vanish.
const LEFTOVER_PATIENCE: Duration = Duration::from_secs(1);

/// Open files for each worker: two pipes, a heartbeat, an error file, a pidfd, and two log files.
const FILES_A_WORKER: usize = 7;

/// Open files beside these, those of the start of a process included, with some to spare.
const FILES_OF_OUR_OWN: usize = 40;

/// How far a worker's process group has come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    /// The worker runs.
    Running,
    /// The worker has ended, and processes that it started are left until this time.
    Leftovers { kill_at: Instant },
    /// Those were killed, and are waited for until this time.
    Killed { give_up_at: Instant },
    /// Nothing is left.
    Gone,
}

/// One worker: a process that leads a group of its own.
pub struct Worker {
    /// Its number on this node.
    pub index: usize,
    /// Its rank.
    pub rank: usize,
    pid: Pid,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    group: Group,
    /// Becomes readable when the process ends; `None` on old kernels.
    pidfd: Option<OwnedFd>,
    /// Where it writes its heartbeats; they outlive it.
    heartbeat: File,
    /// Where a PyTorch program records the exception that ends it.
    error_file: ErrorFile,
    started: Instant,
    started_at: SystemTime,
    /// How it ended, and after how long.
    pub ended: Option<(Exit, Duration)>,
}

impl Worker {
    fn start(plan: &Plan, index: usize, common: &Common, guardian: &Guardian) -> io::Result<Self> {
        let heartbeat = sys::memory_file(c"rr-heartbeat")?;
        heartbeat.write_all_at(&heartbeat::blank(), 0)?;
        let rank = plan.first_rank() + index;
        let error_file = ErrorFile::new(common.error_dir.as_deref(), rank)?;
        let mut own = plan.worker_vars(index);
        own.push((vars::RR_HEARTBEAT, sys::path_of(&heartbeat)));
        own.push((vars::TORCHELASTIC_ERROR_FILE, error_file.name()));
        let own = own.iter().map(|(name, value)| CString::new(format!("{name}={value}")));
        let own = own.collect::<Result<Vec<_>, _>>()?;
        let started_at = SystemTime::now();
        let ((stdout, its_stdout), (stderr, its_stderr)) = (io::pipe()?, io::pipe()?);
        let start = sys::Start {
            program: &common.arguments[0],
            arguments: &common.arguments,
            environment: [&common.environment, &own],
            streams: [common.stdin.as_fd(), its_stdout.as_fd(), its_stderr.as_fd()],
            cpus: plan.cpus(index),
            held_back: plan.held_back(),
            roster: guardian.roster(),
            mark: guardian.mark(),
        };
        let pid = start.run()?;
        Ok(Self {
            index,
            rank,
            pid,
            stdout: Some(stdout.into()),
            stderr: Some(stderr.into()),
            group: Group::Running,
            pidfd: sys::pidfd(pid),
            heartbeat,
            error_file,
            started: Instant::now(),
            started_at,
            ended: None,
        })
    }

    /// Its process id, which is also its group's.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Its last heartbeat.
    pub fn beat(&self) -> Option<Beat> {
        let mut record = [0; heartbeat::LENGTH];
        self.heartbeat.read_exact_at(&mut record, 0).ok()?;
        Beat::decode(&record)
    }

    /// The exception that it has recorded.
    pub fn error(&self) -> Option<WorkerError> {
        self.error_file.read(self.started_at)
    }

    /// What becomes readable when the worker ends.
    pub fn end_of_life(&self) -> Option<BorrowedFd<'_>> {
        self.pidfd.as_ref().map(OwnedFd::as_fd)
    }

    /// The reading end of one of its streams; can be taken once.
    pub fn take_pipe(&mut self, stream: Stream) -> Option<OwnedFd> {
        match stream {
            Stream::Stdout => self.stdout.take(),
            Stream::Stderr => self.stderr.take(),
        }
    }

    /// Whether neither the worker nor anything in its group is left.
    pub fn is_gone(&self) -> bool {
        self.group == Group::Gone
    }

    /// Sends a signal to the whole group.
    pub fn signal(&self, signal: i32) {
        if !self.is_gone() {
            sys::signal_group(self.pid(), signal);
        }
    }

    /// Sends a signal to the worker itself.
    pub fn ask(&self, signal: i32) {
        if self.ended.is_none() && !self.is_gone() {
            sys::signal_process(self.pid(), signal);
        }
    }

    /// Kills the whole group.
    pub fn kill(&mut self, now: Instant) {
        self.signal(libc::SIGKILL);
        if matches!(self.group, Group::Leftovers { .. }) {
            self.group = Group::Killed { give_up_at: now + LEFTOVER_PATIENCE };
        }
    }

    /// Collects the worker if it has ended, and says how it did. The rest of its group is asked to
    /// end too.
    pub fn collect(&mut self, now: Instant, guardian: &Guardian) -> Option<Exit> {
        if self.group != Group::Running {
            return None;
        }
        // An error means that somebody else has collected it; how it ended is lost.
        let exit = match sys::try_wait(self.pid) {
            Ok(None) => return None,
            Ok(Some(status)) => exit_of(status),
            Err(_) => Exit::Code(1),
        };
        self.ended = Some((exit, now.duration_since(self.started)));
        self.group = Group::Leftovers { kill_at: now + LEFTOVER_GRACE };
        self.signal(libc::SIGTERM);
        self.tidy(now, guardian);
        Some(exit)
    }

    /// Looks after what an ended worker has left behind in its group.
    ///
    /// As long as the group has a member its number cannot be given to another process, so that a
    /// signal to it cannot hit a stranger; a group that has none is never signalled again.
    pub fn tidy(&mut self, now: Instant, guardian: &Guardian) {
        let deadline = match self.group {
            Group::Running | Group::Gone => return,
            Group::Leftovers { kill_at } => kill_at,
            Group::Killed { give_up_at } => give_up_at,
        };
        sys::reap_group(self.pid());
        if !sys::signal_group(self.pid(), 0) {
            self.group = Group::Gone;
            guardian.forget(self.pid());
        } else if now >= deadline {
            if matches!(self.group, Group::Killed { .. }) {
                // Zombies of a parent outside the group, or processes that hang in the kernel.
                self.group = Group::Gone;
            } else {
                self.kill(now);
            }
        }
    }

    /// When [`Self::tidy`] has something to do that no signal announces.
    pub fn deadline(&self) -> Option<Instant> {
        match self.group {
            Group::Running | Group::Gone => None,
            Group::Leftovers { kill_at } => Some(kill_at),
            Group::Killed { give_up_at } => Some(give_up_at),
        }
    }

    /// Counts a worker that cannot be killed as gone.
    pub fn abandon(&mut self) {
        self.group = Group::Gone;
    }
}

impl Drop for Worker {
    /// No way out of the launcher, an error or a panic included, leaves a worker behind.
    fn drop(&mut self) {
        if !self.is_gone() {
            self.signal(libc::SIGKILL);
            if self.ended.is_none() {
                sys::wait_for(self.pid);
            }
        }
    }
}

/// What the workers of an attempt are all started with.
struct Common {
    /// The program, and the words behind it.
    arguments: Vec<CString>,
    /// Of this process's environment what no worker has a variable of its own for.
    environment: Vec<CString>,
    stdin: File,
    /// Where they record exceptions.
    error_dir: Option<PathBuf>,
}

impl Common {
    fn new(plan: &Plan, error_dir: Option<&Path>) -> io::Result<Self> {
        // A variable of one worker is one of all, but for the progress of one.
        let own: Vec<&str> = [vars::RR_PROGRESS, vars::RR_HEARTBEAT, vars::TORCHELASTIC_ERROR_FILE]
            .into_iter()
            .chain(plan.worker_vars(0).iter().map(|&(name, _)| name))
            .collect();
        let inherited = env::vars_os().filter(|(name, _)| own.iter().all(|own| name != *own));
        let inherited = inherited
            .map(|(name, value)| CString::new([name.as_bytes(), value.as_bytes()].join(&b'=')));
        let words = iter::once(&plan.command.program).chain(&plan.command.args);
        Ok(Self {
            arguments: words.map(|word| CString::new(word.as_bytes())).collect::<Result<_, _>>()?,
            environment: inherited.collect::<Result<_, _>>()?,
            stdin: File::open("/dev/null")?,
            error_dir: error_dir.map(Path::to_owned),
        })
    }
}

fn cannot_start(plan: &Plan, index: usize, source: io::Error) -> LaunchError {
    let program = plan.command.program.to_string_lossy();
    match (source.kind(), source.raw_os_error()) {
        // That the program is there was seen before.
        (io::ErrorKind::NotFound, _) => LaunchError::Usage(format!(
            "cannot start `{program}`: what runs it, named in its first line or its ELF header, is \
             not there"
        )),
        (io::ErrorKind::PermissionDenied, _) => {
            LaunchError::Usage(format!("cannot start `{program}`: {source}"))
        }
        (_, Some(libc::EMFILE)) => LaunchError::Usage(format!(
            "cannot start rank {} of {} workers here: too many open files; raise the limit \
             (`ulimit -n`) to {} or more",
            plan.first_rank() + index,
            plan.workers(),
            plan.workers() * FILES_A_WORKER + FILES_OF_OUR_OWN
        )),
        _ => LaunchError::System {
            action: format!("start rank {} (`{program}`)", plan.first_rank() + index),
            source,
        },
    }
}

/// Starts all workers of a plan, and hands each to `watch` before the next one starts: the order in
/// which workers end is known only of those that are watched. If one cannot be started, those before
/// it are killed.
pub fn start(
    plan: &Plan,
    guardian: &Guardian,
    mut watch: impl FnMut(&mut Worker) -> io::Result<()>,
) -> Result<Vec<Worker>, LaunchError> {
    let common =
        Common::new(plan, guardian.error_dir()).map_err(|source| cannot_start(plan, 0, source))?;
    (0..plan.workers())
        .map(|index| {
            let started = Worker::start(plan, index, &common, guardian).and_then(|mut worker| {
                watch(&mut worker)?;
                Ok(worker)
            });
            started.map_err(|source| cannot_start(plan, index, source))
        })
        .collect()
}

/// Processes that left their worker's group and outlived it. This process is the parent of orphans,
/// so that they are its children once whoever started them is gone.
#[derive(Debug, Default)]
pub struct Strays {
    /// When those that do not heed TERM are killed; known once the workers have ended.
    kill_at: Option<Instant>,
    asked: Vec<Pid>,
    left: Vec<Pid>,
    abandoned: bool,
}

impl Strays {
    /// Collects strays that have ended, and once all workers have, asks the others to end, then
    /// kills them.
    pub fn tidy(&mut self, workers: &[Worker], guardian: &Guardian, now: Instant) {
        let is_known = |pid: &Pid| {
            guardian.spares(*pid)
                || workers.iter().any(|worker| worker.pid() == *pid && worker.ended.is_none())
        };
        let unknown = || procfs::children().into_iter().filter(|pid| !is_known(pid)).collect();
        self.left = collect_all(unknown, sys::reap);
        let works = |worker: &Worker| worker.ended.is_none() && !worker.is_gone();
        if self.left.is_empty() || workers.iter().any(works) {
            return;
        }
        let kill_at = *self.kill_at.get_or_insert(now + LEFTOVER_GRACE);
        self.abandoned = now >= kill_at + LEFTOVER_PATIENCE;
        for &pid in &self.left {
            if now >= kill_at {
                sys::signal_process(pid, libc::SIGKILL);
            } else if !self.asked.contains(&pid) {
                sys::signal_process(pid, libc::SIGTERM);
                self.asked.push(pid);
            }
        }
    }

    /// Whether none is left, or only such as cannot be killed.
    pub fn are_gone(&self) -> bool {
        self.left.is_empty() || self.abandoned
    }

    /// When [`Self::tidy`] has something to do that no signal announces.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let kill_at = self.kill_at.filter(|_| !self.are_gone())?;
        Some(if now < kill_at { kill_at } else { kill_at + LEFTOVER_PATIENCE })
    }
}

/// Collects those children that have ended, and returns the others. The children of one that ended after
/// they were `listed` have come to this process since: a list counts in which nobody had ended.
fn collect_all(
    mut listed: impl FnMut() -> Vec<Pid>,
    mut reap: impl FnMut(Pid) -> bool,
) -> Vec<Pid> {
    loop {
        let mut left = listed();
        let all = left.len();
        left.retain(|&pid| !reap(pid));
        if left.len() == all {
            return left;
        }
    }
}

fn exit_of(status: ExitStatus) -> Exit {
    match status.signal() {
        Some(signal) => Exit::Signal(signal),
        None => Exit::Code(status.code().unwrap_or(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_child_of_a_stray_that_ends_while_strays_are_listed_is_not_overlooked() {
        // 5 ends behind its listing, and hands 6 on; so does 6 with 7.
        let mut lists = [vec![4, 5], vec![4, 6], vec![4, 7]].into_iter();
        let left = collect_all(|| lists.next().unwrap_or_default(), |pid| [5, 6].contains(&pid));
        assert_eq!(left, [4, 7]);
        assert!(collect_all(Vec::new, |_| true).is_empty());
    }
}
