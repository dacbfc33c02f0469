//! Bad usage: one line on stderr, exit code 2, nothing started.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::net::TcpListener;

use common::{launcher, run, shell, write_program};

/// Runs a command line that must be refused, and returns the line that says why.
fn refused(flags: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(launcher().args(flags).current_dir(folder.path()));
    assert_eq!(outcome.code, Some(2), "{flags:?}: {}", outcome.stderr);
    assert_eq!(outcome.stdout, "", "{flags:?}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{flags:?}: {}", outcome.stderr);
    assert!(outcome.stderr.starts_with("rr-launch: "), "{flags:?}: {}", outcome.stderr);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "{flags:?} left a file");
    outcome.stderr
}

#[test]
fn every_misuse_is_one_line() {
    let program = ["--", "touch", "started"];
    for (flags, expected) in [
        (&[][..], "nothing to run"),
        (&["--cpu", "--nproc", "0"], "at least 1"),
        (&["--cpu", "--nproc", "two"], "at least 1"),
        (&["--cpu", "--nproc", "99999999999"], "at most 65536"),
        (&["--nproc", "2"], "--cpu"),
        (&["--cpu", "--gpus", "0"], "--gpus"),
        (&["--gpus", "0,0"], "GPU 0 is listed twice"),
        (&["--gpus", ""], "expected GPU indices"),
        (&["--gpus", "0,,1"], "expected GPU indices"),
        (&["--gpus", "9999"], "GPU"),
        (&["--gpus", "GPU-no-such-device"], "GPU"),
        (&["--cpu", "--grace", "soon"], "number of seconds"),
        (&["--cpu", "--grace", "-1"], "number of seconds"),
        (&["--cpu", "--master-port", "70000"], "--master-port"),
        (&["--cpu", "--max-restarts", "many"], "--max-restarts"),
        (&["--cpu", "--hang-timeout", "0"], "above 0"),
        (&["--cpu", "--hang-timeout", "-1"], "above 0"),
        (&["--cpu", "--preempt-signal", "KILL"], "can ask for it"),
        (&["--cpu", "--preempt-signal", "SEGV"], "can ask for it"),
        (&["--cpu", "--preempt-signal", "CONT"], "can ask for it"),
        (&["--cpu", "--preempt-signal", "SOON"], "can ask for it"),
        (&["--cpu", "--config", "x.yaml"], "exclude each other"),
        (&["--cpu", "--set", "lr=1"], "--config"),
        (&["--cpu", "--no-such-flag"], "--no-such-flag"),
    ] {
        let mut line = flags.to_vec();
        if !flags.is_empty() {
            line.extend(program);
        }
        let error = refused(&line);
        assert!(error.contains(expected), "{flags:?}: {error}");
    }
}

#[test]
fn a_program_without_the_dashes_is_told_where_it_goes() {
    let error = refused(&["--cpu", "--nproc", "2", "touch", "started"]);
    assert!(error.contains("behind `--`: rr-launch … -- touch …"), "{error}");
}

#[test]
fn a_python_file_is_told_what_runs_it() {
    let error = refused(&["--cpu", "--nproc", "2", "train.py", "--lr", "1"]);
    assert!(error.contains("rr-launch … -- python train.py …"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("train.py"), "print(1)").unwrap();
    let outcome = run(launcher().args(["--cpu", "--", "./train.py"]).current_dir(folder.path()));
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("; to run it by Python: -- python ./train.py"));
}

#[test]
fn a_flag_of_another_launcher_is_answered_with_ours() {
    for (flags, expected) in [
        (&["--nproc_per_node=4"][..], "`--cpu --nproc N`"),
        (&["--standalone", "--nproc-per-node", "4"], "leave it out"),
        (&["--num_processes", "4"], "`--gpus LIST`"),
        (&["--cpu", "--rdzv-endpoint", "a:1"], "`--rdzv HOST:PORT`"),
        (&["--cpu", "-m", "pkg.train"], "`-- python -m MODULE`"),
        (&["--cpu", "--tee", "3"], "`--log-dir DIR`"),
    ] {
        let error = refused(flags);
        assert!(error.contains("is another launcher's; here it is "), "{flags:?}: {error}");
        assert!(error.contains(expected), "{flags:?}: {error}");
    }
}

#[test]
fn a_program_that_does_not_exist_is_refused() {
    for program in ["no-such-program-anywhere", "./no/such/file", "/"] {
        let error = refused(&["--cpu", "--nproc", "2", "--", program]);
        assert!(error.contains(program), "{error}");
    }
}

#[test]
fn a_taken_port_is_refused() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let error = refused(&["--cpu", "--master-port", &port, "--", "touch", "started"]);
    assert!(error.contains(&port) && error.contains("taken"), "{error}");
    // Rank 0 is on node 0, where the launcher itself needs a port too.
    let rdzv = format!("node0:{port}");
    let node = |rank, at, asked| {
        let flags = ["--cpu", "--dry-run", "--nnodes", "2", "--node-rank", rank, "--rdzv", at];
        [&flags[..], &["--master-port", asked, "--", "touch", "started"]].concat()
    };
    assert!(refused(&node("0", "node0:1", &port)).contains("taken"));
    assert!(refused(&node("1", &rdzv, &port)).contains("for the other nodes (--rdzv)"));
    let outcome = run(launcher().args(node("1", "node0:1", &port)));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
}

#[test]
fn a_file_that_is_no_program_is_refused_however_it_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("broken");
    write_program(&script, "#!/no/such/interpreter\n");
    let outcome = run(launcher().args(["--cpu", "--nproc", "2", "--"]).arg(&script));
    assert_eq!(outcome.code, Some(2));
    assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.stderr);
}

#[test]
fn a_worker_may_exit_with_any_code_of_its_own() {
    for code in [1, 2, 77, 255] {
        let outcome = run(&mut shell(1, &[], &format!("exit {code}")));
        assert_eq!(outcome.code, Some(code));
    }
}

#[test]
fn a_program_that_nothing_can_run_is_named_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("train.sh");
    write_program(&script, "#!/no/such/interpreter\n");
    let outcome = run(launcher().args(["--cpu", "--"]).arg(&script));
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("named in its first line"), "{}", outcome.stderr);
}

#[test]
fn the_limit_that_a_large_launch_needs_is_named_and_enough() {
    let with_limit = |limit: &str| {
        let mut command = std::process::Command::new("sh");
        let line = format!("ulimit -n {limit}; exec \"$0\" --cpu --nproc 40 -- true");
        run(command.args(["-c", &line, env!("CARGO_BIN_EXE_rr-launch")]))
    };
    let outcome = with_limit("60");
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    let (_, rest) = outcome.stderr.split_once("raise the limit (`ulimit -n`) to ").unwrap();
    let outcome = with_limit(rest.split(' ').next().unwrap());
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
}
