//! The guardian: a second process that outlives a launcher killed with SIGKILL just long enough to
//! kill what the launcher can no longer kill.
//!
//! The kernel kills the workers themselves when the launcher dies (`PR_SET_PDEATHSIG`), but not
//! what they have started: data workers, side processes. The guardian knows every worker's process
//! group, holds one end of a socket whose other end only the launcher has, and kills the groups
//! when that end closes without a farewell. What has left its group (`setsid`, a daemon) is known
//! by the launcher's identifier in its environment. The guardian sleeps in one system call for the whole run.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::time::Duration;

use crate::contract::vars;
use crate::procfs;
use crate::sys::{self, Pid};

/// Its name in process lists.
const NAME: &std::ffi::CStr = c"rr-guardian";

/// Between two searches for processes of the run.
const SEARCH: Duration = Duration::from_millis(20);

/// Searches at most; each kills what it finds, so that only what forks faster than it dies is left.
const SEARCHES: u32 = 50;

/// Sent as the last number: all is well.
const FAREWELL: i32 = 0;

/// The launcher's hold on its guardian. Dropped without [`Guardian::dismiss`], on whatever way out
/// of the launcher, it lets the guardian do its work first.
pub struct Guardian {
    pid: Pid,
    socket: Option<OwnedFd>,
    /// Children that this process had before it became a launcher: a script has started them, and
    /// then `exec`ed it.
    bystanders: Vec<Pid>,
}

impl Guardian {
    /// Starts the guardian of the launcher `launcher_id`. To be called before any worker, and before this
    /// process has a thread.
    pub fn start(launcher_id: &str) -> io::Result<Self> {
        let bystanders = procfs::children();
        let (ours, theirs) = sys::message_pair()?;
        let own_end = ours.as_raw_fd();
        let pid = sys::fork_aside(NAME, || {
            // The guardian's copy of the launcher's end would keep the connection open for ever.
            sys::close_inherited(own_end);
            watch(&theirs, launcher_id);
        })?;
        Ok(Self { pid, socket: Some(ours), bystanders })
    }

    /// Whether a child of this process is the guardian itself, or older than the launch.
    pub fn spares(&self, pid: Pid) -> bool {
        pid == self.pid || self.bystanders.contains(&pid)
    }

    /// The descriptor on which a worker, before it becomes its program, sends its process id.
    pub fn descriptor(&self) -> RawFd {
        self.socket.as_ref().map_or(-1, OwnedFd::as_raw_fd)
    }

    /// Tells the guardian that a group has ended: its number may come to mean another one.
    pub fn forget(&self, group: Pid) {
        // A guardian that was itself killed is missed only if the launcher is killed too.
        let _ = sys::send_number(self.descriptor(), -group);
    }

    /// Nothing is left to guard.
    pub fn dismiss(&self) {
        let _ = sys::send_number(self.descriptor(), FAREWELL);
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        drop(self.socket.take());
        sys::wait_for(self.pid);
    }
}

/// The guardian's whole life.
fn watch(launcher: &OwnedFd, launcher_id: &str) {
    let mut groups: Vec<Pid> = Vec::new();
    while let Some(number) = sys::receive_number(launcher) {
        match number {
            FAREWELL => return,
            group if group > 0 => groups.push(group),
            forgotten => groups.retain(|&group| group != -forgotten),
        }
    }
    for group in groups {
        sys::signal_group(group, libc::SIGKILL);
    }
    let mark = format!("{}={launcher_id}", vars::RR_LAUNCHER);
    for _ in 0..SEARCHES {
        let left: Vec<Pid> =
            procfs::processes().filter(|&pid| procfs::was_started_with(pid, &mark)).collect();
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
