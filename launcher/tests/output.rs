//! The workers' output: never torn, marked with the rank, bounded, and no danger to the job.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Command, Stdio};

use common::{Launch, assert_all_end, launcher, pids, run, shell};

fn python(workers: usize, program: &str) -> Command {
    let mut command = launcher();
    command.args(["--cpu", "--nproc", &workers.to_string(), "--", "python3", "-u", "-c", program]);
    command
}

#[test]
fn no_line_is_torn_when_all_workers_flood() {
    const LINES: usize = 20_000;
    // Small and odd writes that cut lines anywhere, on both streams, which are one file here.
    let program = format!(
        r#"
import os
rank = os.environ["RANK"]
for stream in (1, 2):
    text = "".join(f"{{stream}} {{rank}} {{i}} {{'x' * (i * 37 % 211)}}|\n" for i in range({LINES} // 2))
    data = text.encode()
    at, step = 0, 1
    while at < len(data):
        at += os.write(stream, data[at:at + step])
        step = step * 7 % 9973 + 1
"#
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut child = python(4, &program)
        .stdout(file.reopen().unwrap())
        .stderr(file.as_file().try_clone().unwrap())
        .spawn()
        .unwrap();
    assert!(child.wait().unwrap().success());
    let mut next = [[0_usize; 4]; 2];
    for line in BufReader::new(file.reopen().unwrap()).lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        let [mark, stream, rank, number, rest] = words[..] else { panic!("torn: {line}") };
        let (stream, rank): (usize, usize) = (stream.parse().unwrap(), rank.parse().unwrap());
        let number: usize = number.parse().unwrap();
        assert_eq!(mark, format!("[{rank}]"), "{line}");
        assert_eq!(rest, format!("{}|", "x".repeat(number * 37 % 211)), "{line}");
        assert_eq!(number, next[stream - 1][rank], "out of order: {line}");
        next[stream - 1][rank] += 1;
    }
    assert_eq!(next, [[LINES / 2; 4]; 2]);
}

#[test]
fn a_slow_reader_loses_nothing_and_stops_nobody() {
    let program = r#"
import sys
for i in range(20000):
    sys.stdout.write(f"{i} {'y' * 100}\n")
sys.stdout.flush()
"#;
    let mut child = python(2, program).stdout(Stdio::piped()).spawn().unwrap();
    let mut reader = BufReader::with_capacity(512, child.stdout.take().unwrap());
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut lines = 0;
    let mut line = String::new();
    while reader.read_line(&mut line).unwrap() > 0 {
        assert!(line.ends_with(&format!(" {}\n", "y".repeat(100))), "{line}");
        line.clear();
        lines += 1;
    }
    assert_eq!(lines, 40_000);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_restart_behind_a_slow_reader_loses_nothing() {
    // More than the launcher queues, but no more than its pipes hold: the first attempt ends while
    // nobody reads, and the second one runs when somebody does again.
    let script = "yes | head -n 100000; [ $RR_RESTART_COUNT = 1 ] || exit 1; sleep 2";
    let mut command = shell(1, &["--max-restarts", "1"], script);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let reader = child.stdout.take().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(1));
    let mut reader = BufReader::with_capacity(512, reader);
    let (mut line, mut lines) = (String::new(), 0);
    while reader.read_line(&mut line).unwrap() > 0 {
        assert_eq!(line, "[0] y\n");
        line.clear();
        lines += 1;
    }
    assert_eq!((lines, wait(child)), (200_000, Some(0)));
}

#[test]
fn streams_stay_apart_and_bytes_stay_as_they_are() {
    let script = r"printf 'caf\351 \377\n'; echo problem >&2; printf 'two\r\n'; printf unfinished";
    let mut child =
        shell(1, &[], script).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    child.stdout.take().unwrap().read_to_end(&mut out).unwrap();
    child.stderr.take().unwrap().read_to_end(&mut err).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(out, b"[0] caf\xe9 \xff\n[0] two\r\n[0] unfinished\n");
    assert_eq!(err, b"[0] problem\n");
}

#[test]
fn status_lines_are_dropped_where_there_is_no_terminal() {
    let outcome =
        run(&mut shell(2, &[], r"printf '10%%\r20%%\r' >&2; printf '30%%\r' >&2; echo x"));
    assert_eq!(outcome.stderr, "");
    assert_eq!(outcome.stdout.lines().count(), 2);
}

#[test]
fn on_a_terminal_only_rank_0_draws_its_status() {
    // script(1) would be one more thing to install; Python has a pseudo-terminal.
    let own = env!("CARGO_BIN_EXE_rr-launch");
    let worker = r#"[ "$RR_PROGRESS" = 1 ] && echo "$RANK may draw"; printf "$RANK at half\r"; sleep 0.5; echo "$RANK done""#;
    let program = format!(
        "import os, pty, sys
code = pty.spawn([{own:?}, '--cpu', '--nproc', '2', '--', 'sh', '-c', sys.argv[1]])
sys.exit(os.waitstatus_to_exitcode(code))"
    );
    let output = Command::new("python3").args(["-c", &program, worker]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("[0] 0 may draw"), "{text}");
    assert!(!text.contains("1 may draw"), "{text}");
    assert!(text.contains("0 at half"), "{text}");
    assert!(!text.contains("1 at half"), "{text}");
    for line in ["[0] 0 done\r\n", "[1] 1 done\r\n"] {
        assert!(text.contains(line), "{text:?}");
    }
    assert!(!text.trim_end_matches("\r\n").ends_with("half"), "the status is taken away: {text:?}");
}

#[test]
fn a_reader_that_goes_away_ends_the_job() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("echo $$ > {}/$RANK; while :; do echo y; done", folder.path().display());
    let mut child =
        shell(2, &[], &script).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let workers = pids(folder.path(), 2);
    let mut first = [0; 6];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(141));
    assert_all_end(&workers);
}

