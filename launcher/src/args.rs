//! The command line: raw flags, and what they ask for.

mod foreign;
mod nodes;
mod output;

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{ArgAction, Parser};

pub use crate::binding::Binding;
use crate::contract::{preemption, vars};
use crate::devices::MOST_WORKERS;
use crate::error::LaunchError;
use crate::manual::Manual;
use crate::supervise;
pub use nodes::NodeArgs;
pub use output::OutputArgs;

const USAGE: &str = "rr-launch [OPTIONS] --config FILE
       rr-launch [OPTIONS] -- PROGRAM [ARG]...";

/// Of the man page; `--help` has the first line.
const DESCRIPTION: &str = "Starts one worker per device, watches them, and leaves nothing behind.

With --config, workers run `reranker train` on a training file, which is checked before anything \
starts. With a program behind --, they run that under torchrun's environment (RANK, LOCAL_RANK, \
WORLD_SIZE, MASTER_ADDR, MASTER_PORT and so on).

When a worker fails, the others are ended, and the rank that ended first is named with its last lines. \
The exit code is 0 if all workers ended with 0; that of the worker that failed first; 128 + n if \
it, or the launcher, was ended by signal n; 1 if the launcher could not do its work; 2 if the command \
line, a file or a setting is wrong; 40 for a hang; 41 if the workers were asked to make room and saved; \
42 if --max-restarts is used up; 43 if starting again would end alike; 44 if another node was lost or \
never came. All nodes of a launch end with the same code.

TERM, INT and HUP are handed to all workers, which have --grace to end; a second INT ends them at once. \
USR1, USR2 and --preempt-signal ask them to save and end.";

const EXAMPLES: &str = "Examples:
  rr-launch --gpus 0,1 --config train.yaml
  rr-launch --gpus all --parallel zero2.yaml --config train.yaml --set lr=2e-5
  rr-launch --max-restarts 3 --hang-timeout 600 --config train.yaml
  rr-launch --gpus 0,1 -- python train.py
  srun rr-launch --nnodes auto --gpus all --config train.yaml
  rr-launch --cpu --nproc 4 --show failed --log-dir logs -- ./my-program";

/// The flags of `rr-launch`.
#[derive(Debug, Parser)]
#[command(
    name = "rr-launch",
    version,
    about = "Starts one worker per device, watches them, and leaves nothing behind",
    long_about = DESCRIPTION,
    override_usage = USAGE,
    disable_help_flag = true,
    max_term_width = 100,
    after_help = EXAMPLES
)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct Args {
    /// GPUs: indices, UUIDs or all [default: config's]
    ///
    /// By index, UUID (or its beginning), or MIG UUID. Without this flag and --cpu the configuration decides, else all visible GPUs.
    #[arg(long, value_name = "LIST", conflicts_with = "cpu")]
    pub gpus: Option<GpuRequest>,
    /// Run on the CPU
    #[arg(long)]
    pub cpu: bool,
    /// CPU workers [default: the config's, else 1]
    #[arg(long, value_name = "N", requires = "cpu", value_parser = worker_count)]
    pub nproc: Option<usize>,
    /// Training file: run `reranker train` on it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Parallel file, as accelerate's --config-file
    #[arg(
        long,
        value_name = "FILE",
        aliases = ["config-file", "config_file"],
        requires = "config"
    )]
    pub parallel: Option<PathBuf>,
    /// Override a key of the training file
    ///
    /// May be repeated.
    #[arg(long, value_name = "KEY=VALUE", requires = "config", value_parser = key_value)]
    pub set: Vec<String>,
    /// Replace a finished run in the output directory
    #[arg(long, requires = "config")]
    pub overwrite: bool,
    /// Drop and report bad records, do not stop
    #[arg(long, requires = "config")]
    pub skip_bad_records: bool,
    /// Go on: auto, never, or a checkpoint's path
    #[arg(long, value_name = "VALUE", requires = "config")]
    pub resume: Option<OsString>,
    /// Go on although the run differs
    #[arg(long, requires = "config")]
    pub resume_anyway: bool,
    /// A worker's wait for another [default: 600]
    #[arg(long, value_name = "SEC", value_parser = seconds, requires = "config")]
    pub timeout: Option<Duration>,
    /// Port of rank 0 [default: a free one]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub master_port: Option<u16>,
    /// From TERM to KILL [default: 10]
    #[arg(long, value_name = "SEC", default_value = "10", hide_default_value = true, value_parser = seconds, allow_negative_numbers = true)]
    pub grace: Duration,
    /// Restart all after a failure [default: 0]
    ///
    /// At most N times.
    #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
    pub max_restarts: u32,
    /// End, or restart, after no progress for so long
    #[arg(long, value_name = "SEC", value_parser = positive_seconds, allow_negative_numbers = true)]
    pub hang_timeout: Option<Duration>,
    /// Time for stacks after a hang [default: 10]
    ///
    /// By py-spy (of Python programs), eu-stack or gdb, whichever of them is in PATH, before the
    /// workers are ended: into DIR/attempt-A/rank-R.stacks.txt of --log-dir, else the main thread of
    /// the rank to blame onto stderr. 0: none.
    #[arg(long, value_name = "SEC", default_value = "10", hide_default_value = true, value_parser = seconds, allow_negative_numbers = true)]
    pub stack_timeout: Duration,
    /// Ask to save and end, as do USR1 and USR2
    #[arg(long, value_name = "SIG", value_parser = preempting_signal)]
    pub preempt_signal: Option<i32>,
    /// Several nodes
    #[command(flatten)]
    pub nodes: NodeArgs,
    /// What becomes of the workers' output
    #[command(flatten)]
    pub output: OutputArgs,
    /// Tie to CPUs: numa, cores, none [default: none]
    ///
    /// To a NUMA node, or to cores of their own.
    #[arg(
        long,
        value_enum,
        value_name = "HOW",
        default_value = "none",
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub bind: Binding,
    /// Print the plan, start nothing
    ///
    /// With each worker's environment.
    #[arg(long)]
    pub dry_run: bool,
    /// Print help
    // The long texts are for the manual: a screen has room for a line a flag.
    #[arg(short, long, action = ArgAction::HelpShort)]
    pub help: Option<bool>,
    /// Print the man page or a shell's completions
    #[arg(long, value_enum, value_name = "man|bash|zsh|fish", hide = true, exclusive = true)]
    pub generate: Option<Manual>,
    /// Any program, started under torchrun's environment
    #[arg(last = true, value_name = "PROGRAM", hide = true)]
    pub program: Vec<OsString>,
}

