//! Signals: which there are, reading them, and remembering that one came.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use super::{checked, owned};

/// A set of signals, for masks.
pub(super) fn signal_set(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the whole set; sigaddset is given that set.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// Whether the parent has asked for a signal to be ignored, as `nohup` does for SIGHUP and a shell
/// for SIGINT of its background jobs.
pub fn is_ignored(signal: libc::c_int) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null new action only queries; the old one is written to a live sigaction.
    unsafe {
        libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

/// Undoes an inherited "ignore SIGCHLD", under which the kernel would throw away how a child ended.
pub fn wait_for_own_children() {
    // SAFETY: sets a default disposition; no handler of ours is replaced.
    unsafe {
        libc::signal(libc::SIGCHLD, libc::SIG_DFL);
    }
}

/// From now on a write beyond the limit on the size of files (`ulimit -f`) fails, as on a full disk. By
/// default it ends the process.
pub fn outlive_file_size_limit() {
    // SAFETY: no handler of ours is replaced.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}

/// In the child between fork and exec: undoes what this process has set for itself, and blocks no signal
/// but `blocked`. Nor is TERM ignored, which this process heeds however it was started.
pub(super) fn start_with_default_signals(blocked: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: async-signal-safe calls; the set is initialised, a null old set is allowed.
    unsafe {
        for signal in [libc::SIGPIPE, libc::SIGXFSZ, libc::SIGTERM] {
            libc::signal(signal, libc::SIG_DFL);
        }
        checked(libc::sigprocmask(libc::SIG_SETMASK, blocked, std::ptr::null_mut())).map(drop)
    }
}

/// In the child between fork and exec: HUP ends it, however this process was started (`nohup`). That of a
/// terminal goes to the processes of its session, of which a child with a session of its own is none.
pub(super) fn heed_hangup() {
    // SAFETY: an async-signal-safe call, which replaces no handler of ours.
    unsafe {
        libc::signal(libc::SIGHUP, libc::SIG_DFL);
    }
}

/// Signals as a stream: blocked for the process, and read from a descriptor.
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Blocks `signals` in this thread (the only one) and opens the descriptor.
    pub fn open(signals: &[libc::c_int]) -> io::Result<Self> {
        let set = signal_set(signals);
        // SAFETY: both calls read an initialised set; a null old set is allowed.
        unsafe {
            checked(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))?;
            let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
            owned(libc::signalfd(-1, &raw const set, flags)).map(Self)
        }
    }

    /// The next pending signal, if any.
    pub fn next(&self) -> Option<libc::c_int> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the kernel writes at most `size` bytes into `info`, and whole records only, so
        // that a full read has initialised it.
        unsafe {
            let read = libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size);
            (read == size as isize).then(|| info.assume_init().ssi_signo as libc::c_int)
        }
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Set by the first signal that [`remember_signals`] was called for.
static REMEMBERED: AtomicBool = AtomicBool::new(false);

/// From now on these signals are only remembered. Once one has come, TERM, which would interrupt
/// what this process does on it, has no effect; before, it ends the process as ever.
///
/// A thread of its own receives them, so that their order is kept: a handler of TERM could run on
/// one thread while the signal that came before is about to be handled on another. To be called
/// while this is the only thread: those that follow inherit that they receive none of these.
pub fn remember_signals(signals: &[libc::c_int]) -> io::Result<()> {
    let asked = signals.to_vec();
    let mut awaited = asked.clone();
    if !asked.contains(&libc::SIGTERM) && !is_ignored(libc::SIGTERM) {
        awaited.push(libc::SIGTERM);
    }
    let set = signal_set(&awaited);
    mask(libc::SIG_BLOCK, &set);
    let thread = std::thread::Builder::new().name("signals".to_owned());
    let started = thread.spawn(move || receive(&set, &asked));
    if started.is_err() {
        mask(libc::SIG_UNBLOCK, &set);
    }
    started.map(drop)
}

/// Changes which signals this thread receives.
fn mask(how: libc::c_int, set: &libc::sigset_t) {
    // SAFETY: reads an initialised set; a null old set is allowed.
    let failed = unsafe { libc::pthread_sigmask(how, set, std::ptr::null_mut()) };
    assert_eq!(failed, 0, "a mask is only refused for an unknown way of changing it");
}

/// Waits for signals of `set` for as long as the process lives.
fn receive(set: &libc::sigset_t, asked: &[libc::c_int]) {
    loop {
        let mut signal = 0;
        // SAFETY: reads an initialised set, and writes a live number.
        if unsafe { libc::sigwait(set, &raw mut signal) } != 0 {
            continue;
        }
        // Of several that wait the lowest number comes first, whichever was sent first.
        if asked.contains(&signal) || asked.iter().any(|&signal| is_pending(signal)) {
            REMEMBERED.store(true, Ordering::Relaxed);
        } else if !remembered_signal() {
            end_by(signal);
        }
    }
}

/// Whether a blocked signal waits to be received.
fn is_pending(signal: libc::c_int) -> bool {
    let mut pending = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: all zeroes is a valid set, which sigpending fills.
    unsafe {
        libc::sigpending(pending.as_mut_ptr()) == 0
            && libc::sigismember(pending.as_ptr(), signal) == 1
    }
}

/// Ends this process by a signal's default action, so that its parent sees what ended it.
fn end_by(signal: libc::c_int) {
    // SAFETY: no handler of ours is replaced.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
    mask(libc::SIG_UNBLOCK, &signal_set(&[signal]));
}

/// Whether such a signal has come.
pub fn remembered_signal() -> bool {
    REMEMBERED.load(Ordering::Relaxed)
}

/// The signals that have a name of their own here.
const SIGNALS: [(libc::c_int, &str); 19] = [
    (libc::SIGHUP, "SIGHUP"),
    (libc::SIGINT, "SIGINT"),
    (libc::SIGQUIT, "SIGQUIT"),
    (libc::SIGILL, "SIGILL"),
    (libc::SIGTRAP, "SIGTRAP"),
    (libc::SIGABRT, "SIGABRT"),
    (libc::SIGBUS, "SIGBUS"),
    (libc::SIGFPE, "SIGFPE"),
    (libc::SIGKILL, "SIGKILL"),
    (libc::SIGUSR1, "SIGUSR1"),
    (libc::SIGSEGV, "SIGSEGV"),
    (libc::SIGUSR2, "SIGUSR2"),
    (libc::SIGPIPE, "SIGPIPE"),
    (libc::SIGALRM, "SIGALRM"),
    (libc::SIGTERM, "SIGTERM"),
    (libc::SIGCONT, "SIGCONT"),
    (libc::SIGXCPU, "SIGXCPU"),
    (libc::SIGXFSZ, "SIGXFSZ"),
    (libc::SIGSYS, "SIGSYS"),
];

/// The usual name of a signal, such as `SIGSEGV`.
pub fn signal_name(signal: libc::c_int) -> String {
    let known = SIGNALS.iter().find(|(number, _)| *number == signal);
    known.map_or_else(|| format!("signal {signal}"), |(_, name)| (*name).to_owned())
}

/// The signal of a name (`TERM`, `SIGTERM`, in any case) or number.
pub fn signal_number(text: &str) -> Option<libc::c_int> {
    if let Ok(number) = text.parse() {
        return (1..64).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    SIGNALS.iter().find(|(_, known)| known[3..] == *name).map(|(number, _)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        assert_eq!(signal_name(libc::SIGSEGV), "SIGSEGV");
        assert_eq!(signal_name(64), "signal 64");
        for text in ["TERM", "SIGTERM", "sigterm", "15"] {
            assert_eq!(signal_number(text), Some(libc::SIGTERM), "{text}");
        }
        for text in ["", "SIG", "TERMINATE", "0", "-1", "999"] {
            assert_eq!(signal_number(text), None, "{text}");
        }
    }
}
