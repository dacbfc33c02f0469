//! Several hosts: network namespaces with addresses of their own, on one switch.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::{Launch, Outcome, assert_all_end, assert_codes, launcher, pids, send, wait_all};
use serde_json::Value;

/// What a failure on one node may take to end all of them.
const END: Duration = Duration::from_secs(5);

const WORKERS: usize = 2;
const NAMES: [&str; 3] = ["host-a", "host-b", "host-c"];

/// Three hosts and a switch. Removed in the end, with all that runs there.
struct Hosts {
    switch: String,
    names: Vec<String>,
}

fn ip(args: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(args).output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if output.status.success() { Ok(()) } else { Err(format!("ip {}: {said}", args.join(" "))) }
}

impl Hosts {
    /// `None`, and a word about it, where no namespaces can be made.
    fn new() -> Option<Self> {
        match Self::make() {
            Ok(hosts) => Some(hosts),
            Err(reason) => {
                println!("skipped: no network namespaces here: {reason}");
                None
            }
        }
    }

    fn make() -> Result<Self, String> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let id = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let hosts = Self {
            switch: format!("rr-switch-{id}"),
            names: NAMES.iter().map(|name| format!("rr-{name}-{id}")).collect(),
        };
        let switch = hosts.switch.as_str();
        ip(&["netns", "add", switch])?;
        ip(&["-n", switch, "link", "add", "bridge", "type", "bridge"])?;
        // Who can do this can do the rest.
        let ip = |args: &[&str]| ip(args).unwrap();
        ip(&["-n", switch, "link", "set", "bridge", "up"]);
        for (node, name) in hosts.names.iter().enumerate() {
            let port = format!("port{node}");
            ip(&["netns", "add", name]);
            let cable = ["link", "add", &port, "netns", switch, "type", "veth", "peer"];
            ip(&[&cable[..], &["name", "eth0", "netns", name]].concat());
            ip(&["-n", switch, "link", "set", &port, "master", "bridge", "up"]);
            let address = format!("{}/24", Self::address(node));
            ip(&["-n", name, "address", "add", &address, "dev", "eth0"]);
            ip(&["-n", name, "link", "set", "eth0", "up"]);
            ip(&["-n", name, "link", "set", "lo", "up"]);
        }
        Ok(hosts)
    }

    fn address(node: usize) -> String {
        format!("10.213.78.{}", node + 1)
    }

    /// A launcher on a host, as a process that can be killed by its own id.
    fn launcher(&self, node: usize, flags: &[&str], script: &[&str]) -> Command {
        let plain = launcher();
        let name = format!("echo {} > /proc/sys/kernel/hostname; exec \"$@\"", NAMES[node]);
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names[node], "unshare", "--uts"]);
        command.args(["sh", "-c", &name, "sh"]).arg(plain.get_program());
        for (name, _) in plain.get_envs() {
            command.env_remove(name);
        }
        let (rank, rdzv) = (node.to_string(), format!("{}:29400", Self::address(0)));
        command.args(["--cpu", "--nproc", &WORKERS.to_string(), "--nnodes", "3"]);
        command.args(["--node-rank", &rank, "--rdzv", &rdzv, "--grace", "1"]);
        command.args(flags).arg("--").args(script);
        command
    }

    fn start(&self, node: usize, flags: &[&str], script: &str) -> Launch {
        Launch::start(&mut self.launcher(node, flags, &["sh", "-c", script]))
    }

    fn start_all(&self, flags: &[&str], script: &str) -> Vec<Launch> {
        (0..3).map(|node| self.start(node, flags, script)).collect()
    }

    /// Pulls a host's cable: nothing is sent any more, no end of a connection either.
    fn cut(&self, node: usize) {
        ip(&["-n", &self.switch, "link", "set", &format!("port{node}"), "down"]).unwrap();
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.names.iter().chain([&self.switch]) {
            let _ = ip(&["netns", "delete", name]);
        }
    }
}