/// What a command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// Start a job.
    Launch(Box<Args>),
    /// Print this text (help, version, man page, completions) and end.
    Show(String),
}

/// The GPUs named by `--gpus`: never empty, never the same name twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GpuRequest {
    /// Every visible GPU.
    All,
    /// Indices or UUIDs, in the order of the local ranks.
    Listed(Vec<String>),
}

/// Where the workers should run, as far as the command line says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceRequest {
    /// On these GPUs, one worker each.
    Gpus(GpuRequest),
    /// On the CPU.
    Cpu {
        /// How many workers, if said.
        workers: Option<usize>,
    },
    /// Not said: the configuration decides, else all GPUs.
    Unsaid,
}

/// What the workers should run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// `reranker train` with these flags.
    Train(TrainFlags),
    /// Any program.
    Program(WorkerCommand),
}

/// A program and its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerCommand {
    /// A path, or a name to look up in `PATH`.
    pub program: OsString,
    /// Its arguments, without the program's own name.
    pub args: Vec<OsString>,
}

/// The flags that `rr-launch` hands on to `reranker check` and `reranker train`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainFlags(Vec<OsString>);

impl Args {
    /// Parses a command line, the program's name first.
    ///
    /// # Errors
    /// One line that says what is wrong with the command line.
    pub(crate) fn read(
        command_line: impl IntoIterator<Item = OsString>,
    ) -> Result<Invocation, LaunchError> {
        match Self::try_parse_from(command_line) {
            Ok(args) => {
                if let Some(manual) = args.generate {
                    return Ok(Invocation::Show(manual.text(Self::command())));
                }
                args.work()?;
                Ok(Invocation::Launch(Box::new(args)))
            }
            Err(error) => match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                    Ok(Invocation::Show(error.render().to_string()))
                }
                _ => Err(LaunchError::Usage(one_line(&error))),
            },
        }
    }

    /// The clap command, for man pages, shell completions and tests of the flags.
    #[must_use]
    pub fn command() -> clap::Command {
        <Self as clap::CommandFactory>::command()
    }

    /// Where the workers should run, as far as the flags say.
    #[must_use]
    pub fn devices(&self) -> DeviceRequest {
        match (&self.gpus, self.cpu) {
            (Some(request), _) => DeviceRequest::Gpus(request.clone()),
            (None, true) => DeviceRequest::Cpu { workers: self.nproc },
            (None, false) => DeviceRequest::Unsaid,
        }
    }

    /// What the workers should run.
    ///
    /// # Errors
    /// Both or neither of `--config` and a program were given.
    pub(crate) fn work(&self) -> Result<Work, LaunchError> {
        match (&self.config, self.program.split_first()) {
            (Some(config), None) => Ok(Work::Train(self.train_flags(config))),
            (None, Some((program, args))) => {
                Ok(Work::Program(WorkerCommand { program: program.clone(), args: args.to_vec() }))
            }
            (None, None) => Err(LaunchError::Usage(
                "nothing to run: pass --config FILE, or -- PROGRAM ARG...".to_owned(),
            )),
            (Some(_), Some(_)) => Err(LaunchError::Usage(
                "--config and -- PROGRAM exclude each other: pass one of them".to_owned(),
            )),
        }
    }

    /// How the workers are to be watched. `RR_PREEMPT_SIGNAL` counts as the flag.
    ///
    /// # Errors
    /// The variable names no signal.
    pub(crate) fn supervision(&self) -> Result<supervise::Options, LaunchError> {
        let inherited = || -> Result<Option<i32>, LaunchError> {
            let Some(text) = preemption::variable() else { return Ok(None) };
            let signal = preempting_signal(&text).map_err(|reason| {
                LaunchError::Usage(format!("{} is `{text}`: {reason}", vars::RR_PREEMPT_SIGNAL))
            })?;
            Ok(Some(signal))
        };
        Ok(supervise::Options {
            grace: self.grace,
            max_restarts: self.max_restarts,
            hang_timeout: self.hang_timeout,
            stack_timeout: self.stack_timeout,
            preempt_signal: self
                .preempt_signal
                .map_or_else(inherited, |signal| Ok(Some(signal)))?,
            master_port: self.master_port,
            output: self.output.options(),
        })
    }

    fn train_flags(&self, config: &Path) -> TrainFlags {
        let mut flags: Vec<OsString> = vec!["--config".into(), config.into()];
        if let Some(parallel) = &self.parallel {
            flags.extend(["--parallel".into(), parallel.into()]);
        }
        for pair in &self.set {
            flags.extend(["--set".into(), pair.into()]);
        }
        if self.overwrite {
            flags.push("--overwrite".into());
        }
        if self.skip_bad_records {
            flags.push("--skip-bad-records".into());
        }
        if let Some(resume) = &self.resume {
            flags.extend(["--resume".into(), resume.clone()]);
        }
        if self.resume_anyway {
            flags.push("--resume-anyway".into());
        }
        if let Some(timeout) = self.timeout {
            flags.extend(["--timeout".into(), timeout.as_secs_f64().to_string().into()]);
        }
        TrainFlags(flags)
    }
}

