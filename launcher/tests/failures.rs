//! How a job ends when a worker does not do what it should: who is blamed, which exit code, and
//! that nobody survives.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::time::{Duration, Instant};

use common::{Launch, assert_all_end, pids, run, send, shell};

#[test]
fn the_rank_that_dies_first_is_blamed_and_the_others_do_not_outlive_it() {
    let script = r"
        if [ $RANK = 1 ]; then echo about to fail; echo the reason >&2; exit 3; fi
        sleep 300
        exit 7";
    let outcome = run(&mut shell(3, &[], script));
    assert_eq!(outcome.code, Some(3));
    let report = outcome.stderr;
    assert!(report.contains("rank 1 exited with code 3; ending the other 2 workers"), "{report}");
    assert!(report.contains("exited with code 3 after "), "{report}");
    assert!(report.contains("rr-launch: | the reason"), "{report}");
    assert!(report.contains("rr-launch: | about to fail"), "{report}");
    assert!(report.contains("[1] the reason"), "{report}");
}

#[test]
fn victims_that_fail_in_the_same_moment_are_not_blamed() {
    // Rank 2 dies; both others notice at once, as peers in a collective do, and fail too. The
    // launcher is stopped meanwhile, so that it sees all three ends in one look.
    let folder = tempfile::tempdir().unwrap();
    let script = format!(
        r"echo $$ > {0}/$RANK.tmp; mv {0}/$RANK.tmp {0}/$RANK; echo up
        while [ ! -e {0}/go ]; do sleep 0.02; done
        [ $RANK = 2 ] && {{ kill -ABRT $$; }}
        while kill -0 $(cat {0}/2) && ! grep -q '^State:.Z' /proc/$(cat {0}/2)/status; do
            sleep 0.02
        done
        exit 1",
        folder.path().display()
    );
    let launch = Launch::start(&mut shell(3, &[], &script));
    let workers = pids(folder.path(), 3);
    launch.wait_for_lines(3);
    launch.signal("STOP");
    std::fs::write(folder.path().join("go"), "").unwrap();
    let all_dead =
        common::eventually(common::DEADLINE, || !workers.iter().any(|&pid| common::is_alive(pid)));
    assert!(all_dead);
    launch.signal("CONT");
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(134), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("rank 2 was killed by SIGABRT"), "{}", outcome.stderr);
}

#[test]
fn a_signal_gives_128_plus_its_number() {
    for (signal, code, name) in [("SEGV", 139, "SIGSEGV"), ("KILL", 137, "SIGKILL")] {
        let script = format!("[ $RANK = 0 ] && kill -{signal} $$; sleep 300");
        let outcome = run(&mut shell(2, &[], &script));
        assert_eq!(outcome.code, Some(code));
        let expected = format!("was killed by {name} (exit code {code})");
        assert!(outcome.stderr.contains(&expected), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("it wrote nothing"), "{}", outcome.stderr);
    }
}

#[test]
fn an_early_success_is_no_failure() {
    let script = "[ $RANK = 0 ] && exit 0; sleep 1; echo done";
    let outcome = run(&mut shell(2, &[], script));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
    assert_eq!(outcome.stdout, "[1] done\n");
}

#[test]
fn a_worker_that_ignores_term_is_killed_after_the_grace() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!(
        r"trap '' TERM; echo $$ > {0}/$RANK
        [ $RANK = 1 ] && {{ while [ ! -s {0}/0 ]; do sleep 0.02; done; exit 5; }}
        while :; do sleep 300; done",
        folder.path().display()
    );
    let begin = Instant::now();
    let launch = Launch::start(&mut shell(2, &["--grace", "1"], &script));
    let workers = pids(folder.path(), 2);
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(5), "{}", outcome.stderr);
    assert!(begin.elapsed() >= Duration::from_secs(1), "the grace was not given");
    assert!(outcome.stderr.contains("killing 1 worker that did not end"), "{}", outcome.stderr);
    assert_all_end(&workers);
}

