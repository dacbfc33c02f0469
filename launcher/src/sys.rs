//! The system calls that std does not wrap, and all of this crate's `unsafe`.

mod roster;
mod signals;
mod spawn;

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Command, ExitStatus};
use std::sync::atomic::AtomicU64;
use std::time::Duration;

pub use roster::Roster;
pub use signals::{
    SignalFd, is_ignored, outlive_file_size_limit, remember_signals, remembered_signal,
    signal_name, signal_number, wait_for_own_children,
};
use signals::{signal_set, start_with_default_signals};
pub use spawn::Start;

/// A process id, or the id of the process group that the process leads.
pub type Pid = libc::pid_t;

/// Turns the -1 of a system call into the error that it stands for.
fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Repeats a call that a signal interrupts.
fn retried(mut call: impl FnMut() -> libc::c_int) -> io::Result<libc::c_int> {
    loop {
        match checked(call()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Takes ownership of a new descriptor.
fn owned(result: libc::c_int) -> io::Result<OwnedFd> {
    let fd = checked(result)?;
    // SAFETY: the callers pass the result of a call that has just created this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What to wait for on a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Data, the end of it, or a process's end.
    Read,
    /// Room to write.
    Write,
}

/// Waits on many descriptors, each under a token. Level-triggered. Ready ones come in the order in
/// which the kernel saw them become ready, which makes the order of process ends exact.
pub struct Epoll {
    fd: OwnedFd,
    events: Vec<libc::epoll_event>,
}

impl Epoll {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are involved.
        let fd = owned(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?;
        Ok(Self { fd, events: Vec::with_capacity(256) })
    }

    /// Watches a descriptor. A regular file, which is always ready, is refused with `EPERM`.
    pub fn add(&self, fd: BorrowedFd<'_>, interest: Interest, token: u64) -> io::Result<()> {
        let events = match interest {
            Interest::Read => libc::EPOLLIN,
            Interest::Write => libc::EPOLLOUT,
        };
        let mut event = libc::epoll_event { events: events as u32, u64: token };
        // SAFETY: both descriptors are open, and `event` lives over the call.
        checked(unsafe {
            libc::epoll_ctl(
                self.fd.as_raw_fd(),
                libc::EPOLL_CTL_ADD,
                fd.as_raw_fd(),
                &raw mut event,
            )
        })
        .map(drop)
    }

    /// Stops watching a descriptor.
    pub fn remove(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        // SAFETY: both descriptors are open; EPOLL_CTL_DEL takes a null event.
        checked(unsafe {
            libc::epoll_ctl(
                self.fd.as_raw_fd(),
                libc::EPOLL_CTL_DEL,
                fd.as_raw_fd(),
                std::ptr::null_mut(),
            )
        })
        .map(drop)
    }

    /// Waits until something is ready or `timeout` is over (`None`: for ever), and returns the
    /// tokens of what is ready. A timeout is rounded up to a millisecond.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Vec<u64>> {
        let millis = timeout.map_or(-1, |timeout| {
            libc::c_int::try_from(timeout.as_nanos().div_ceil(1_000_000))
                .unwrap_or(libc::c_int::MAX)
        });
        // SAFETY: the kernel writes at most `capacity` events into the vector's own memory, and
        // returns how many it wrote.
        unsafe {
            let capacity = self.events.capacity() as libc::c_int;
            let buffer = self.events.as_mut_ptr();
            let ready =
                match checked(libc::epoll_wait(self.fd.as_raw_fd(), buffer, capacity, millis)) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                    result => result?,
                };
            self.events.set_len(ready as usize);
        }
        Ok(self.events.iter().map(|event| event.u64).collect())
    }
}

/// A descriptor that becomes readable when the child ends, or `None` on a kernel older than 5.3.
pub fn pidfd(pid: Pid) -> Option<OwnedFd> {
    // SAFETY: no pointers are involved.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    owned(fd as libc::c_int).ok()
}

/// Sends a signal to all of a process group (0: none, only look). False if it has no member left.
pub fn signal_group(group: Pid, signal: libc::c_int) -> bool {
    // A group of 0 or 1 would mean our own group or everything.
    debug_assert!(group > 1, "no group to signal: {group}");
    // SAFETY: no pointers are involved.
    let result = checked(unsafe { libc::kill(-group, signal) });
    // EPERM: there are members, under another user.
    !matches!(result, Err(error) if error.raw_os_error() == Some(libc::ESRCH))
}

/// Collects those members of a group that have ended as children of this process.
pub fn reap_group(group: Pid) {
    // SAFETY: a null status is allowed.
    while unsafe { libc::waitpid(-group, std::ptr::null_mut(), libc::WNOHANG) } > 0 {}
}

/// Waits for one child to end.
pub fn wait_for(pid: Pid) {
    // SAFETY: a null status is allowed. An error means that there is nothing to wait for.
    let _ = retried(|| unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) });
}

