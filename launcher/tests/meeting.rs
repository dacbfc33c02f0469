//! How launchers meet, on this host: what keeps them from starting together, and what does not.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use common::{
    DEADLINE, Launch, Outcome, assert_codes, eventually, is_alive, launcher, pids, send, wait_all,
};
use serde_json::Value;

/// What a failure on one node may take to end all of them.
const END: Duration = Duration::from_secs(5);

/// Two launchers on this host, for what keeps them from starting.
fn pair(flags: [&[&str]; 2], program: [&str; 2]) -> Vec<Outcome> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |node: usize| {
        let mut command = launcher();
        let rdzv = format!("127.0.0.1:{port}");
        command.args(["--cpu", "--nnodes", "2", "--node-rank", &node.to_string(), "--rdzv", &rdzv]);
        command.args(flags[node]).args(["--", "echo", program[node]]);
        Launch::start(&mut command)
    };
    wait_all(vec![start(0), start(1)])
}

#[test]
fn what_differs_is_one_line_on_both() {
    let run = ["--run-id", "x"];
    for (flags, program, expected) in [
        ([&[][..], &["--max-restarts", "2"]], ["a", "a"], "--max-restarts: 2 on node 1 ("),
        ([&run[..], &[]], ["a", "a"], "--run-id: none on node 1 ("),
        ([&[][..], &[]], ["a", "b"], "the command: echo b on node 1 ("),
    ] {
        let outcomes = pair(flags, program);
        assert_codes(&outcomes, 2);
        for Outcome { stdout, stderr, .. } in &outcomes {
            assert_eq!((stdout.as_str(), stderr.lines().count()), ("", 1), "{stderr}");
            assert!(stderr.contains(expected), "{stderr}");
        }
    }
    let outcomes = pair([&["--nproc", "2"], &["--nproc", "1"]], ["a", "a"]);
    assert_codes(&outcomes, 0);
    assert!(outcomes[0].stderr.contains("starts 1 worker, "), "{}", outcomes[0].stderr);
    assert!(outcomes[1].stdout.contains("[2] a"), "{}", outcomes[1].stdout);
}

#[test]
fn a_node_of_another_run_is_turned_away_and_ends_nobody() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |node: &str, run: &str, program: &str| {
        let mut command = launcher();
        let rdzv = format!("127.0.0.1:{port}");
        command.args(["--cpu", "--nnodes", "2", "--node-rank", node, "--rdzv", &rdzv]);
        Launch::start(command.args(["--run-id", run, "--", program]))
    };
    let first = start("0", "ours", "true");
    let stranger = start("1", "theirs", "false").wait();
    assert_eq!((stranger.code, stranger.stderr.lines().count()), (Some(2), 1));
    assert!(stranger.stderr.contains("--run-id theirs, ours on node 0 ("), "{}", stranger.stderr);
    assert_eq!(start("1", "theirs", "no-such-program-anywhere").wait().code, Some(2));
    let outcomes = wait_all(vec![first, start("1", "ours", "true")]);
    assert_codes(&outcomes, 0);
    let told = outcomes[0].stderr.matches(") is of another run and is turned away: ").count();
    assert_eq!((told, outcomes[0].stderr.lines().count()), (2, 2), "{}", outcomes[0].stderr);
}

#[test]
fn nodes_are_not_lost_over_a_timeout_shorter_than_a_second() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |node: &str| {
        let mut command = launcher();
        let rdzv = format!("127.0.0.1:{port}");
        command.args(["--cpu", "--nnodes", "2", "--node-rank", node, "--rdzv", &rdzv]);
        Launch::start(command.args(["--node-timeout", "0.6", "--", "sleep", "1.5"]))
    };
    assert_codes(&wait_all(vec![start("0"), start("1")]), 0);
}

#[test]
fn a_node_that_cannot_start_ends_the_others() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |node: &str, program: &str| {
        let mut command = launcher();
        let rdzv = format!("127.0.0.1:{port}");
        command.args(["--cpu", "--nnodes", "2", "--node-rank", node, "--rdzv", &rdzv]);
        Launch::start(command.args(["--", program]))
    };
    let waiting = start("0", "true");
    std::thread::sleep(Duration::from_millis(300));
    let outcomes = wait_all(vec![waiting, start("1", "no-such-program-anywhere")]);
    assert_codes(&outcomes, 2);
    assert!(outcomes[0].stderr.contains("cannot start: exit code 2"), "{}", outcomes[0].stderr);
}