impl TrainFlags {
    /// The flags as `reranker` takes them.
    #[must_use]
    pub fn as_args(&self) -> &[OsString] {
        &self.0
    }

    /// What each worker runs. The kind of device is said outright: a worker that guessed could
    /// train on another kind than the launcher placed it on.
    #[must_use]
    pub fn train_command(&self, reranker: &Path, device: &str) -> WorkerCommand {
        let mut args: Vec<OsString> = vec!["train".into()];
        args.extend_from_slice(&self.0);
        args.extend(["--device".into(), device.into()]);
        WorkerCommand { program: reranker.into(), args }
    }
}

impl FromStr for GpuRequest {
    type Err = String;

    fn from_str(list: &str) -> Result<Self, String> {
        if list.trim() == "all" {
            return Ok(Self::All);
        }
        let mut names: Vec<String> = Vec::new();
        for name in list.split(',').map(str::trim) {
            if name.is_empty() {
                return Err("expected GPU indices or UUIDs such as 0,1, or `all`".to_owned());
            }
            // 0 and 00 are one index; UUIDs are compared after they are looked up.
            let name = name.parse::<u32>().map_or(name.to_owned(), |index| index.to_string());
            if names.contains(&name) {
                return Err(format!("GPU {name} is listed twice"));
            }
            names.push(name);
        }
        Ok(Self::Listed(names))
    }
}

/// clap explains in paragraphs; a user error here is one line. Its usage is left to `--help`.
fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let explanation = text
        .split("\n\n")
        .take_while(|part| !part.starts_with("Usage:") && !part.starts_with("For more information"))
        // A mistyped flag is hardly ever meant as a value.
        .filter(|part| !part.trim_start().starts_with("tip: to pass"))
        .map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect::<Vec<_>>()
        .join("; ");
    let unknown = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(word)) if error.kind() == ErrorKind::UnknownArgument => {
            word.as_str()
        }
        _ => "",
    };
    if let Some(instead) = foreign::counterpart(unknown) {
        return format!(
            "{unknown} is another launcher's; here it is {instead} (see rr-launch --help)"
        );
    }
    // As after torchrun, which needs no `--`.
    let hint = if unknown.is_empty() || unknown.starts_with('-') {
        String::new()
    } else if is_python(OsStr::new(unknown)) {
        format!("; a program goes behind `--`: rr-launch … -- python {unknown} …")
    } else {
        format!("; a program and its arguments go behind `--`: rr-launch … -- {unknown} …")
    };
    format!("{explanation}{hint} (see rr-launch --help)")
}

