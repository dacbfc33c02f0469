//! The fault matrix: what can go wrong with a worker, on the first and on the last rank, under one
//! launcher and under two that share the workers as two nodes do. For each: the exit code, the rank that is named, the time to the end, and that nobody survives.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use common::{Launch, assert_all_end, launcher};

const WORKERS: usize = 3;

/// The workers of each launcher.
const NODES: [&[usize]; 2] = [&[WORKERS], &[2, 1]];

/// Beyond what a fault takes by itself to be noticed: the promised 2 seconds, and as much again for
/// a machine that is busy with other things.
const END: Duration = Duration::from_secs(4);

/// What every worker can do: write its process id down, and tell the launcher where it is.
const PRELUDE: &str = r#"
beat() { printf '%-127s\n' "rr-heartbeat $*" 1<>"$RR_HEARTBEAT"; }
enlist() { echo $1 > $DIR/$2.tmp; mv $DIR/$2.tmp $DIR/$2.pid; }
fault() { : > $DIR/fault; }
gone() { ! kill -0 $1 2>/dev/null || grep -q '^State:.Z' /proc/$1/status 2>/dev/null; }
enlist $$ $RANK
while [ $(ls $DIR | grep -c '^[0-9]*.pid$') -lt $WORLD_SIZE ]; do sleep 0.01; done
if [ $RANK != $BAD ]; then
    beat 7 waits all_reduce of layer 3
    "#;

/// A row of the matrix.
struct Fault {
    /// What the bad rank does.
    bad: &'static str,
    /// What the others do, waiting in a collective.
    others: &'static str,
    flags: &'static [&'static str],
    code: i32,
    /// Whether the bad rank is the one that is named.
    names_bad: bool,
    /// How long the fault by itself takes to be noticed.
    takes: Duration,
    /// What is said besides.
    says: &'static str,
    /// Whether only a launcher that has all workers can say that.
    says_alone: bool,
}

const SIMPLE: Fault = Fault {
    bad: "",
    others: "sleep 300",
    flags: &[],
    code: 0,
    names_bad: true,
    takes: Duration::ZERO,
    says: "",
    says_alone: false,
};

/// Runs a row for the first and the last rank, on one node and on two.
fn check(name: &str, fault: &Fault) {
    for (nodes, bad) in NODES.into_iter().flat_map(|nodes| [(nodes, 0), (nodes, WORKERS - 1)]) {
        check_rank(name, fault, bad, nodes, None);
    }
}

/// Runs one cell of the matrix, in a control group if one is given.
fn check_rank(name: &str, fault: &Fault, bad: usize, nodes: &[usize], group: Option<&Path>) {
    let folder = tempfile::tempdir().unwrap();
    let script = format!("{PRELUDE}{}\nfi\n{}", fault.others, fault.bad);
    let rdzv = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let start = |(node, workers): (usize, &usize)| {
        let mut command = launcher();
        command.args(["--cpu", "--nproc", &workers.to_string(), "--grace", "0.5"]);
        command.args(["--nnodes", &nodes.len().to_string(), "--node-rank", &node.to_string()]);
        command.args(["--rdzv", &rdzv]).args(fault.flags).args(["--", "sh", "-c", &script]);
        command.env("DIR", folder.path()).env("BAD", bad.to_string());
        if let Some(group) = group {
            command = inside(group, &command);
        }
        Launch::start(&mut command)
    };
    let launches: Vec<Launch> = nodes.iter().enumerate().map(start).collect();
    let mut said = String::new();
    for outcome in launches.into_iter().map(Launch::wait) {
        assert_eq!(outcome.code, Some(fault.code), "{name}, rank {bad}: {}", outcome.stderr);
        said.push_str(&outcome.stderr);
    }
    let ended = SystemTime::now();
    let began = fs::metadata(folder.path().join("fault")).unwrap().modified().unwrap();
    let took = ended.duration_since(began).unwrap();
    assert!(took < fault.takes + END, "{name}, rank {bad}: the end took {took:?}");
    let pids = everybody(folder.path());
    assert!(pids.len() >= WORKERS, "{pids:?}");
    assert_all_end(&pids);
    let named: Vec<usize> = (0..WORKERS)
        .filter(|rank| {
            said.lines().any(|line| {
                line.contains(&format!(": rank {rank} (pid ")) && line.contains(" after ")
            })
        })
        .collect();
    assert_eq!(named.len(), 1, "{name}, rank {bad}: {said}");
    assert_eq!(named[0] == bad, fault.names_bad, "{name}, rank {bad}: {said}");
    let is_said = (fault.says_alone && nodes.len() > 1) || said.contains(fault.says);
    assert!(is_said, "{name}, rank {bad}: {said}");
    let (nodes, code, took) = (nodes.len(), fault.code, took.as_secs_f64());
    println!("{name}, rank {bad}, {nodes} node(s): code {code}, ended after {took:.2} s");
}

/// The process ids in a folder.
fn everybody(folder: &Path) -> Vec<i32> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let pids = files.filter(|path| path.extension().is_some_and(|extension| extension == "pid"));
    pids.map(|path| fs::read_to_string(path).unwrap().trim().parse().unwrap()).collect()
}

#[test]
fn exits_with_1() {
    check(
        "exits 1",
        &Fault { bad: "fault; exit 1", code: 1, says: "exited with code 1", ..SIMPLE },
    );
}

#[test]
fn exits_with_0_early() {
    // The others notice that a peer has left, as in a collective, and fail over it.
    let others = "while ! gone $(cat $DIR/$BAD.pid); do sleep 0.01; done; sleep 0.2; exit 9";
    let says = "before that, with code 0, ended rank ";
    let (bad, names_bad, says_alone) = ("fault; exit 0", false, true);
    let fault = Fault { bad, others, code: 9, names_bad, says, says_alone, ..SIMPLE };
    check("exits 0 early", &fault);
}

