//! Starting a process without copying this one first.
//!
//! `fork` copies the page tables of its caller and then page after page that either touches; a clone
//! that shares memory until it runs its program, while its parent sleeps, copies nothing.
//! `posix_spawn` does so too, but has no way to tie the life of a process to that of its parent.

use std::convert::Infallible;
use std::ffi::{CStr, CString, c_char, c_void};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::ptr;

use super::signals::{heed_hangup, signal_set, start_with_default_signals};
use super::{Pid, Roster, checked, cpu_set, die_with, own_pid};

/// Bytes of the child's stack, beside its list of arguments, which `execvpe` may copy there: it also
/// holds a path.
const STACK: usize = 64 << 10;

/// A program to be run as a worker.
#[derive(Debug)]
pub struct Start<'a> {
    /// A path, or a name to be looked for in `PATH`.
    pub program: &'a CStr,
    /// With the program's own name, which comes first.
    pub arguments: &'a [CString],
    /// `NAME=VALUE`, all there are: what it has in common with others, and what is its own.
    pub environment: [&'a [CString]; 2],
    /// Its stdin, stdout and stderr; none of these has a number below 3.
    pub streams: [BorrowedFd<'a>; 3],
    /// The CPUs that it is bound to.
    pub cpus: Option<&'a [usize]>,
    /// Signals that wait until it asks for them. It hands that down to what it starts.
    pub held_back: &'a [libc::c_int],
    /// Where it enters itself before its program begins, so that there is no moment at which the
    /// guardian does not know of it.
    pub roster: Roster,
    /// What it and all that it starts are known by: see [`super::mark`].
    pub mark: u64,
}

/// What the child needs, made before it exists: it must not allocate.
struct Order<'a> {
    start: &'a Start<'a>,
    arguments: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    cpus: Option<libc::cpu_set_t>,
    mark: Option<libc::rlimit>,
    blocked: libc::sigset_t,
    parent: Pid,
    /// Why it could not run its program, an `errno`.
    failure: libc::c_int,
}

impl Start<'_> {
    /// Starts it as the leader of a session and a group of its own, which is killed when this thread ends and may be
    /// traced by this process, with no signal blocked but those that are held back and the usual answers
    /// to a broken pipe, to a file that grows too large, to TERM and to HUP.
    ///
    /// # Errors
    /// What the system says, of the new process or of its program.
    pub fn run(&self) -> io::Result<Pid> {
        let mut order = Order {
            start: self,
            arguments: pointers(&[self.arguments]),
            environment: pointers(&self.environment),
            cpus: self.cpus.map(cpu_set),
            mark: super::marked_limit(self.mark),
            blocked: signal_set(self.held_back),
            parent: own_pid(),
            failure: 0,
        };
        let mut stack = vec![0_u8; STACK + size_of_val(order.arguments.as_slice())];
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let (mut all, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: the sets are initialised by the calls that they are given to. The child gets a stack
        // of its own, whose end is aligned, and an `Order` that outlives it: this thread sleeps until
        // it runs its program or ends. Until then no signal reaches either.
        let pid = unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
            let end = stack.as_mut_ptr_range().end;
            let top = end.sub(end.addr() % 16);
            let pid = checked(libc::clone(child, top.cast(), flags, (&raw mut order).cast()));
            libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut());
            pid?
        };
        // SAFETY: a live place that the child may have written.
        let failure = unsafe { (&raw const order.failure).read_volatile() };
        if failure == 0 {
            return Ok(pid);
        }
        super::wait_for(pid);
        self.roster.strike(pid);
        Err(io::Error::from_raw_os_error(failure))
    }
}

/// Lists, one behind the other, as `execve` wants them.
fn pointers(lists: &[&[CString]]) -> Vec<*const c_char> {
    lists.iter().copied().flatten().map(|word| word.as_ptr()).chain([ptr::null()]).collect()
}

/// The child. It shares this process's memory, so it only makes system calls, and no locks.
extern "C" fn child(order: *mut c_void) -> libc::c_int {
    // SAFETY: `run` hands over a live `Order`, and does not touch it meanwhile.
    let order = unsafe { &mut *order.cast::<Order<'_>>() };
    let Err(error) = order.carry_out();
    order.failure = error.raw_os_error().unwrap_or(libc::EINVAL);
    127
}

impl Order<'_> {
    /// Returns only if something failed.
    fn carry_out(&self) -> io::Result<Infallible> {
        // SAFETY: lists end with a null and, as all else here, outlive the call.
        unsafe {
            for (stream, number) in self.start.streams.iter().zip(0..) {
                checked(libc::dup2(stream.as_raw_fd(), number))?;
            }
            checked(libc::setsid())?;
            if let Some(cpus) = &self.cpus {
                checked(libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), cpus))?;
            }
            if let Some(limit) = &self.mark {
                // One that cannot be set is missed only by the guardian, which has other signs.
                libc::setrlimit(libc::RLIMIT_LOCKS, limit);
            }
            // Where Yama (`ptrace_scope` 1) else allows only ancestors to trace it, for its stacks. It
            // outlasts exec; a kernel without Yama does not know it, and needs no permission.
            libc::prctl(libc::PR_SET_PTRACER, self.parent as libc::c_ulong, 0, 0, 0);
            die_with(self.parent)?;
            // What finds no place still dies with its parent.
            self.start.roster.enter(libc::getpid());
            start_with_default_signals(&self.blocked)?;
            heed_hangup();
            let (arguments, environment) = (self.arguments.as_ptr(), self.environment.as_ptr());
            libc::execvpe(self.start.program.as_ptr(), arguments, environment);
        }
        Err(io::Error::last_os_error())
    }
}
