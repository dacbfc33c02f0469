//! A run that is killed, wherever it is, goes on from its newest whole checkpoint and ends with the
//! weights of a run that nobody disturbed, bit for bit. With real processes.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::training::Bench;
use reranker::checkpoint::training::Store;
use serde_json::Value;

/// 14 steps of 8 pairs on two workers, a checkpoint after every second.
const SETTINGS: [&str; 4] =
    ["batch_size=2", "save_steps=2", "num_max_checkpoints=2", "metric_for_best=loss"];

const RANKS: usize = 2;

/// Steps between two checkpoints.
const SAVE_STEPS: usize = 2;

/// How many kills at random moments, unless `RESUME_KILLS` says.
const KILLS: usize = 6;

fn command(bench: &Bench, name: &str, more: &[&str]) -> Command {
    let settings: Vec<&str> = SETTINGS.iter().chain(more).copied().collect();
    let mut command = bench.command(name, RANKS, &settings);
    command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", stderr(&output));
    stderr(&output)
}

/// Runs to an end that is not a success; returns its code and what it said.
fn fail(command: &mut Command) -> (i32, String) {
    let output = command.output().unwrap();
    assert!(!output.status.success(), "{command:?} succeeded");
    (output.status.code().unwrap(), stderr(&output))
}

fn weights(dir: &Path) -> Vec<u8> {
    fs::read(dir.join("model/model.safetensors")).unwrap()
}

fn checkpoints(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir.join("checkpoints")) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    // What is being built or removed hides.
    names.retain(|name| !name.starts_with('.'));
    names.sort();
    names
}

/// The steps of `metrics.jsonl`'s training lines, in order.
fn logged_steps(dir: &Path) -> Vec<u64> {
    let text = fs::read_to_string(dir.join("runs/metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|l| l["type"] == "train").map(|l| l["step"].as_u64().unwrap()).collect()
}

/// A bench with a run that nobody disturbed, in `whole`.
fn bench() -> (Bench, PathBuf) {
    let bench = Bench::new(0.1);
    succeed(&mut command(&bench, "whole", &[]));
    let whole = bench.root.path().join("whole");
    assert_eq!(checkpoints(&whole), ["step-12", "step-14"]);
    assert_eq!(logged_steps(&whole), (1..=14).collect::<Vec<_>>());
    (bench, whole)
}

/// `dir` ended as `whole` did.
fn assert_same(dir: &Path, whole: &Path, what: &str) {
    assert!(weights(dir) == weights(whole), "{what}: other weights");
    assert_eq!(checkpoints(dir), checkpoints(whole), "{what}");
    assert_eq!(logged_steps(dir), logged_steps(whole), "{what}: steps that were logged");
    let all = fs::read_dir(dir.join("checkpoints")).unwrap().count();
    assert_eq!(all, checkpoints(dir).len(), "{what}: something half-built or half-removed is left");
    let left = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = left.filter(|name| name.starts_with('.')).collect();
    assert!(left.is_empty(), "{what}: {left:?}");
    let best = |dir: &Path| fs::read(dir.join("best/model.safetensors")).unwrap();
    assert!(best(dir) == best(whole), "{what}: another best model");
}

#[test]
fn a_kill_at_any_step_of_the_commit_loses_at_most_one_interval() {
    let (bench, whole) = bench();
    let places = [
        ("staging_made:3", 1),
        ("before_states:3", 0),
        ("after_states:3", 0),
        ("after_states:3", 1),
        ("before_receipt:3", 1),
        ("after_receipt:3", 1),
        ("before_model:3", 0),
        ("before_manifest:3", 0),
        ("after_manifest:3", 0),
        ("before_rename:3", 0),
        ("after_rename:3", 0),
        ("after_sync:3", 0),
        // The third checkpoint is the first that makes one too many.
        ("before_prune:1", 0),
        ("in_remove:1", 0),
        // The best model, after step 7.
        ("before_model_moves:1", 0),
        ("after_model_moves:1", 0),
    ];
    for (number, (place, rank)) in places.into_iter().enumerate() {
        let name = format!("run{number}");
        let mut killed = command(&bench, &name, &[]);
        killed.env("RR_FAIL_POINT", format!("{place}@{rank}"));
        let (code, said) = fail(&mut killed);
        assert_eq!(code, 137, "{place}: {said}");
        let dir = bench.root.path().join(&name);
        // The third checkpoint is of step 6, and saved beside step 7 at the latest.
        let left = checkpoints(&dir);
        let newest = if left.contains(&"step-6".to_owned()) { 6 } else { 4 };
        assert!(left.contains(&format!("step-{newest}")), "{place}: {left:?}");
        let said = succeed(&mut command(&bench, &name, &[]));
        let from = format!("going on from {name}/checkpoints/step-{newest}: ");
        assert!(said.contains(&from), "{place}: {said}");
        assert_same(&dir, &whole, place);
    }
}

/// A xorshift generator: kills need no better one.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// The workers of the launcher with process id `launcher`.
fn workers(launcher: u32) -> Vec<u32> {
    let path = format!("/proc/{launcher}/task/{launcher}/children");
    let children = fs::read_to_string(path).unwrap_or_default();
    let is_worker = |pid: &u32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|&byte| byte == 0).any(|word| word == b"train")
    };
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(is_worker).collect()
}

