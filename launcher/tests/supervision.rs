//! Restarts, requests to make room, hangs and the summary, with programs that are not ours.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{DEADLINE, Launch, assert_all_end, eventually, ignoring, launcher, pids, run, shell};
use serde_json::Value;

const BEAT: &str = r#"beat() { printf '%-127s\n' "rr-heartbeat $*" 1<>"$RR_HEARTBEAT"; }"#;

#[test]
fn every_restart_has_its_number_and_a_port_of_its_own() {
    let script = r#"echo "$RR_RESTART_COUNT $TORCHELASTIC_RESTART_COUNT \
        $TORCHELASTIC_MAX_RESTARTS $RR_RUN_ID $MASTER_PORT"
        [ $RR_RESTART_COUNT = 2 ] && exit 0; [ $RANK = 1 ] && exit 3; sleep 300"#;
    let outcome = run(&mut shell(2, &["--max-restarts", "5"], script));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let mut lines: Vec<Vec<&str>> =
        outcome.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    lines.retain(|words| words[0] == "[1]");
    assert_eq!(lines.len(), 3);
    for (number, words) in lines.iter().enumerate() {
        let number = number.to_string();
        assert_eq!(words[1..4], [number.as_str(), number.as_str(), "5"]);
        assert_eq!(words[4], lines[0][4], "one run");
    }
    assert!(lines[0][5] != lines[1][5] && lines[1][5] != lines[2][5], "{lines:?}");
    assert!(outcome.stderr.contains("restarting 2 workers (restart 2 of 5)"), "{}", outcome.stderr);
}

#[test]
fn a_named_port_that_is_taken_at_a_restart_is_rank_0s_to_complain_of() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().display();
    let port = TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
    let script = format!(
        "[ $RR_RESTART_COUNT = 1 ] && {{ echo port $MASTER_PORT; exit 0; }}
        echo $$ > {dir}/0; while [ ! -e {dir}/taken ]; do sleep 0.01; done; exit 3"
    );
    let logs = folder.path().join("logs");
    let port_flag = port.to_string();
    let flags = ["--max-restarts", "1", "--master-port", &port_flag];
    let flags = [&flags[..], &["--log-dir", logs.to_str().unwrap()]].concat();
    let launch = Launch::start(&mut shell(1, &flags, &script));
    assert!(eventually(DEADLINE, || folder.path().join("0").exists()));
    let _taken = TcpListener::bind(("0.0.0.0", port)).unwrap();
    fs::write(folder.path().join("taken"), "").unwrap();
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.stdout, format!("[0] port {port}\n"));
    let summary: Value =
        serde_json::from_slice(&fs::read(logs.join("launch.json")).unwrap()).unwrap();
    assert_eq!((&summary["exit_code"], &summary["outcome"]), (&0.into(), &"success".into()));
}

#[test]
fn restarts_end_when_they_are_used_up_or_would_help_nobody() {
    for (code, expected, restarts) in [(3, 42, 2), (2, 2, 0), (43, 43, 0), (255, 42, 2)] {
        let script = format!("[ $RANK = 0 ] && exit {code}; sleep 300");
        let outcome = run(&mut shell(2, &["--max-restarts", "2"], &script));
        assert_eq!(outcome.code, Some(expected), "{}", outcome.stderr);
        assert_eq!(outcome.stderr.matches("restarting").count(), restarts, "{}", outcome.stderr);
    }
    let script = format!("{BEAT}; beat 7 works hard; exit 3");
    let outcome = run(&mut shell(1, &["--max-restarts", "9"], &script));
    assert_eq!(outcome.code, Some(43), "{}", outcome.stderr);
    assert_eq!(outcome.stderr.matches("restarting").count(), 3, "{}", outcome.stderr);
    let script = format!("{BEAT}; beat $RR_RESTART_COUNT works hard; exit 3");
    let outcome = run(&mut shell(1, &["--max-restarts", "5"], &script));
    assert_eq!(outcome.code, Some(42), "each comes further: {}", outcome.stderr);
}

#[test]
fn nothing_of_an_attempt_is_left_when_the_next_one_starts() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!(
        r#"cd {}
        if [ $RR_RESTART_COUNT = 0 ]; then
            setsid sh -c 'trap "" TERM; echo $$ > stray; while :; do sleep 300; done' &
            while [ ! -s stray ]; do sleep 0.01; done; exit 3
        fi
        kill -0 $(cat stray) 2>/dev/null && exit 9; exit 0"#,
        folder.path().display()
    );
    let outcome = run(&mut shell(1, &["--max-restarts", "1"], &script));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
}

/// Workers that write their process id, then wait under `trap`.
fn waiting(folder: &Path, trap: &str) -> String {
    format!("{trap}; echo $$ > {}/$RANK; while :; do sleep 300 & wait; done", folder.display())
}