/// Workers that write their process id down, and do something else then.
fn enlist(folder: &Path, then: &str) -> String {
    let dir = folder.display();
    format!("echo $$ > {dir}/$RANK.new; mv {dir}/$RANK.new {dir}/$RANK; {then}")
}

#[test]
fn hosts_agree_on_ranks_and_meet_at_rank_0() {
    let Some(hosts) = Hosts::new() else { return };
    let program = r#"
import os, socket, time
env = lambda name: os.environ[name]
meet = (env("MASTER_ADDR"), int(env("MASTER_PORT")))
if env("RANK") == "0":
    server = socket.create_server(meet)
    for _ in range(int(env("WORLD_SIZE")) - 1):
        server.accept()[0].sendall(b"hello")
else:
    while True:
        try:
            assert socket.create_connection(meet).recv(5) == b"hello"
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE MASTER_ADDR RR_RUN_ID"
print(*map(env, names.split()))
"#;
    let start = |node| {
        let script = ["python3", "-c", program];
        Launch::start(&mut hosts.launcher(node, &["--run-id", "one run"], &script))
    };
    let outcomes = wait_all((0..3).map(start).collect());
    assert_codes(&outcomes, 0);
    for (node, outcome) in outcomes.iter().enumerate() {
        let mut lines: Vec<&str> = outcome.stdout.lines().collect();
        lines.sort_unstable();
        let line = |local| {
            let rank = node * WORKERS + local;
            format!("[{rank}] {rank} {local} 6 2 {node} 3 10.213.78.1 one run")
        };
        assert_eq!(lines, [line(0), line(1)]);
        assert_eq!(outcome.stderr, "");
    }
}

#[test]
fn rank_0_is_met_where_all_hosts_reach_it() {
    let Some(hosts) = Hosts::new() else { return };
    let start = |host: usize, nnodes: &str, node: &str, rdzv: &str, program: &[&str]| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &hosts.names[host]]).arg(launcher().get_program());
        command.args(["--cpu", "--nnodes", nnodes, "--node-rank", node, "--rdzv", rdzv]);
        Launch::start(command.args(["--prefix", "", "--"]).args(program))
    };
    // Node 1 is on node 0's host, and comes by an address that node 2 does not reach it at.
    let (near, far) = ("127.0.0.1:29400", "10.213.78.1:29400");
    let show = ["printenv", "MASTER_ADDR"];
    let places = [(0, "0", near), (0, "1", near), (1, "2", far)];
    let launches = places.map(|(host, node, rdzv)| start(host, "3", node, rdzv, &show));
    let outcomes = wait_all(launches.into());
    assert_codes(&outcomes, 0);
    assert!(outcomes.iter().all(|outcome| outcome.stdout == "10.213.78.1\n"));
    // An address that holds on a link only is of no use without the link's name.
    let program = r#"
import os, socket, time
meet = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if os.environ["RANK"] == "0":
    socket.create_server(("::", meet[1]), family=socket.AF_INET6).accept()
else:
    while True:
        try:
            socket.create_connection(meet)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
"#;
    let link = ["address", "add", "fe80::1/64", "dev", "eth0", "nodad"];
    ip(&[&["-n", &hosts.names[0]][..], &link].concat()).unwrap();
    let rdzv = "[fe80::1%eth0]:29400";
    let launches = [(0, "0"), (1, "1")]
        .map(|(host, node)| start(host, "2", node, rdzv, &["python3", "-c", program]));
    assert_codes(&wait_all(launches.into()), 0);
}

