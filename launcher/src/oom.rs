//! Whether it was the kernel's out-of-memory killer that ended a worker.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;

use crate::sys::Pid;

/// Bytes of the longest record of the kernel's log.
const RECORD: usize = 8192;

/// What the kernel counted and said before the workers started.
pub struct OomWatch {
    /// The kernel's log, from then on; only where this user may read it and its process ids are
    /// ours.
    log: Option<File>,
    /// What the log has said of killed processes since.
    killed: Vec<Pid>,
    counters: Vec<Counter>,
}

/// A file in which a line `oom_kill N` counts.
struct Counter {
    path: PathBuf,
    before: u64,
}

impl OomWatch {
    /// Notes how things stand. The workers run in this process's control groups.
    pub fn start() -> Self {
        let options =
            || File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
        let log = options()
            .ok()
            .filter(|_| sees_true_process_ids())
            .and_then(|mut log| log.seek(SeekFrom::End(0)).map(|_| log).ok());
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let counters = counter_files(&groups)
            .into_iter()
            .filter_map(|path| Some(Counter { before: read(&path)?, path }))
            // The one that is named first is the narrowest.
            .take(1)
            .collect();
        Self { log, killed: Vec::new(), counters }
    }

    /// Whether a worker that SIGKILL has ended was a victim of the killer: it is named in the
    /// kernel's log, or, where that cannot be read, a victim was counted since the last call.
    pub fn killed(&mut self, pid: Pid) -> bool {
        self.read_log();
        let mut counted = false;
        for counter in &mut self.counters {
            let now = read(&counter.path).unwrap_or(counter.before);
            counted |= now > counter.before;
            counter.before = now;
        }
        self.killed.contains(&pid) || (self.log.is_none() && counted)
    }

    fn read_log(&mut self) {
        let Some(log) = &mut self.log else { return };
        let mut record = vec![0; RECORD];
        loop {
            match log.read(&mut record) {
                Ok(size) if size > 0 => {
                    self.killed.extend(victim(&String::from_utf8_lossy(&record[..size])));
                }
                // Records that were overwritten before they were read.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }
}

/// Whether this process is in the first namespace of process ids, whose number is fixed.
fn sees_true_process_ids() -> bool {
    const FIRST: u64 = 0xEFFF_FFFC;
    fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == FIRST)
}

/// The files that count, the narrowest first: of the control group (version 2, then 1), then of
/// the machine.
fn counter_files(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let path = path.trim_start_matches('/');
        if controllers.is_empty() {
            for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"] {
                files.push(PathBuf::from(root).join(path).join("memory.events"));
            }
        } else if controllers.split(',').any(|name| name == "memory") {
            // In a container the path may be the host's, and the mount begins at our own group.
            for root in ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"] {
                files.push(PathBuf::from(root).join(path).join("memory.oom_control"));
            }
            files.push("/sys/fs/cgroup/memory/memory.oom_control".into());
        }
    }
    files.push("/proc/vmstat".into());
    files
}

fn read(path: &PathBuf) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
}

/// The process of a log record such as `…;Memory cgroup out of memory: Killed process 12 (python)`.
fn victim(record: &str) -> Option<Pid> {
    let (_, rest) = record.split_once("Killed process ")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_victim_of_a_log_record() {
        let record = "3,9,1,-;Memory cgroup out of memory: Killed process 4711 (sh) total-vm:2kB";
        assert_eq!(victim(record), Some(4711));
        assert_eq!(victim("6,1,1,-;usb 1-1: new device"), None);
    }

    #[test]
    fn the_narrowest_counter_comes_first() {
        let files = counter_files("4:memory:/job/1\n0::/user\n");
        assert_eq!(files[0], PathBuf::from("/sys/fs/cgroup/memory/job/1/memory.oom_control"));
        assert_eq!(files.last(), Some(&PathBuf::from("/proc/vmstat")));
        assert_eq!(
            counter_files("0::/a/b\n")[0],
            PathBuf::from("/sys/fs/cgroup/a/b/memory.events")
        );
    }
}
