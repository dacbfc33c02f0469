//! Log files, prefixes, the choice of ranks, JSON lines.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::fs;
use std::path::Path;

use common::{launcher, run, shell};
use serde_json::Value;

fn read(folder: &Path, name: &str) -> String {
    let path = folder.join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// `shell` with `--log-dir folder`.
fn logged(workers: usize, folder: &Path, flags: &[&str], script: &str) -> common::Outcome {
    let dir = folder.to_str().unwrap();
    run(&mut shell(workers, &[&["--log-dir", dir], flags].concat(), script))
}

#[test]
fn each_rank_and_attempt_has_a_file_and_all_together_one() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("new/logs");
    // Rank 1 fails the first time, once rank 0 has written.
    let script = format!(
        r#"echo "$RANK out"; echo "$RANK err" >&2; cd {}; [ $RR_RESTART_COUNT = 1 ] && exit 0
        [ $RANK = 0 ] && {{ touch written; sleep 60; }}; until [ -e written ]; do sleep 0.01; done; exit 3"#,
        folder.path().display()
    );
    let outcome = logged(2, &dir, &["--max-restarts", "1"], &script);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    for attempt in 0..2 {
        for rank in 0..2 {
            let text = read(&dir, &format!("attempt-{attempt}/rank-{rank}.log"));
            let mut lines: Vec<_> = text.lines().collect();
            lines.sort_unstable();
            assert_eq!(lines, [format!("{rank} err"), format!("{rank} out")]);
        }
    }
    let merged = read(&dir, "launch.log");
    for line in ["[0] 0 out", "[1] 1 err", "rr-launch: restarting 2 workers (restart 1 of 1)"] {
        assert!(merged.lines().any(|other| other == line), "no `{line}` in {merged}");
    }
    let begins: Vec<_> = merged.lines().filter(|line| line.contains("attempt ")).collect();
    assert!(begins[0].ends_with("attempt 0: 2 workers") && begins.len() == 2, "{begins:?}");
    let file = dir.join("attempt-0/rank-1.log");
    let blame = format!("its last lines (all are in {}):", file.display());
    assert!(outcome.stderr.contains(&blame), "{}", outcome.stderr);
    let summary: Value = serde_json::from_str(&read(&dir, "launch.json")).unwrap();
    assert_eq!(summary["attempts"][0]["ranks"][1]["log"], file.to_str().unwrap());
}

#[test]
fn an_earlier_launch_keeps_its_lines() {
    let folder = tempfile::tempdir().unwrap();
    for word in ["one", "two"] {
        assert_eq!(logged(1, folder.path(), &[], &format!("echo {word}")).code, Some(0));
    }
    assert_eq!(read(folder.path(), "attempt-0/rank-0.log"), "one\ntwo\n");
}

#[test]
fn the_console_shows_the_ranks_that_are_asked_for_and_files_have_all() {
    let folder = tempfile::tempdir().unwrap();
    let outcome = logged(4, folder.path(), &["--show", "0,2-3"], "echo $RANK");
    let mut lines: Vec<_> = outcome.stdout.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["[0] 0", "[2] 2", "[3] 3"]);
    assert_eq!(read(folder.path(), "attempt-0/rank-1.log"), "1\n");
    assert!(read(folder.path(), "launch.log").contains("[1] 1\n"));
}

#[test]
fn failed_shows_nothing_but_the_end_of_the_rank_that_failed() {
    let script = "echo from $RANK; [ $RANK = 0 ] || sleep 60; exit 7";
    let outcome = run(&mut shell(3, &["--show", "failed"], script));
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(7), ""));
    assert!(outcome.stderr.contains("rr-launch: | from 0\n"), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains("from 1"), "{}", outcome.stderr);
}

#[test]
fn a_rank_that_there_is_not_is_refused() {
    let outcome = run(&mut shell(2, &["--show", "0,2"], "true"));
    assert_eq!(outcome.code, Some(2));
    let expected = "rr-launch: --show: there is no rank 2; ranks go from 0 to 1\n";
    assert_eq!(outcome.stderr, expected);
}

#[test]
fn a_prefix_is_a_template() {
    let flags = ["--prefix", "{time} {host} {local_rank} {stream}> "];
    let outcome = run(&mut shell(1, &flags, "echo a; echo b >&2"));
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    for (text, stream, line) in [(outcome.stdout, "stdout", 'a'), (outcome.stderr, "stderr", 'b')] {
        let (time, rest) = text.split_once(' ').unwrap();
        assert!(time.starts_with("20") && time.ends_with('Z'), "{text}");
        assert_eq!(rest, format!("{} 0 {stream}> {line}\n", host.trim()));
    }
    let plain = run(&mut shell(1, &["--prefix", ""], "echo a"));
    assert_eq!(plain.stdout, "a\n");
}

#[test]
fn json_lines_hold_whatever_a_worker_writes() {
    let folder = tempfile::tempdir().unwrap();
    let script = r#"printf 'a "quote" \\ \t caf\351\n' ; echo err >&2; exit 5"#;
    let outcome = logged(1, folder.path(), &["--log-format", "json"], script);
    assert_eq!(outcome.code, Some(5));
    let parse = |text: &str| -> Vec<Value> {
        text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
    };
    let out = parse(&outcome.stdout);
    assert_eq!(out.len(), 1);
    assert_eq!(out[0]["line"], "a \"quote\" \\ \t caf\u{fffd}");
    assert_eq!((&out[0]["rank"], &out[0]["stream"]), (&0.into(), &"stdout".into()));
    assert!(out[0]["time"].as_str().unwrap().ends_with('Z'));
    let err = parse(&outcome.stderr);
    assert!(err.iter().any(|line| line["stream"] == "stderr" && line["line"] == "err"));
    let own: Vec<_> = err.iter().filter(|line| line["stream"] == "launcher").collect();
    assert!(own.iter().all(|line| line["rank"].is_null()), "{own:?}");
    assert!(own.iter().any(|line| line["line"].as_str().unwrap().contains("code 5")), "{own:?}");
    assert_eq!(parse(&read(folder.path(), "attempt-0/rank-0.log")).len(), 2);
    assert!(parse(&read(folder.path(), "launch.log")).len() > 3);
}

