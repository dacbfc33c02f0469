//! What a worker finds in its environment, and what `--dry-run` shows of it.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::collections::HashMap;

use common::{launcher, run, shell, write_program};

/// The environment of every worker of a launch, by rank.
fn environments(
    workers: usize,
    flags: &[&str],
    set: &[(&str, &str)],
) -> Vec<HashMap<String, String>> {
    let outcome = run(shell(workers, flags, "env").envs(set.iter().copied()));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let mut found = vec![HashMap::new(); workers];
    for line in outcome.stdout.lines() {
        let (mark, rest) = line.split_once("] ").unwrap();
        let rank: usize = mark[1..].parse().unwrap();
        if let Some((name, value)) = rest.split_once('=') {
            found[rank].insert(name.to_owned(), value.to_owned());
        }
    }
    found
}

#[test]
fn every_worker_is_told_who_it_is() {
    let found = environments(3, &[], &[]);
    for (rank, worker) in found.iter().enumerate() {
        let rank = rank.to_string();
        for (name, value) in [
            ("RANK", rank.as_str()),
            ("LOCAL_RANK", &rank),
            ("WORLD_SIZE", "3"),
            ("LOCAL_WORLD_SIZE", "3"),
            ("GROUP_RANK", "0"),
            ("GROUP_WORLD_SIZE", "1"),
            ("ROLE_NAME", "default"),
            ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            ("ROLE_RANK", &rank),
            ("ROLE_WORLD_SIZE", "3"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("CUDA_VISIBLE_DEVICES", ""),
            ("RR_RESTART_COUNT", "0"),
            ("TORCHELASTIC_RESTART_COUNT", "0"),
            ("TORCHELASTIC_MAX_RESTARTS", "0"),
            ("TORCHELASTIC_USE_AGENT_STORE", "False"),
        ] {
            assert_eq!(worker.get(name).map(String::as_str), Some(value), "{name} of rank {rank}");
        }
        let shared = ["MASTER_PORT", "RR_RUN_ID", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"];
        for name in shared {
            assert_eq!(worker[name], found[0][name], "{name} is the same for all");
        }
        assert_eq!(worker["RR_RUN_ID"], worker["TORCHELASTIC_RUN_ID"]);
        assert_ne!(worker["MASTER_PORT"].parse::<u16>().unwrap(), 0);
        assert!(worker["OMP_NUM_THREADS"].parse::<usize>().unwrap() >= 1);
        assert!(!worker.contains_key("RR_PROGRESS"), "stderr is no terminal");
    }
}

#[test]
fn workers_meet_where_they_are_told_to() {
    // A rendezvous as torch.distributed's: rank 0 listens, the others try until they reach it.
    let program = r#"
import os, socket, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
if rank == 0:
    server = socket.create_server(("", address[1]))
    print(sum(server.accept()[0].recv(1)[0] for _ in range(world - 1)))
else:
    while True:
        try:
            socket.create_connection(address).send(bytes([rank]))
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
"#;
    let mut command = launcher();
    command.args(["--cpu", "--nproc", "4", "--", "python3", "-c", program]);
    let outcome = run(&mut command);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(0), "[0] 6\n"), "{}", outcome.stderr);
}

#[test]
fn what_the_user_has_set_is_kept_and_what_an_outer_launcher_set_is_not() {
    let outer = [("OMP_NUM_THREADS", "7"), ("RANK", "9"), ("RR_PROGRESS", "1"), ("MINE", "x")];
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let port = free.to_string();
    let found = environments(2, &["--master-port", &port], &outer);
    assert_eq!(found[1]["OMP_NUM_THREADS"], "7");
    assert_eq!(found[1]["RANK"], "1");
    assert_eq!(found[1]["MINE"], "x");
    assert_eq!(found[1]["MASTER_PORT"], port);
    assert!(!found[0].contains_key("RR_PROGRESS"));
}

#[test]
fn what_python_has_printed_is_not_lost_with_a_rank_that_is_killed() {
    let program = "import os; print('step 1'); os.kill(os.getpid(), 9)";
    let start = |value: Option<&str>| {
        let mut command = launcher();
        command.env_remove("PYTHONUNBUFFERED").args(["--cpu", "--", "python3", "-c", program]);
        run(command.envs(value.map(|value| ("PYTHONUNBUFFERED", value))))
    };
    let outcome = start(None);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(137), "[0] step 1\n"));
    assert_eq!(start(Some("")).stdout, "", "the user's own word counts");
}

