//! Stacks of workers that hang: which tool takes them, where they go, and that no tool outlasts its
//! time.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{
    DEADLINE, Launch, Outcome, assert_all_end, eventually, pids, run, shell, write_program,
};
use serde_json::Value;

const BEAT: &str = r#"beat() { printf '%-127s\n' "rr-heartbeat $*" 1<>"$RR_HEARTBEAT"; }"#;

const HINT: &str = "rr-launch: install gdb, elfutils (eu-stack) or py-spy for stacks\n";

/// A program in `PATH`.
fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap();
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// A `PATH` with what the workers need, and with `tool`, a shell script, under its name.
fn path_with(folder: &Path, tool: Option<(&str, &str)>) -> PathBuf {
    let bin = folder.join("bin");
    fs::create_dir(&bin).unwrap();
    for name in ["sh", "sleep", "setsid"] {
        symlink(which(name).unwrap(), bin.join(name)).unwrap();
    }
    if let Some((name, script)) = tool {
        write_program(&bin.join(name), &format!("#!/bin/sh\n{script}\n"));
    }
    bin
}

/// Two workers that hang: rank 0 waits for rank 1, which `does` something.
fn hanging(flags: &[&str], does: &str) -> Command {
    let script = format!(
        "{BEAT}; if [ $RANK = 0 ]; then beat 3 waits all_reduce; exec sleep 300; fi
        beat 3 works reading data; {does}"
    );
    shell(2, &[&["--hang-timeout", "0.5"], flags].concat(), &script)
}

/// An `eu-stack` that says whom it was asked about.
const FAKE: &str = r#"[ $1 = -p ] || exit 1
printf '%s\n' "PID $2 - process" "TID $2:" '#0  0x7f read_shard' '#1  0x55 main' 'TID 1:' '#0  f'"#;

#[test]
fn stacks_of_every_rank_are_in_files_that_the_summary_names() {
    let folder = tempfile::tempdir().unwrap();
    let bin = path_with(folder.path(), Some(("eu-stack", FAKE)));
    let logs = folder.path().join("logs");
    let flags = ["--max-restarts", "1", "--log-dir", logs.to_str().unwrap()];
    let outcome = run(hanging(&flags, "exec sleep 300").env("PATH", bin));
    assert_eq!(outcome.code, Some(42), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains("read_shard"), "the console stays short: {}", outcome.stderr);
    let text = fs::read_to_string(logs.join("launch.json")).unwrap();
    let summary: Value = serde_json::from_str(&text).unwrap();
    for attempt in 0..2 {
        let dir = logs.join(format!("attempt-{attempt}"));
        let told =
            format!("threads and stacks of ranks 0-1: {}", dir.join("rank-R.stacks.txt").display());
        assert!(outcome.stderr.contains(&told), "{}", outcome.stderr);
        for (rank, place) in ["all_reduce, step 3", "reading data, step 3"].iter().enumerate() {
            let file = dir.join(format!("rank-{rank}.stacks.txt"));
            let record = &summary["attempts"][attempt]["ranks"][rank];
            assert_eq!(record["stacks"], file.to_str().unwrap());
            let (pid, text) = (&record["pid"], fs::read_to_string(file).unwrap());
            assert!(text.starts_with(&format!("rank {rank} (pid {pid}): {place}\n\n")), "{text}");
            assert!(text.contains(&format!("thread {pid} sleep: sleeping in sleep")), "{text}");
            let stack = format!("TID {pid}:\n#0  0x7f read_shard\n#1  0x55 main\nTID 1:\n");
            assert!(text.contains(&stack), "{text}");
        }
    }
}

#[test]
fn without_files_the_main_thread_of_the_rank_to_blame_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let bin = path_with(folder.path(), Some(("eu-stack", FAKE)));
    let outcome = run(hanging(&[], "exec sleep 300").env("PATH", &bin));
    assert_eq!(outcome.code, Some(40), "{}", outcome.stderr);
    let shown = "rr-launch: main thread of rank 1 (eu-stack):\nrr-launch: | #0  0x7f read_shard\n\
                 rr-launch: | #1  0x55 main\nrr-launch: rank 1 (pid ";
    assert!(outcome.stderr.contains(shown), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains("of rank 0 ("), "{}", outcome.stderr);

    let outcome = run(hanging(&["--stack-timeout", "0"], "exec sleep 300").env("PATH", bin));
    assert!(!outcome.stderr.contains("main thread"), "{}", outcome.stderr);
}

#[test]
fn without_a_tool_it_is_said_what_to_install() {
    let folder = tempfile::tempdir().unwrap();
    let bin = path_with(folder.path(), None);
    let logs = folder.path().join("logs");
    for flags in [&[][..], &["--log-dir", logs.to_str().unwrap()]] {
        let outcome = run(hanging(flags, "exec sleep 300").env("PATH", &bin));
        assert_eq!(outcome.code, Some(40), "{}", outcome.stderr);
        assert_eq!(outcome.stderr.matches(HINT).count(), 1, "{}", outcome.stderr);
    }
    let text = fs::read_to_string(logs.join("attempt-0/rank-1.stacks.txt")).unwrap();
    assert!(text.contains(" sleep: sleeping in sleep"), "{text}");
}

