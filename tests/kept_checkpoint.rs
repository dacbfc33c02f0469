//! Checkpoints that earlier versions of the format wrote (`scripts/make_checkpoint.sh`): every later
//! version goes on from them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/launch.rs"]
mod launch;

use std::fs;
use std::path::Path;

use launch::{launcher, run};
use serde_json::Value;

/// The loss of each step of a run's metrics.
fn losses(metrics: &Path) -> Vec<(u64, f64)> {
    let text = fs::read_to_string(metrics).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .filter(|line| line["type"] == "train")
        .map(|line| (line["step"].as_u64().unwrap(), line["loss"].as_f64().unwrap()))
        .collect()
}

fn copy_all(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let copy = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy_all(&path, &copy);
        } else {
            fs::copy(&path, copy).unwrap();
        }
    }
}

#[test]
fn a_run_goes_on_from_a_checkpoint_of_every_version() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kept = root.join("tests/kept_checkpoint");
    let mut versions = 0;
    for entry in fs::read_dir(&kept).unwrap() {
        let version = entry.unwrap().path();
        if !version.is_dir() {
            continue;
        }
        versions += 1;
        let folder = tempfile::tempdir().unwrap();
        launch::copy_model("bert_tiny", &folder.path().join("base"));
        for file in ["tests/kept_checkpoint/t.yaml", "tests/kept_checkpoint/pairs.jsonl"] {
            let file = root.join(file);
            fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
        }
        fs::copy(root.join("config/deepspeed/zero2.yaml"), folder.path().join("zero2.yaml"))
            .unwrap();
        copy_all(&version.join("step-6"), &folder.path().join("run/checkpoints/step-6"));
        fs::create_dir(folder.path().join("run/runs")).unwrap();
        let mut command = launcher(
            folder.path(),
            &["--cpu", "--nproc", "2", "--parallel", "zero2.yaml", "--config", "t.yaml"],
        );
        let outcome = run(&mut command);
        assert_eq!(outcome.code, Some(0), "{}: {}", version.display(), outcome.stderr);
        assert!(outcome.stderr.contains("going on from run/checkpoints/step-6"));
        let ours = losses(&folder.path().join("run/runs/metrics.jsonl"));
        let theirs = losses(&version.join("metrics.jsonl"));
        assert_eq!(ours.len(), 8, "steps 7 to 14");
        for (&(step, ours), &(expected_step, expected)) in ours.iter().zip(&theirs[6..]) {
            assert_eq!(step, expected_step);
            // fp16 on another processor: rounding grows from step to step.
            let tolerance = if step == 7 { 1e-3 } else { 2e-2 };
            assert!((ours - expected).abs() < tolerance, "step {step}: {ours}, not {expected}");
        }
    }
    assert!(versions > 0, "no version is kept in {}", kept.display());
}