#[test]
fn a_request_to_make_room_is_handed_on_and_its_answer_is_the_exit_code() {
    for (signal, number, flags) in
        [("USR1", 10, &[][..]), ("USR2", 12, &[]), ("TERM", 15, &["--preempt-signal", "TERM"])]
    {
        for (answer, code) in [("exit 41", 41), ("exit 0", 0), ("exit 4", 4), ("", 128 + number)] {
            let folder = tempfile::tempdir().unwrap();
            let trap = match answer {
                "" => ":".to_owned(),
                answer => format!("trap '{answer}' {signal}"),
            };
            let launch = Launch::start(&mut shell(2, flags, &waiting(folder.path(), &trap)));
            let workers = pids(folder.path(), 2);
            launch.signal(signal);
            let outcome = launch.wait();
            assert_eq!(outcome.code, Some(code), "{signal}, {answer}: {}", outcome.stderr);
            assert_all_end(&workers);
            let says = format!("preempted by SIG{signal}; saved a checkpoint");
            assert_eq!(outcome.stderr.contains(&says), code == 41, "{}", outcome.stderr);
        }
    }
}

#[test]
fn a_failure_is_not_taken_for_a_request_where_term_is_one() {
    // A worker that saves on TERM would wait in vain for the rank that has failed; and Python's handler of
    // INT does not run while a program waits in a collective. It is ready once it is another program.
    let worker = |ready: &Path| {
        format!(
            "[ $RANK = 0 ] && {{ while [ ! -e {0} ]; do sleep 0.01; done; exit 7; }}
            trap '' TERM INT
            {{ until grep -q sleep /proc/$$/comm; do sleep 0.01; done; : > {0}; }} &
            exec sleep 300",
            ready.display()
        )
    };
    for ignored in ["", "INT HUP"] {
        let folder = tempfile::tempdir().unwrap();
        let flags = ["--grace", "100", "--preempt-signal", "TERM"];
        let launcher = shell(2, &flags, &worker(&folder.path().join("ready")));
        let begin = Instant::now();
        let outcome = run(&mut ignoring(ignored, &launcher));
        assert_eq!(outcome.code, Some(7), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("rank 1 was killed by SIGHUP"), "{}", outcome.stderr);
        assert!(begin.elapsed() < Duration::from_secs(50));
    }
}

#[test]
fn saving_is_not_interrupted_but_bounded() {
    let folder = tempfile::tempdir().unwrap();
    // Saving takes a second; a scheduler's TERM comes meanwhile.
    let trap = "trap 'echo saving; sleep 1; exit 41' USR1";
    let flags = ["--grace", "30", "--max-restarts", "3"];
    let launch = Launch::start(&mut shell(2, &flags, &waiting(folder.path(), trap)));
    pids(folder.path(), 2);
    launch.signal("USR1");
    launch.wait_for_lines(2);
    launch.signal("TERM");
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(41), "{}", outcome.stderr);

    for (second, most) in [(None, "0.5"), (Some("INT"), "1000")] {
        let folder = tempfile::tempdir().unwrap();
        let trap = "trap '' TERM INT; trap 'echo asked' USR1";
        let flags = ["--grace", most];
        let launch = Launch::start(&mut shell(2, &flags, &waiting(folder.path(), trap)));
        let workers = pids(folder.path(), 2);
        launch.signal("USR1");
        let begin = Instant::now();
        if let Some(signal) = second {
            // Of signals that are pending together the order is lost.
            launch.wait_for_lines(2);
            launch.signal(signal);
        }
        let outcome = launch.wait();
        assert_eq!(outcome.code, Some(138), "{}", outcome.stderr);
        assert!(begin.elapsed() < Duration::from_secs(60));
        assert!(outcome.stderr.contains("no worker saved"), "{}", outcome.stderr);
        assert_all_end(&workers);
    }
}

#[test]
fn a_checkpoint_is_not_called_saved_where_a_rank_was_killed_over_it() {
    let folder = tempfile::tempdir().unwrap();
    let trap = "[ $RANK = 0 ] && trap 'exit 41' USR1 || trap '' USR1 TERM";
    let script = waiting(folder.path(), trap);
    let launch = Launch::start(&mut shell(2, &["--grace", "0.5"], &script));
    pids(folder.path(), 2);
    launch.signal("USR1");
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(138), "{}", outcome.stderr);
    let says =
        "preempted by SIGUSR1; not all workers have saved\nrr-launch: rank 1 was killed by SIGKILL";
    assert!(outcome.stderr.contains(says), "{}", outcome.stderr);
}

