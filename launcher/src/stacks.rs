//! Where the threads of workers that hang are: what the kernel says of each, and the stacks that a
//! tool takes from outside.
//!
//! The tools are children of the launcher beside its event loop, which never waits for them: each
//! writes into a file, and what has not ended in time is killed. A process that is traced is stopped
//! meanwhile; when its tracer ends, however, the kernel lets go of it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::contract::vars;
use crate::guardian::Guardian;
use crate::preflight;
use crate::procfs;
use crate::report;
use crate::sys::{self, Pid};

/// What is said where no tool is found.
const HINT: &str = "install gdb, elfutils (eu-stack) or py-spy for stacks";

/// What is said where a Python program's stacks were taken of its interpreter.
const PYTHON_HINT: &str = "install py-spy for the stacks of Python functions";

/// What is read of a tool's output for the console.
const READ_AT_MOST: usize = 1 << 20;

/// Frames of a stack on the console; the innermost ones tell where it hangs.
const SHOWN: usize = 32;

/// Characters of a frame on the console: gdb adds all arguments.
const WIDTH: usize = 120;

/// Lines of what a tool says instead of a stack.
const COMPLAINT: usize = 5;

/// A program that prints the stacks of a process, whose id is its last argument.
#[derive(Debug)]
struct Tool {
    name: &'static str,
    arguments: &'static [&'static str],
    /// Whether it reads Python programs only.
    is_for_python: bool,
}

/// The best first.
const TOOLS: [Tool; 3] = [
    // It reads memory without stopping the process, which for one that is stopped already would fail.
    Tool { name: "py-spy", arguments: &["dump", "--nonblocking", "--pid"], is_for_python: true },
    Tool { name: "eu-stack", arguments: &["-p"], is_for_python: false },
    Tool {
        name: "gdb",
        // No files of the user's or the program's that could make it do something else.
        arguments: &[
            "-nx",
            "-iex",
            "set auto-load no",
            "-batch",
            "-ex",
            "thread apply all -ascending bt 256",
            "-p",
        ],
        is_for_python: false,
    },
];

impl Tool {
    /// The first in `PATH` that reads a process.
    fn for_process(pid: Pid) -> Option<&'static Self> {
        let is_python = is_python(pid);
        let fits = |tool: &&Self| is_python || !tool.is_for_python;
        let is_there = |tool: &&Self| preflight::find_in_path(OsStr::new(tool.name)).is_some();
        TOOLS.iter().filter(fits).find(is_there)
    }
}

/// Whether a process is a Python interpreter.
fn is_python(pid: Pid) -> bool {
    let program = procfs::program(pid);
    let name = program.as_deref().and_then(|path| path.file_name()?.to_str());
    name.is_some_and(|name| name.starts_with("python"))
}

/// A worker whose stacks are to be taken.
#[derive(Debug)]
pub struct Subject {
    /// Its rank.
    pub rank: usize,
    /// Its process id.
    pub pid: Pid,
    /// What it last said it did.
    pub place: Option<String>,
    /// The file for its stacks; `None`: the console.
    pub file: Option<PathBuf>,
}

/// How far a tool has come with a worker.
#[derive(Debug)]
enum Progress {
    Waiting,
    Running(Child),
    Ended,
}

/// A worker, and the tool that takes its stacks.
#[derive(Debug)]
struct Case {
    subject: Subject,
    tool: Option<&'static Tool>,
    output: File,
    progress: Progress,
}

/// What there is to tell of a collection.
#[derive(Debug, Default)]
pub struct Findings {
    /// For the user.
    pub lines: Vec<String>,
    /// The files that were written, by rank.
    pub files: BTreeMap<usize, PathBuf>,
}

/// The stacks of workers, while they are taken. Dropped, it ends its tools.
#[derive(Debug)]
pub struct Collection {
    launcher_id: String,
    /// Tools at once: one for two CPUs, since that of a large program takes a CPU and half a gigabyte
    /// for seconds, and workers that wait may spin.
    at_once: usize,
    cases: Vec<Case>,
    /// What could not be done.
    troubles: Vec<String>,
}

impl Collection {
    /// Writes what the kernel says of the workers' threads into their files. The tools follow with
    /// [`Self::advance`], in the order of `subjects`.
    pub fn new(subjects: Vec<Subject>, launcher_id: &str) -> Self {
        let (mut cases, mut troubles) = (Vec::new(), Vec::new());
        for subject in subjects {
            match Case::new(subject) {
                Ok(case) => cases.push(case),
                Err(trouble) => troubles.push(trouble),
            }
        }
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let at_once = (cpus / 2).max(1);
        Self { launcher_id: launcher_id.to_owned(), at_once, cases, troubles }
    }

    /// Starts the next tools where others have ended; returns whether all have.
    pub fn advance(&mut self, guardian: &Guardian) -> bool {
        for case in &mut self.cases {
            case.look(guardian);
        }
        let running = self.cases.iter().filter(|case| case.is_running()).count();
        let waiting = self.cases.iter_mut().filter(|case| case.is_waiting());
        for case in waiting.take(self.at_once.saturating_sub(running)) {
            if let Err(trouble) = case.start(&self.launcher_id, guardian) {
                self.troubles.push(trouble);
            }
        }
        self.cases.iter().all(|case| matches!(case.progress, Progress::Ended))
    }

