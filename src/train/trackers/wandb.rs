//! Weights & Biases, through its own Python client in a side process that reads lines of JSON. The
//! client's settings (`WANDB_PROJECT`, `WANDB_MODE`, …) are its own environment variables.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use rr_launch::contract::preemption;
use serde_json::{Value, json};

use crate::config::Plan;
use crate::error::{Error, Result};

/// What the side process runs.
const PROGRAM: &str = include_str!("wandb_bridge.py");

/// Fails where there is no client, also where a directory `wandb` here would be taken for one.
const PROBE: &str = "import wandb; wandb.init";

/// The environment variable that names the interpreter.
const PYTHON: &str = "RERANKER_PYTHON";

/// How long the client may take to hand over the last metrics.
const LAST_WORDS: Duration = Duration::from_secs(60);

/// How long where the run makes room: whoever asked for it gives it seconds in all, and kills it then.
const IN_HASTE: Duration = Duration::from_secs(2);

/// Lines that may wait for the client.
const QUEUE: usize = 1024;

/// The side process, which gets a line for each line of metrics. Another thread writes to it, so that
/// training never waits for it.
#[derive(Debug)]
pub(super) struct Bridge {
    child: Child,
    lines: Sender<String>,
}

fn python() -> String {
    std::env::var(PYTHON).unwrap_or_else(|_| "python3".into())
}

/// Checks that the interpreter has the client.
pub(super) fn check(plan: &Plan) -> Result<()> {
    let python = python();
    let output = Command::new(&python).args(["-c", PROBE]).stdin(Stdio::null()).output();
    let message = match output {
        Ok(output) if output.status.success() => return Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let why = said.trim().lines().next_back().unwrap_or("it ends without a word").trim();
            format!(
                "wandb needs its Python client, which {python} cannot import ({why}); run `{python} \
                 -m pip install wandb`, or name another interpreter in {PYTHON}"
            )
        }
        Err(error) => {
            format!("wandb needs Python, and {python} cannot be run: {error}; set {PYTHON}")
        }
    };
    Err(plan.error("log_with", message))
}

impl Bridge {
    /// Starts the client for a run that keeps its files in `dir`, and that goes on where it took
    /// steps before.
    pub(super) fn start(plan: &Plan, dir: &Path, done: usize) -> Result<Self> {
        let mut command = Command::new(python());
        command.args(["-c", PROGRAM]);
        let name = plan.saving.output_dir.file_name().unwrap_or_default().to_string_lossy();
        let config = plan.to_json();
        let first = json!({"dir": dir, "name": name, "config": config, "goes_on": done > 0});
        Self::spawn(command, &first).map_err(|error| {
            plan.error("log_with", format!("cannot start the client of wandb: {error}"))
        })
    }

    fn spawn(mut command: Command, first: &Value) -> io::Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let (lines, waiting): (_, Receiver<String>) = bounded(QUEUE);
        if let Some(mut stdin) = child.stdin.take() {
            let write = move || {
                // When the client has ended, so does this thread, and the queue with it.
                waiting.iter().try_for_each(|line| writeln!(stdin, "{line}"))
            };
            std::thread::Builder::new().name("wandb".into()).spawn(write)?;
        }
        let this = Self { child, lines };
        // An empty queue has room.
        let _ = this.lines.try_send(first.to_string());
        Ok(this)
    }

    /// Hands on figures of one step.
    ///
    /// # Errors
    /// [`Error::Training`] when the client has ended, or has not read for long.
    pub(super) fn log(&mut self, step: u64, figures: &[(String, f64)]) -> Result<()> {
        let figures: serde_json::Map<String, Value> =
            figures.iter().map(|(tag, figure)| (tag.clone(), json!(figure))).collect();
        let line = json!({"step": step, "figures": figures}).to_string();
        // A full queue may be all that is seen yet of a client that has ended.
        self.lines.try_send(line).map_err(|error| match (self.child.try_wait(), error) {
            (Ok(Some(status)), _) => gone(&format!("its client ended ({status})")),
            (_, TrySendError::Full(_)) => gone(&format!("its client left {QUEUE} lines unread")),
            (_, TrySendError::Disconnected(_)) => gone("its client reads no more"),
        })
    }

    /// Lets the client hand over what it has, perhaps in haste, and end.
    ///
    /// # Errors
    /// [`Error::Training`] when it fails or takes too long.
    pub(super) fn finish(self, in_haste: bool) -> Result<()> {
        self.end(if in_haste { IN_HASTE } else { LAST_WORDS })
    }

    fn end(mut self, patience: Duration) -> Result<()> {
        let mut deadline = Instant::now() + patience;
        // Whether it arrived shows when the client ends.
        let _ = self.lines.send_timeout(json!({"over": true}).to_string(), patience);
        loop {
            // Asked to make room only now.
            if preemption::is_requested() {
                deadline = deadline.min(Instant::now() + IN_HASTE);
            }
            match self.child.try_wait() {
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(gone(&format!("its client ended with {status}"))),
                Ok(None) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(None) => return Err(gone("its client does not end")),
                Err(error) => return Err(gone(&error.to_string())),
            }
        }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // It does not end by itself: nothing may be left behind.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn gone(why: &str) -> Error {
    Error::Training(why.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn shell(script: &str) -> Bridge {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Bridge::spawn(command, &json!({})).unwrap()
    }

    fn log_until_refused(bridge: &mut Bridge) -> String {
        // More than the queue and a pipe hold.
        let figures = [("x".repeat(500), 1.0)];
        let refused = (0..).find_map(|step| bridge.log(step, &figures).err());
        refused.unwrap().to_string()
    }

    #[test]
    fn a_client_that_reads_nothing_is_let_go_of_without_waiting() {
        let mut bridge = shell("exec sleep 600");
        let started = Instant::now();
        assert_eq!(log_until_refused(&mut bridge), "its client left 1024 lines unread");
        drop(bridge);
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    }

    #[test]
    fn a_client_that_does_not_end_is_ended() {
        let bridge = shell("cat > /dev/null; exec sleep 600");
        let error = bridge.end(Duration::from_millis(200)).unwrap_err();
        assert_eq!(error.to_string(), "its client does not end");
    }

    #[test]
    fn a_client_that_dies_is_told() {
        let mut bridge = shell("read line; exit 3");
        bridge.child.wait().unwrap();
        assert_eq!(log_until_refused(&mut bridge), "its client ended (exit status: 3)");
        let error = shell("exit 4").end(Duration::from_secs(60)).unwrap_err();
        assert_eq!(error.to_string(), "its client ended with exit status: 4");
    }

    #[test]
    fn the_client_gets_every_line_in_order() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("lines");
        let script = format!(
            "while read line; do echo $line; case $line in *over*) exit;; esac; \
                              done > {}",
            file.display()
        );
        let mut bridge = shell(&script);
        bridge.log(7, &[("train/loss".into(), 0.5)]).unwrap();
        bridge.end(Duration::from_secs(60)).unwrap();
        let text = std::fs::read_to_string(file).unwrap();
        let expected = ["{}", "{figures:{train/loss:0.5},step:7}", "{over:true}"];
        let lines: Vec<_> = text.lines().map(|line| line.replace('"', "")).collect();
        assert_eq!(lines, expected);
    }
}
