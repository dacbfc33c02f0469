//! Training under supervision, with real processes: asked to make room, failing and restarted,
//! hanging in a collective.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::training::Bench;
use serde_json::Value;

/// Long enough for a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(120);

/// 140 steps of 4 pairs on each of two workers, checkpoints only where they are asked for: long
/// enough to be interrupted.
const LONG: [&str; 2] = ["batch_size=2", "epochs=20"];

/// 14 steps with a checkpoint after every second.
const SHORT: [&str; 2] = ["batch_size=2", "save_steps=2"];

fn command(bench: &Bench, name: &str, settings: &[&str], flags: &[&str]) -> Command {
    let mut command = bench.command(name, 2, settings);
    command.args(flags).env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    command
}

/// How a launch ended: its code, and what it said.
fn end(child: Child) -> (i32, String) {
    let output = child.wait_with_output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn start(command: &mut Command) -> Child {
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn weights(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model/model.safetensors")).unwrap()
}

/// The steps of `metrics.jsonl`'s training lines, in order.
fn logged_steps(dir: &Path) -> Vec<u64> {
    let text = std::fs::read_to_string(dir.join("runs/metrics.jsonl")).unwrap_or_default();
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|l| l["type"] == "train").map(|l| l["step"].as_u64().unwrap()).collect()
}

fn wait_for_step(dir: &Path, step: u64) {
    let deadline = Instant::now() + PATIENCE;
    while logged_steps(dir).last().is_none_or(|&last| last < step) {
        assert!(Instant::now() < deadline, "training does not come to step {step}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn send(signal: &str, pid: u32) {
    let status = Command::new("kill").args([&format!("-{signal}"), &pid.to_string()]).status();
    assert!(status.unwrap().success());
}

/// The workers of a launcher, by rank: it starts them in that order.
fn workers(launcher: u32) -> Vec<u32> {
    let path = format!("/proc/{launcher}/task/{launcher}/children");
    let children = std::fs::read_to_string(path).unwrap();
    let is_worker = |pid: &u32| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|&byte| byte == 0).any(|word| word == b"train")
    };
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(is_worker).collect()
}

/// A run that nobody disturbs.
fn undisturbed(bench: &Bench, settings: &[&str]) -> PathBuf {
    let (code, said) = end(start(&mut command(bench, "whole", settings, &[])));
    assert_eq!(code, 0, "{said}");
    bench.root.path().join("whole")
}

#[test]
fn a_preempted_run_saves_and_goes_on_bit_for_bit() {
    let bench = Bench::new(0.1);
    let whole = undisturbed(&bench, &LONG);
    for (name, signal, flags) in
        [("usr1", "USR1", &[][..]), ("term", "TERM", &["--preempt-signal", "TERM"])]
    {
        let dir = bench.root.path().join(name);
        let launcher = start(&mut command(&bench, name, &LONG, flags));
        wait_for_step(&dir, 3);
        send(signal, launcher.id());
        let (code, said) = end(launcher);
        assert_eq!(code, 41, "{said}");
        assert!(said.contains(&format!("preempted by SIG{signal}; saved a checkpoint")), "{said}");
        let last = *logged_steps(&dir).last().unwrap();
        assert!((3..140).contains(&last), "{said}");
        assert!(dir.join(format!("checkpoints/step-{last}")).is_dir(), "{said}");
        assert!(!dir.join("model").exists());
        let page = std::fs::read_to_string(dir.join("runs/report.html")).unwrap();
        assert!(page.contains(r#""status":"preempted""#));
        let (code, said) = end(start(&mut command(&bench, name, &LONG, flags)));
        assert_eq!(code, 0, "{said}");
        assert!(said.contains("going on from"), "{said}");
        assert!(weights(&dir) == weights(&whole), "{name}: other weights");
        assert_eq!(logged_steps(&dir), (1..=140).collect::<Vec<_>>(), "{name}");
    }
}

#[test]
fn a_request_that_comes_before_workers_have_begun_is_heard() {
    let bench = Bench::new(0.1);
    let launcher = start(&mut command(&bench, "early", &LONG, &[]));
    let deadline = Instant::now() + PATIENCE;
    while workers(launcher.id()).len() < 2 {
        assert!(Instant::now() < deadline, "no workers");
        std::thread::sleep(Duration::from_millis(1));
    }
    send("USR1", launcher.id());
    let (code, said) = end(launcher);
    assert_eq!(code, 41, "{said}");
}

#[test]
fn one_worker_that_hears_of_it_is_enough_and_needs_no_launcher() {
    let bench = Bench::new(0.1);
    let program = env!("CARGO_BIN_EXE_reranker");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let worker = |rank: usize| {
        let mut command = Command::new(program);
        command.current_dir(bench.root.path()).args(["train", "--config", "t.yaml"]);
        for setting in LONG.iter().chain(&["output_dir=bare"]) {
            command.args(["--set", setting]);
        }
        command.args(["--device", "cpu"]).env("OMP_NUM_THREADS", "1");
        command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
        command.env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        command.env("RR_PREEMPT_SIGNAL", "HUP").stdin(Stdio::null());
        start(&mut command)
    };
    let (first, second) = (worker(0), worker(1));
    let dir = bench.root.path().join("bare");
    wait_for_step(&dir, 3);
    send("HUP", second.id());
    // What a scheduler sends when its patience ends does not interrupt the save.
    send("TERM", second.id());
    for worker in [second, first] {
        let (code, said) = end(worker);
        assert_eq!(code, 41, "{said}");
    }
    let last = *logged_steps(&dir).last().unwrap();
    assert!(dir.join(format!("checkpoints/step-{last}/manifest.json")).is_file());
}

#[test]
fn a_failing_run_is_restarted_from_its_newest_checkpoint() {
    let bench = Bench::new(0.1);
    let whole = undisturbed(&bench, &SHORT);
    // Without a restart's own rule the second would begin anew each time, and never end.
    for (name, flags) in [("auto", &[][..]), ("anew", &["--resume", "never", "--overwrite"])] {
        let dir = bench.root.path().join(name);
        let mut flags = flags.to_vec();
        flags.extend(["--max-restarts", "6", "--log-dir", "logs"]);
        let mut launch = command(&bench, name, &SHORT, &flags);
        // Each start dies over its third checkpoint: after steps 6, 10 and 14.
        launch.env("RR_FAIL_POINT", "before_states:3@1");
        let (code, said) = end(start(&mut launch));
        assert_eq!(code, 0, "{said}");
        assert_eq!(said.matches("restarting 2 workers").count(), 3, "{said}");
        assert!(said.contains("restarting 2 workers (restart 3 of 6)"), "{said}");
        assert!(weights(&dir) == weights(&whole), "{name}: other weights");
        assert_eq!(logged_steps(&dir), (1..=14).collect::<Vec<_>>());
        let summary = std::fs::read_to_string(bench.root.path().join("logs/launch.json")).unwrap();
        let summary: Value = serde_json::from_str(&summary).unwrap();
        assert_eq!(
            (&summary["outcome"], summary["attempts"].as_array().unwrap().len()),
            (&"success".into(), 4)
        );
        assert_eq!(summary["attempts"][0]["first_rank"], 1, "{summary}");
        assert!(summary["attempts"][0]["ranks"][1]["step"].as_u64().unwrap() >= 6, "{summary}");
    }
}

#[test]
fn what_would_fail_again_is_not_restarted() {
    let bench = Bench::new(0.0);
    let diverging = ["lr=1e30", "max_grad_norm=null", "batch_size=2", "warmup_proportion=0"];
    let (code, said) =
        end(start(&mut command(&bench, "diverging", &diverging, &["--max-restarts", "5"])));
    assert_eq!(code, 43, "{said}");
    assert!(said.contains("is not finite") && !said.contains("restarting"), "{said}");
    // Every start dies over its first checkpoint: nothing is ever saved.
    let mut launch = command(&bench, "stuck", &SHORT, &["--max-restarts", "50"]);
    launch.env("RR_FAIL_POINT", "before_states:1@0");
    let (code, said) = end(start(&mut launch));
    assert_eq!(code, 43, "{said}");
    assert_eq!(said.matches("restarting 2 workers").count(), 3, "{said}");
    assert!(said.contains("the last 3 came no further"), "{said}");
}

#[test]
fn a_hang_is_seen_its_rank_named_and_the_run_restarted() {
    let bench = Bench::new(0.1);
    let endless = ["batch_size=2", "epochs=100000"];
    for (rank, name) in [(0, "first"), (1, "last")] {
        let dir = bench.root.path().join(name);
        let flags = ["--hang-timeout", "8", "--max-restarts", "1"];
        let launcher = start(&mut command(&bench, name, &endless, &flags));
        wait_for_step(&dir, 3);
        let before = workers(launcher.id());
        assert_eq!(before.len(), 2);
        send("STOP", before[rank]);
        let deadline = Instant::now() + PATIENCE;
        let restarted = loop {
            let now = workers(launcher.id());
            if now.len() == 2 && now.iter().all(|pid| !before.contains(pid)) {
                break now;
            }
            assert!(Instant::now() < deadline, "{name}: no restart");
            std::thread::sleep(Duration::from_millis(20));
        };
        send("STOP", restarted[rank]);
        let (code, said) = end(launcher);
        assert_eq!(code, 42, "{said}");
        assert!(
            said.contains(&format!("no progress for 8 s; the others wait for rank {rank}")),
            "{said}"
        );
        let of = |rank: usize| {
            let mark = format!("rr-launch: rank {rank} (pid {}): ", before[rank]);
            said.lines().find(|line| line.starts_with(&mark)).unwrap_or_else(|| panic!("{said}"))
        };
        assert!(of(rank).contains("stopped by a signal"), "{said}");
        let waiting = of(1 - rank);
        assert!(waiting.contains("all_reduce") && waiting.contains(", step "), "{said}");
        assert!(said.contains("restarting 2 workers (restart 1 of 1)"), "{said}");
        assert!(said.contains("--max-restarts 1 is used up"), "{said}");
    }
}

/// A process's variables that say how OpenMP's threads wait.
fn waiting(pid: u32) -> Vec<String> {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    let all = String::from_utf8_lossy(&environment).into_owned();
    let says_how = |entry: &&str| {
        ["OMP_WAIT_POLICY=", "GOMP_SPINCOUNT="].iter().any(|name| entry.starts_with(name))
    };
    all.split('\0').filter(says_how).map(str::to_owned).collect()
}

/// A program that waits for pairs on its standard input; what it waits like once it has its model.
fn waiting_of_score(variables: &[(&str, &str)]) -> Vec<String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_reranker"));
    command.args(["score", "--device", "cpu", "--max-len", "48", "--model"]);
    command.arg(common::golden_dir("bert_tiny"));
    for name in ["OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"] {
        command.env_remove(name);
    }
    command.envs(variables.iter().copied());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let found = {
        use std::io::{BufRead as _, Write as _};
        // The first score says that it has begun; the process is the one that was started.
        let mut input = child.stdin.take().unwrap();
        for _ in 0..200 {
            input.write_all(b"{\"query\": \"tea\", \"content\": \"a cup\"}\n").unwrap();
        }
        input.flush().unwrap();
        let pid = child.id();
        let found = std::thread::spawn(move || {
            let deadline = Instant::now() + PATIENCE;
            while std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count) < 2 {
                assert!(Instant::now() < deadline, "the program does not begin");
                std::thread::sleep(Duration::from_millis(5));
            }
            waiting(pid)
        });
        let found = found.join().unwrap();
        drop(input);
        let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.count(), 200);
        found
    };
    assert!(child.wait().unwrap().success());
    found
}

#[test]
fn threads_sleep_while_they_wait_unless_told_otherwise() {
    let passive = ["OMP_WAIT_POLICY=passive"];
    assert_eq!(waiting_of_score(&[]), passive);
    assert_eq!(waiting_of_score(&[("OMP_WAIT_POLICY", "active")]), ["OMP_WAIT_POLICY=active"]);
    assert_eq!(waiting_of_score(&[("GOMP_SPINCOUNT", "9")]), ["GOMP_SPINCOUNT=9"]);
    assert_eq!(waiting_of_score(&[("OMP_NUM_THREADS", "1")]), [""; 0]);
    // The launcher says it to our workers, not to programs of others.
    let bench = Bench::new(0.1);
    let plan_of = |command: &mut Command| {
        for name in ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"] {
            command.env_remove(name);
        }
        String::from_utf8(command.arg("--dry-run").output().unwrap().stdout).unwrap()
    };
    let plan = plan_of(&mut bench.command("run", 2, &[]));
    assert_eq!(plan.matches(" OMP_WAIT_POLICY=passive").count(), 2, "{plan}");
}