/// Waits until the process of a [`pidfd`] has ended, whoever's child it is.
pub fn wait_for_end(process: &OwnedFd) {
    let mut ended = libc::pollfd { fd: process.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one entry, which outlives the call.
    let _ = retried(|| unsafe { libc::poll(&raw mut ended, 1, -1) });
}

/// How a child ended, if it has; it is then collected.
///
/// # Errors
/// It is no child of this process, or no longer.
pub fn try_wait(pid: Pid) -> io::Result<Option<ExitStatus>> {
    let mut status = 0;
    // SAFETY: the kernel writes a live status.
    let ended = retried(|| unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) })?;
    Ok((ended == pid).then(|| ExitStatus::from_raw(status)))
}

/// Makes this process the parent of descendants whose own parent ends, so that it hears of their
/// end and no zombie stays behind in a container without a proper init.
pub fn adopt_orphans() -> io::Result<()> {
    // SAFETY: no pointers are involved.
    checked(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }).map(drop)
}

/// In the child between fork and exec: be killed when the thread that forked ends.
///
/// Linux ties this to the parent *thread*; ours is the main thread, which lives as long as the
/// process. A parent that ended before the call would never be noticed, so the caller's id is
/// compared again.
fn die_with(parent: Pid) -> io::Result<()> {
    // SAFETY: no pointers are involved; both calls are async-signal-safe.
    unsafe {
        checked(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
        if libc::getppid() != parent {
            libc::_exit(1);
        }
    }
    Ok(())
}

/// The mark of a launcher: what all processes that descend from its workers carry, and no other does.
///
/// It is their limit on file locks (`RLIMIT_LOCKS`), which the kernel hands down over fork, exec and
/// `setsid`, shows to everybody, and has not enforced since Linux 2.4.25. An environment can be cleared.
pub fn mark(id: u64) -> u64 {
    // Far beyond what anybody would limit locks to, and below "unlimited".
    (id >> 2) | (1 << 62)
}

/// That limit with a mark, where it may be set: nobody may go beyond the hard one.
fn marked_limit(mark: u64) -> Option<libc::rlimit> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes a live place.
    let known = unsafe { libc::getrlimit(libc::RLIMIT_LOCKS, &raw mut limit) } == 0;
    limit.rlim_cur = mark;
    (known && mark <= limit.rlim_max).then_some(limit)
}

/// The id of this process.
pub fn own_pid() -> Pid {
    std::process::id() as Pid
}

/// Makes a command's process end when this one does, SIGKILL included, and receive all signals: this
/// process blocks some for [`SignalFd`].
pub fn die_with_parent(command: &mut Command) {
    let parent = own_pid();
    let none = signal_set(&[]);
    // SAFETY: the closure only makes async-signal-safe calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            die_with(parent)?;
            start_with_default_signals(&none)
        });
    }
}