/// An `eu-stack` that never ends, and neither does what it starts in its group and beside it.
fn deaf_tool(seen: &Path) -> String {
    let leaf =
        format!("trap \"\" TERM; echo $$ > {}/$$; while :; do sleep 300; done", seen.display());
    format!("sh -c '{leaf}' & setsid sh -c '{leaf}' & {leaf}")
}

#[test]
fn a_tool_that_never_ends_delays_nothing_beyond_its_time() {
    let folder = tempfile::tempdir().unwrap();
    let seen = folder.path().join("seen");
    fs::create_dir(&seen).unwrap();
    let bin = path_with(folder.path(), Some(("eu-stack", &deaf_tool(&seen))));
    let launch =
        Launch::start(hanging(&["--stack-timeout", "2"], "exec sleep 300").env("PATH", bin));
    let tools = pids(&seen, 3);
    let begin = Instant::now();
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(40), "{}", outcome.stderr);
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    assert_all_end(&tools);
    let says = "eu-stack did not end within 2 s (--stack-timeout): stacks of rank 1 are missing";
    assert!(outcome.stderr.contains(says), "{}", outcome.stderr);
}

#[test]
fn signals_are_heard_while_stacks_are_taken() {
    for (signal, status) in [("TERM", (Some(40), None)), ("KILL", (None, Some(9)))] {
        let folder = tempfile::tempdir().unwrap();
        let seen = folder.path().join("seen");
        fs::create_dir(&seen).unwrap();
        let bin = path_with(folder.path(), Some(("eu-stack", &deaf_tool(&seen))));
        let flags = ["--stack-timeout", "600"];
        let launch = Launch::start(hanging(&flags, "exec sleep 300").env("PATH", bin));
        let tools = pids(&seen, 3);
        let begin = Instant::now();
        launch.signal(signal);
        let outcome = launch.wait();
        assert_eq!((outcome.code, outcome.signal), status, "{}", outcome.stderr);
        assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
        assert_all_end(&tools);
    }
}

#[test]
fn every_launcher_takes_the_stacks_of_its_own_node() {
    let folder = tempfile::tempdir().unwrap();
    let bin = path_with(folder.path(), Some(("eu-stack", FAKE)));
    let logs = folder.path().join("logs");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let rdzv = format!("127.0.0.1:{port}");
    let start = |node: &str| {
        let place = ["--nnodes", "2", "--node-rank", node, "--rdzv", &rdzv];
        let flags = [&place[..], &["--log-dir", logs.to_str().unwrap()]].concat();
        Launch::start(hanging(&flags, "exec sleep 300").env("PATH", &bin))
    };
    let launches = [start("0"), start("1")];
    for (node, launch) in launches.into_iter().enumerate() {
        let Outcome { code, stderr, .. } = launch.wait();
        assert_eq!(code, Some(40), "{stderr}");
        for rank in [2 * node, 2 * node + 1] {
            let file = logs.join(format!("node-{node}/attempt-0/rank-{rank}.stacks.txt"));
            assert!(
                fs::read_to_string(&file).unwrap().contains("read_shard"),
                "{}",
                file.display()
            );
        }
        let ranks = format!("threads and stacks of ranks {}-{}: ", 2 * node, 2 * node + 1);
        assert!(stderr.contains(&ranks), "{stderr}");
    }
}

/// The real one, where it is installed; of a worker that is stopped too.
#[test]
fn gdb_shows_where_a_worker_sleeps() {
    let Some(gdb) = which("gdb") else { return };
    for does in ["exec sleep 300", "kill -STOP $$; sleep 300"] {
        let folder = tempfile::tempdir().unwrap();
        let bin = path_with(folder.path(), None);
        symlink(&gdb, bin.join("gdb")).unwrap();
        let logs = folder.path().join("logs");
        let flags = ["--stack-timeout", "60", "--log-dir", logs.to_str().unwrap()];
        let outcome = run(hanging(&flags, does).env("PATH", bin));
        assert_eq!(outcome.code, Some(40), "{}", outcome.stderr);
        for rank in 0..2 {
            let file = logs.join(format!("attempt-0/rank-{rank}.stacks.txt"));
            let text = fs::read_to_string(file).unwrap();
            assert!(text.contains("\nThread 1 (") && text.contains("\n#0  "), "{text}");
        }
    }
}

/// A worker ends although a tracer that was killed has held it.
#[test]
fn a_worker_whose_tracer_was_killed_ends_too() {
    let Some(gdb) = which("gdb") else { return };
    let folder = tempfile::tempdir().unwrap();
    let seen = folder.path().join("seen");
    fs::create_dir(&seen).unwrap();
    let tool = format!(
        "exec {} -nx -batch -p $2 -ex 'shell echo $$ > {}/$$' -ex 'shell sleep 300'",
        gdb.display(),
        seen.display()
    );
    let bin = path_with(folder.path(), Some(("eu-stack", &tool)));
    let does = format!("echo $$ > {}/worker; exec sleep 300", folder.path().display());
    let launch = Launch::start(hanging(&["--stack-timeout", "600"], &does).env("PATH", bin));
    pids(&seen, 1);
    let worker: i32 =
        fs::read_to_string(folder.path().join("worker")).unwrap().trim().parse().unwrap();
    let state = || fs::read_to_string(format!("/proc/{worker}/stat")).unwrap_or_default();
    assert!(eventually(DEADLINE, || state().contains(") t ")), "{}", state());
    launch.signal("TERM");
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(40), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("was killed by SIGTERM"), "{}", outcome.stderr);
    assert_all_end(&[worker]);
}