#[test]
fn a_stuck_reader_does_not_keep_a_signal_out() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("echo $$ > {}/$RANK; while :; do echo y; done", folder.path().display());
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = shell(2, &[], &script);
    command.stdout(writer).stderr(Stdio::null());
    let child = command.spawn().unwrap();
    drop(command);
    let workers = pids(folder.path(), 2);
    // Long enough for the pipe and the queue to fill up.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let launcher = child.id().cast_signed();
    common::send("TERM", launcher);
    let ended =
        common::eventually(common::DEADLINE, || !workers.iter().any(|&pid| common::is_alive(pid)));
    assert!(ended, "workers outlive a TERM because nobody reads");
    // What is queued is still there for the reader, and then the launcher ends.
    let text = std::io::read_to_string(reader).unwrap();
    assert!(text.lines().all(|line| line == "[0] y" || line == "[1] y"));
    assert_eq!(wait(child), Some(143));
}

#[test]
fn a_terminal_that_is_not_read_does_not_keep_a_signal_out() {
    let own = env!("CARGO_BIN_EXE_rr-launch");
    // Once the launcher writes no more, it is signalled: the second time over its last output.
    let program = format!(
        "import os, pty, subprocess, time
master, slave = pty.openpty()
launch = subprocess.Popen([{own:?}, '--cpu', '--', 'yes', 'x' * 100],
    stdin=slave, stdout=slave, stderr=slave)
written, before = 0, -1
while written < 4096 or written != before:
    time.sleep(0.1)
    before = written
    with open(f'/proc/{{launch.pid}}/io') as io:
        written = int(dict(line.split(': ') for line in io)['wchar'])
for _ in range(200):
    launch.terminate()
    time.sleep(0.05)
    if launch.poll() is not None: break
print(launch.poll())
launch.kill()"
    );
    let output = Command::new("python3").args(["-c", &program]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "143\n", "{output:?}");
}

#[test]
fn a_stuck_reader_at_the_end_costs_no_time_and_a_signal_then_does_not_change_the_outcome() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let logs = tempfile::tempdir().unwrap();
    let start = |nodes: &str, node: &str, stdout: Stdio| {
        let mut command = launcher();
        command.args([
            "--cpu",
            "--nnodes",
            nodes,
            "--node-rank",
            node,
            "--rdzv",
            &free.to_string(),
        ]);
        command.args(["--log-dir", logs.path().to_str().unwrap()]);
        // More than a pipe holds, and less than what would hold back the worker.
        command.args([
            "--",
            "sh",
            "-c",
            "[ $((RANK + 1)) = $WORLD_SIZE ] && yes | head -n 40000; :",
        ]);
        command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::null()).spawn().unwrap()
    };
    let (reader, writer) = std::io::pipe().unwrap();
    let child = start("2", "1", writer.into());
    assert_eq!(wait(start("2", "0", Stdio::null())), Some(0), "node 0 has hung up");
    let pid = child.id().cast_signed();
    let before = ticks(pid);
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(ticks(pid) - before < 4, "it turns round and round while nobody reads");
    common::send("TERM", pid);
    assert_eq!(wait(child), Some(0));
    drop(reader);
    // Alone.
    let (_reader, writer) = std::io::pipe().unwrap();
    let child = start("1", "0", writer.into());
    let is_told = || {
        let summary = std::fs::read_to_string(logs.path().join("launch.json")).unwrap_or_default();
        summary.contains("\"exit_code\": 0") && summary.contains("success")
    };
    assert!(common::eventually(common::DEADLINE, is_told));
    common::send("TERM", child.id().cast_signed());
    assert_eq!(wait(child), Some(0));
}

/// The CPU time of a process, of 100 in a second.
fn ticks(pid: i32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum()
}

fn wait(mut child: std::process::Child) -> Option<i32> {
    child.wait().unwrap().code()
}

#[test]
fn an_endless_line_does_not_fill_the_memory() {
    let program = "import sys\nfor _ in range(64): sys.stdout.write('z' * (1 << 20))";
    let launch = Launch::start(&mut python(1, program));
    let mut peak = 0_usize;
    let status = format!("/proc/{}/status", launch.pid());
    let watcher = std::thread::spawn(move || {
        while let Ok(text) = std::fs::read_to_string(&status) {
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let Some(kib) = line.and_then(|rest| rest.split_whitespace().next()) else { break };
            peak = kib.parse().unwrap();
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        peak
    });
    let outcome = launch.wait();
    assert_eq!(outcome.code, Some(0));
    let written: usize = outcome.stdout.lines().map(|line| line.len() - "[0] ".len()).sum();
    assert_eq!(written, 64 << 20);
    let peak = watcher.join().unwrap();
    assert!(peak < 32 * 1024, "{peak} KiB for a line of 64 MiB");
}
