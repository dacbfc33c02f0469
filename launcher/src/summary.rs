//! What is kept of the attempts of a launch, and `launch.json`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::contract::error_file::WorkerError;
use crate::contract::exit_code;
use crate::lifecycle::{Cause, Exit};
use crate::restarts::Verdict;
use crate::sys;

/// The summary's name in the log directory.
pub const FILE_NAME: &str = "launch.json";

/// The outcome where all workers have done what they were started for.
const SUCCESS: &str = "success";

/// The outcome where a launcher cannot start its workers, or not go on.
const LAUNCHER_FAILED: &str = "launcher_failed";

/// One worker of an attempt.
#[derive(Debug, Clone)]
pub struct RankRecord {
    /// Its rank.
    pub rank: usize,
    /// Its process id.
    pub pid: sys::Pid,
    /// How it ended; `None` where it could not be killed.
    pub exit: Option<Exit>,
    /// Whether the kernel's out-of-memory killer ended it.
    pub oom_killed: bool,
    /// How long it ran.
    pub elapsed: Option<Duration>,
    /// The step of its last heartbeat.
    pub step: Option<u64>,
    /// What its last heartbeat said it did.
    pub phase: Option<String>,
    /// The file that has all its output.
    pub log: Option<PathBuf>,
    /// The file that has its stacks, where it hung.
    pub stacks: Option<PathBuf>,
    /// The exception that it has recorded.
    pub error: Option<WorkerError>,
    /// Its last lines of output.
    pub last_lines: Vec<String>,
}

/// One start of all workers.
#[derive(Debug, Clone)]
pub struct AttemptRecord {
    /// The restarts before it.
    pub restart: u32,
    /// Why it ended, if not well.
    pub cause: Option<Cause>,
    /// How long it took.
    pub elapsed: Duration,
    /// Its workers.
    pub ranks: Vec<RankRecord>,
}

impl AttemptRecord {
    /// The exception to hand on to whoever started the launcher: that of the rank to blame, else the
    /// first one.
    #[must_use]
    pub fn error(&self) -> Option<&WorkerError> {
        let blamed = self.cause.and_then(Cause::rank);
        let own = self.ranks.iter().find(|rank| Some(rank.rank) == blamed);
        let first = || {
            self.ranks.iter().filter_map(|rank| rank.error.as_ref()).min_by_key(|error| error.after)
        };
        own.and_then(|rank| rank.error.as_ref()).or_else(first)
    }
}

/// A launch as a whole.
#[derive(Debug, Default)]
pub struct Summary {
    /// Its identifier.
    pub run_id: String,
    /// Its attempts, the first one first.
    pub attempts: Vec<AttemptRecord>,
}

impl Summary {
    /// Writes the summary into a directory, whole or not at all. `exit_code` is `None` as long as
    /// the launch goes on.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, dir: &Path, verdict: Verdict, exit_code: Option<u8>) -> io::Result<()> {
        let staged = dir.join(format!(".{FILE_NAME}"));
        let text = format!("{:#}\n", self.to_json(verdict, exit_code));
        let written =
            fs::write(&staged, text).and_then(|()| fs::rename(&staged, dir.join(FILE_NAME)));
        if written.is_err() {
            // It may not even exist.
            let _ = fs::remove_file(staged);
        }
        written
    }

    fn to_json(&self, verdict: Verdict, exit_code: Option<u8>) -> Value {
        let elapsed: Duration = self.attempts.iter().map(|attempt| attempt.elapsed).sum();
        let last = self.attempts.last().and_then(|attempt| attempt.cause);
        json!({
            "run_id": self.run_id,
            "exit_code": exit_code,
            "outcome": exit_code.map(|code| outcome(verdict, last, code)),
            "elapsed_s": elapsed.as_secs_f64(),
            "attempts": self.attempts.iter().map(AttemptRecord::to_json).collect::<Vec<_>>(),
        })
    }
}

/// How a launch ended, in a word for programs.
fn outcome(verdict: Verdict, cause: Option<Cause>, code: u8) -> &'static str {
    match (verdict, cause) {
        // The end although another attempt was to begin, or before there was one.
        (Verdict::Restart(_), _) => LAUNCHER_FAILED,
        (_, None) if code != exit_code::OK => LAUNCHER_FAILED,
        (_, None) => SUCCESS,
        (Verdict::Exhausted, _) => "out_of_restarts",
        (Verdict::NoProgress, _) => "no_progress",
        (Verdict::CalledOff(by), _) => kind(by),
        // Its workers were done before they heard of it.
        (Verdict::End, Some(Cause::Preempted { .. })) if code == exit_code::OK => SUCCESS,
        (Verdict::End, Some(cause)) => kind(cause),
    }
}