#[test]
fn workers_that_hear_of_it_by_themselves_are_waited_for() {
    let outcome = run(&mut shell(2, &[], "[ $RANK = 0 ] && sleep 0.5; exit 41"));
    assert_eq!(outcome.code, Some(41), "{}", outcome.stderr);
}

#[test]
fn a_program_without_heartbeats_never_hangs() {
    let outcome = run(&mut shell(2, &["--hang-timeout", "0.2"], "sleep 1.5"));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
}

#[test]
fn a_python_program_tells_where_it_is_as_the_page_says() {
    let program = r#"
import os, time
step = 3
beat = open(os.environ["RR_HEARTBEAT"], "r+b", buffering=0)
os.pwrite(beat.fileno(), f"rr-heartbeat {step} works reading data".ljust(127).encode() + b"\n", 0)
time.sleep(300)
"#;
    let page = include_str!("../../docs/launcher.md");
    for line in program.lines().filter(|line| line.contains("beat")) {
        assert!(page.contains(line), "{line}");
    }
    let mut command = launcher();
    command.args(["--cpu", "--hang-timeout", "0.5", "--", "python3", "-c", program]);
    let outcome = run(&mut command);
    assert_eq!(outcome.code, Some(40), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("reading data, step 3, for "), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("; sleeping in sleep"), "{}", outcome.stderr);
}

#[test]
fn a_worker_that_moves_is_no_hang() {
    let script = format!(
        "{BEAT}; beat 1 waits barrier; [ $RANK = 1 ] && exec sleep 2.5
        for i in 1 2 3 4 5 6 7 8; do beat 1 works validating, batch $i; sleep 0.2; done"
    );
    let outcome = run(&mut shell(2, &["--hang-timeout", "2"], &script));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
}

#[test]
fn a_launcher_that_waits_for_deaf_workers_sleeps() {
    let script = format!("trap '' TERM; {BEAT}; beat 1 works hard; while :; do sleep 300; done");
    let flags = ["--hang-timeout", "0.3", "--grace", "3"];
    let launch = Launch::start(&mut shell(2, &flags, &script));
    // In the middle of the grace.
    std::thread::sleep(Duration::from_secs(2));
    let stat = fs::read_to_string(format!("/proc/{}/stat", launch.pid())).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks = fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap());
    let ticks: u64 = ticks.sum();
    // Of 100 in a second.
    assert!(ticks < 20, "{ticks} ticks of CPU time");
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(40), "{}", outcome.stderr);
}

#[test]
fn the_summary_of_an_earlier_launch_is_not_taken_for_this_ones() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("launch.json");
    fs::write(&path, "{\"exit_code\": 0}").unwrap();
    let script = format!(
        "until grep -q '\"exit_code\": null' {}; do sleep 0.02; done; exit 3",
        path.display()
    );
    let outcome = run(&mut shell(1, &["--log-dir", folder.path().to_str().unwrap()], &script));
    assert_eq!(outcome.code, Some(3), "{}", outcome.stderr);
    let summary: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(summary["exit_code"], 3);
}

#[test]
fn the_summary_tells_how_every_rank_ended() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("new/logs");
    let script = format!(
        "{BEAT}; beat 12 works computing; echo line of $RANK; [ $RANK = 1 ] && kill -ABRT $$; sleep 300"
    );
    let flags = ["--max-restarts", "1", "--log-dir", dir.to_str().unwrap()];
    let outcome = run(&mut shell(2, &flags, &script));
    assert_eq!(outcome.code, Some(42), "{}", outcome.stderr);
    let text = fs::read_to_string(dir.join("launch.json")).unwrap();
    let summary: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        (&summary["exit_code"], &summary["outcome"]),
        (&42.into(), &"out_of_restarts".into())
    );
    let attempts = summary["attempts"].as_array().unwrap();
    assert_eq!(attempts.len(), 2);
    for (number, attempt) in attempts.iter().enumerate() {
        assert_eq!((&attempt["restart"], &attempt["first_rank"]), (&number.into(), &1.into()));
        assert_eq!(attempt["cause"], "worker_failed");
        let ranks = attempt["ranks"].as_array().unwrap();
        let ends: Vec<_> = ranks.iter().map(|rank| (&rank["signal"], &rank["exit_code"])).collect();
        assert_eq!(ends, [(&"SIGTERM".into(), &143.into()), (&"SIGABRT".into(), &134.into())]);
        assert_eq!((&ranks[1]["step"], &ranks[1]["phase"]), (&12.into(), &"computing".into()));
        assert_eq!(ranks[1]["last_lines"][0], "line of 1");
        assert!(ranks[1]["elapsed_s"].as_f64().unwrap() > 0.0);
    }
    let unwritable = run(launcher().args(["--cpu", "--log-dir", "/proc/none", "--", "true"]));
    assert_eq!(unwritable.code, Some(2), "{}", unwritable.stderr);
}
