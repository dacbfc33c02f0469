//! Restarts by rr-launch and torchrun: a launch goes on from what it has saved itself, and takes nothing of
//! an earlier one for its own.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "common/program.rs"]
mod program;

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};

use common::ranks::free_port;
use common::training::{Bench, end, killed_at, succeed, weights};
use program::write_program;

#[test]
fn restarts_go_on_from_what_this_launch_has_saved() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    succeed(&mut bench.saving("whole", &[]));
    // Each attempt dies when it saves for the third time. Attempts after the first ones of step 4
    // must not return to it; nor be led astray by what is no checkpoint of this launch.
    killed_at("before_states:3@0", &mut bench.saving("run", &[]));
    fs::create_dir(root.join("run/checkpoints/step-999")).unwrap();
    let mut restarted = bench.saving("run", &[]);
    restarted.args(["--resume", "run/checkpoints/step-4", "--max-restarts", "2"]);
    let said = succeed(restarted.env("RR_FAIL_POINT", "before_states:3@0"));
    for step in [4, 8, 12] {
        assert!(said.contains(&format!("run/checkpoints/step-{step}: step {step}")), "{said}");
    }
    assert!(weights(&root.join("run/model")) == weights(&root.join("whole/model")));
}

#[test]
fn a_restart_after_the_last_save_has_nothing_left_to_do() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    let mut restarted = bench.saving("run", &[]);
    restarted.args(["--max-restarts", "1"]).env("RR_FAIL_POINT", "after_model_moves:1@0");
    let said = succeed(&mut restarted);
    assert!(said.contains("run/model was saved before this restart"), "{said}");
    assert!(root.join("run/model/model.safetensors").exists());
    // So it is where the run replaces another, and where there was none to replace.
    for (name, place) in [("run", "after_end:1@0"), ("new", "after_model_moves:1@0")] {
        let mut restarted = bench.saving(name, &["lr=5e-4"]);
        restarted.args(["--overwrite", "--max-restarts", "1"]).env("RR_FAIL_POINT", place);
        let said = succeed(&mut restarted);
        assert!(said.contains(&format!("{name}/model was saved before this restart")), "{said}");
    }
    // A start by hand is told that there is a finished run.
    let (code, said) = end(&mut bench.saving("run", &[]));
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("already holds a finished run"), "{said}");
}

#[test]
fn restarts_by_torchrun_go_on_as_well() {
    let bench = Bench::new(0.1);
    let attempt = |count: &str| {
        let mut worker = Command::new(env!("CARGO_BIN_EXE_reranker"));
        worker.current_dir(bench.root.path()).args(["train", "--device", "cpu"]);
        worker.args(["--config", "t.yaml", "--set", "output_dir=run", "--set", "batch_size=4"]);
        worker.args(["--set", "save_steps=2", "--resume", "never", "--overwrite"]);
        worker.env("OMP_NUM_THREADS", "1").env_remove("RR_RUN_ID").stdin(Stdio::null());
        worker.env("TORCHELASTIC_RUN_ID", "none").env("TORCHELASTIC_RESTART_COUNT", count);
        worker
    };
    killed_by_hand(&mut attempt("0"), "before_states:3@0");
    let said = killed_by_hand(&mut attempt("1"), "after_end:1@0");
    assert!(said.contains("going on from run/checkpoints/step-4"), "{said}");
    let said = succeed(&mut attempt("2"));
    assert!(said.contains("run/model was saved before this restart"), "{said}");
    // Another launch knows nothing of this one.
    let said = succeed(&mut attempt("0"));
    assert!(said.contains("trained 106 pairs"), "{said}");
}

