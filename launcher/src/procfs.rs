//! What `/proc` says of processes: whose children they are, what they carry in their environment,
//! and what they wait for.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::PathBuf;

use crate::sys::Pid;

/// Whether `/proc` is that of this process's own namespace. After `unshare --pid` without
/// `--mount-proc` its numbers mean other processes than they do in system calls.
fn is_own() -> bool {
    fs::read_link("/proc/self").is_ok_and(|pid| *pid == *std::process::id().to_string())
}

/// The processes of this machine that this one can see.
pub fn processes() -> impl Iterator<Item = Pid> {
    let entries = is_own().then(|| fs::read_dir("/proc")).into_iter().flatten().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The children of this process, whose only thread is the main one.
pub fn children() -> Vec<Pid> {
    let own = std::process::id();
    match fs::read_to_string(format!("/proc/self/task/{own}/children")) {
        Ok(list) => list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect(),
        // A kernel built without that file.
        Err(_) => processes().filter(|&pid| parent(pid) == Some(own as Pid)).collect(),
    }
}

/// This host's name.
pub fn hostname() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if name.trim().is_empty() { "localhost".to_owned() } else { name.trim().to_owned() }
}

/// The fields of a `stat` file behind the name, which may hold anything: the state is the first.
fn stat(path: &str) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("{path}/stat")).ok()?;
    let (_, rest) = text.rsplit_once(')')?;
    Some(rest.split_whitespace().map(str::to_owned).collect())
}

fn parent(pid: Pid) -> Option<Pid> {
    stat(&format!("/proc/{pid}"))?.get(1)?.parse().ok()
}

/// A process's name.
pub fn name(pid: Pid) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim_end().to_owned())
}

/// Whether a process was started with `NAME=value` in its environment.
pub fn was_started_with(pid: Pid, variable: &str) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment.split(|&byte| byte == 0).any(|entry| entry == variable.as_bytes())
}

/// Whether a process, or one that it descends from, was started with a mark: see [`crate::sys::mark`].
/// One that has ended, and waits to be collected, is not.
pub fn is_marked(pid: Pid, mark: u64) -> bool {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    let locks = limits.lines().find_map(|line| line.strip_prefix("Max file locks"));
    let soft = locks.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    let is_over = |fields: Vec<String>| fields.first().is_none_or(|state| "ZX".contains(&**state));
    soft == Some(mark) && !stat(&format!("/proc/{pid}")).is_none_or(is_over)
}

/// One thread of a process, as far as the kernel can tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    /// Its id: the main thread's is the process's.
    id: Pid,
    name: String,
    /// A letter of `/proc/PID/task/TID/stat`.
    state: char,
    /// What it waits for in the kernel.
    waits_for: Option<String>,
    /// Where it is in the kernel, innermost first; empty without the right to know.
    kernel_stack: Vec<String>,
}

impl Thread {
    /// Looks at a thread; `None` when it is gone.
    fn of(pid: Pid, id: Pid) -> Option<Self> {
        let folder = format!("/proc/{pid}/task/{id}");
        let read = |file: &str| fs::read_to_string(format!("{folder}/{file}")).unwrap_or_default();
        let frame = |line: &str| line.trim_start_matches("[<0>] ").to_owned();
        Some(Self {
            id,
            name: read("comm").trim_end().to_owned(),
            state: stat(&folder)?.first()?.chars().next()?,
            waits_for: waits_for(&folder),
            kernel_stack: read("stack").lines().map(frame).collect(),
        })
    }
}

impl fmt::Display for Thread {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "thread {} {}: {}", self.id, self.name, state_name(self.state))?;
        if let Some(what) = &self.waits_for {
            write!(out, " in {what}")?;
        }
        self.kernel_stack.iter().try_for_each(|frame| write!(out, "\n    {frame}"))
    }
}

/// The threads of a process, the main one first; none when it is gone.
pub fn threads(pid: Pid) -> Vec<Thread> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut threads: Vec<_> = ids.filter_map(|id| Thread::of(pid, id)).collect();
    threads.sort_by_key(|thread| (thread.id != pid, thread.id));
    threads
}

/// The file that a process runs.
pub fn program(pid: Pid) -> Option<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// A thread's state in words.
fn state_name(state: char) -> &'static str {
    match state {
        'T' => "stopped by a signal",
        't' => "stopped by a debugger",
        'D' => "in a system call that cannot be interrupted",
        'R' => "running",
        'Z' | 'X' => "ended",
        _ => "sleeping",
    }
}

/// What a process does, as far as the kernel can tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Activity {
    /// The main thread's state, a letter of `/proc/PID/stat`.
    state: char,
    /// What the main thread waits for in the kernel.
    main: Option<String>,
    /// What the other threads wait for, and how many of each.
    others: BTreeMap<String, usize>,
}