fn kind(cause: Cause) -> &'static str {
    match cause {
        Cause::Failure { .. } => "worker_failed",
        Cause::Hang { .. } => "hang",
        Cause::Signal(_) => "signal",
        Cause::Preempted { .. } => "preempted",
        Cause::OutputClosed => "output_closed",
        Cause::NodeLost { .. } => "node_lost",
        Cause::LauncherFailed { .. } => LAUNCHER_FAILED,
    }
}

impl AttemptRecord {
    fn to_json(&self) -> Value {
        json!({
            "restart": self.restart,
            "cause": self.cause.map(kind),
            "first_rank": self.cause.and_then(Cause::rank),
            "elapsed_s": self.elapsed.as_secs_f64(),
            "ranks": self.ranks.iter().map(RankRecord::to_json).collect::<Vec<_>>(),
        })
    }
}

impl RankRecord {
    fn to_json(&self) -> Value {
        let signal = match self.exit {
            Some(Exit::Signal(signal)) => Some(sys::signal_name(signal)),
            _ => None,
        };
        json!({
            "rank": self.rank,
            "pid": self.pid,
            "exit_code": self.exit.map(Exit::code),
            "signal": signal,
            "oom_killed": self.oom_killed,
            "elapsed_s": self.elapsed.map(|elapsed| elapsed.as_secs_f64()),
            "step": self.step,
            "phase": self.phase,
            "log": self.log.as_deref().map(Path::to_string_lossy),
            "stacks": self.stacks.as_deref().map(Path::to_string_lossy),
            "error": self.error.as_ref().map(|error| json!({
                "message": error.message,
                "traceback": error.traceback,
                "after_s": error.after.as_secs_f64(),
            })),
            "last_lines": self.last_lines,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    use super::*;

    fn record(exits: &[Exit]) -> AttemptRecord {
        let rank = |(rank, &exit): (usize, &Exit)| RankRecord {
            rank,
            pid: 100,
            exit: Some(exit),
            oom_killed: false,
            elapsed: Some(Duration::from_secs(1)),
            step: Some(3),
            phase: Some("reading data".to_owned()),
            log: None,
            stacks: None,
            error: None,
            last_lines: vec!["x".to_owned()],
        };
        AttemptRecord {
            restart: 0,
            cause: Some(Cause::Failure { rank: 1, exit: Exit::Code(3) }),
            elapsed: Duration::from_secs(2),
            ranks: exits.iter().enumerate().map(rank).collect(),
        }
    }

    #[test]
    fn the_summary_is_json_with_every_rank() {
        let mut attempt = record(&[Exit::Code(1), Exit::Signal(libc::SIGKILL)]);
        // A directory of another encoding than UTF-8.
        attempt.ranks[1].log = Some(OsStr::from_bytes(b"logs-\xe9/rank-0.log").into());
        let summary = Summary { run_id: "r".to_owned(), attempts: vec![attempt] };
        let folder = tempfile::tempdir().unwrap();
        summary.write(folder.path(), Verdict::Exhausted, Some(42)).unwrap();
        let text = fs::read_to_string(folder.path().join(FILE_NAME)).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&json["outcome"], &json["exit_code"]), (&json!("out_of_restarts"), &json!(42)));
        let attempt = &json["attempts"][0];
        assert_eq!(
            (&attempt["cause"], &attempt["first_rank"]),
            (&json!("worker_failed"), &json!(1))
        );
        assert_eq!(attempt["ranks"][1]["signal"], "SIGKILL");
        assert_eq!(attempt["ranks"][1]["exit_code"], 137);
        assert_eq!(attempt["ranks"][0]["last_lines"][0], "x");
        assert_eq!(attempt["ranks"][1]["log"], "logs-\u{fffd}/rank-0.log");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing half-written is left");
        let last = summary.attempts[0].cause;
        assert_eq!(outcome(Verdict::Restart(1), last, 2), "launcher_failed");
        assert_eq!(outcome(Verdict::End, None, 2), "launcher_failed");
        assert_eq!(outcome(Verdict::End, None, 0), "success");
        let asked = Some(Cause::Preempted { signal: Some(libc::SIGUSR1) });
        assert_eq!(outcome(Verdict::End, asked, 0), "success");
        assert_eq!(outcome(Verdict::End, asked, 41), "preempted");
        assert_eq!(outcome(Verdict::End, asked, 138), "preempted");
    }
}
