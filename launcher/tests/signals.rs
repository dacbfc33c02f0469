//! Signals to the launcher, SIGKILL included.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Launch, assert_all_end, launcher, pids, shell};

/// Workers that write their process id, then do `then`, with a process beside each.
fn script(folder: &Path, then: &str) -> String {
    let folder = folder.display();
    format!("sleep 300 & echo $! > {folder}/$RANK.side\n{then}\necho $$ > {folder}/$RANK\nwait")
}

#[test]
fn signals_are_handed_on_and_give_128_plus_their_number() {
    for (signal, code) in [("TERM", 143), ("INT", 130), ("HUP", 129)] {
        let folder = tempfile::tempdir().unwrap();
        let trap = format!("trap 'echo got {signal}; exit 0' {signal}");
        let launch = Launch::start(&mut shell(2, &[], &script(folder.path(), &trap)));
        let everybody = pids(folder.path(), 4);
        launch.signal(signal);
        let outcome = launch.wait();
        assert_eq!(outcome.code, Some(code), "{}", outcome.stderr);
        for rank in 0..2 {
            let line = format!("[{rank}] got {signal}\n");
            assert!(outcome.stdout.contains(&line), "{signal}: {}", outcome.stdout);
        }
        assert!(outcome.stderr.contains(&format!("ended by SIG{signal}")), "{}", outcome.stderr);
        assert_all_end(&everybody);
    }
}

#[test]
fn a_signal_while_a_failed_attempt_ends_is_not_forgotten() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let two = ["--nnodes", "2", "--rdzv", &free, "--node-rank"];
    for nodes in
        [vec![vec!["--nproc", "2"]], vec![[&two[..], &["0"]].concat(), [&two[..], &["1"]].concat()]]
    {
        let folder = tempfile::tempdir().unwrap();
        // The second TERM, which is the launcher's own, ends rank 1.
        let ending = folder.path().join("ending");
        let script = format!(
            "[ $RR_RESTART_COUNT = 0 ] || exit 0
            [ $RANK = 0 ] && {{ while [ ! -e {0}.ready ]; do sleep 0.01; done; exit 3; }}
            trap '[ -e {0} ] && exit 143; : > {0}' TERM; : > {0}.ready
            while :; do sleep 300 & wait; done",
            ending.display()
        );
        let start = |flags: &Vec<&str>| {
            let mut command = launcher();
            command.args(["--cpu", "--grace", "100", "--max-restarts", "3"]).args(flags);
            Launch::start(command.args(["--", "sh", "-c", &script]))
        };
        let launches: Vec<Launch> = nodes.iter().map(start).collect();
        assert!(common::eventually(common::DEADLINE, || ending.exists()));
        launches[launches.len() - 1].signal("TERM");
        for launch in launches {
            let outcome = launch.wait();
            assert_eq!(outcome.code, Some(143), "{}", outcome.stderr);
            assert!(outcome.stderr.contains("no restart: ended by SIGTERM"), "{}", outcome.stderr);
        }
    }
}

/// Whether a launcher reads its signals by itself.
fn takes_signals(launcher: i32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{launcher}/status")).unwrap_or_default();
    let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:\t"));
    let blocked = blocked.and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    blocked >> (15 - 1) & 1 == 1
}