impl Activity {
    /// Looks at a process; `None` when it is gone.
    pub fn of(pid: Pid) -> Option<Self> {
        let mut threads = threads(pid).into_iter();
        let main = threads.next().filter(|thread| thread.id == pid)?;
        let mut others = BTreeMap::new();
        for thread in threads {
            *others.entry(thread.waits_for.unwrap_or_else(|| "running".to_owned())).or_default() +=
                1;
        }
        Some(Self { state: main.state, main: main.waits_for, others })
    }

    /// Whether a signal or a debugger has stopped it.
    pub fn is_stopped(&self) -> bool {
        matches!(self.state, 'T' | 't')
    }
}

impl fmt::Display for Activity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(state_name(self.state))?;
        if let (Some(what), 'S' | 'D') = (&self.main, self.state) {
            write!(out, " in {what}")?;
        }
        for (index, (what, count)) in self.others.iter().enumerate() {
            out.write_str(if index == 0 { "; other threads: " } else { ", " })?;
            write!(out, "{count} in {what}")?;
        }
        Ok(())
    }
}

/// The system call that a thread (or a process's main thread) is in, and the kernel's function.
fn waits_for(path: &str) -> Option<String> {
    let call = fs::read_to_string(format!("{path}/syscall")).ok();
    let number = call.as_deref().and_then(|text| text.split_whitespace().next()?.parse().ok());
    let function = fs::read_to_string(format!("{path}/wchan")).ok();
    let function = function.filter(|name| !name.is_empty() && name != "0");
    match (number.filter(|&number: &i64| number >= 0), function) {
        (Some(number), Some(function)) => Some(format!("{} ({function})", call_name(number))),
        (Some(number), None) => Some(call_name(number)),
        (None, function) => function,
    }
}

/// The calls in which programs wait.
fn call_name(number: i64) -> String {
    const NAMES: [(libc::c_long, &str); 18] = [
        (libc::SYS_futex, "futex"),
        (libc::SYS_read, "read"),
        (libc::SYS_pread64, "pread"),
        (libc::SYS_write, "write"),
        (libc::SYS_pwrite64, "pwrite"),
        (libc::SYS_recvfrom, "recvfrom"),
        (libc::SYS_recvmsg, "recvmsg"),
        (libc::SYS_sendto, "sendto"),
        (libc::SYS_sendmsg, "sendmsg"),
        (libc::SYS_accept4, "accept"),
        (libc::SYS_connect, "connect"),
        (libc::SYS_ppoll, "poll"),
        (libc::SYS_epoll_pwait, "epoll_wait"),
        (libc::SYS_nanosleep, "sleep"),
        (libc::SYS_clock_nanosleep, "sleep"),
        (libc::SYS_wait4, "wait for a child"),
        (libc::SYS_ioctl, "ioctl"),
        (libc::SYS_fsync, "fsync"),
    ];
    // Calls that newer architectures leave out.
    #[cfg(target_arch = "x86_64")]
    const OLDER: [(libc::c_long, &str); 3] = [
        (libc::SYS_poll, "poll"),
        (libc::SYS_epoll_wait, "epoll_wait"),
        (libc::SYS_select, "select"),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    const OLDER: [(libc::c_long, &str); 0] = [];
    let known = NAMES.iter().chain(&OLDER).find(|(known, _)| *known == number);
    known.map_or_else(|| format!("system call {number}"), |(_, name)| (*name).to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use std::process::Command;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_sleeping_child_is_found_and_described() {
        let mut child =
            Command::new("sleep").arg("300").env("RR_TEST_MARK", "x y").spawn().unwrap();
        let pid = child.id() as Pid;
        let asleep = |_| {
            std::thread::sleep(Duration::from_millis(10));
            Activity::of(pid).is_some_and(|activity| activity.state == 'S')
        };
        assert!((0..500).any(asleep));
        let activity = Activity::of(pid).unwrap();
        assert!(activity.to_string().starts_with("sleeping in sleep"), "{activity}");
        assert!(!activity.is_stopped());
        let [main] = &threads(pid)[..] else { panic!("one thread") };
        let start = format!("thread {pid} sleep: sleeping in sleep");
        assert!(main.to_string().starts_with(&start), "{main}");
        assert!(program(pid).unwrap().is_absolute());
        assert!(was_started_with(pid, "RR_TEST_MARK=x y"));
        assert!(!was_started_with(pid, "RR_TEST_MARK=x"));
        assert!(!is_marked(pid, crate::sys::mark(1)));
        assert_eq!(parent(pid), Some(std::process::id() as Pid));
        assert_eq!(name(pid).as_deref(), Some("sleep"));
        assert!(processes().any(|other| other == pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(Activity::of(pid), None);
    }
}
