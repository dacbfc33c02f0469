//! The check step: `reranker check --for-launch` runs once, before any worker, so that a bad
//! configuration is one error instead of one per rank.

use std::ffi::OsStr;
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use crate::args::{TrainFlags, is_python};
use crate::contract::{LaunchPlan, exit_code, vars};
use crate::devices::Placement;
use crate::error::LaunchError;
use crate::requests::Requests;
use crate::sys::{self, Epoll, Interest};

const RERANKER: &str = "reranker";

/// The `reranker` program: `RR_RERANKER`, else beside this executable, else in `PATH`.
pub fn find_reranker() -> Result<PathBuf, LaunchError> {
    if let Some(path) = std::env::var_os(vars::RR_RERANKER) {
        let path = PathBuf::from(path);
        if !is_executable(&path) {
            return Err(LaunchError::Usage(format!(
                "{} is `{}`, which is no executable file",
                vars::RR_RERANKER,
                path.display()
            )));
        }
        return Ok(path);
    }
    let beside = std::env::current_exe().ok().map(|own| own.with_file_name(RERANKER));
    beside
        .filter(|path| is_executable(path))
        .or_else(|| find_in_path(OsStr::new(RERANKER)))
        .ok_or_else(|| {
            LaunchError::Usage(format!(
                "cannot find the program `{RERANKER}` beside rr-launch or in PATH: build it with \
                 `cargo build`, or name it in {}",
                vars::RR_RERANKER
            ))
        })
}

/// Refuses a program that cannot be started, before anything is.
pub fn require_program(program: &OsStr) -> Result<(), LaunchError> {
    let found = if program.as_bytes().contains(&b'/') {
        is_executable(Path::new(program))
    } else {
        find_in_path(program).is_some()
    };
    if found {
        return Ok(());
    }
    let name = program.to_string_lossy();
    let hint = if is_python(program) && Path::new(program).is_file() {
        format!("; to run it by Python: -- python {name}")
    } else {
        String::new()
    };
    Err(LaunchError::Usage(format!("cannot start `{name}`: no such executable file{hint}")))
}

/// Runs the check with the job's flags and reads its plan. Its messages go to stderr as they are.
/// `asked` are the workers of this node; each of `nnodes` is taken to start as many. A signal to the
/// launcher ends it.
pub fn check(
    reranker: &Path,
    flags: &TrainFlags,
    asked: Option<&Placement>,
    cpu: bool,
    nnodes: usize,
    requests: &Requests,
) -> Result<LaunchPlan, LaunchError> {
    let mut command = Command::new(reranker);
    command.args(["check", "--for-launch"]).args(flags.as_args());
    if nnodes > 1 {
        command.args(["--nnodes", &nnodes.to_string()]);
    }
    match asked {
        Some(placement) => {
            command.args(["--nproc", &(nnodes * placement.workers()).to_string()]);
            command.args(["--device", placement.device()]);
        }
        None if cpu => {
            command.args(["--device", "cpu"]);
        }
        None => {}
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    sys::die_with_parent(&mut command);
    let mut check = command
        .spawn()
        .map_err(LaunchError::system(format!("run `{} check`", reranker.display())))?;
    let ended = attend(&mut check, requests);
    if ended.is_err() {
        // It changes nothing that would have to be put back. That it is gone already is as well.
        let _ = check.kill().and_then(|()| check.wait());
    }
    let (status, text) = ended?;
    if let Some(signal) = status.signal().filter(|&signal| requests.asks_to_make_room(signal)) {
        // Sent to all processes of the job.
        return Err(LaunchError::Signalled { signal, makes_room: true });
    }
    if !status.success() {
        return Err(LaunchError::Told(code_of(status)));
    }
    text.split(|&byte| byte == b'\n')
        .rev()
        .find_map(|line| serde_json::from_slice(line).ok())
        .ok_or_else(|| LaunchError::System {
            action: format!("read the plan of `{} check --for-launch`", reranker.display()),
            source: io::Error::new(
                io::ErrorKind::InvalidData,
                "expected one line of JSON on its stdout",
            ),
        })
}

/// Waits for the end of the check, and reads what it writes to its stdout.
///
/// # Errors
/// A signal to this process has come first.
fn attend(check: &mut Child, requests: &Requests) -> Result<(ExitStatus, Vec<u8>), LaunchError> {
    let trouble = || LaunchError::system("wait for the check");
    let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
    let mut stdout = check.stdout.take();
    loop {
        requests.heed()?;
        // Its end is told by SIGCHLD, which wakes the wait below.
        if stdout.is_none()
            && let Some(status) = check.try_wait().map_err(trouble())?
        {
            return Ok((status, text));
        }
        let mut epoll = Epoll::new().map_err(trouble())?;
        requests.watch(&epoll, 0).map_err(trouble())?;
        if let Some(pipe) = &stdout {
            epoll.add(pipe.as_fd(), Interest::Read, 1).map_err(trouble())?;
        }
        let ready = epoll.wait(None).map_err(trouble())?;
        if let Some(pipe) = stdout.as_mut().filter(|_| ready.contains(&1)) {
            match pipe.read(&mut buffer) {
                Ok(0) => stdout = None,
                Ok(count) => text.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(trouble()(error)),
            }
        }
    }
}

/// A shell's view of an exit status.
fn code_of(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => exit_code::of_signal(signal),
        (None, None) => exit_code::FAILURE,
    }
}

/// A program of this name in `PATH`.
pub fn find_in_path(name: &OsStr) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| is_executable(file))
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}