/// A launcher of several nodes that meet on this host.
fn node(port: u16, nodes: &str, rank: &str, wrapper: &[&str]) -> Launch {
    let plain = launcher();
    let mut command = match wrapper {
        [] => launcher(),
        [program, words @ ..] => {
            let mut command = std::process::Command::new(program);
            command.args(words).arg(plain.get_program());
            command
        }
    };
    let rdzv = format!("127.0.0.1:{port}");
    command.args(["--cpu", "--nnodes", nodes, "--node-rank", rank, "--rdzv", &rdzv]);
    Launch::start(command.args(["--", "sleep", "300"]))
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn the_first_process_of_a_container_hears_signals_while_it_waits_for_other_nodes() {
    let wrapper = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let can = std::process::Command::new(wrapper[0]).args(&wrapper[1..]).arg("true").status();
    if !can.is_ok_and(|status| status.success()) {
        println!("skipped: no namespace of processes can be made here");
        return;
    }
    for (rank, signal, code) in [("0", "TERM", 143), ("1", "INT", 130), ("0", "USR1", 41)] {
        let launch = node(free_port(), "2", rank, &wrapper);
        let inner = || tree(launch.pid()).get(1).copied().filter(|&pid| takes_signals(pid));
        assert!(common::eventually(common::DEADLINE, || inner().is_some()));
        let inner = inner().unwrap();
        common::send(signal, inner);
        // It waits for the other one, to tell it; a second signal ends that.
        let ends = || {
            let _ = std::process::Command::new("kill").args(["-TERM", &inner.to_string()]).output();
            std::thread::sleep(Duration::from_millis(50));
            !common::is_alive(launch.pid())
        };
        assert!(common::eventually(Duration::from_secs(4), ends), "{rank} {signal}");
        let outcome = launch.wait();
        assert_eq!(outcome.code, Some(code), "{}", outcome.stderr);
        let says = format!("by SIG{signal} before any worker was started");
        assert!(outcome.stderr.contains(&says), "{}", outcome.stderr);
    }
}

#[test]
fn a_signal_to_one_node_before_all_are_there_ends_the_others_with_its_code() {
    for signalled in [0, 1] {
        let port = free_port();
        let launches = ["0", "1"].map(|rank| node(port, "3", rank, &[]));
        let takes = || launches.iter().all(|launch| takes_signals(launch.pid()));
        assert!(common::eventually(common::DEADLINE, takes));
        launches[signalled].signal("TERM");
        // Who comes later is told as well.
        let last = node(port, "3", "2", &[]);
        for launch in launches.into_iter().chain([last]) {
            let outcome = launch.wait();
            assert_eq!(outcome.code, Some(143), "{}", outcome.stderr);
        }
    }
}

#[test]
fn a_second_int_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let script = script(folder.path(), "trap 'echo saving' INT; trap '' TERM");
    let script = format!("{script}\nwhile :; do sleep 300; done");
    let launch = Launch::start(&mut shell(2, &["--grace", "1000"], &script));
    let everybody = pids(folder.path(), 4);
    launch.signal("INT");
    // Two signals of one kind that are pending together are one signal.
    launch.wait_for_lines(2);
    let begin = Instant::now();
    launch.signal("INT");
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(130), "{}", outcome.stderr);
    assert!(begin.elapsed() < Duration::from_secs(60));
    assert_all_end(&everybody);
}

#[test]
fn a_signal_waits_for_the_grace_and_then_kills() {
    let folder = tempfile::tempdir().unwrap();
    let script = script(folder.path(), "trap '' TERM");
    let launch = Launch::start(&mut shell(2, &["--grace", "0.5"], &script));
    let everybody = pids(folder.path(), 4);
    launch.signal("TERM");
    assert_eq!(launch.wait().code, Some(143));
    assert_all_end(&everybody);
}

#[test]
fn nobody_survives_a_killed_launcher() {
    for _ in 0..3 {
        let folder = tempfile::tempdir().unwrap();
        let script = script(folder.path(), "trap '' TERM INT HUP");
        let launch = Launch::start(&mut shell(3, &[], &script));
        let everybody = pids(folder.path(), 6);
        launch.signal("KILL");
        assert_all_end(&everybody);
        assert_eq!(launch.wait().signal, Some(9));
    }
}

#[test]
fn nobody_survives_a_launcher_killed_while_it_starts_workers() {
    let folder = tempfile::tempdir().unwrap();
    // A hundred instants over what the start of eight workers takes, and some more.
    for delay in (0..100).map(|step| Duration::from_micros(300 * step)) {
        // No process id can be written down in time; the length of a sleep marks the processes.
        let mark = format!("3{:09}.{:06}", std::process::id(), delay.as_micros());
        let worker = format!("trap '' TERM; (sleep {mark}; :) & sleep {mark}");
        let launch = Launch::start(shell(8, &[], &worker).env("TMPDIR", folder.path()));
        std::thread::sleep(delay);
        launch.signal("KILL");
        launch.wait();
        let gone = common::eventually(Duration::from_secs(2), || !any_command_line_has(&mark));
        assert!(gone, "somebody survives a kill after {delay:?}");
    }
    let left = || std::fs::read_dir(folder.path()).unwrap().count();
    assert!(common::eventually(Duration::from_secs(2), || left() == 0), "directories stay");
}

