//! What the tests of the binary share: running it with a deadline, and looking for survivors.

#![allow(dead_code, reason = "every test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

#[path = "../../../tests/common/program.rs"]
mod program;

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

#[allow(unused_imports, reason = "not every test file writes a program")]
pub use program::write_program;

/// Far beyond what anything here takes, even on a machine that is busy with other things.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// What variables begin with that schedulers, launchers and users set for programs such as these.
const FOREIGN: [&str; 11] = [
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "MASTER_",
    "RR_",
    "SLURM_",
    "OMPI_",
    "OMP_",
    "CUDA_",
    "TORCH",
    "PET_",
];

/// How a launch went.
pub struct Outcome {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A running launch whose output goes to files that have no name.
pub struct Launch {
    child: Child,
    stdout: fs::File,
    stderr: fs::File,
}

/// `rr-launch` with an environment in which nobody else has launched anything.
pub fn launcher() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rr-launch"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if FOREIGN.iter().any(|prefix| name.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
    command
}

/// `rr-launch --cpu --nproc N FLAGS -- sh -c SCRIPT`.
pub fn shell(workers: usize, flags: &[&str], script: &str) -> Command {
    let mut command = launcher();
    command.args(["--cpu", "--nproc", &workers.to_string()]).args(flags);
    command.args(["--", "sh", "-c", script]);
    command
}

/// A launcher that a shell starts with these signals ignored, `INT HUP`.
pub fn ignoring(signals: &str, launcher: &Command) -> Command {
    let mut command = Command::new("sh");
    let before = format!("[ -z '{signals}' ] || trap '' {signals}; exec \"$@\"");
    command.args(["-c", &before, "sh"]).arg(launcher.get_program()).args(launcher.get_args());
    for (name, value) in launcher.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

impl Launch {
    /// Starts a launcher.
    pub fn start(command: &mut Command) -> Self {
        let stdout = tempfile::tempfile().unwrap();
        let stderr = tempfile::tempfile().unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(stdout.try_clone().unwrap())
            .stderr(stderr.try_clone().unwrap())
            .spawn()
            .unwrap();
        Self { child, stdout, stderr }
    }

    /// The launcher's process id.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Sends the launcher a signal.
    pub fn signal(&self, name: &str) {
        send(name, self.pid());
    }

    /// Waits until the launcher has passed on so many lines: it watches its workers.
    pub fn wait_for_lines(&self, count: usize) {
        use std::os::unix::fs::FileExt as _;
        let mut text = vec![0; 1 << 16];
        let lines = |bytes: &[u8]| bytes.split(|&byte| byte == b'\n').count() - 1;
        let come = eventually(DEADLINE, || {
            // The file's own offset is the launcher's.
            let size = self.stdout.read_at(&mut text, 0).unwrap();
            lines(&text[..size]) >= count
        });
        assert!(come, "the launcher does not pass on {count} lines");
    }

    /// Waits until the launcher has said something on stderr.
    pub fn wait_for_word(&self, word: &str) {
        use std::os::unix::fs::FileExt as _;
        let mut text = vec![0; 1 << 16];
        let said = eventually(DEADLINE, || {
            // The file's own offset is the launcher's.
            let size = self.stderr.read_at(&mut text, 0).unwrap();
            String::from_utf8_lossy(&text[..size]).contains(word)
        });
        assert!(said, "the launcher does not say {word:?}");
    }

    /// Waits for the launcher's end.
    pub fn wait(mut self) -> Outcome {
        let limit = Instant::now() + DEADLINE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > limit {
                self.child.kill().unwrap();
                panic!("the launcher hangs; stderr so far: {}", text_of(&mut self.stderr));
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        Outcome {
            code: status.code(),
            signal: status.signal(),
            stdout: text_of(&mut self.stdout),
            stderr: text_of(&mut self.stderr),
        }
    }
}

/// Runs a launcher to its end.
pub fn run(command: &mut Command) -> Outcome {
    Launch::start(command).wait()
}

/// Waits for the end of launchers that have been started.
pub fn wait_all(launches: Vec<Launch>) -> Vec<Outcome> {
    launches.into_iter().map(Launch::wait).collect()
}

/// Asserts how the launchers of several nodes have ended.
pub fn assert_codes(outcomes: &[Outcome], code: i32) {
    for (node, outcome) in outcomes.iter().enumerate() {
        assert_eq!(outcome.code, Some(code), "node {node}: {}", outcome.stderr);
    }
}

impl Drop for Launch {
    /// A test that fails leaves no launcher behind, and a launcher no workers.
    fn drop(&mut self) {
        if self.child.kill().is_ok() {
            let _ = self.child.wait();
        }
    }
}

fn text_of(file: &mut fs::File) -> String {
    let mut bytes = Vec::new();
    // The offset is shared with the process that writes, which has ended or is about to.
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Sends a signal by name to a process, or with a negative number to a group.
pub fn send(name: &str, pid: i32) {
    let status =
        Command::new("sh").arg("-c").arg(format!("kill -s {name} -- {pid}")).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

/// Waits until something holds, and says whether it ever did.
pub fn eventually(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let limit = Instant::now() + limit;
    loop {
        if holds() {
            return true;
        }
        if Instant::now() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a process runs. A zombie, which only its new parent can remove, does not.
pub fn is_alive(pid: i32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    state != Some('Z')
}

/// The process ids that workers have written into a folder, one per file, once there are `count`.
pub fn pids(folder: &Path, count: usize) -> Vec<i32> {
    let mut found = Vec::new();
    let complete = eventually(DEADLINE, || {
        found = fs::read_dir(folder)
            .unwrap()
            .filter_map(|entry| fs::read_to_string(entry.unwrap().path()).ok())
            .filter(|text| text.ends_with('\n'))
            .filter_map(|text| text.trim().parse().ok())
            .collect();
        found.len() == count
    });
    assert!(complete, "only {found:?} of {count} processes have started");
    found
}

/// Asserts that every one of the processes ends within 2 seconds.
pub fn assert_all_end(pids: &[i32]) {
    let gone = eventually(Duration::from_secs(2), || !pids.iter().any(|&pid| is_alive(pid)));
    let survivors: Vec<_> = pids.iter().filter(|&&pid| is_alive(pid)).collect();
    assert!(gone || survivors.is_empty(), "survivors: {survivors:?}");
}