#[test]
fn a_node_that_cannot_start_its_workers_after_the_meeting_ends_all_with_its_code() {
    for (wrong, at_restart) in [(0, false), (1, false), (0, true), (1, true)] {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let folder = tempfile::tempdir().unwrap();
        let logs = folder.path().join("logs");
        // A log file that cannot be opened is noticed when the ranks are known; and a launcher that may
        // open no more files cannot start workers again.
        let log = logs.join(format!("node-{wrong}/attempt-0/rank-{wrong}.log"));
        let flags: &[&str] = if at_restart {
            &["--max-restarts", "1"]
        } else {
            std::fs::create_dir_all(log).unwrap();
            &["--log-dir", logs.to_str().unwrap()]
        };
        let script =
            "[ $RANK = $WRONG ] && { prlimit --pid $PPID --nofile=8:8; exit 3; }; sleep 300";
        let start = |node: usize| {
            let mut command = launcher();
            let rdzv = format!("127.0.0.1:{port}");
            command.args(["--cpu", "--nnodes", "2", "--node-rank", &node.to_string()]);
            command.args(["--rdzv", &rdzv]).args(flags).args(["--", "sh", "-c", script]);
            Launch::start(command.env("WRONG", wrong.to_string()))
        };
        let begin = Instant::now();
        let outcomes = wait_all(vec![start(0), start(1)]);
        assert!(begin.elapsed() < END);
        assert_codes(&outcomes, 2);
        let says = format!("node {wrong} (");
        let told = &outcomes[1 - wrong].stderr;
        assert!(told.contains(&says) && told.contains("exit code 2; see its output"), "{told}");
        if !at_restart {
            let file = std::fs::read(logs.join(format!("node-{wrong}/launch.json"))).unwrap();
            let summary: Value = serde_json::from_slice(&file).unwrap();
            assert_eq!(
                (&summary["exit_code"], &summary["outcome"]),
                (&2.into(), &"launcher_failed".into())
            );
        }
    }
}

#[test]
fn who_comes_late_is_told_too_that_nothing_comes_of_it() {
    let start = |port: u16, node: &str, program: &str| {
        let mut command = launcher();
        let rdzv = format!("127.0.0.1:{port}");
        command.args(["--cpu", "--nnodes", "3", "--node-rank", node, "--rdzv", &rdzv]);
        Launch::start(command.args(["--rdzv-timeout", "60", "--", program]))
    };
    let late = || std::thread::sleep(Duration::from_millis(1500));
    let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    // Nodes 0 and 2 do not agree.
    let port = free();
    let early = [start(port, "0", "true"), start(port, "2", "false")];
    late();
    let outcomes = wait_all([start(port, "1", "true")].into_iter().chain(early).collect());
    assert_codes(&outcomes, 2);
    for Outcome { stderr, .. } in &outcomes {
        let is_one = stderr.lines().count() == 1;
        assert!(is_one && stderr.contains("the command: false on node 2"), "{stderr}");
    }
    // A node cannot start, and knows it before another one is there.
    for (wrong, other) in [("0", "1"), ("2", "0")] {
        let port = free();
        let early = start(port, wrong, "no-such-program-anywhere");
        late();
        let outcomes = wait_all(vec![start(port, other, "true"), early]);
        assert_codes(&outcomes, 2);
        assert!(outcomes[0].stderr.contains("cannot start: exit code 2"), "{}", outcomes[0].stderr);
        assert_eq!(outcomes[1].stderr.lines().count(), 1, "{}", outcomes[1].stderr);
    }
    // What connects and says nothing is no node, and nobody is left out for it.
    let port = free();
    let first = start(port, "0", "true");
    let connect = || TcpStream::connect(("127.0.0.1", port)).ok();
    let mut strays = Vec::new();
    assert!(eventually(DEADLINE, || {
        strays.extend(connect());
        strays.len() == 2
    }));
    first.signal("TERM");
    first.wait_for_word("ended by SIGTERM");
    strays.extend(connect());
    let outcomes = wait_all(vec![start(port, "1", "true"), start(port, "2", "true"), first]);
    assert_codes(&outcomes, 143);
    drop(strays);
}