#[test]
fn a_progress_bar_leaves_its_last_state_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let script = r"echo begin; i=0; while [ $i -lt 500 ]; do printf '\rstep %d' $i >&2; i=$((i+1)); done; printf '\r' >&2; exit 1";
    let outcome = logged(1, folder.path(), &[], script);
    assert_eq!(outcome.code, Some(1));
    let text = read(folder.path(), "attempt-0/rank-0.log");
    let mut lines: Vec<_> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["begin", "step 499"]);
    assert!(outcome.stderr.contains("| step 499\n"), "{}", outcome.stderr);
}

#[test]
fn a_full_disk_costs_lines_and_one_warning_but_not_the_job() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("attempt-0")).unwrap();
    for name in ["attempt-0/rank-0.log", "attempt-0/rank-1.log", "launch.log"] {
        std::os::unix::fs::symlink("/dev/full", folder.path().join(name)).unwrap();
    }
    let script = "i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done; sleep 0.2; echo end";
    let outcome = logged(2, folder.path(), &[], script);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.stdout.lines().count(), 6002, "the console has every line");
    assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
    assert!(outcome.stderr.contains("No space left on device"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("the job goes on"), "{}", outcome.stderr);
}

#[test]
fn a_limit_on_the_size_of_files_costs_lines_and_one_warning_but_not_the_job() {
    let folder = tempfile::tempdir().unwrap();
    // A program has its usual answer to it, which is to end by SIGXFSZ.
    let worker = format!(
        "yes | head -n 10000 > /dev/stderr; head -c 9999 /dev/zero > {}/file; kill -l $?",
        folder.path().display()
    );
    let launch = shell(1, &["--log-dir", folder.path().to_str().unwrap()], &worker);
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", "ulimit -f 8 && exec \"$@\"", "sh"]).arg(launch.get_program());
    let output = limited.args(launch.get_args()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said:.9999}");
    assert_eq!(said.matches("the job goes on, its log files lack lines").count(), 1);
    assert_eq!(output.stdout, b"[0] XFSZ\n");
}

#[test]
fn a_log_directory_that_cannot_be_is_refused_before_anything_starts() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let mut command = launcher();
    command.args(["--cpu", "--log-dir"]).arg(&file).args(["--", "touch"]);
    let outcome = run(command.arg(folder.path().join("started")));
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.starts_with("rr-launch: --log-dir: cannot"), "{}", outcome.stderr);
    assert!(!folder.path().join("started").exists());
}

#[test]
fn no_line_is_torn_or_lost_in_any_file() {
    let folder = tempfile::tempdir().unwrap();
    let program = r"
import os, sys
rank = os.environ['RANK']
for i in range(5000):
    stream = sys.stdout if i % 2 else sys.stderr
    stream.write(f'{rank} {i} ' + 'x' * (i % 300) + '\n')
";
    let dir = folder.path().to_str().unwrap();
    let mut command = launcher();
    command.args(["--cpu", "--nproc", "4", "--show", "failed", "--log-dir", dir, "--"]);
    let outcome = run(command.args(["python3", "-c", program]));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let expected = |rank: usize, prefix: &str| {
        let line = |i: usize| format!("{prefix}{rank} {i} {}", "x".repeat(i % 300));
        (0..5000).map(line).collect::<Vec<_>>()
    };
    let mut all = Vec::new();
    for rank in 0..4 {
        let text = read(folder.path(), &format!("attempt-0/rank-{rank}.log"));
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort_unstable();
        let mut wanted = expected(rank, "");
        wanted.sort_unstable();
        assert!(lines == wanted, "rank {rank}");
        all.extend(expected(rank, &format!("[{rank}] ")));
    }
    let text = read(folder.path(), "launch.log");
    let lines = text.lines().filter(|line| !line.starts_with("rr-launch: "));
    let mut lines: Vec<_> = lines.map(str::to_owned).collect();
    lines.sort_unstable();
    all.sort_unstable();
    assert!(lines == all, "launch.log");
}

#[test]
fn no_line_is_torn_where_there_is_no_more_room() {
    let folder = tempfile::tempdir().unwrap();
    let bin = env!("CARGO_BIN_EXE_rr-launch");
    // 32 KiB a file, and an error instead of a signal beyond.
    let script = format!(
        "trap '' XFSZ; ulimit -f 64; exec {bin} --cpu --nproc 2 --show failed --log-dir logs -- \
         sh -c 'i=0; while [ $i -lt 3000 ]; do echo line $i is whole; i=$((i + 1)); done'"
    );
    let outcome =
        run(std::process::Command::new("sh").args(["-c", &script]).current_dir(folder.path()));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("the job goes on"), "{}", outcome.stderr);
    for name in ["logs/launch.log", "logs/attempt-0/rank-0.log", "logs/attempt-0/rank-1.log"] {
        let text = read(folder.path(), name);
        let whole = |line: &str| {
            ["is whole", "no room", "workers"].iter().any(|end| line.ends_with(end))
                || line.contains("; the job goes on")
        };
        assert!(text.ends_with('\n'), "{name} ends with {:?}", text.lines().last());
        let torn = text.lines().find(|line| !whole(line));
        assert_eq!(torn, None, "{name}");
    }
}