#[test]
fn a_stopped_worker_is_ended_too() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("echo $$ > {}/$RANK; exec sleep 300", folder.path().display());
    let launch = Launch::start(&mut shell(2, &["--grace", "0.3"], &script));
    let workers = pids(folder.path(), 2);
    send("STOP", workers[0]);
    send("KILL", workers[1]);
    assert_eq!(launch.wait().code, Some(137));
    assert_all_end(&workers);
}

/// A worker with a child and a grandchild, all three of which ignore `TERM` if `deaf`, and write
/// their process ids.
fn family(folder: &std::path::Path, deaf: bool, then: &str) -> String {
    let folder = folder.display();
    let trap = if deaf { "trap '' TERM;" } else { "" };
    let leaf = format!("{trap} echo $$ > {folder}/$RANK.leaf; while :; do sleep 300; done");
    format!(
        "{trap} sh -c \"{}\" & echo $$ > {folder}/$RANK
        sh -c '(sleep 300; :) & echo $! > {folder}/$RANK.side; wait' &
        {then}",
        leaf.replace("$$", "\\$\\$")
    )
}

#[test]
fn grandchildren_end_with_a_failed_worker() {
    for deaf in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let script = family(folder.path(), deaf, "wait");
        let launch = Launch::start(&mut shell(2, &["--grace", "0.5"], &script));
        let everybody = pids(folder.path(), 6);
        let first: i32 =
            std::fs::read_to_string(folder.path().join("0")).unwrap().trim().parse().unwrap();
        send("KILL", first);
        assert_eq!(launch.wait().code, Some(137), "deaf: {deaf}");
        assert_all_end(&everybody);
    }
}

#[test]
fn what_a_successful_worker_leaves_behind_is_ended() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    let wait = format!("while [ $(ls {path} | wc -l) -lt 3 ]; do sleep 0.02; done; exit 0");
    let script = family(folder.path(), true, &wait);
    let launch = Launch::start(&mut shell(1, &[], &script));
    let everybody = pids(folder.path(), 3);
    assert_eq!(launch.wait().code, Some(0));
    assert_all_end(&everybody);
}

#[test]
fn a_process_that_escaped_its_group_is_ended_and_does_not_hold_the_launcher() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!(
        "setsid sh -c 'echo $$ > {0}/escaped; exec sleep 300' &
        while [ ! -s {0}/escaped ]; do sleep 0.02; done; printf 'last words'; exit 4",
        folder.path().display()
    );
    let begin = Instant::now();
    let outcome = run(&mut shell(1, &[], &script));
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(4), "[0] last words\n"));
    assert!(begin.elapsed() < Duration::from_secs(60));
    assert_all_end(&pids(folder.path(), 1));
}

#[test]
fn a_worker_may_close_its_output_and_go_on() {
    let outcome = run(&mut shell(2, &[], "exec >&- 2>&-; sleep 0.5; exit 6"));
    assert_eq!(outcome.code, Some(6));
    assert!(outcome.stderr.contains("it wrote nothing"), "{}", outcome.stderr);
}

#[test]
fn what_a_script_started_before_it_became_the_launcher_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (folder, bin) = (folder.path().display(), env!("CARGO_BIN_EXE_rr-launch"));
    // A monitor beside the job, as entry points of containers start one; and two attempts.
    let script = format!(
        "sleep 300 > /dev/null 2>&1 & echo $! > {folder}/monitor
         exec {bin} --cpu --max-restarts 1 -- sh -c '[ $RR_RESTART_COUNT = 1 ]'"
    );
    let outcome = run(std::process::Command::new("sh").args(["-c", &script]));
    let monitor = std::fs::read_to_string(format!("{folder}/monitor")).unwrap();
    let monitor = monitor.trim().parse().unwrap();
    let lives = common::is_alive(monitor);
    send("KILL", monitor);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(lives, "the monitor was ended with the workers");
}

/// Records an exception as PyTorch's `@record` does.
const RECORD: &str = r#"record() { printf '{"message": {"message": "%s", "extraInfo":
    {"py_callstack": "Traceback: %s", "timestamp": "1"}}}' "$1" "$1" > $TORCHELASTIC_ERROR_FILE; }"#;

