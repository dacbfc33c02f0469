//! Checkpoints on disks that fail or are full: earlier ones stay whole, no rank hangs, and the run
//! ends with its own exit code or goes on without, as it was told.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "common/fault_disk.rs"]
mod fault_disk;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::training::Bench;
use reranker::checkpoint::training::Store;

/// The exit code of a run that ended over a checkpoint.
const CANNOT_SAVE: i32 = 4;

const SETTINGS: [&str; 3] = ["batch_size=2", "save_steps=2", "num_max_checkpoints=9"];

fn command(bench: &Bench, more: &[&str]) -> Command {
    let settings: Vec<&str> = SETTINGS.iter().chain(more).copied().collect();
    let mut command = bench.command("run", 2, &settings);
    command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    command
}

/// What goes wrong with a file.
#[derive(Clone, Copy)]
struct Fault {
    /// A part of the file's path.
    path: &'static str,
    rank: usize,
    /// `fsync`, `read`, `write` or `open`.
    call: &'static str,
    errno: i32,
    /// What the system calls the error.
    says: &'static str,
}

const EIO: (i32, &str) = (5, "Input/output error");
const EROFS: (i32, &str) = (30, "Read-only file system");
const EDQUOT: (i32, &str) = (122, "Disk quota exceeded");

impl Fault {
    const fn new(
        path: &'static str,
        rank: usize,
        call: &'static str,
        (errno, says): (i32, &'static str),
    ) -> Self {
        Self { path, rank, call, errno, says }
    }

    /// Runs with this fault, once, at the third checkpoint.
    fn run(self, bench: &Bench, more: &[&str]) -> Output {
        self.command(bench, more).output().unwrap()
    }

    fn command(self, bench: &Bench, more: &[&str]) -> Command {
        let mut command = command(bench, more);
        command.env("LD_PRELOAD", fault_disk::library()).env("FAULT_PATH", self.path);
        command.env("FAULT_CALL", self.call).env("FAULT_ERRNO", self.errno.to_string());
        command.env("FAULT_RANK", self.rank.to_string()).env("FAULT_TIMES", "1");
        // The names of the others have the third checkpoint's step in them.
        command.env("FAULT_AFTER", if self.call == "fsync" { "3" } else { "1" });
        command
    }
}

/// Every checkpoint that is there is whole; returns their steps, oldest first.
fn whole_steps(root: &Path) -> Vec<usize> {
    let store = Store::new(root.join("run/checkpoints"));
    let mut steps = store.steps().unwrap();
    for &step in &steps {
        store.verify(step, 0, 1).unwrap();
    }
    steps.reverse();
    steps
}

/// A failing disk under each kind of file, one that has become read-only, a quota that is used up.
const FAULTS: [Fault; 6] = [
    Fault::new("rank-00001-of-00002.safetensors", 1, "fsync", EIO),
    Fault::new("rank-00001.partial", 1, "fsync", EIO),
    Fault::new("rank-00000-of-00002.safetensors", 0, "fsync", EIO),
    Fault::new("manifest.json", 0, "fsync", EIO),
    Fault::new("/.step-6.", 1, "write", EDQUOT),
    Fault::new("/.step-6.", 0, "open", EROFS),
];

/// Beside training and with training that waits, in turns.
const WAYS: [&str; 2] = ["async_save=true", "async_save=false"];

#[test]
fn a_failing_disk_ends_the_run_and_the_earlier_checkpoints_stay() {
    for (fault, way) in FAULTS.into_iter().zip(WAYS.into_iter().cycle()) {
        let file = fault.path;
        let bench = Bench::new(0.1);
        let output = fault.run(&bench, &[way]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(CANNOT_SAVE), "{file}: {said}");
        assert!(said.contains("cannot save a checkpoint: "), "{file}: {said}");
        assert!(said.contains(fault.says), "{file}: {said}");
        assert!(said.contains("start again to go on from them"), "{file}: {said}");
        assert_eq!(whole_steps(bench.root.path()), [2, 4], "{file}");
        // The disk is well again.
        let output = command(&bench, &[]).output().unwrap();
        assert!(output.status.success(), "{file}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(whole_steps(bench.root.path()), [2, 4, 6, 8, 10, 12, 14], "{file}");
    }
}

#[test]
fn a_run_may_go_on_without_a_checkpoint() {
    for (fault, way) in FAULTS.into_iter().zip(WAYS.into_iter().cycle().skip(1)) {
        let file = fault.path;
        let bench = Bench::new(0.1);
        let output = fault.run(&bench, &["save_failure=continue", way]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{file}: {said}");
        assert!(
            said.contains("the checkpoint is left out, and training goes on"),
            "{file}: {said}"
        );
        assert_eq!(whole_steps(bench.root.path()), [2, 4, 8, 10, 12, 14], "{file}");
        assert!(bench.root.path().join("run/model/model.safetensors").exists(), "{file}");
    }
}

/// The disk fails under a model that is put together from all ranks.
fn model_fault(path: &'static str, bench: &Bench, more: &[&str]) -> (Option<i32>, String) {
    let fault = Fault::new(path, 0, "fsync", EIO);
    let more: Vec<&str> = ["metric_for_best=loss"].iter().chain(more).copied().collect();
    let mut command = fault.command(bench, &more);
    let output = command.args(["--parallel", "zero3.yaml"]).output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_model_that_cannot_be_saved_ends_the_run_and_the_next_start_saves_it() {
    for path in [".model.partial", ".best.partial"] {
        let bench = Bench::new(0.1);
        let (code, said) = model_fault(path, &bench, &[]);
        assert_eq!(code, Some(CANNOT_SAVE), "{said}");
        assert!(said.contains("cannot save the model: ") && said.contains(path), "{said}");
        assert!(said.contains("goes on from its newest checkpoint"), "{said}");
        let mut again = command(&bench, &["metric_for_best=loss"]);
        let output = again.args(["--parallel", "zero3.yaml"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("going on from"), "{said}");
        for model in ["model", "best"] {
            assert!(bench.root.path().join("run").join(model).exists(), "{model}");
        }
    }
}

/// A large model on a slow disk: the others wait for the rank that writes no longer than they would for
/// any other reason, but as often as it takes.
#[test]
fn a_disk_may_be_slower_than_ranks_wait_for_one_another() {
    // Rank 0 flushes more files than the other rank. So that it is slow enough to count:
    for (rank, slow_ms, least_s) in [("0", "700", 8), ("1", "2000", 5)] {
        let bench = Bench::new(0.0);
        // Checkpoints are written beside the steps, the last one and the model at the end.
        let mut slow = command(&bench, &["save_steps=14", "val_dataset=null"]);
        slow.args(["--timeout", "4"]).env("LD_PRELOAD", fault_disk::library());
        slow.envs([("FAULT_PATH", "partial"), ("FAULT_CALL", "fsync"), ("FAULT_RANK", rank)]);
        let begun = Instant::now();
        let output = slow.env("FAULT_SLOW_MS", slow_ms).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "rank {rank}: {stderr}");
        assert!(begun.elapsed() > Duration::from_secs(least_s), "{:?}", begun.elapsed());
        assert!(bench.root.path().join("run/model/model.safetensors").exists());
    }
}

/// Nor does it matter how long one takes to read its part of what the run goes on from, or to copy the best
/// model over.
#[test]
fn what_a_run_goes_on_from_may_take_longer_than_ranks_wait_for_one_another() {
    let bench = Bench::new(0.0);
    let settings = ["metric_for_best=loss", "eval_steps=2"];
    let mut first = command(&bench, &settings);
    let output = first.env("RR_FAIL_POINT", "before_states:3@0").output().unwrap();
    assert_eq!(output.status.code(), Some(137), "{}", String::from_utf8_lossy(&output.stderr));
    let elsewhere = ["--set", "output_dir=moved", "--resume", "run/checkpoints/step-4"];
    for (path, call, rank, more) in [
        ("moved/.best.partial", "fsync", "0", &elsewhere[..]),
        ("rank-00001-of-00002", "read", "1", &[]),
    ] {
        let mut slow = command(&bench, &settings);
        slow.args(more).args(["--timeout", "5"]).env("LD_PRELOAD", fault_disk::library());
        slow.envs([("FAULT_PATH", path), ("FAULT_CALL", call), ("FAULT_RANK", rank)]);
        let begun = Instant::now();
        let output =
            slow.envs([("FAULT_SLOW_MS", "12000"), ("FAULT_TIMES", "1")]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{path}: {said}");
        assert!(said.contains("run/checkpoints/step-4: step 4"), "{path}: {said}");
        assert!(begun.elapsed() > Duration::from_secs(12), "{path}: {:?}", begun.elapsed());
    }
}

#[test]
fn a_run_may_go_on_without_its_best_model() {
    let bench = Bench::new(0.1);
    let (code, said) = model_fault(".best.partial", &bench, &["save_failure=continue"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("the best model is left out, and training goes on"), "{said}");
    // The next validation that is better than none.
    assert!(said.contains("the best model, loss ") && said.contains(" after step 14"), "{said}");
    assert!(bench.root.path().join("run/best/model.safetensors").exists());
    assert!(bench.root.path().join("run/model/model.safetensors").exists());
}

/// The lines of a run's metrics that are of training, by step.
fn trained_steps(root: &Path) -> Vec<u64> {
    let text = fs::read_to_string(root.join("run/runs/metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let trained = lines.filter(|line| line["type"] == "train");
    trained.map(|line| line["step"].as_u64().unwrap()).collect()
}

#[test]
fn a_line_of_metrics_that_cannot_be_written_ends_no_run() {
    const ENOSPC: (i32, &str) = (28, "No space left on device");
    let bench = Bench::new(0.1);
    let fault = Fault::new("metrics.jsonl", 0, "write", ENOSPC);
    let mut command = fault.command(&bench, &[]);
    // The fifth and the sixth line.
    let output = command.env("FAULT_AFTER", "5").env("FAULT_TIMES", "2").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    let warning = "metrics.jsonl: cannot write: No space left on device";
    assert_eq!(said.matches(warning).count(), 2, "{said}");
    assert_eq!(trained_steps(bench.root.path()), [1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13, 14]);
    assert!(bench.root.path().join("run/model/model.safetensors").exists());
}

/// Runs the command in a mount namespace of its own with a small file system of memory at `run`,
/// and copies its checkpoints out. `None` where such a namespace cannot be made.
fn on_small_disk(bench: &Bench, options: &str, more: &[&str]) -> Option<Output> {
    let root = bench.root.path();
    fs::create_dir(root.join("run")).unwrap();
    let probe = Command::new("unshare").args(["-m", "true"]).stderr(Stdio::null()).status();
    if !probe.is_ok_and(|status| status.success()) {
        println!("skipped: mount namespaces cannot be made here (needs root)");
        return None;
    }
    let start = command(bench, more);
    let script = format!(
        "mount -t tmpfs -o {options} tmpfs run || exit 99; \"$@\"; code=$?; \
         mkdir -p copy/run && cp -r run/checkpoints copy/run/; exit $code"
    );
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &script, "sh"]).current_dir(root).stdin(Stdio::null());
    command.arg(start.get_program()).args(start.get_args());
    command.env_remove("RUST_LOG").env("OMP_NUM_THREADS", "1");
    let output = command.output().unwrap();
    if output.status.code() == Some(99) {
        println!("skipped: a tmpfs cannot be mounted here");
        return None;
    }
    Some(output)
}

#[test]
fn a_disk_without_room_is_seen_before_writing() {
    let bench = Bench::new(0.1);
    // A checkpoint of the tiny model takes under a megabyte.
    let Some(output) = on_small_disk(&bench, "size=3m", &[]) else { return };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(CANNOT_SAVE), "{said}");
    assert!(said.contains(" MB needed, ") && said.contains("make room"), "{said}");
    let steps = whole_steps(&bench.root.path().join("copy"));
    assert_eq!(steps.first(), Some(&2), "{steps:?}");
}

#[test]
fn a_checkpoint_that_cannot_be_read_for_a_moment_is_not_lost() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    let ends = |command: &mut Command, code: i32| {
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        said
    };
    ends(command(&bench, &[]).env("RR_FAIL_POINT", "before_states:4@0"), 137);
    let fault = Fault::new("checkpoints/step-6/rank-", 1, "read", EIO);
    let mut again = fault.command(&bench, &["save_steps=5"]);
    let said = ends(again.env("RR_FAIL_POINT", "before_states:2@0"), 137);
    assert!(said.contains("step-6: rank 1 cannot read it"), "{said}");
    assert!(said.contains("going on from run/checkpoints/step-4"), "{said}");
    assert_eq!(whole_steps(root), [2, 4, 5, 6], "{said}");
    // Where none can be read they are left alone, and another start may help.
    let fault = Fault::new("checkpoints/step-", 1, "read", EIO);
    let said = ends(fault.command(&bench, &[]).env_remove("FAULT_TIMES"), 1);
    assert!(said.contains("step-6: rank 1 cannot read it (Input/output error"), "{said}");
    assert!(!said.contains("--overwrite"), "{said}");
    let said = ends(&mut command(&bench, &[]), 0);
    assert!(said.contains("going on from run/checkpoints/step-6"), "{said}");
}

#[test]
fn a_disk_that_fills_up_while_writing_leaves_the_earlier_checkpoints_whole() {
    let bench = Bench::new(0.1);
    // Bytes enough, but no names for the files of a third checkpoint.
    let Some(output) = on_small_disk(&bench, "size=64m,nr_inodes=34", &[]) else { return };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(CANNOT_SAVE), "{said}");
    assert!(said.contains("No space left on device"), "{said}");
    let steps = whole_steps(&bench.root.path().join("copy"));
    assert!(!steps.is_empty() && steps.len() < 7, "{steps:?}");
}

#[test]
fn a_checkpoint_that_outgrows_the_limit_on_the_size_of_files_is_one_that_cannot_be_saved() {
    let bench = Bench::new(0.0);
    let start = command(&bench, &["val_dataset=null"]);
    let mut limited = Command::new("bash");
    // In KiB: less than a rank's states take.
    limited.args(["-c", "ulimit -f 100 && exec \"$@\"", "bash"]).current_dir(bench.root.path());
    limited.arg(start.get_program()).args(start.get_args()).env("OMP_NUM_THREADS", "1");
    let output = limited.stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(CANNOT_SAVE), "{said}");
    assert!(said.contains("File too large"), "{said}");
}

#[test]
fn an_old_checkpoint_that_cannot_be_removed_ends_no_run() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    let probe = Command::new("unshare").args(["-m", "true"]).stderr(Stdio::null()).status();
    if !probe.is_ok_and(|status| status.success()) {
        println!("skipped: mount namespaces cannot be made here (needs root)");
        return;
    }
    let first = command(&bench, &[]).env("RR_FAIL_POINT", "before_states:3@0").output().unwrap();
    assert_eq!(first.status.code(), Some(137), "{}", String::from_utf8_lossy(&first.stderr));
    // What is mounted in a directory keeps it from being removed, as an open file on NFS does.
    let start = command(&bench, &["num_max_checkpoints=1"]);
    let mut again = Command::new("unshare");
    let script = "held=run/checkpoints/step-2/held; mkdir $held && \
                  mount -t tmpfs tmpfs $held || exit 99; exec \"$@\"";
    again.args(["-m", "sh", "-c", script, "sh"]).current_dir(root).stdin(Stdio::null());
    again.arg(start.get_program()).args(start.get_args()).env("OMP_NUM_THREADS", "1");
    let output = again.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() == Some(99) {
        println!("skipped: a tmpfs cannot be mounted here");
        return;
    }
    assert!(output.status.success(), "{said}");
    assert!(said.contains("Device or resource busy"), "{said}");
    assert!(said.contains("it takes up room until the next save or start removes it"), "{said}");
    assert_eq!(whole_steps(root).last(), Some(&14), "{said}");
    assert!(root.join("run/model/model.safetensors").exists());
}

#[test]
fn a_directory_that_cannot_be_written_is_seen_before_training() {
    let bench = Bench::new(0.1);
    let Some(output) = on_small_disk(&bench, "ro,size=1m", &[]) else { return };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("run") && said.contains("Read-only file system"), "{said}");
    assert!(!said.contains("trained step"), "{said}");
}