/// The step of the newest of these checkpoints.
fn newest(names: &[String]) -> Option<usize> {
    names.iter().filter_map(|name| name.strip_prefix("step-")?.parse().ok()).max()
}

/// The last step that a run has logged; nothing where its last line is torn.
fn last_logged(dir: &Path) -> Option<usize> {
    let text = fs::read_to_string(dir.join("runs/metrics.jsonl")).ok()?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter_map(|line| line["step"].as_u64()).max().map(|step| step as usize)
}

/// The newest checkpoint of a run that is under way.
fn progress(dir: &Path) -> Option<usize> {
    newest(&checkpoints(dir))
}

fn kill(pid: u32) {
    // One that is gone already needs no killing.
    let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status();
}

/// Whether a process runs. Where the first process of a container takes no notice of orphans, what has ended
/// stays on as a zombie.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    !stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
}

/// Waits for the launcher; `None` when it still runs after `patience`.
fn wait(child: &mut Child, patience: Duration) -> Option<bool> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status.success());
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn kills_at_random_moments() {
    let (bench, whole) = bench();
    let wanted = std::env::var("RESUME_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(KILLS);
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    let (mut kills, mut round) = (0, 0);
    while kills < wanted {
        let name = format!("random{round}");
        // Every other run waits for its writes. One that does not has the save of one step under way
        // beside the next ones, up to the next save.
        let waits = round % 2 == 0;
        let most = if waits { SAVE_STEPS } else { 2 * SAVE_STEPS };
        let how: &[&str] = if waits { &["async_save=false"] } else { &[] };
        let dir = bench.root.path().join(&name);
        round += 1;
        loop {
            let mut start = command(&bench, &name, how);
            let mut child = start.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
            // From before the first step to behind the last.
            let moment = Duration::from_millis(50 + dice.below(1500));
            if kills >= wanted || wait(&mut child, moment).is_some() {
                if wait(&mut child, Duration::from_secs(120)).unwrap() {
                    break;
                }
                continue;
            }
            let workers = workers(child.id());
            let before = progress(&dir);
            match dice.below(3) {
                0 => kill(child.id()),
                1 if !workers.is_empty() => {
                    kill(workers[dice.below(workers.len() as u64) as usize]);
                }
                _ => [child.id()].iter().chain(&workers).for_each(|&pid| kill(pid)),
            }
            kills += 1;
            wait(&mut child, Duration::from_secs(60)).expect("the launcher ends after a kill");
            // Workers of a killed launcher end by themselves.
            let deadline = Instant::now() + Duration::from_secs(30);
            while workers.iter().any(|&pid| is_alive(pid)) {
                assert!(Instant::now() < deadline, "workers outlive their launcher");
                std::thread::sleep(Duration::from_millis(5));
            }
            // What was there before the kill is there, and the newest of it is whole.
            let after = checkpoints(&dir);
            if let Some(step) = before {
                let newest = newest(&after).unwrap_or_else(|| panic!("{name}: nothing is left"));
                assert!(newest >= step, "{name}: step {step} is gone, {after:?} are left");
                Store::new(dir.join("checkpoints")).verify(newest, 0, 1).unwrap();
            }
            if let (Some(newest), Some(taken)) = (newest(&after), last_logged(&dir)) {
                assert!(taken <= newest + most, "{name}: {taken} steps, {after:?} left");
            }
            if dir.join("model").exists() {
                break;
            }
        }
        assert_same(&dir, &whole, &format!("{name}, after {kills} kills"));
    }
}

#[test]
fn a_damaged_newest_checkpoint_is_named_and_the_one_before_used() {
    let (bench, whole) = bench();
    let mut killed = command(&bench, "run", &[]);
    fail(killed.env("RR_FAIL_POINT", "before_states:4@0"));
    let dir = bench.root.path().join("run");
    assert_eq!(checkpoints(&dir), ["step-4", "step-6"]);
    let victim = dir.join("checkpoints/step-6/rank-00001-of-00002.safetensors");
    let mut bytes = fs::read(&victim).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&victim, bytes).unwrap();
    let said = succeed(&mut command(&bench, "run", &[]));
    assert!(said.contains("step-6/rank-00001-of-00002.safetensors: damaged"), "{said}");
    assert!(said.contains("going on from run/checkpoints/step-4"), "{said}");
    assert_same(&dir, &whole, "after damage");
}