    /// Ends the tools that have not ended in `limit`, and tells what was found.
    pub fn finish(mut self, limit: Duration, guardian: &Guardian) -> Findings {
        let mut findings = Findings { lines: std::mem::take(&mut self.troubles), ..<_>::default() };
        let mut late: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
        let mut console = Vec::new();
        for case in &mut self.cases {
            case.look(guardian);
            let rank = case.subject.rank;
            if let (Some(tool), false) = (case.tool, case.has_ended()) {
                case.end(guardian);
                case.note(&format!("{} did not end in time", tool.name));
                late.entry(tool.name).or_default().insert(rank);
            }
            match &case.subject.file {
                Some(path) => drop(findings.files.insert(rank, path.clone())),
                None => console.extend(case.told()),
            }
        }
        if let Some(path) = findings.files.values().next() {
            let ranks = named(findings.files.keys().copied());
            let path = path.with_file_name("rank-R.stacks.txt");
            findings.lines.push(format!("threads and stacks of {ranks}: {}", path.display()));
        }
        findings.lines.extend(console);
        for (tool, ranks) in late {
            let (ranks, limit) = (named(ranks.into_iter()), limit.as_secs_f64());
            findings.lines.push(format!(
                "{tool} did not end within {limit} s (--stack-timeout): stacks of {ranks} are missing"
            ));
        }
        findings.lines.extend(self.hint().map(str::to_owned));
        findings
    }

    /// What to install for more.
    fn hint(&self) -> Option<&'static str> {
        if self.cases.iter().any(|case| case.tool.is_none()) {
            return Some(HINT);
        }
        let lacks_py_spy = |case: &Case| {
            case.tool.is_some_and(|tool| !tool.is_for_python) && is_python(case.subject.pid)
        };
        self.cases.iter().any(lacks_py_spy).then_some(PYTHON_HINT)
    }
}

/// `rank 3`, `ranks 0-7`.
fn named(ranks: impl Iterator<Item = usize>) -> String {
    let ranks: Vec<usize> = ranks.collect();
    let plural = if ranks.len() == 1 { "" } else { "s" };
    format!("rank{plural} {}", report::ranges(&ranks))
}

impl Case {
    fn new(subject: Subject) -> Result<Self, String> {
        let opened = match &subject.file {
            Some(path) => File::options().create(true).append(true).open(path),
            None => sys::memory_file(c"rr-stacks"),
        };
        let describe = |error: io::Error| {
            let file = subject.file.as_deref().unwrap_or(std::path::Path::new("memory"));
            format!("cannot write stacks to {}: {error}", file.display())
        };
        let mut output = opened.map_err(describe)?;
        if subject.file.is_some() {
            let (rank, pid) = (subject.rank, subject.pid);
            let place = subject.place.as_deref().unwrap_or("has not reported");
            let threads: Vec<_> = procfs::threads(pid).iter().map(ToString::to_string).collect();
            let text = format!("rank {rank} (pid {pid}): {place}\n\n{}\n", threads.join("\n"));
            output.write_all(text.as_bytes()).map_err(describe)?;
        }
        let tool = Tool::for_process(subject.pid);
        let progress = if tool.is_some() { Progress::Waiting } else { Progress::Ended };
        Ok(Self { subject, tool, output, progress })
    }

    fn is_waiting(&self) -> bool {
        matches!(self.progress, Progress::Waiting)
    }

    fn is_running(&self) -> bool {
        matches!(self.progress, Progress::Running(_))
    }

    fn has_ended(&self) -> bool {
        matches!(self.progress, Progress::Ended)
    }

    /// Starts the tool, in a group of its own that the guardian knows of.
    fn start(&mut self, launcher_id: &str, guardian: &Guardian) -> Result<(), String> {
        self.progress = Progress::Ended;
        let Some(tool) = self.tool else { return Ok(()) };
        let pid = self.subject.pid.to_string();
        self.note(&format!("{} {} {pid}", tool.name, tool.arguments.join(" ")));
        let start = || {
            let mut command = Command::new(tool.name);
            command
                .args(tool.arguments)
                .arg(pid)
                .env(vars::RR_LAUNCHER, launcher_id)
                // Where symbols would be fetched from over the network.
                .env_remove("DEBUGINFOD_URLS")
                .stdin(Stdio::null())
                .stdout(self.output.try_clone()?)
                .stderr(self.output.try_clone()?)
                .process_group(0);
            sys::prepare_watched(&mut command, guardian.roster());
            command.spawn()
        };
        let child = start().map_err(|error| format!("cannot start {}: {error}", tool.name))?;
        self.progress = Progress::Running(child);
        Ok(())
    }