#[test]
fn a_call_that_was_given_up_is_no_node_that_was_told() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let start = |node: &str, program: &str| {
        let mut command = launcher();
        let rdzv = format!("127.0.0.1:{port}");
        command.args(["--cpu", "--nnodes", "3", "--node-rank", node, "--rdzv", &rdzv]);
        Launch::start(command.args(["--rdzv-timeout", "60", "--", program]))
    };
    let first = start("0", "no-such-program-anywhere");
    // What node 1 leaves behind that has called while node 0 was in its check: two calls.
    let hello = br#"{"hello":{"node_rank":1,"host":"b","workers":1,"terms":[]}}"#;
    let call = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.write_all(&(hello.len() as u32).to_be_bytes()).unwrap();
        stream.write_all(hello).ok()
    };
    let mut calls = 0;
    let called = || {
        calls += usize::from(call().is_some());
        calls == 2
    };
    assert!(eventually(END, called));
    let outcomes = wait_all(vec![start("1", "true"), start("2", "true"), first]);
    assert_codes(&outcomes, 2);
    for Outcome { stderr, .. } in &outcomes[..2] {
        assert!(stderr.contains("cannot start: exit code 2"), "{stderr}");
    }
}

#[test]
fn a_second_node_of_the_same_rank_is_refused() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let folder = tempfile::tempdir().unwrap();
    let go = folder.path().join("go");
    let script = format!("echo; until [ -e {} ]; do sleep 0.02; done", go.display());
    let start = |node: &str, patience: &str| {
        let mut command = launcher();
        let rdzv = format!("127.0.0.1:{port}");
        command.args(["--cpu", "--nnodes", "3", "--node-rank", node, "--rdzv", &rdzv]);
        command.args(["--rdzv-timeout", patience]);
        Launch::start(command.args(["--", "sh", "-c", &script]))
    };
    let (first, mut second, mut twin) = (start("0", "60"), start("1", "60"), start("1", "60"));
    // Either may come first.
    assert!(eventually(DEADLINE, || !is_alive(second.pid()) || !is_alive(twin.pid())));
    if !is_alive(second.pid()) {
        std::mem::swap(&mut second, &mut twin);
    }
    let twin = twin.wait();
    assert_eq!(twin.code, Some(2), "{}", twin.stderr);
    assert!(twin.stderr.contains("--node-rank 1 of host "), "{}", twin.stderr);
    assert!(is_alive(first.pid()) && is_alive(second.pid()));
    let third = start("2", "60");
    first.wait_for_lines(1);
    // Who waits for the next launch in vain.
    let late = start("2", "0.5").wait();
    std::fs::write(go, "").unwrap();
    assert_eq!(late.code, Some(44), "{}", late.stderr);
    assert!(late.stderr.contains("without this node, with all nodes"), "{}", late.stderr);
    assert!(late.stderr.contains("waited 0.5 s (--rdzv-timeout) for the end"), "{}", late.stderr);
    let outcomes = wait_all(vec![first, second, third]);
    assert_codes(&outcomes, 0);
    assert!(outcomes[0].stderr.contains("--node-rank 1 of host "), "{}", outcomes[0].stderr);
}

#[test]
fn a_successor_that_comes_while_the_old_launch_ends_waits_for_the_next() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().display();
    // Workers that are not through before the test lets them end.
    let script = format!(
        "trap '' TERM; echo $$ > {dir}/$RANK.new; mv {dir}/$RANK.new {dir}/$RANK
        until [ -e {dir}/go ]; do sleep 0.02; done"
    );
    let start = |node: &str| {
        let mut command = launcher();
        let rdzv = format!("127.0.0.1:{port}");
        command.args(["--cpu", "--nnodes", "2", "--node-rank", node, "--rdzv", &rdzv]);
        Launch::start(command.args(["--grace", "60", "--", "sh", "-c", &script]))
    };
    let (first, second) = (start("0"), start("1"));
    pids(folder.path(), 2);
    send("KILL", second.pid());
    second.wait();
    let successor = start("1");
    successor.wait_for_word("has begun without this node, with all nodes that it has; waiting");
    std::fs::write(folder.path().join("go"), "").unwrap();
    assert_codes(&[first.wait()], 44);
    let outcomes = [start("0").wait(), successor.wait()];
    assert_codes(&outcomes, 0);
    assert_eq!(outcomes[1].stderr.lines().count(), 1, "{}", outcomes[1].stderr);
}
