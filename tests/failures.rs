//! What a run does when training or a worker goes wrong, with real processes.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::training::{Bench, succeed};
use serde_json::Value;

/// Long enough for a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(60);

fn wait(child: &mut Child) -> i32 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap();
        }
        assert!(Instant::now() < deadline, "the launcher hangs");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The processes whose working directory is the bench's: no other test's.
fn workers(bench: &Bench) -> Vec<i32> {
    let root = bench.root.path().canonicalize().unwrap();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|entry| {
            let cwd = std::fs::read_link(entry.path().join("cwd"));
            let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let trains = command.split(|&byte| byte == 0).any(|word| word == b"train");
            cwd.is_ok_and(|cwd| cwd == root) && trains
        })
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

fn start_endless(bench: &Bench) -> Child {
    let mut command = bench.command("endless", 2, &["epochs=100000", "batch_size=2"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until the run has taken steps.
fn wait_for_steps(bench: &Bench) {
    let metrics = bench.root.path().join("endless/runs/metrics.jsonl");
    let deadline = Instant::now() + PATIENCE;
    while std::fs::read_to_string(&metrics).unwrap_or_default().lines().count() < 3 {
        assert!(Instant::now() < deadline, "training does not start");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn kill(pid: i32, signal: &str) {
    let status = Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
    assert!(status.success());
}

#[test]
fn a_loss_that_is_not_finite_names_step_rank_and_records() {
    let bench = Bench::new(0.0);
    let settings = ["lr=1e30", "max_grad_norm=null", "batch_size=2", "warmup_proportion=0"];
    let output = bench.command("infinite", 2, &settings).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(43), "{stderr}");
    let line = stderr.lines().find(|line| line.contains("is not finite")).unwrap();
    assert!(line.contains("error: step 2: rank "), "{line}");
    assert!(line.contains("its records were pairs.jsonl:"), "{line}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(!bench.root.path().join("infinite/model").exists(), "no model of a failed run");
}

#[test]
fn a_killed_worker_ends_the_run_with_its_code() {
    let bench = Bench::new(0.1);
    let mut launcher = start_endless(&bench);
    wait_for_steps(&bench);
    let pids = workers(&bench);
    assert_eq!(pids.len(), 2);
    kill(pids[1], "-KILL");
    assert_eq!(wait(&mut launcher), 137);
    assert_eq!(workers(&bench), Vec::<i32>::new(), "no worker survives");
    assert!(!bench.root.path().join("endless/model").exists());
}

#[test]
fn a_killed_launcher_takes_its_workers_along() {
    let bench = Bench::new(0.1);
    let mut launcher = start_endless(&bench);
    wait_for_steps(&bench);
    assert_eq!(workers(&bench).len(), 2);
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(2);
    while !workers(&bench).is_empty() {
        assert!(Instant::now() < deadline, "workers survive the launcher by 2 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_interrupt_ends_the_run() {
    let bench = Bench::new(0.1);
    let mut launcher = start_endless(&bench);
    wait_for_steps(&bench);
    kill(launcher.id() as i32, "-INT");
    assert_eq!(wait(&mut launcher), 130);
    assert_eq!(workers(&bench), Vec::<i32>::new());
}

#[test]
fn a_log_that_nobody_reads_ends_no_training() {
    let bench = Bench::new(0.0);
    let mut command = Command::new(env!("CARGO_BIN_EXE_reranker"));
    command.current_dir(bench.root.path()).env_remove("RUST_LOG");
    command.args(["train", "--device", "cpu", "--config", "t.yaml", "--set", "output_dir=run"]);
    let mut worker = command.stderr(Stdio::piped()).spawn().unwrap();
    drop(worker.stderr.take());
    assert_eq!(wait(&mut worker), 0);
    assert!(bench.root.path().join("run/model").exists());
}

/// Multiplies the head's weights in a file of safetensors.
fn scale_head(path: &Path, factor: f32) {
    let mut bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let place = &header["classifier.weight"]["data_offsets"];
    let [from, to] = [0, 1].map(|end| 8 + length + place[end].as_u64().unwrap() as usize);
    for value in bytes[from..to].chunks_exact_mut(4) {
        let scaled = f32::from_le_bytes((&*value).try_into().unwrap()) * factor;
        value.copy_from_slice(&scaled.to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_run_tells_of_the_steps_that_overflow_in_fp16() {
    let bench = Bench::new(0.1);
    scale_head(&bench.root.path().join("base/model.safetensors"), 3000.0);
    let settings = ["mixed_precision=fp16", "epochs=1", "batch_size=4", "log_interval=10"];
    let said = succeed(&mut bench.command("run", 1, &settings));
    assert!(said.contains("step 1: a gradient overflows in fp16"), "{said}");
    assert_eq!(said.matches("overflows in fp16").count(), 1, "{said}");
    assert!(said.contains("all 7 steps were skipped"), "{said}");
    let metrics =
        std::fs::read_to_string(bench.root.path().join("run/runs/metrics.jsonl")).unwrap();
    let line: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    assert_eq!(line["skipped_steps"], 7, "{line}");
    assert_eq!(line["loss_scale"], 512.0, "{line}");
}
