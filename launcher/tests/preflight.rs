//! `--config`: the check that runs before any worker, through a stand-in for `reranker`.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use common::{Launch, Outcome, ignoring, launcher, run, write_program};
use tempfile::TempDir;

/// A folder with a `reranker` that writes every command line it gets into `calls`, answers `check`
/// with `check`, and trains by printing its rank.
fn stand_in(check: &str) -> TempDir {
    stand_in_that(check, "echo \"training $RANK of $WORLD_SIZE\"")
}

/// As [`stand_in`], with another training.
fn stand_in_that(check: &str, train: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("reranker");
    let calls = folder.path().join("calls");
    let script = format!(
        "#!/bin/sh\necho \"$*\" >> '{}'\nif [ \"$1\" = check ]; then\n{check}\nelse\n{train}\nfi\n",
        calls.display()
    );
    write_program(&path, &script);
    folder
}

fn launch(folder: &TempDir, flags: &[&str]) -> Outcome {
    let mut command: Command = launcher();
    run(command.env("RR_RERANKER", folder.path().join("reranker")).args(flags))
}

fn calls(folder: &TempDir) -> Vec<String> {
    let text = fs::read_to_string(folder.path().join("calls")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

const PLAN: &str =
    r#"echo '{"processes":2,"device":"cpu","gpu_ids":null,"text":"the plan: 3 steps"}'"#;

#[test]
fn the_check_runs_once_and_all_workers_train_with_the_same_flags() {
    let folder = stand_in(PLAN);
    let outcome = launch(
        &folder,
        &[
            "--cpu",
            "--nproc",
            "3",
            "--config",
            "t.yaml",
            "--config-file",
            "p.yaml",
            "--set",
            "lr=1",
            "--set",
            "seed=2",
            "--overwrite",
            "--skip-bad-records",
            "--resume",
            "never",
        ],
    );
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let shared = "--config t.yaml --parallel p.yaml --set lr=1 --set seed=2 --overwrite \
                  --skip-bad-records --resume never";
    let calls = calls(&folder);
    assert_eq!(calls[0], format!("check --for-launch {shared} --nproc 3 --device cpu"));
    assert_eq!(calls[1..], [(); 3].map(|()| format!("train {shared} --device cpu")));
    assert!(outcome.stdout.contains("[2] training 2 of 3"), "{}", outcome.stdout);
}

#[test]
fn a_request_to_make_room_waits_for_workers_that_do_not_listen_yet() {
    let train = r#"exec python3 -c "
import os, signal, sys, time
print(os.getpid(), file=open('$DIR/$RANK', 'w'))
while not signal.sigpending(): time.sleep(0.01)
sys.exit(41)""#;
    for (signal, flags) in [("USR1", &[][..]), ("TERM", &["--preempt-signal", "TERM"])] {
        let (folder, pids) = (stand_in_that(PLAN, train), tempfile::tempdir().unwrap());
        let mut command = launcher();
        command.env("RR_RERANKER", folder.path().join("reranker")).env("DIR", pids.path());
        let launch = Launch::start(command.args(flags).args(["--config", "t.yaml"]));
        common::pids(pids.path(), 2);
        launch.signal(signal);
        let outcome = launch.wait();
        assert_eq!(outcome.code, Some(41), "{}", outcome.stderr);
    }
}

#[test]
fn the_configuration_says_how_many_where_the_command_line_does_not() {
    for flags in [&["--config", "t.yaml"][..], &["--cpu", "--config", "t.yaml"]] {
        let folder = stand_in(&format!("echo a log line\n{PLAN}"));
        let outcome = launch(&folder, flags);
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        assert!(outcome.stdout.contains("[1] training 1 of 2"), "{}", outcome.stdout);
    }
}

#[test]
fn a_user_error_is_shown_once_and_its_code_passed_on() {
    for code in [2, 1, 9] {
        let folder = stand_in(&format!("echo 't.yaml:3:1: unknown key `epoch5`' >&2; exit {code}"));
        let outcome = launch(&folder, &["--cpu", "--nproc", "2", "--config", "t.yaml"]);
        assert_eq!(outcome.code, Some(code));
        assert_eq!(outcome.stderr, "t.yaml:3:1: unknown key `epoch5`\n");
        assert_eq!((outcome.stdout.as_str(), calls(&folder).len()), ("", 1), "nobody trained");
    }
}

#[test]
fn a_check_killed_by_a_signal_gives_128_plus_its_number() {
    let outcome = launch(&stand_in("kill -SEGV $$"), &["--cpu", "--config", "t.yaml"]);
    assert_eq!(outcome.code, Some(139));
}

#[test]
fn a_signal_ends_the_check_and_the_launch() {
    for (signal, flags, code) in [
        ("TERM", &[][..], 143),
        ("INT", &[], 130),
        ("USR1", &[], 41),
        ("TERM", &["--preempt-signal", "TERM"], 41),
    ] {
        let pids = tempfile::tempdir().unwrap();
        let check = format!("echo $$ > {}/0; exec sleep 300", pids.path().display());
        let folder = stand_in(&check);
        let mut command = launcher();
        command.env("RR_RERANKER", folder.path().join("reranker")).args(flags);
        let launch = Launch::start(command.args(["--cpu", "--config", "t.yaml"]));
        let check = common::pids(pids.path(), 1);
        launch.signal(signal);
        let outcome = launch.wait();
        assert_eq!(outcome.code, Some(code), "{}", outcome.stderr);
        let says = format!("by SIG{signal} before any worker was started\n");
        let is_one = outcome.stderr.lines().count() == 1;
        assert!(is_one && outcome.stderr.ends_with(&says), "{}", outcome.stderr);
        assert!(!common::is_alive(check[0]));
    }
    // Some send it to all processes of a job, the check among them.
    let outcome = launch(&stand_in("kill -USR1 $$"), &["--cpu", "--config", "t.yaml"]);
    assert_eq!(outcome.code, Some(41), "{}", outcome.stderr);
}

#[test]
fn an_int_that_was_ignored_does_not_end_the_check() {
    // A terminal sends it to the whole group, as Ctrl-C on a script whose background job this is.
    let folder = stand_in(&format!("kill -INT 0; {PLAN}"));
    let mut command = launcher();
    command.env("RR_RERANKER", folder.path().join("reranker")).args(["--config", "t.yaml"]);
    let outcome = run(ignoring("INT", &command).process_group(0));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stdout.contains("[1] training 1 of 2"), "{}", outcome.stdout);
}

#[test]
fn a_check_without_a_plan_is_not_the_users_fault() {
    let outcome = launch(&stand_in("echo hello"), &["--cpu", "--config", "t.yaml"]);
    assert_eq!(outcome.code, Some(1));
    assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("one line of JSON"), "{}", outcome.stderr);
}

#[test]
fn a_dry_run_shows_the_plan_of_the_check() {
    let folder = stand_in(PLAN);
    let outcome = launch(&folder, &["--dry-run", "--config", "my file.yaml"]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stdout.starts_with("the plan: 3 steps\n"), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("train --config 'my file.yaml'"), "{}", outcome.stdout);
    assert_eq!(calls(&folder).len(), 1, "only the check ran");
}

#[test]
fn a_missing_reranker_is_named() {
    let outcome = run(launcher()
        .env("RR_RERANKER", "/no/such/reranker")
        .args(["--cpu", "--config", "t.yaml"]));
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.contains("/no/such/reranker"), "{}", outcome.stderr);
}