fn any_command_line_has(mark: &str) -> bool {
    std::fs::read_dir("/proc").unwrap().any(|entry| {
        let line = std::fs::read(entry.unwrap().path().join("cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(mark)
    })
}

#[test]
fn nobody_survives_the_launchers_whole_process_group_being_killed() {
    use std::os::unix::process::CommandExt as _;
    let folder = tempfile::tempdir().unwrap();
    let script = script(folder.path(), "");
    let launch = Launch::start(shell(2, &[], &script).process_group(0));
    let everybody = pids(folder.path(), 4);
    common::send("KILL", -launch.pid());
    assert_all_end(&everybody);
    assert_eq!(launch.wait().signal, Some(9));
}

#[test]
fn the_guardian_ends_with_the_launcher_and_before_it_nothing_is_missed() {
    let folder = tempfile::tempdir().unwrap();
    let launch = Launch::start(&mut shell(1, &[], &script(folder.path(), "")));
    let everybody = pids(folder.path(), 2);
    let guardian = guardian_of(launch.pid());
    // Nothing that a terminal or a batch system sends ends the guardian.
    for signal in ["TERM", "INT", "HUP"] {
        common::send(signal, guardian);
    }
    assert!(common::is_alive(guardian));
    launch.signal("TERM");
    assert_eq!(launch.wait().code, Some(143));
    assert_all_end(&everybody);
    assert!(!common::is_alive(guardian), "the launcher waits for its guardian");
}

/// The guardian of a launcher, which is a fork of it and so has its command line.
fn guardian_of(launcher: i32) -> i32 {
    find_guardian(launcher).unwrap()
}

fn find_guardian(launcher: i32) -> Option<i32> {
    let line = |pid: i32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let name = |pid: i32| std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let is_guardian = |&pid: &i32| name(pid) == "rr-guardian\n" && line(pid) == line(launcher);
    processes().filter(|&pid| common::is_alive(pid)).find(is_guardian)
}

fn processes() -> impl Iterator<Item = i32> {
    let number = |entry: std::fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    std::fs::read_dir("/proc").unwrap().filter_map(move |entry| number(entry.unwrap()))
}

/// A process and all that descend from it, as a scheduler without control groups lists them.
fn tree(root: i32) -> Vec<i32> {
    let parent = |pid: i32| -> Option<i32> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        status.lines().find_map(|line| line.strip_prefix("PPid:\t"))?.parse().ok()
    };
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        let children = processes().filter(|&pid| parent(pid) == Some(found[next]));
        let children: Vec<i32> = children.collect();
        found.extend(children);
        next += 1;
    }
    found
}

#[test]
fn nobody_survives_a_kill_of_all_processes_in_a_list_to_which_one_is_added_meanwhile() {
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("turns");
    let worker = format!("while :; do echo >> {}; sleep 300; done", mark.display());
    let launch = Launch::start(shell(1, &[], &worker).env("SLURM_JOB_ID", "7"));
    let turns = || std::fs::read_to_string(&mark).unwrap_or_default().len();
    let has_slept = |count| {
        let long = || tree(launch.pid()).len() >= 3 && turns() == count;
        assert!(common::eventually(Duration::from_secs(10), long), "turn {count}");
    };
    has_slept(1);
    let listed = tree(launch.pid());
    // The child of the worker is killed first, and another follows before the worker is killed too.
    common::send("KILL", listed[listed.len() - 1]);
    has_slept(2);
    let added: Vec<i32> =
        tree(launch.pid()).into_iter().filter(|pid| !listed.contains(pid)).collect();
    assert_eq!(added.len(), 1, "{added:?} were added to {listed:?}");
    let listed: Vec<String> = listed[..listed.len() - 1].iter().map(i32::to_string).collect();
    // At once; one that another's end has ended is not there to be killed.
    let _ = std::process::Command::new("kill").arg("-KILL").args(listed).status().unwrap();
    assert_all_end(&added);
    launch.wait();
}

/// Starts `rr-launch --cpu -- sh -c WORKER` through Python, which ignores a signal first: signals
/// that are ignored stay so over exec.
fn launch_ignoring(signal: &str, worker: &str) -> Launch {
    let own = env!("CARGO_BIN_EXE_rr-launch");
    let program = format!(
        "import os, signal, sys; signal.signal(signal.{signal}, signal.SIG_IGN); \
         os.execv({own:?}, [{own:?}, '--cpu', '--', 'sh', '-c', sys.argv[1]])"
    );
    Launch::start(std::process::Command::new("python3").args(["-c", &program, worker]))
}

#[test]
fn an_ignored_hangup_stays_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    let worker = format!("echo $$ > {path}/0; while [ ! -e {path}/go ]; do sleep 0.02; done");
    let launch = launch_ignoring("SIGHUP", &worker);
    pids(folder.path(), 1);
    launch.signal("HUP");
    std::fs::write(folder.path().join("go"), "").unwrap();
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
}

