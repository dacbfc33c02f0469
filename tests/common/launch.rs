//! Running the built programs from a test: with a deadline, and in an environment in which nobody
//! has launched anything.
#![allow(dead_code, reason = "every test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Far beyond what anything here takes, even on a machine that is busy with other things.
const DEADLINE: Duration = Duration::from_secs(120);

/// What variables begin with from which a worker learns its place in a job, with which users tell a library
/// what to do, and those of the Hugging Face hub.
const FOREIGN: [&str; 16] = [
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "RR_",
    "SLURM_",
    "OMPI_",
    "PET_",
    "TORCH",
    "CUDA_",
    "CUBLAS_",
    "HF_",
    "HUGGING",
    "TRANSFORMERS_",
    "WANDB_",
    "RUST_LOG",
];

/// How a program ended.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// `reranker ARGS` in `dir`.
pub fn reranker(dir: &Path, args: &[&str]) -> Command {
    program(Path::new(env!("CARGO_BIN_EXE_reranker")), dir, args)
}

/// `rr-launch ARGS` in `dir`; cargo builds it beside `reranker`.
pub fn launcher(dir: &Path, args: &[&str]) -> Command {
    let path = Path::new(env!("CARGO_BIN_EXE_reranker")).with_file_name("rr-launch");
    assert!(path.is_file(), "{} is not built: run cargo build first", path.display());
    program(&path, dir, args)
}

fn program(path: &Path, dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(path);
    for (name, _) in std::env::vars_os() {
        let known = name.to_string_lossy();
        if FOREIGN.iter().any(|prefix| known.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
    // No test leaves the machine.
    command.env("HF_HOME", "hf").env("HF_HUB_OFFLINE", "1").env("NO_PROXY", "127.0.0.1,localhost");
    // Tiny models: a pool of threads costs more than it gives.
    command.env("OMP_NUM_THREADS", "1").current_dir(dir).args(args).stdin(Stdio::null());
    command
}

/// Runs a program to its end.
pub fn run(command: &mut Command) -> Outcome {
    let (mut stdout, mut stderr) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let mut child = command
        .stdout(stdout.try_clone().unwrap())
        .stderr(stderr.try_clone().unwrap())
        .spawn()
        .unwrap();
    let limit = Instant::now() + DEADLINE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > limit {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{command:?} hangs; stderr so far: {}", text_of(&mut stderr));
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let (stdout, stderr) = (text_of(&mut stdout), text_of(&mut stderr));
    assert!(!stderr.contains("panicked"), "{command:?}: {stderr}");
    Outcome { code: status.code(), stdout, stderr }
}

/// Runs a program that must succeed and returns its stdout.
pub fn output_of(command: &mut Command) -> String {
    let outcome = run(command);
    assert_eq!(outcome.code, Some(0), "{command:?}: {}", outcome.stderr);
    outcome.stdout
}

fn text_of(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Every file and directory below `dir`, with the bytes of the files.
pub fn snapshot(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(snapshot(&path));
            all.insert(path, Vec::new());
        } else {
            let bytes = fs::read(&path).unwrap();
            all.insert(path, bytes);
        }
    }
    all
}

/// Copies the model directory of a golden case without the golden files.
pub fn copy_model(case: &str, to: &Path) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case);
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if !name.starts_with("golden.") {
            fs::copy(&path, to.join(name)).unwrap();
        }
    }
}