#[test]
fn a_single_worker_keeps_all_threads() {
    assert!(!environments(1, &[], &[])[0].contains_key("OMP_NUM_THREADS"));
}

#[test]
fn a_worker_has_an_empty_stdin_and_default_signals() {
    let script = "cat; kill -TERM $$; echo still here";
    let outcome = run(&mut shell(1, &[], script));
    assert_eq!(outcome.code, Some(143), "TERM is neither blocked nor ignored");
    assert!(!outcome.stdout.contains("still here"));
}

#[test]
fn a_worker_that_turns_to_the_terminal_fails_and_is_not_stopped_for_ever() {
    let own = env!("CARGO_BIN_EXE_rr-launch");
    let program = format!(
        "import os, pty, sys
code = pty.spawn([{own:?}, '--cpu', '--', 'sh', '-c', 'read answer < /dev/tty; echo $? $answer'])
sys.exit(os.waitstatus_to_exitcode(code))"
    );
    let mut command = std::process::Command::new("timeout");
    let output = command.args(["-s", "KILL", "60", "python3", "-c", &program]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("/dev/tty") && said.contains("[0] 2"), "{said}");
}

#[test]
fn a_dry_run_shows_everything_and_starts_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let witness = folder.path().join("started");
    let script = format!("touch {}", witness.display());
    // A variable that is empty counts as unset.
    let outcome = run(shell(2, &["--dry-run"], &script).env("RR_PREEMPT_SIGNAL", ""));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(!witness.exists());
    assert_eq!(outcome.stderr, "");
    for expected in
        ["2 workers on cpu", "rank 0", "rank 1", "RANK=1", "MASTER_PORT=", "sh -c 'touch "]
    {
        assert!(outcome.stdout.contains(expected), "{expected:?} is not in:\n{}", outcome.stdout);
    }
}

#[test]
fn help_and_version_go_to_stdout() {
    for flag in ["--help", "--version"] {
        let outcome = run(launcher().arg(flag));
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
        assert!(outcome.stdout.contains("rr-launch"));
    }
}

/// The CPUs that a worker may use, as the kernel lists them.
const ALLOWED: &str = "grep Cpus_allowed_list /proc/self/status";

#[test]
fn bound_workers_have_cores_of_their_own_and_unbound_ones_all() {
    let allowed = |workers: usize, binding: &str| {
        let outcome = run(&mut shell(workers, &["--bind", binding], ALLOWED));
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        let mut lines: Vec<String> = outcome
            .stdout
            .lines()
            .map(|line| line.split_whitespace().last().unwrap().to_owned())
            .collect();
        lines.sort();
        lines
    };
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find(|line| line.starts_with("Cpus_allowed_list")).unwrap();
    let own = own.split_whitespace().last().unwrap();
    assert_eq!(allowed(2, "none"), [own, own]);
    let plan = run(&mut shell(1, &["--bind", "cores", "--dry-run"], "true"));
    assert!(plan.stdout.contains("\n  cpus:        "), "{}", plan.stdout);
    let many = run(&mut shell(5000, &["--bind", "cores", "--dry-run"], "true"));
    assert_eq!((many.code, many.stderr.lines().count()), (Some(2), 1), "{}", many.stderr);
    assert!(many.stderr.contains("use --bind numa"), "{}", many.stderr);
    if run(&mut shell(2, &["--bind", "cores", "--dry-run"], "true")).code == Some(0) {
        let both = allowed(2, "cores");
        assert!(both[0] != both[1] && !both.contains(&own.to_owned()), "{both:?} of {own}");
    }
}

#[test]
fn a_script_without_a_first_line_gets_all_of_many_arguments() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("count");
    write_program(&script, "echo $# ${20000}");
    let mut command = launcher();
    command.args(["--cpu", "--nproc", "3", "--prefix", "", "--"]).arg(&script);
    let outcome = run(command.args((1..=20_000).map(|number| format!("argument-{number}"))));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert_eq!(outcome.stdout, "20000 argument-20000\n".repeat(3));
}