#[test]
fn term_ends_a_job_also_where_it_was_ignored() {
    let folder = tempfile::tempdir().unwrap();
    let worker = format!("echo $$ > {}/0; sleep 300", folder.path().display());
    let launch = launch_ignoring("SIGTERM", &worker);
    pids(folder.path(), 1);
    launch.signal("TERM");
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(143), "{}", outcome.stderr);
    assert!(!outcome.stderr.contains("killing"), "{}", outcome.stderr);
}

#[test]
fn exit_codes_are_not_lost_where_the_parent_ignores_sigchld() {
    for code in [0, 7] {
        let outcome = launch_ignoring("SIGCHLD", &format!("exit {code}")).wait();
        assert_eq!(outcome.code, Some(code), "{}", outcome.stderr);
    }
}

#[test]
fn what_left_its_group_does_not_survive_a_killed_launcher_either() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    let deaf =
        format!("trap '' TERM HUP; echo \\$\\$ > {path}/$RANK.$1; while :; do sleep 300; done");
    // One in a session of its own, and one that is a daemon besides.
    let script = format!(
        "set -- session; setsid sh -c \"{deaf}\" &
        set -- daemon; (setsid sh -c \"{deaf}\" & exit)
        echo $$ > {path}/$RANK; wait"
    );
    let launch = Launch::start(&mut shell(2, &[], &script));
    let everybody = pids(folder.path(), 6);
    launch.signal("KILL");
    assert_all_end(&everybody);
    assert_eq!(launch.wait().signal, Some(9));
}

#[test]
fn what_left_its_group_and_cleared_its_environment_does_not_survive_a_killed_launcher() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    // A daemon without a variable or a stream of the run; so is what it starts.
    let leaf = format!("sleep 300 & echo $! > {path}/leaf; echo $$ > {path}/daemon; wait");
    let script = format!(
        "(setsid env -i sh -c 'trap \"\" TERM HUP; {leaf}' < /dev/null > /dev/null 2>&1 & exit)
        echo $$ > {path}/$RANK; wait; sleep 300"
    );
    let launch = Launch::start(&mut shell(1, &[], &script));
    let everybody = pids(folder.path(), 3);
    launch.signal("KILL");
    assert_all_end(&everybody);
    assert_eq!(launch.wait().signal, Some(9));
}

#[test]
fn a_guardian_that_is_killed_is_replaced_and_nobody_survives_the_launcher() {
    let folder = tempfile::tempdir().unwrap();
    let script = script(folder.path(), "setsid sleep 300 & echo $! > $DIR/$RANK.session");
    let launch = Launch::start(shell(2, &[], &script).env("DIR", folder.path()));
    let everybody = pids(folder.path(), 6);
    let mut guardian = guardian_of(launch.pid());
    for _ in 0..2 {
        common::send("KILL", guardian);
        let is_another = || find_guardian(launch.pid()).is_some_and(|pid| pid != guardian);
        assert!(common::eventually(Duration::from_secs(2), is_another));
        guardian = guardian_of(launch.pid());
    }
    launch.signal("KILL");
    assert_all_end(&everybody);
    let outcome = launch.wait();
    let says = "the guardian was killed; another has taken its place";
    assert_eq!(outcome.stderr.matches(says).count(), 2, "{}", outcome.stderr);
    assert!(common::eventually(Duration::from_secs(2), || !common::is_alive(guardian)));
}

#[test]
fn a_launch_whose_guardian_was_killed_ends_as_any() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    let worker = format!("echo $$ > {path}/$RANK; while [ ! -e {path}/go ]; do sleep 0.02; done");
    let launch = Launch::start(&mut shell(2, &[], &worker));
    pids(folder.path(), 2);
    let first = guardian_of(launch.pid());
    common::send("KILL", first);
    let is_another = || find_guardian(launch.pid()).is_some_and(|pid| pid != first);
    assert!(common::eventually(Duration::from_secs(2), is_another));
    let second = guardian_of(launch.pid());
    std::fs::write(folder.path().join("go"), "").unwrap();
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(!common::is_alive(second), "the launcher waits for its guardian");
}

#[test]
fn a_hundred_daemons_do_not_survive_a_killed_launcher_either() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    let script = format!(
        "for i in $(seq 100); do
            (setsid env -i sh -c \"echo \\$\\$ > {path}/$i; exec sleep 300\" > /dev/null 2>&1 & exit)
        done
        echo $$ > {path}/self; wait; sleep 300"
    );
    let launch = Launch::start(&mut shell(1, &[], &script));
    let everybody = pids(folder.path(), 101);
    launch.signal("KILL");
    assert_all_end(&everybody);
    assert_eq!(launch.wait().signal, Some(9));
}