/// What an image's layer holds cannot be moved (EXDEV), only removed.
#[test]
fn a_run_in_a_layer_of_an_image_can_be_replaced() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    let probe = Command::new("unshare").args(["-m", "true"]).stderr(Stdio::null()).status();
    if !probe.is_ok_and(|status| status.success()) {
        println!("skipped: mount namespaces cannot be made here (needs root)");
        return;
    }
    let first = command(&bench, &["num_max_checkpoints=2"]).output().unwrap();
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    fs::write(root.join("run/model/of-the-image"), "").unwrap();
    let start = command(&bench, &["num_max_checkpoints=2", "seed=7"]);
    let mut again = Command::new("unshare");
    // Its own work directory cannot lie on another overlay: one in memory.
    let script = "mv run image && mkdir run layers && mount -t tmpfs tmpfs layers && \
                  mkdir layers/upper layers/work && mount -t overlay overlay \
                  -o lowerdir=image,upperdir=layers/upper,workdir=layers/work run || exit 99; \
                  \"$@\"; code=$?; mkdir copy && cp -a run copy/; exit $code";
    again.args(["-m", "sh", "-c", script, "sh"]).current_dir(root).stdin(Stdio::null());
    again.arg(start.get_program()).args(start.get_args()).arg("--overwrite");
    let output = again.env("OMP_NUM_THREADS", "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.code() == Some(99) {
        println!("skipped: an overlay cannot be mounted here: {said}");
        return;
    }
    assert!(output.status.success(), "{said}");
    let copy = root.join("copy");
    assert_eq!(whole_steps(&copy), [12, 14], "{said}");
    let model = copy.join("run/model");
    assert!(model.join("model.safetensors").exists() && !model.join("of-the-image").exists());
    for dir in [copy.join("run"), copy.join("run/checkpoints")] {
        for entry in fs::read_dir(dir).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let leftovers = [".partial", ".ready", ".removed", ".old"];
            assert!(!leftovers.iter().any(|end| name.ends_with(end)), "{name}");
        }
    }
}