/// An identifier that a user gives every time names no launch.
#[test]
fn a_launch_that_is_called_as_an_earlier_one_does_its_own_work() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    let night = |more: &[&str]| {
        let mut command = bench.saving("run", more);
        command.args(["--run-id", "nightly"]);
        command
    };
    succeed(&mut night(&[]));
    let before = weights(&root.join("run/model"));
    // The first attempt ends before it has written anything.
    let script = "#!/bin/sh\n[ \"$RR_RESTART_COUNT\" = 0 ] && exit 9\nexec \"$TRAINER\" \"$@\"\n";
    write_program(&root.join("late"), script);
    let late = |command: &mut Command| {
        command.env("RR_RERANKER", root.join("late"));
        command.env("TRAINER", env!("CARGO_BIN_EXE_reranker"));
        succeed(command.args(["--overwrite", "--max-restarts", "2"]))
    };
    let said = late(&mut night(&["lr=5e-4"]));
    assert!(said.contains("trained 106 pairs"), "{said}");
    assert!(weights(&root.join("run/model")) != before);
    // Nor does it go on from the earlier one's checkpoints; its own are another matter.
    let mut never = night(&["lr=2e-4"]);
    let said = late(never.args(["--resume", "never"]).env("RR_FAIL_POINT", "after_end:1@0"));
    assert!(!said.contains("going on from"), "{said}");
    assert!(said.contains("run/model was saved before this restart"), "{said}");
}

/// A worker as torchrun starts it on one of its nodes, through a shell: the directory that torchrun has
/// made there, the rank, and how often this node has seen a failure.
fn by_torchrun(bench: &Bench, (node, rank, count): (&str, usize, usize), port: u16) -> Command {
    let mut worker = Command::new("sh");
    worker.args(["-c", "\"$@\"; exit $?", "sh", env!("CARGO_BIN_EXE_reranker"), "train"]);
    worker.args(["--device", "cpu", "--config", "t.yaml", "--set", "output_dir=run"]);
    worker.args(["--set", "batch_size=2", "--set", "save_steps=2"]);
    worker.current_dir(bench.root.path()).stdin(Stdio::null()).stderr(Stdio::piped());
    for name in ["RR_RUN_ID", "RR_RESTART_COUNT", "RR_LAUNCHER"] {
        worker.env_remove(name);
    }
    let record = format!("{node}/attempt_{count}/0/error.json");
    worker.env("TORCHELASTIC_ERROR_FILE", bench.root.path().join(record));
    worker.env("TORCHELASTIC_RUN_ID", "100").env("TORCHELASTIC_RESTART_COUNT", count.to_string());
    worker.env("OMP_NUM_THREADS", "1").env("RANK", rank.to_string()).env("WORLD_SIZE", "2");
    worker.env("LOCAL_RANK", "0").env("LOCAL_WORLD_SIZE", "1");
    worker.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    worker
}

#[test]
fn nodes_under_torchrun_agree_whose_the_model_is() {
    let bench = Bench::new(0.1);
    // Rank 0 is on the first of the nodes.
    let run = |nodes: [(&str, usize); 2], place: Option<&str>| {
        let port = free_port();
        let start = |(rank, (node, count)): (usize, (&str, usize))| {
            let mut worker = by_torchrun(&bench, (node, rank, count), port);
            worker.envs(place.map(|place| ("RR_FAIL_POINT", place))).spawn().unwrap()
        };
        let workers: Vec<_> = nodes.into_iter().enumerate().map(start).collect();
        let ends = workers.into_iter().map(|worker| {
            let output = worker.wait_with_output().unwrap();
            (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
        });
        ends.collect::<Vec<_>>()
    };
    let first = run([("100_ab", 0), ("100_cd", 0)], Some("after_end:1@0"));
    assert_eq!(first[0].0, 137, "{}", first[0].1);
    // The nodes have changed their places.
    let again = run([("100_cd", 1), ("100_ab", 1)], None);
    for (code, said) in &again {
        assert_eq!(*code, 0, "{said}");
    }
    assert!(again[0].1.contains("run/model was saved before this restart"), "{}", again[0].1);
    // Another launch of that name is refused, and so is its next attempt: torchrun makes one regardless.
    for count in [0, 1] {
        let other = run([("100_ef", count), ("100_gh", count)], None);
        assert!(other[0].1.contains("already holds a finished run"), "{}", other[0].1);
        for (code, said) in &other {
            assert_eq!(*code, 2, "{said}");
        }
    }
}

/// Starts a worker without a launcher that kills itself at this place; what it said.
fn killed_by_hand(worker: &mut Command, place: &str) -> String {
    let output = worker.env("RR_FAIL_POINT", place).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.signal(), Some(9), "{said}");
    said
}