/// The CPUs that this process may use, by number.
pub fn allowed_cpus() -> Vec<usize> {
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: the kernel writes at most the size of `set`, all zeroes is a valid one, and CPU_ISSET
    // looks at numbers below its size.
    unsafe {
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), set.as_mut_ptr()) != 0 {
            return Vec::new();
        }
        let set = set.assume_init();
        (0..libc::CPU_SETSIZE as usize).filter(|&cpu| libc::CPU_ISSET(cpu, &set)).collect()
    }
}

/// A set of CPUs. A machine that has taken one away since is not an error as long as one is left.
fn cpu_set(cpus: &[usize]) -> libc::cpu_set_t {
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: all zeroes is a valid set, and numbers beyond its size are left out.
    unsafe {
        for &cpu in cpus.iter().filter(|&&cpu| cpu < libc::CPU_SETSIZE as usize) {
            libc::CPU_SET(cpu, set.assume_init_mut());
        }
        set.assume_init()
    }
}

/// As [`die_with_parent`] for what looks at a worker, which also enters itself in `roster` before its
/// program begins, so that there is no moment at which the guardian does not know of it.
pub fn prepare_watched(command: &mut Command, roster: Roster) {
    let parent = own_pid();
    let none = signal_set(&[]);
    // SAFETY: the closure only makes async-signal-safe calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            die_with(parent)?;
            start_with_default_signals(&none)?;
            // What finds no place still dies with its parent.
            roster.enter(libc::getpid());
            Ok(())
        });
    }
}

/// Two ends of a connection that keeps the borders of messages.
pub fn message_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: the kernel writes two descriptors into `ends`, which nothing else owns.
    unsafe {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        checked(libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()))?;
        Ok((owned(ends[0])?, owned(ends[1])?))
    }
}

/// Sends one number. Async-signal-safe, and never raises SIGPIPE.
pub fn send_number(socket: RawFd, number: i32) -> io::Result<()> {
    let bytes = number.to_ne_bytes();
    loop {
        // SAFETY: `bytes` is valid for its length; a closed descriptor gives an error.
        let sent =
            unsafe { libc::send(socket, bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
        if sent == bytes.len() as isize {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Receives one number; `None` when all senders are gone.
pub fn receive_number(socket: &OwnedFd) -> Option<i32> {
    let mut bytes = [0; 4];
    loop {
        // SAFETY: `bytes` is valid for its length.
        let read =
            unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        if read == bytes.len() as isize {
            return Some(i32::from_ne_bytes(bytes));
        }
        if read != -1 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            return None;
        }
    }
}

/// Forks a child that runs `body` and ends. To be called before this process starts a thread.
///
/// The child is in its own session, ignores the signals that end a launcher, holds none of its
/// parent's standard streams, and shows as `name` in process lists. `as_orphan` it is a grandchild
/// whose parent, the child whose id is returned, has ended: no descendant of this process in anybody's
/// list. Where no second process can be had, it is the child after all.
pub fn fork_aside(name: &CStr, as_orphan: bool, body: impl FnOnce()) -> io::Result<Pid> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    // SAFETY: this process has started no thread, so that the child may do whatever a process may;
    // it never returns from here. (NVML, where it was loaded, has been closed; should it have left
    // a thread behind, glibc still hands the child a working malloc, the only lock it could miss.)
    let pid = checked(unsafe { libc::fork() })?;
    if pid != 0 {
        return Ok(pid);
    }
    // SAFETY: plain calls on descriptors and signals that exist; `name` ends in NUL. Failures
    // leave a child that is less well hidden, which is no reason not to run it.
    unsafe {
        if as_orphan && libc::fork() > 0 {
            libc::_exit(0);
        }
        libc::setsid();
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
            libc::signal(signal, libc::SIG_IGN);
        }
        for stream in 0..3 {
            libc::dup2(null.as_raw_fd(), stream);
        }
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        body();
        libc::_exit(0)
    }
}

/// Closes, in a forked child, the descriptor `inherited`, which the parent's copy of the program owns,
/// and all others above the standard streams but `kept`. A kernel older than 5.9 closes only the first.
pub fn close_inherited(inherited: RawFd, kept: RawFd) {
    let ranges = [(3, kept - 1), (kept + 1, RawFd::MAX)];
    // SAFETY: the child never runs the parent's code that owns these descriptors.
    unsafe {
        libc::close(inherited);
        for (first, last) in ranges.into_iter().filter(|(first, last)| first <= last) {
            libc::syscall(libc::SYS_close_range, first, last, 0);
        }
    }
}

/// How many bytes can be read from a pipe without waiting.
pub fn readable_bytes(pipe: BorrowedFd<'_>) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int.
    let result = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if result == 0 { count.max(0) as usize } else { 0 }
}

/// Asks that a pipe hold so many bytes. The kernel may refuse, and then leaves it as it is.
pub fn widen_pipe(pipe: BorrowedFd<'_>, bytes: libc::c_int) {
    // SAFETY: F_SETPIPE_SZ takes one int.
    unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, bytes) };
}