#[test]
fn an_exception_that_was_recorded_before_its_victims_ended_is_told_and_handed_on() {
    let folder = tempfile::tempdir().unwrap();
    let (logs, outer) = (folder.path().join("logs"), folder.path().join("outer.json"));
    // Rank 1 fails first, but is held up by its exit handlers; rank 0 fails over that and ends first.
    let script = format!(
        "{RECORD}
        case $RANK in
            1) record 'ValueError: no such column'; : > {dir}/failed; sleep 300;;
            0) while [ ! -e {dir}/failed ]; do sleep 0.01; done; sleep 0.3
               record 'RuntimeError: peer gone'; exit 7;;
        esac",
        dir = folder.path().display()
    );
    let flags = ["--log-dir", logs.to_str().unwrap()];
    let outcome = run(shell(2, &flags, &script).env("TORCHELASTIC_ERROR_FILE", &outer));
    assert_eq!(outcome.code, Some(7), "{}", outcome.stderr);
    let said = |text: &str| outcome.stderr.lines().any(|line| line.contains(text));
    assert!(said("rank 0 recorded, 0."), "{}", outcome.stderr);
    assert!(said("start: RuntimeError: peer gone"), "{}", outcome.stderr);
    assert!(said("start, rank 1 recorded an exception: ValueError: no such column"));
    let read = |path: &std::path::Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    };
    let ranks = &read(&logs.join("launch.json"))["attempts"][0]["ranks"];
    assert_eq!(ranks[1]["error"]["message"], "ValueError: no such column");
    assert_eq!(ranks[1]["error"]["traceback"], "Traceback: ValueError: no such column");
    assert!(ranks[0]["error"]["after_s"].as_f64() > ranks[1]["error"]["after_s"].as_f64());
    let handed_on = &read(&outer)["message"];
    assert_eq!(handed_on["message"], "RuntimeError: peer gone");
    assert_eq!(handed_on["errorCode"], 7);
}

#[test]
fn a_record_may_take_the_place_of_another_and_nothing_of_it_stays() {
    // As PyTorch hands on the exception of a child: what is there is removed first.
    let script = format!(
        "{RECORD}; record early; rm $TORCHELASTIC_ERROR_FILE || exit 9; record last; exit 3"
    );
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(shell(2, &[], &script).env("TMPDIR", folder.path()));
    assert_eq!(outcome.code, Some(3), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("start: last"), "{}", outcome.stderr);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    // Nor after a KILL of the launcher.
    let script = format!("{RECORD}; record it; sleep 300");
    let launch = Launch::start(shell(1, &[], &script).env("TMPDIR", folder.path()));
    let files =
        || std::fs::read_dir(folder.path()).unwrap().flat_map(|dir| dir.unwrap().path().read_dir());
    let is_there = || files().flatten().count() == 1;
    assert!(common::eventually(common::DEADLINE, is_there));
    launch.signal("KILL");
    let is_gone = || std::fs::read_dir(folder.path()).unwrap().count() == 0;
    assert!(common::eventually(common::DEADLINE, is_gone));
    // Where there can be no directory, a file in memory has it.
    let outcome =
        run(shell(1, &[], &format!("{RECORD}; record it; exit 3")).env("TMPDIR", "/proc"));
    assert!(outcome.stderr.contains("start: it"), "{}", outcome.stderr);
}

#[test]
fn a_file_for_exceptions_that_cannot_be_made_anew_keeps_nobody_from_a_restart() {
    let script = format!(
        "{RECORD}; [ $RR_RESTART_COUNT = 0 ] && {{ mkdir $TORCHELASTIC_ERROR_FILE; exit 3; }}
        record 'ValueError: the second'; exit 2"
    );
    let outcome = run(&mut shell(1, &["--max-restarts", "1"], &script));
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("start: ValueError: the second"), "{}", outcome.stderr);
}

#[test]
fn a_record_of_an_attempt_before_is_not_taken_for_the_last_ones() {
    let script =
        format!("{RECORD}; [ $RR_RESTART_COUNT = 0 ] && record 'ValueError: the first'; exit 3");
    let outcome = run(&mut shell(1, &["--max-restarts", "1"], &script));
    assert_eq!(outcome.code, Some(42), "{}", outcome.stderr);
    assert_eq!(outcome.stderr.matches("ValueError: the first").count(), 1, "{}", outcome.stderr);
}
