//! Signals: which there are, reading them, and remembering that one came.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

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

/// The signals that it was called for, a bit each.
static REMEMBERING: AtomicU64 = AtomicU64::new(0);

/// From now on these signals (numbers up to 63) are only remembered. Once one has come, TERM, which
/// would interrupt what this process does on it, has no effect; before, it ends the process as ever.
pub fn remember_signals(signals: &[libc::c_int]) -> io::Result<()> {
    let bits = signals.iter().fold(0, |bits, signal| bits | (1 << signal));
    REMEMBERING.store(bits, Ordering::Relaxed);
    for &signal in signals {
        handle(signal, remember)?;
    }
    if !signals.contains(&libc::SIGTERM) && !is_ignored(libc::SIGTERM) {
        handle(libc::SIGTERM, end_unless_remembered)?;
    }
    Ok(())
}

extern "C" fn remember(_: libc::c_int) {
    REMEMBERED.store(true, Ordering::Relaxed);
}

/// TERM may overtake a signal that came before it but is handled by another thread, or later.
extern "C" fn end_unless_remembered(term: libc::c_int) {
    let mut pending = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: all zeroes is a valid set, which sigpending fills; all of these calls are
    // async-signal-safe.
    unsafe {
        libc::sigpending(pending.as_mut_ptr());
        let remembering = REMEMBERING.load(Ordering::Relaxed);
        let is_asked = |signal| {
            remembering & (1_u64 << signal) != 0 && libc::sigismember(pending.as_ptr(), signal) == 1
        };
        if !remembered_signal() && !(1..64).any(is_asked) {
            // Delivered when this handler returns.
            libc::signal(term, libc::SIG_DFL);
            libc::raise(term);
        }
    }
}

fn handle(signal: libc::c_int, handler: extern "C" fn(libc::c_int)) -> io::Result<()> {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: all zeroes is a valid sigaction without flags or mask; the handlers above only use
    // atomics and async-signal-safe calls, and live as long as the program.
    unsafe {
        let action = action.assume_init_mut();
        action.sa_sigaction = handler as libc::sighandler_t;
        // Interrupted system calls go on.
        action.sa_flags = libc::SA_RESTART;
        checked(libc::sigaction(signal, action, std::ptr::null_mut())).map(drop)
    }
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