/// What it is called, and what does it to a file.
type Damage = (&'static str, fn(&Path));

/// Every file below `dir`.
fn files(dir: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<PathBuf> =
        paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect();
    all.sort();
    all
}

/// Copies the checkpoints of a run and what it has logged.
fn copy_run(from: &Path, to: &Path) {
    for path in files(from) {
        let target = to.join(path.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(path, target).unwrap();
    }
}

#[test]
fn damage_to_any_file_leads_to_the_checkpoint_before() {
    let (bench, whole) = bench();
    fail(command(&bench, "stopped", &[]).env("RR_FAIL_POINT", "before_states:4@0"));
    let stopped = bench.root.path().join("stopped");
    let newest = stopped.join("checkpoints/step-6");
    let damages: [Damage; 3] = [
        ("flipped", |path| {
            let mut bytes = fs::read(path).unwrap();
            *bytes.last_mut().unwrap() ^= 4;
            fs::write(path, bytes).unwrap();
        }),
        ("truncated", |path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("missing", |path| fs::remove_file(path).unwrap()),
    ];
    // Every kind of damage, and each file; all pairs of them on request.
    let is_long = std::env::var_os("RESUME_KILLS").is_some();
    for (number, file) in files(&newest).iter().enumerate() {
        let file = file.strip_prefix(&stopped).unwrap();
        for (kind, (what, damage)) in damages.iter().enumerate() {
            if !is_long && kind != number % damages.len() {
                continue;
            }
            let name = format!("damaged{number}-{what}");
            let dir = bench.root.path().join(&name);
            copy_run(&stopped, &dir);
            damage(&dir.join(file));
            let said = succeed(&mut command(&bench, &name, &[]));
            let named = format!("{name}/{}", file.display());
            assert!(said.contains(&named), "{named} {what}: {said}");
            let from = format!("going on from {name}/checkpoints/step-4: ");
            assert!(said.contains(&from), "{named} {what}: {said}");
            assert_same(&dir, &whole, &format!("{named} {what}"));
        }
    }
}

#[test]
fn a_kill_while_it_goes_on_loses_no_line_of_metrics() {
    let (bench, whole) = bench();
    for place in ["before_states:4@0", "before_metrics:1@0", "before_states:1@1"] {
        fail(command(&bench, "run", &[]).env("RR_FAIL_POINT", place));
    }
    succeed(&mut command(&bench, "run", &[]));
    assert_same(&bench.root.path().join("run"), &whole, "after three kills");
}

/// Another file of the same meaning is another file: nothing is guessed.
const CHANGED_TOKENIZER: fn(&mut Vec<u8>) = |json| json.push(b'\n');
/// Another dropout.
const CHANGED_CONFIG: fn(&mut Vec<u8>) = |file| {
    let text = String::from_utf8(std::mem::take(file)).unwrap();
    assert!(text.contains("_dropout_prob\":0.1"), "{text}");
    *file = text.replace("_dropout_prob\":0.1", "_dropout_prob\":0.2").into_bytes();
};

const CHANGED_WEIGHTS: fn(&mut Vec<u8>) = |file| *file.last_mut().unwrap() ^= 1;

#[test]
fn another_run_is_refused_with_what_differs() {
    let (bench, _) = bench();
    let stop = |name: &str| {
        let mut killed = command(&bench, name, &[]);
        fail(killed.env("RR_FAIL_POINT", "before_states:3@0"));
    };
    stop("run");
    let before = checkpoints(&bench.root.path().join("run"));
    let (code, said) = fail(&mut command(&bench, "run", &["lr=5e-4", "max_label=3"]));
    assert_eq!(code, 2);
    assert!(
        said.contains("lr: 0.001 there, 0.0005 here; max_label: 2.0 there, 3.0 here"),
        "{said}"
    );
    assert!(said.contains("--resume-anyway"), "{said}");
    assert_eq!(checkpoints(&bench.root.path().join("run")), before);
    // The same file under the same name, with other contents.
    let pairs = bench.root.path().join("pairs.jsonl");
    let text = fs::read_to_string(&pairs).unwrap();
    fs::write(&pairs, text.replacen("cup", "leaf", 1)).unwrap();
    let (_, said) = fail(&mut command(&bench, "run", &[]));
    assert!(said.contains("training data (CRC-32): "), "{said}");
    fs::write(&pairs, text).unwrap();
    for (file, changed, says) in [
        ("base/config.json", CHANGED_CONFIG, "model configuration (CRC-32): "),
        ("base/tokenizer.json", CHANGED_TOKENIZER, "tokenizer (CRC-32): "),
        ("base/model.safetensors", CHANGED_WEIGHTS, "base weights (sum of bits): "),
    ] {
        let path = bench.root.path().join(file);
        let original = fs::read(&path).unwrap();
        let mut other = original.clone();
        changed(&mut other);
        fs::write(&path, other).unwrap();
        let (code, said) = fail(&mut command(&bench, "run", &[]));
        assert_eq!(code, 2, "{said}");
        assert!(said.contains(says), "{said}");
        fs::write(&path, original).unwrap();
    }
    // Beginning anew beside an earlier run's checkpoints would mix them.
    let (code, said) = fail(command(&bench, "run", &[]).args(["--resume", "never"]));
    assert_eq!(code, 2);
    assert!(said.contains("holds the checkpoints of an earlier run, up to step 4"), "{said}");
    let said = succeed(command(&bench, "run", &["lr=5e-4"]).arg("--resume-anyway"));
    assert!(said.contains("going on although the run differs: lr: 0.001 there"), "{said}");
    // What moves or shows things makes no other run.
    stop("same");
    succeed(&mut command(&bench, "same", &["log_interval=1", "num_max_checkpoints=3"]));
    stop("anew");
    succeed(command(&bench, "anew", &[]).args(["--resume", "never", "--overwrite"]));
}

#[test]
fn other_workers_go_on_in_data_order() {
    let (bench, whole) = bench();
    let mut killed = command(&bench, "run", &[]);
    fail(killed.env("RR_FAIL_POINT", "before_states:3@0"));
    // One worker with batches of four takes the steps of two with batches of two.
    let mut alone = bench.command("run", 1, &["batch_size=4", "save_steps=2"]);
    let said = succeed(alone.args(["--set", "metric_for_best=loss"]));
    assert!(said.contains("going on from run/checkpoints/step-4"), "{said}");
    let loss = |dir: &Path| -> Vec<f64> {
        let text = fs::read_to_string(dir.join("runs/metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|l| l["type"] == "train").map(|l| l["pairs"].as_f64().unwrap()).collect()
    };
    // Pairs are counted from each start.
    let dir = bench.root.path().join("run");
    assert_eq!(logged_steps(&dir), logged_steps(&whole));
    assert_eq!(loss(&dir).last().unwrap() + 32.0, *loss(&whole).last().unwrap());
}

/// A line of metrics averages the steps since the last one, of which some were before the kill.
#[test]
fn the_lines_of_metrics_are_those_of_a_run_never_interrupted() {
    let bench = Bench::new(0.1);
    let every_third = |run| command(&bench, run, &["log_interval=3"]);
    succeed(&mut every_third("whole"));
    fail(every_third("run").env("RR_FAIL_POINT", "before_states:3@0"));
    let said = succeed(&mut every_third("run"));
    assert!(said.contains("going on from run/checkpoints/step-4"), "{said}");
    let lines = |run: &str| -> Vec<Value> {
        let path = bench.root.path().join(run).join("runs/metrics.jsonl");
        let text = fs::read_to_string(path).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let told = ["step", "epoch", "loss", "lr", "grad_norm"];
        lines
            .filter(|line| line["type"] == "train")
            .map(|line| told.iter().map(|&key| line[key].clone()).collect())
            .collect()
    };
    assert_eq!(lines("run"), lines("whole"));
    assert!(lines("run").len() >= 5);
}

#[test]
fn one_run_at_a_time_in_a_directory() {
    let bench = Bench::new(0.1);
    let mut long = command(&bench, "run", &["epochs=100000"]);
    let mut first = long.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let dir = bench.root.path().join("run");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !checkpoints(&dir).iter().any(|name| name.starts_with("step-")) {
        assert!(Instant::now() < deadline, "no checkpoint comes");
        std::thread::sleep(Duration::from_millis(20));
    }
    let (code, said) = fail(&mut command(&bench, "run", &["epochs=100000"]));
    kill(first.id());
    first.wait().unwrap();
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("run/runs/.lock is held by run "), "{said}");
}