#[test]
fn a_failure_on_one_host_ends_all_and_is_named_on_all() {
    let Some(hosts) = Hosts::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().display();
    // Victims, as in a collective, fail soon after; the one beside it leaves in peace.
    let then = format!(
        "while [ $(ls {dir} | grep -c '^[0-9]$') -lt 6 ]; do sleep 0.02; done
        [ $RANK = 3 ] && {{ echo out of luck; exit 9; }}; [ $RANK = 2 ] && sleep 300
        while kill -0 $(cat {dir}/3) 2>/dev/null; do sleep 0.02; done; sleep 0.1; exit 1"
    );
    let launches = hosts.start_all(&[], &enlist(folder.path(), &then));
    let workers = pids(folder.path(), 6);
    let begin = Instant::now();
    let outcomes = wait_all(launches);
    println!("a failure ended all after {:.2} s", begin.elapsed().as_secs_f64());
    assert!(begin.elapsed() < END);
    assert_codes(&outcomes, 9);
    assert_all_end(&workers);
    for Outcome { stderr, .. } in &outcomes {
        assert!(stderr.contains("rr-launch: node 1 (host-b): rank 3 (pid "), "{stderr}");
        assert!(stderr.contains("exited with code 9 after "), "{stderr}");
        assert!(stderr.contains("rr-launch: | out of luck\n"), "{stderr}");
    }
}

#[test]
fn a_cable_that_is_cut_ends_all() {
    let Some(hosts) = Hosts::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let launches = hosts.start_all(&["--max-restarts", "3"], &enlist(folder.path(), "sleep 300"));
    let workers = pids(folder.path(), 6);
    std::thread::sleep(Duration::from_millis(1500));
    hosts.cut(1);
    let begin = Instant::now();
    let outcomes = wait_all(launches);
    println!("a cut cable ended all after {:.2} s", begin.elapsed().as_secs_f64());
    assert!(begin.elapsed() < END);
    assert_codes(&outcomes, 44);
    assert_all_end(&workers);
    for (node, lost) in [(0, "node 1 (host-b)"), (1, "node 0 (host-a)"), (2, "node 1 (host-b)")] {
        let stderr = &outcomes[node].stderr;
        assert!(stderr.contains(&format!("rr-launch: {lost} is lost\n")), "{node}: {stderr}");
    }
}

#[test]
fn a_launcher_that_is_killed_ends_all() {
    for killed in [0, 2] {
        let Some(hosts) = Hosts::new() else { return };
        let folder = tempfile::tempdir().unwrap();
        let launches = hosts.start_all(&[], &enlist(folder.path(), "sleep 300"));
        let workers = pids(folder.path(), 6);
        send("KILL", launches[killed].pid());
        let begin = Instant::now();
        let outcomes = wait_all(launches);
        println!("a killed launcher ended all after {:.2} s", begin.elapsed().as_secs_f64());
        assert!(begin.elapsed() < END);
        assert_all_end(&workers);
        for (node, outcome) in outcomes.iter().enumerate().filter(|(node, _)| *node != killed) {
            assert_eq!(outcome.code, Some(44), "node {node}: {}", outcome.stderr);
            let lost = format!("rr-launch: node {killed} ({}) is lost\n", NAMES[killed]);
            assert!(outcome.stderr.contains(&lost), "node {node}: {}", outcome.stderr);
        }
    }
}

#[test]
fn a_host_that_never_comes_is_named() {
    let Some(hosts) = Hosts::new() else { return };
    let launches = [0, 1].map(|node| hosts.start(node, &["--rdzv-timeout", "1"], "echo started"));
    let outcomes = wait_all(launches.into());
    assert_codes(&outcomes, 44);
    for Outcome { stdout, stderr, .. } in &outcomes {
        assert_eq!((stdout.as_str(), stderr.lines().count()), ("", 1), "{stderr}");
        assert!(stderr.contains("node 2"), "{stderr}");
    }
    let alone = hosts.start(1, &["--rdzv-timeout", "1"], "echo started").wait();
    assert_eq!((alone.code, alone.stdout.as_str()), (Some(44), ""));
    assert!(alone.stderr.contains("10.213.78.1:29400"), "{}", alone.stderr);
}