/// Whether a word names a Python file, which torchrun hands to the interpreter by itself.
pub(crate) fn is_python(word: &OsStr) -> bool {
    Path::new(word).extension().is_some_and(|extension| extension == "py")
}

fn worker_count(text: &str) -> Result<usize, String> {
    let count = text.parse().ok().filter(|count| (1..=MOST_WORKERS).contains(count));
    count.ok_or_else(|| {
        format!("expected a number of workers, at least 1 and at most {MOST_WORKERS}")
    })
}

fn key_value(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((key, _)) if !key.trim().is_empty() => Ok(text.to_owned()),
        _ => Err("expected key=value, such as lr=2e-5".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .ok()
        .and_then(|seconds: f64| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| "expected a number of seconds, such as 10 or 0.5".to_owned())
}

fn positive_seconds(text: &str) -> Result<Duration, String> {
    let expected = "expected a number of seconds above 0, such as 600";
    seconds(text).ok().filter(|time| !time.is_zero()).ok_or_else(|| expected.to_owned())
}

fn preempting_signal(text: &str) -> Result<i32, String> {
    let expected = "expected a signal that can ask for it, such as TERM or USR1";
    preemption::parse_signal(text).ok_or_else(|| expected.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use super::*;

    fn read(flags: &[&str]) -> Result<Box<Args>, LaunchError> {
        let line = std::iter::once("rr-launch").chain(flags.iter().copied()).map(OsString::from);
        match Args::read(line)? {
            Invocation::Launch(args) => Ok(args),
            Invocation::Show(text) => panic!("{text}"),
        }
    }

    #[test]
    fn the_command_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn help_fits_one_screen() {
        let text = match Args::read(["rr-launch", "--help"].map(Into::into)).unwrap() {
            Invocation::Show(text) => text,
            Invocation::Launch(_) => panic!("--help launches"),
        };
        assert!((24..=48).contains(&text.lines().count()), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert!(text.contains("Examples:"), "{text}");
    }

    #[test]
    fn flags_are_handed_on_in_order() {
        let args = read(&[
            "--config",
            "t.yaml",
            "--config_file",
            "p.yaml",
            "--set",
            "lr=1",
            "--set",
            "seed=2",
            "--overwrite",
            "--resume",
            "never",
        ])
        .unwrap();
        let Work::Train(flags) = args.work().unwrap() else { panic!("not a training") };
        assert_eq!(
            flags.as_args(),
            [
                "--config",
                "t.yaml",
                "--parallel",
                "p.yaml",
                "--set",
                "lr=1",
                "--set",
                "seed=2",
                "--overwrite",
                "--resume",
                "never"
            ]
        );
        assert_eq!(flags.train_command(Path::new("r"), "cpu").args[0], "train");
    }

    #[test]
    fn a_programs_own_flags_are_left_alone() {
        let args = read(&["--cpu", "--nproc", "3", "--", "python", "x.py", "--cpu"]).unwrap();
        assert_eq!(args.devices(), DeviceRequest::Cpu { workers: Some(3) });
        let Work::Program(command) = args.work().unwrap() else { panic!("not a program") };
        assert_eq!(
            (command.program, command.args),
            ("python".into(), vec!["x.py".into(), "--cpu".into()])
        );
    }

    #[test]
    fn gpu_lists() {
        assert_eq!("all".parse(), Ok(GpuRequest::All));
        let listed: GpuRequest = "1, 0,GPU-ab".parse().unwrap();
        assert_eq!(listed, GpuRequest::Listed(vec!["1".into(), "0".into(), "GPU-ab".into()]));
        for bad in ["", ",", "0,", "0,0", "0,00"] {
            assert!(bad.parse::<GpuRequest>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn bad_usage_is_one_line() {
        for (flags, expected) in [
            (&[][..], "nothing to run"),
            (&["--config", "a", "--", "b"], "exclude each other"),
            (&["--cpu", "--gpus", "0", "--config", "a"], "cannot be used with"),
            (&["--cpu", "--nproc", "0", "--config", "a"], "at least 1"),
            (&["--nproc", "2", "--config", "a"], "--cpu"),
            (&["--gpus", "", "--config", "a"], "expected GPU indices"),
            (&["--gpus", "0,0", "--config", "a"], "GPU 0 is listed twice"),
            (&["--config", "a", "--set", "lr"], "expected key=value"),
            (&["--grace", "-1", "--config", "a"], "--grace"),
            (&["--master-port", "0", "--config", "a"], "--master-port"),
            (&["--overwrite", "--", "b"], "--config"),
            (&["--confg", "a"], "--config"),
        ] {
            let line = read(flags).unwrap_err().line().unwrap();
            assert!(line.contains(expected) && !line.contains('\n'), "{flags:?}: {line}");
        }
    }
}