    /// Collects the tool if it has ended.
    fn look(&mut self, guardian: &Guardian) {
        let Progress::Running(child) = &mut self.progress else { return };
        match child.try_wait() {
            Ok(None) => {}
            Ok(Some(_)) => self.end(guardian),
            // It was collected as an orphan, and its number may mean another process by now.
            Err(_) => {
                guardian.forget(child.id() as Pid);
                self.progress = Progress::Ended;
            }
        }
    }

    /// Ends what is left of the tool and what it has started.
    fn end(&mut self, guardian: &Guardian) {
        if let Progress::Running(child) = &self.progress {
            let group = child.id() as Pid;
            sys::signal_group(group, libc::SIGKILL);
            guardian.forget(group);
        }
        self.progress = Progress::Ended;
    }

    /// Writes a line of the launcher's into the file.
    fn note(&mut self, line: &str) {
        if self.subject.file.is_some() {
            // A full disk, which the log files tell of.
            let _ = writeln!(self.output, "\n{line}");
        }
    }

    /// The stack of the main thread, for the console; where there is none, what the tool says instead.
    fn told(&self) -> Vec<String> {
        let Some(tool) = self.tool else { return Vec::new() };
        let mut bytes = vec![0; READ_AT_MOST];
        let length = self.output.read_at(&mut bytes, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&bytes[..length]);
        let (rank, name) = (self.subject.rank, tool.name);
        let (title, shown) = match main_thread(&text, self.subject.pid) {
            frames if !frames.is_empty() => {
                (format!("main thread of rank {rank} ({name}):"), frames)
            }
            _ => {
                let lines = text.lines().filter(|line| !line.trim().is_empty());
                (format!("no stack of rank {rank}; {name} says:"), lines.take(COMPLAINT).collect())
            }
        };
        let shown = shown.into_iter().map(|line| format!("| {}", shortened(line)));
        std::iter::once(title).chain(shown).collect()
    }
}

/// The beginning of a long line.
fn shortened(line: &str) -> String {
    match line.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

impl Drop for Case {
    /// No way out of the launcher leaves a tool behind.
    fn drop(&mut self) {
        if let Progress::Running(child) = &mut self.progress
            && matches!(child.try_wait(), Ok(None))
        {
            sys::signal_group(child.id() as Pid, libc::SIGKILL);
        }
    }
}

/// The innermost frames of a process's main thread in what a tool has written. A thread begins with
/// `TID 7:` (eu-stack), `Thread 1 (Thread 0x7f (LWP 7) "x"):` (gdb) or `Thread 7 (idle): "MainThread"`
/// (py-spy), and ends with an empty line or the next one.
fn main_thread(text: &str, pid: Pid) -> Vec<&str> {
    let begins = |line: &str| line.starts_with("TID ") || line.starts_with("Thread ");
    let is_main = |line: &str| {
        // Behind the quotation mark comes a name, which may hold anything.
        let before = line.split('"').next().unwrap_or_default();
        let mut numbers = before.split(|c: char| !c.is_ascii_alphanumeric());
        begins(line)
            && (line.contains("\"MainThread\"") || numbers.any(|word| word == pid.to_string()))
    };
    let lines = text.lines().skip_while(|line| !is_main(line)).skip(1);
    // Behind the last thread gdb adds a remark in brackets.
    let ends = |line: &str| begins(line) || line.trim().is_empty() || line.starts_with('[');
    lines.take_while(|line| !ends(line)).take(SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_thread_is_found_in_what_each_tool_writes() {
        let eu_stack =
            "PID 71 - process\nTID 71:\n#0  0x7f poll\n#1  0x55 main\nTID 72:\n#0  0x7f read\n";
        assert_eq!(main_thread(eu_stack, 71), ["#0  0x7f poll", "#1  0x55 main"]);
        let gdb = "[New LWP 72]\n0x7f in poll ()\n\nThread 1 (Thread 0x7f71 (LWP 71) \"a 72\"):\n\
                   #0  0x7f in poll ()\n\nThread 2 (Thread 0x7f72 (LWP 72) \"b\"):\n#0  0x7f in read ()\n\
                   [Inferior 1 (process 71) detached]\n";
        assert_eq!(main_thread(gdb, 71), ["#0  0x7f in poll ()"]);
        assert_eq!(main_thread(gdb, 72), ["#0  0x7f in read ()"]);
        let py_spy = "Process 71: python train.py\nPython v3.11.7\n\nThread 72 (idle): \"loader\"\n    \
                      wait (threading.py:3)\n\nThread 0x7F (active): \"MainThread\"\n    \
                      step (train.py:9)\n    <module> (train.py:20)\n";
        let frames = ["    step (train.py:9)", "    <module> (train.py:20)"];
        assert_eq!(main_thread(py_spy, 71), frames);
        assert!(main_thread("ptrace: Operation not permitted.\n", 71).is_empty());
    }

    #[test]
    fn a_deep_stack_shows_its_inner_end() {
        let text = format!("TID 7:\n#0 f\n{}", "#1 f\n".repeat(500));
        let shown = main_thread(&text, 7);
        assert_eq!((shown.len(), shown[0]), (SHOWN, "#0 f"));
    }
}