#[test]
fn a_search_for_a_name_that_takes_long_keeps_nobody_from_ending() {
    let Some(hosts) = Hosts::new() else { return };
    let name = &hosts.names[1];
    // A server of names to which questions go out, and that never answers.
    let server = "10.213.78.9";
    let neighbour = ["neigh", "add", server, "lladdr", "02:00:00:00:00:09", "dev", "eth0"];
    ip(&[&["-n", name][..], &neighbour, &["nud", "permanent"]].concat()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let conf = folder.path().join("resolv.conf");
    std::fs::write(&conf, format!("nameserver {server}\n")).unwrap();
    let start = |patience: &str| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", name, "unshare", "--mount", "sh", "-c"]);
        command.arg("mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"").arg(&conf);
        command.arg(launcher().get_program()).args(["--cpu", "--nnodes", "2", "--node-rank", "1"]);
        command.args(["--rdzv", "node0.test:29400", "--rdzv-timeout", patience, "--", "true"]);
        Launch::start(&mut command)
    };
    let begin = Instant::now();
    let waited = start("0.5").wait();
    assert_eq!(waited.code, Some(44), "{}", waited.stderr);
    assert!(waited.stderr.contains("whose address is not found: node0.test"), "{}", waited.stderr);
    let told = start("60");
    let tasks = format!("/proc/{}/task", told.pid());
    let searches = || std::fs::read_dir(&tasks).is_ok_and(|tasks| tasks.count() == 2);
    assert!(common::eventually(END, searches), "no thread searches for the name");
    // The first is told to the others, if they are found; the second ends that.
    for _ in 0..2 {
        told.signal("TERM");
        told.wait_for_word("ended by SIGTERM before any worker was started");
    }
    assert_eq!(told.wait().code, Some(143));
    assert!(begin.elapsed() < END, "{:?}", begin.elapsed());
}

#[test]
fn hosts_may_come_late_and_in_any_order() {
    for late in [0, 1] {
        let Some(hosts) = Hosts::new() else { return };
        let early = (0..3).filter(|&node| node != late);
        let mut launches: Vec<Launch> =
            early.map(|node| hosts.start(node, &[], "echo $RANK")).collect();
        std::thread::sleep(Duration::from_millis(1500));
        launches.push(hosts.start(late, &[], "echo $RANK"));
        let outcomes = wait_all(launches);
        assert_codes(&outcomes, 0);
        assert!(outcomes[2].stdout.contains(&format!("[{0}] {0}\n", late * WORKERS)));
    }
}

#[test]
fn hosts_restart_together() {
    let Some(hosts) = Hosts::new() else { return };
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().display();
    // The second attempt fails on another host; the third is well.
    let script = format!(
        "echo $RR_RESTART_COUNT $MASTER_PORT $RR_RUN_ID
        [ $RR_RESTART_COUNT = 2 ] && exit 0
        : > {dir}/$RR_RESTART_COUNT-$RANK
        while [ $(ls {dir} | grep -c ^$RR_RESTART_COUNT-) -lt 6 ]; do sleep 0.02; done
        [ $RANK = $((5 - 5 * RR_RESTART_COUNT)) ] && exit 9; sleep 300"
    );
    let logs = folder.path().join("logs");
    let flags = ["--max-restarts", "2", "--log-dir", logs.to_str().unwrap()];
    let outcomes = wait_all(hosts.start_all(&flags, &script));
    assert_codes(&outcomes, 0);
    let said = |outcome: &Outcome| -> Vec<String> {
        let lines = outcome.stdout.lines().map(|line| line.split_once("] ").unwrap().1.to_owned());
        let mut lines: Vec<String> = lines.collect();
        lines.dedup();
        lines
    };
    assert_eq!(said(&outcomes[0]).len(), 3, "{}", outcomes[0].stdout);
    assert!(outcomes.iter().all(|outcome| said(outcome) == said(&outcomes[0])));
    for (node, Outcome { stderr, .. }) in outcomes.iter().enumerate() {
        assert!(stderr.contains("node 2 (host-c): rank 5 "), "{stderr}");
        assert!(stderr.contains("node 0 (host-a): rank 0 "), "{stderr}");
        let file = logs.join(format!("node-{node}/launch.json"));
        let summary: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let attempts = summary["attempts"].as_array().unwrap();
        let blamed: Vec<&Value> = attempts.iter().map(|attempt| &attempt["first_rank"]).collect();
        assert_eq!(blamed, [&Value::from(5), &Value::from(0), &Value::Null]);
    }
}

#[test]
fn a_signal_to_one_launcher_reaches_all_workers() {
    for (signal, trap, code, says) in [
        ("USR1", "trap 'exit 41' USR1", 41, "preempted by SIGUSR1; saved a checkpoint"),
        ("TERM", ":", 143, "ended by SIGTERM"),
    ] {
        let Some(hosts) = Hosts::new() else { return };
        let folder = tempfile::tempdir().unwrap();
        let then = format!("{trap}; echo; while :; do sleep 300 & wait; done");
        let launches = hosts.start_all(&["--max-restarts", "3"], &enlist(folder.path(), &then));
        let workers = pids(folder.path(), 6);
        for launch in &launches {
            launch.wait_for_lines(WORKERS);
        }
        launches[1].signal(signal);
        let begin = Instant::now();
        let outcomes = wait_all(launches);
        assert!(begin.elapsed() < END);
        assert_codes(&outcomes, code);
        assert_all_end(&workers);
        for Outcome { stderr, .. } in &outcomes {
            assert!(stderr.contains(&format!("node 1 (host-b): {says}")), "{signal}: {stderr}");
            assert!(code == 143 || !stderr.contains("ending 2 workers"), "{stderr}");
        }
    }
}

#[test]
fn a_hang_is_one_only_if_nobody_moves_on_any_host() {
    let Some(hosts) = Hosts::new() else { return };
    let beat = r#"beat() { printf '%-127s\n' "rr-heartbeat $*" 1<>"$RR_HEARTBEAT"; }; beat 1 waits barrier"#;
    let script = format!(
        "{beat}; [ $RANK = 4 ] || exec sleep 3.5
        for i in 1 2 3 4 5 6 7 8; do beat 1 works on $i; sleep 0.4; done"
    );
    // The others stand still for longer than that.
    let outcomes = wait_all(hosts.start_all(&["--hang-timeout", "2.5"], &script));
    assert_codes(&outcomes, 0);
    let script = format!("{beat}; [ $RANK = 3 ] && beat 1 works reading data; sleep 300");
    let outcomes = wait_all(hosts.start_all(&["--hang-timeout", "1"], &script));
    assert_codes(&outcomes, 40);
    for Outcome { stderr, .. } in &outcomes {
        assert!(stderr.contains("no progress for 1 s; the others wait for rank 3\n"), "{stderr}");
    }
    assert!(outcomes[1].stderr.contains("): reading data, step 1, for "), "{}", outcomes[1].stderr);
}

#[test]
fn a_host_without_ipv4_meets_at_the_loopback_that_it_has() {
    let Some(hosts) = Hosts::new() else { return };
    let name = &hosts.names[0];
    ip(&["-n", name, "address", "delete", "127.0.0.1/8", "dev", "lo"]).unwrap();
    let program = r#"
import os, socket, time
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if os.environ["RANK"] == "0":
    socket.create_server(address, family=socket.AF_INET6).accept()
else:
    while True:
        try:
            socket.create_connection(address)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
print(address[0])
"#;
    let mut command = Command::new("ip");
    command.args(["netns", "exec", name]).arg(launcher().get_program());
    let outcome =
        common::run(command.args(["--cpu", "--nproc", "2", "--", "python3", "-c", program]));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.stdout.matches("::1").count(), 2, "{}", outcome.stdout);
}