/// Whether a write would find room now. True for files, and where a write would fail at once.
pub fn is_writable(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one live pollfd.
    let ready = retried(|| unsafe { libc::poll(&raw mut poll, 1, 0) });
    // If poll itself fails, the write will say why.
    !matches!(ready, Ok(0))
}

/// The device whose every opening makes a new terminal.
const PTMX: libc::dev_t = libc::makedev(5, 2);

/// A terminal once more, for writes that never wait: of the same device, but a description of this
/// process alone, so that nobody else's writes change.
///
/// # Errors
/// What the system says; also of the upper end of a pseudoterminal, which cannot be opened twice.
pub fn reopen_terminal(terminal: BorrowedFd<'_>) -> io::Result<File> {
    use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
    let path = format!("/proc/self/fd/{}", terminal.as_raw_fd());
    if std::fs::metadata(&path)?.rdev() == PTMX {
        return Err(io::ErrorKind::Unsupported.into());
    }
    File::options().write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// The width of a terminal in columns.
pub fn terminal_width(fd: BorrowedFd<'_>) -> Option<usize> {
    let mut size = MaybeUninit::<libc::winsize>::zeroed();
    // SAFETY: TIOCGWINSZ writes one winsize; all zeroes is a valid one.
    let columns = unsafe {
        if libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, size.as_mut_ptr()) != 0 {
            return None;
        }
        size.assume_init().ws_col
    };
    (columns > 0).then_some(usize::from(columns))
}

/// A file in memory, without a name, gone with its last descriptor.
pub fn memory_file(name: &CStr) -> io::Result<File> {
    // SAFETY: `name` ends in NUL.
    owned(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) }).map(File::from)
}

/// A path under which every process of this user opens a file that this process has open. It names it
/// through this process rather than by a descriptor that is inherited, which would be lost in programs
/// that start others, and leak into those that close none.
pub fn path_of(file: &File) -> String {
    format!("/proc/{}/fd/{}", own_pid(), file.as_raw_fd())
}

/// The first `words` words of a file as memory that is shared with whoever else has the file, for the
/// rest of this process's life.
pub fn map_words(file: &File, words: usize) -> io::Result<&'static [AtomicU64]> {
    let length = words * size_of::<u64>();
    // Beyond the end of the file the kernel answers an access with SIGBUS.
    if file.metadata()?.len() < length as u64 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a fresh mapping of `length` bytes, page-aligned and never unmapped; any bits are a valid
    // u64, and all accesses in this process are atomic.
    unsafe {
        let fd = file.as_raw_fd();
        let memory = libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, 0);
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(std::slice::from_raw_parts(memory.cast(), words))
    }
}

/// Sends a signal to one process. False if there is none.
pub fn signal_process(pid: Pid, signal: libc::c_int) -> bool {
    debug_assert!(pid > 1, "no process to signal: {pid}");
    // SAFETY: no pointers are involved.
    unsafe { libc::kill(pid, signal) == 0 }
}

/// Collects a child if it has ended.
pub fn reap(pid: Pid) -> bool {
    // SAFETY: a null status is allowed.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) == pid }
}
