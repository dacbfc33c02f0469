//! `log_with: wandb` with clients that are missing, broken, or end too early. What the real packages
//! make of a run is seen by `scripts/check_trackers.py`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/launch.rs"]
mod launch;

use std::fs;

use launch::{Outcome, copy_model, reranker, run, write_program};
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

/// Trains with a script in place of Python; it gets the program to run as `$2`.
fn train_with(python: &str) -> (TempDir, Outcome) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    copy_model("bert_tiny", &path("model"));
    fs::write(path("training.yaml"), TRAINING).unwrap();
    let record = r#"{"query": "how to boil water", "content": "heat the water", "label": 1}"#;
    fs::write(path("train.jsonl"), format!("{record}\n{record}\n")).unwrap();
    write_program(&path("python"), &format!("#!/bin/sh\n{python}\n"));
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
