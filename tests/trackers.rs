//! `log_with: wandb` with clients that are missing, broken, or end too early. What the real packages
//! make of a run is seen by `scripts/check_trackers.py`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/launch.rs"]
mod launch;
#[path = "common/program.rs"]
mod program;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use launch::{Outcome, copy_model, launcher, reranker, run};
use program::write_program;
use tempfile::TempDir;

const TRAINING: &str = "model_name_or_path: model
model_type: bert_encoder
train_dataset: train.jsonl
output_dir: out
max_len: 16
batch_size: 1
epochs: 20
log_interval: 1
log_with: [wandb, tensorboard]
";

/// What to train with, and a script in place of Python; it gets the program to run as `$2`.
fn folder(python: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    copy_model("bert_tiny", &path("model"));
    fs::write(path("training.yaml"), TRAINING).unwrap();
    let record = r#"{"query": "how to boil water", "content": "heat the water", "label": 1}"#;
    fs::write(path("train.jsonl"), format!("{record}\n{record}\n")).unwrap();
    write_program(&path("python"), &format!("#!/bin/sh\n{python}\n"));
    dir
}

/// Trains in a [`folder`].
fn train_with(python: &str) -> (TempDir, Outcome) {
    let dir = folder(python);
    let args = ["train", "--device", "cpu", "--config", "training.yaml"];
    let outcome = run(reranker(dir.path(), &args).env("RERANKER_PYTHON", "./python"));
    (dir, outcome)
}

#[test]
fn a_missing_client_is_an_error_before_training() {
    let (dir, outcome) =
        train_with("echo \"ModuleNotFoundError: No module named 'wandb'\" >&2; exit 1");
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    let expected = "training.yaml:9:11: log_with: wandb needs its Python client, which ./python cannot \
                    import (ModuleNotFoundError: No module named 'wandb'); run `./python -m pip install \
                    wandb`, or name another interpreter in RERANKER_PYTHON";
    assert!(outcome.stderr.contains(expected), "{}", outcome.stderr);
    assert!(!dir.path().join("out").exists(), "nothing is written");
}

/// A client that reads all lines, and then takes longer than there is time.
const SLOW: &str = "case $2 in *stdin*) while read line; do case $line in *over*) exec sleep 600;; esac; \
                    done;; esac";

/// Its last metrics are not worth the exit code by which a run that is saved is known.
#[test]
fn a_run_that_makes_room_does_not_wait_for_a_client() {
    let dir = folder(SLOW);
    // Its own patience with a client is longer than the launcher's with it.
    let args = ["--cpu", "--nproc", "1", "--grace", "50", "--config", "training.yaml"];
    let mut command = launcher(dir.path(), &args);
    command.args(["--set", "epochs=1000000"]).env("RERANKER_PYTHON", "./python");
    let child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let metrics = dir.path().join("out/runs/metrics.jsonl");
    let deadline = Instant::now() + Duration::from_secs(120);
    while fs::metadata(&metrics).map_or(0, |metadata| metadata.len()) == 0 {
        assert!(Instant::now() < deadline, "it does not train");
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = Command::new("kill").args(["-USR1", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(41), "{said}");
    assert!(said.contains("wandb may lack the last metrics: its client does not end"), "{said}");
    let page = fs::read_to_string(dir.path().join("out/runs/report.html")).unwrap();
    assert!(page.contains(r#""status":"preempted""#));
}

#[test]
fn a_client_that_crashes_does_not_stop_the_run() {
    let probed = "case $2 in *stdin*) read line; kill -9 $$;; esac";
    let (dir, outcome) = train_with(probed);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let warnings: Vec<_> = outcome.stderr.lines().filter(|line| line.contains("wandb")).collect();
    assert_eq!(warnings.len(), 1, "{}", outcome.stderr);
    assert!(warnings[0].contains("signal: 9"), "{}", warnings[0]);
    assert!(dir.path().join("out/model/reranker.json").exists());
    let metrics = fs::read_to_string(dir.path().join("out/runs/metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().filter(|line| line.contains("\"train\"")).count(), 40);
}
