//! Weights & Biases, through its own Python client in a side process that reads lines of JSON. The
//! client's settings (`WANDB_PROJECT`, `WANDB_MODE`, …) are its own environment variables.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::config::Plan;
use crate::error::{Error, Result};

/// What the side process runs.
const PROGRAM: &str = include_str!("wandb_bridge.py");

/// The environment variable that names the interpreter.
const PYTHON: &str = "RERANKER_PYTHON";

/// How long the client may take to hand over the last metrics.
const LAST_WORDS: Duration = Duration::from_secs(60);

/// The side process, which gets a line for each line of metrics.
#[derive(Debug)]
pub(super) struct Bridge {
    child: Child,
}

fn python() -> String {
    std::env::var(PYTHON).unwrap_or_else(|_| "python3".into())
}

/// Checks that the interpreter has the client.
pub(super) fn check(plan: &Plan) -> Result<()> {
    let python = python();
    let mut probe = Command::new(&python);
    probe.args(["-c", "import wandb"]).stdin(Stdio::null()).stdout(Stdio::null());
    match probe.stderr(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(_) => Err(plan.error(
            "log_with",
            format!(
                "wandb needs its Python client, which {python} lacks; run `{python} -m pip install \
                 wandb`, or name another interpreter in {PYTHON}"
            ),
        )),
        Err(error) => Err(plan.error(
            "log_with",
            format!("wandb needs Python, and {python} cannot be run: {error}; set {PYTHON}"),
        )),
    }
}

impl Bridge {
    /// Starts the client for a run that keeps its files in `dir`.
    pub(super) fn start(plan: &Plan, dir: &Path) -> Result<Self> {
        let mut command = Command::new(python());
        command.args(["-c", PROGRAM]).stdin(Stdio::piped()).stdout(Stdio::null());
        let child = command.spawn().map_err(|error| {
            plan.error("log_with", format!("cannot start the client of wandb: {error}"))
        })?;
        let mut this = Self { child };
        let name = plan.saving.output_dir.file_name().unwrap_or_default().to_string_lossy();
        let first = json!({"dir": dir, "name": name, "config": plan.to_json()});
        // A client that cannot start says so itself; the first line of metrics then finds it gone.
        let _ = this.write(&first);
        Ok(this)
    }

    /// Hands on figures of one step.
    ///
    /// # Errors
    /// [`Error::Training`] when the client has ended.
    pub(super) fn log(&mut self, step: u64, figures: &[(String, f64)]) -> Result<()> {
        let figures: serde_json::Map<String, Value> =
            figures.iter().map(|(tag, figure)| (tag.clone(), json!(figure))).collect();
        self.write(&json!({"step": step, "figures": figures}))
    }

    /// Lets the client hand over what it has, and end.
    ///
    /// # Errors
    /// [`Error::Training`] when it fails or takes too long.
    pub(super) fn finish(mut self) -> Result<()> {
        drop(self.child.stdin.take());
        let deadline = Instant::now() + LAST_WORDS;
        loop {
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

    fn write(&mut self, line: &Value) -> Result<()> {
        let Some(stdin) = &mut self.child.stdin else { return Err(gone("its client has ended")) };
        writeln!(stdin, "{line}").map_err(|error| gone(&error.to_string()))
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        if matches!(self.child.try_wait(), Ok(None)) {
            // Dropped without `finish`, or it does not end: nothing may be left behind.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn gone(why: &str) -> Error {
    Error::Training(why.to_owned())
}