#[test]
fn segfaults() {
    let says = "was killed by SIGSEGV (exit code 139)";
    check("segfaults", &Fault { bad: "fault; kill -SEGV $$", code: 139, says, ..SIMPLE });
}

#[test]
fn is_stopped() {
    let fault = Fault {
        bad: "beat 7 waits all_reduce of layer 3; fault; kill -STOP $$; sleep 300",
        flags: &["--hang-timeout", "1", "--stack-timeout", "1"],
        code: 40,
        takes: Duration::from_secs(3),
        says: "; stopped by a signal",
        ..SIMPLE
    };
    check("is stopped", &fault);
}

#[test]
fn hangs_while_the_others_wait_in_a_collective() {
    let fault = Fault {
        bad: "beat 7 works reading data; fault; sleep 300",
        flags: &["--hang-timeout", "1", "--stack-timeout", "1"],
        code: 40,
        takes: Duration::from_secs(3),
        says: ": all_reduce of layer 3, step 7, for ",
        ..SIMPLE
    };
    check("hangs in a collective", &fault);
}

#[test]
fn floods_its_output() {
    let fault = Fault {
        bad: "yes 'a flood of output' | head -c 30000000; fault; exit 5",
        code: 5,
        says: "rr-launch: | a flood of output",
        ..SIMPLE
    };
    check("floods its output", &fault);
}

#[test]
fn closes_its_output() {
    let bad = "exec >&- 2>&-; sleep 0.2; fault; exit 6";
    check("closes its output", &Fault { bad, code: 6, says: "it wrote nothing", ..SIMPLE });
}

#[test]
fn forks_grandchildren() {
    // One in its group, one in a session of its own, one that is a daemon; all deaf.
    let bad = r#"
        leaf='trap "" TERM HUP; enlist() { echo $1 > $DIR/$2.tmp; mv $DIR/$2.tmp $DIR/$2.pid; }
            enlist $$ $NAME; while :; do sleep 300; done'
        NAME=group sh -c "$leaf" & NAME=session setsid sh -c "$leaf" &
        NAME=daemon LEAF="$leaf" sh -c 'setsid sh -c "$LEAF" & exit'
        for name in group session daemon; do
            while [ ! -e $DIR/$name.pid ]; do sleep 0.01; done
        done
        fault; exit 7"#;
    check("forks a grandchild", &Fault { bad, code: 7, ..SIMPLE });
}

#[test]
fn ignores_term() {
    let fault = Fault {
        bad: "trap '' TERM; : > $DIR/deaf; while :; do sleep 300; done",
        // The last of the others fails.
        others: "while [ ! -e $DIR/deaf ]; do sleep 0.01; done
            [ $RANK = 1 ] && { fault; exit 8; }; sleep 300",
        code: 8,
        names_bad: false,
        takes: Duration::from_millis(500),
        says: "killing 1 worker that did not end",
        ..SIMPLE
    };
    check("ignores TERM", &fault);
}

/// A control group with a limit on memory, removed in the end.
struct Group(PathBuf);

impl Drop for Group {
    fn drop(&mut self) {
        let limit = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.0).is_err() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A group of at most `bytes`, or why there can be none.
fn group(bytes: u64) -> Result<Group, String> {
    let own = fs::read_to_string("/proc/self/cgroup").map_err(|error| error.to_string())?;
    let path = |version1: bool| {
        let mut lines = own.lines().filter_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            Some((parts.next()?, parts.next()?.trim_start_matches('/')))
        });
        let found = |names: &str| {
            if version1 { names.split(',').any(|name| name == "memory") } else { names.is_empty() }
        };
        lines.find_map(|(names, path)| found(names).then_some(path))
    };
    let name = format!("rr-launch-test-{}", std::process::id());
    let kinds = [
        ("/sys/fs/cgroup/memory", path(true), "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", path(false), "memory.max"),
    ];
    let mut reasons = Vec::new();
    for (root, path, limit) in kinds {
        let Some(path) = path else { continue };
        let dir = Path::new(root).join(path).join(&name);
        let made = fs::create_dir(&dir).map(|()| Group(dir.clone()));
        match made.and_then(|group| fs::write(dir.join(limit), bytes.to_string()).map(|()| group)) {
            Ok(group) => {
                // Nor may it go on in swap, where there is such a limit.
                let _ = fs::write(dir.join("memory.swap.max"), "0");
                let _ = fs::write(dir.join("memory.memsw.limit_in_bytes"), bytes.to_string());
                return Ok(group);
            }
            Err(error) => reasons.push(format!("{}: {error}", dir.display())),
        }
    }
    Err(reasons.join("; "))
}

/// The same command inside a control group.
fn inside(group: &Path, command: &Command) -> Command {
    let mut shell = Command::new("sh");
    let procs = group.join("cgroup.procs");
    shell.args(["-c", "echo $$ > \"$0\"; exec \"$@\""]).arg(procs);
    shell.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
}

#[test]
fn is_ended_by_the_out_of_memory_killer() {
    let group = match group(100 << 20) {
        Ok(group) => group,
        Err(reason) => {
            println!("skipped: no control group with a limit on memory can be made: {reason}");
            return;
        }
    };
    let fault = Fault {
        // tail keeps its last line, which never ends.
        bad: "fault; exec tail /dev/zero",
        code: 137,
        takes: Duration::from_secs(10),
        says: "(exit code 137): the kernel's out-of-memory killer ended it after",
        ..SIMPLE
    };
    for bad in [0, WORKERS - 1] {
        for nodes in NODES {
            check_rank("is OOM-killed", &fault, bad, nodes, Some(&group.0));
        }
    }
}
