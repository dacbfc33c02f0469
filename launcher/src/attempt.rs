//! One start of all workers: their processes, their output pipes, and what is remembered of each.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::LaunchError;
use crate::fleet::{self, Strays, Worker};
use crate::guardian::Guardian;
use crate::hang::{Monitor, Position};
use crate::lifecycle::Cause;
use crate::output::{LineSplitter, Output, Stream, Voice};
use crate::plan::Plan;
use crate::procfs::Activity;
use crate::report;
use crate::stacks::Subject;
use crate::summary::{AttemptRecord, RankRecord};
use crate::sys::{self, Epoll, Interest};

/// What a worker's pipe is to hold, so that a burst of output does not wait for the launcher's turn on a
/// CPU. The kernel takes memory for what is in it only.
const PIPE_SIZE: i32 = 256 * 1024;

/// What the pipes of all workers are to hold together at most, a quarter of what the kernel grants the pipes
/// of a user (`pipe-user-pages-soft`). One who has used that up gets pipes of a page or two.
const ALL_PIPES: i32 = 16 * 1024 * 1024;

/// What a pipe holds that nobody has widened.
const NARROW: i32 = 64 * 1024;

/// What a descriptor in the epoll set stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// Signals to the launcher.
    Signals,
    /// Room in the sink of this number.
    Sink(usize),
    /// The end of the worker of this index.
    End(usize),
    /// Output in the pipe of this number.
    Pipe(usize),
    /// Messages of this node's launcher.
    Node(usize),
    /// A launcher that calls although the launch has begun.
    Caller,
    /// The end of the guardian.
    Guardian,
}

impl Token {
    /// As the number that epoll keeps.
    pub fn pack(self) -> u64 {
        let (kind, index) = match self {
            Self::Signals => (0, 0),
            Self::Sink(index) => (1, index),
            Self::End(index) => (2, index),
            Self::Pipe(index) => (3, index),
            Self::Node(node) => (4, node),
            Self::Caller => (5, 0),
            Self::Guardian => (6, 0),
        };
        (kind << 32) | index as u64
    }

    /// Back from that number.
    pub fn unpack(token: u64) -> Self {
        let index = (token & 0xffff_ffff) as usize;
        match token >> 32 {
            0 => Self::Signals,
            1 => Self::Sink(index),
            2 => Self::End(index),
            3 => Self::Pipe(index),
            4 => Self::Node(index),
            5 => Self::Caller,
            _ => Self::Guardian,
        }
    }
}

/// One output stream of one worker.
pub struct Pipe {
    /// `None` once it has ended.
    pub file: Option<File>,
    /// Whose it is: an index.
    pub worker: usize,
    /// Which of the two.
    pub stream: Stream,
    /// Bytes to lines.
    pub splitter: LineSplitter,
}

/// One start of all workers.
pub struct Attempt {
    /// Its number: the restarts before it.
    number: u32,
    /// The workers, by rank.
    pub workers: Vec<Worker>,
    /// What left its worker's group.
    pub strays: Strays,
    /// The workers' output.
    pub pipes: Vec<Pipe>,
    /// How it is marked, by rank.
    pub voices: Vec<Voice>,
    /// Watches the heartbeats, where a hang is to be noticed.
    pub monitor: Option<Monitor>,
    /// Ranks that the kernel's out-of-memory killer ended.
    pub oom_killed: Vec<usize>,
    /// Files with the stacks of workers that hung, by rank.
    pub stacks: BTreeMap<usize, PathBuf>,
    started: Instant,
}

impl Attempt {
    /// Starts all workers and watches them with `epoll`.
    pub fn start(
        plan: &Plan,
        number: u32,
        guardian: &Guardian,
        epoll: &Epoll,
        output: &mut Output,
        hang_timeout: Option<Duration>,
    ) -> Result<Self, LaunchError> {
        let run = plan.run_id();
        output.note(&format!("run {run}, attempt {number}: {}", report::workers(plan.workers())));
        let voices = output.voices(number, plan.ranks())?;
        let mut pipes = Vec::new();
        let size = pipe_size(plan.workers());
        let workers =
            fleet::start(plan, guardian, |worker| watch(worker, &mut pipes, size, epoll))?;
        let started = Instant::now();
        Ok(Self {
            number,
            voices,
            workers,
            strays: Strays::default(),
            pipes,
            monitor: hang_timeout.map(|timeout| Monitor::new(timeout, started)),
            oom_killed: Vec::new(),
            stacks: BTreeMap::new(),
            started,
        })
    }

    /// Whether no worker and nothing that one has started is left.
    pub fn is_gone(&self) -> bool {
        self.workers.iter().all(Worker::is_gone) && self.strays.are_gone()
    }

    /// The number of workers that have not ended.
    pub fn running(&self) -> usize {
        self.workers.iter().filter(|worker| worker.ended.is_none()).count()
    }

    /// The newest step that a worker told of.
    pub fn newest_step(&self) -> Option<u64> {
        self.workers.iter().filter_map(Worker::beat).map(|beat| beat.step).max()
    }

    /// The next time at which something is to be done without an event.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        let workers = self.workers.iter().filter_map(Worker::deadline);
        let strays = self.strays.deadline(now);
        workers.chain(strays).chain(self.monitor.as_ref().map(Monitor::due)).min()
    }

    /// Looks whether the workers still make progress; `None` where that is not due.
    pub fn is_stuck(&mut self, now: Instant) -> Option<bool> {
        let monitor = self.monitor.as_mut().filter(|monitor| now >= monitor.due())?;
        let running = self.workers.iter().filter(|worker| worker.ended.is_none());
        let beats = running.map(|worker| (worker.rank, worker.beat())).collect();
        Some(monitor.look(beats, now))
    }

    /// Where the workers are that have not ended, and a line about each.
    pub fn positions(&self, now: Instant) -> (Vec<Position>, Vec<String>) {
        let running = self.workers.iter().filter(|worker| worker.ended.is_none());
        let position = |worker: &Worker| {
            let (rank, pid, beat) = (worker.rank, worker.pid(), worker.beat());
            let activity = Activity::of(pid);
            let standing = self.monitor.as_ref().and_then(|monitor| monitor.standing(rank, now));
            let parts = [
                Some(beat.as_ref().map_or("has not reported".to_owned(), ToString::to_string)),
                standing.map(|standing| format!(", for {:.1} s", standing.as_secs_f64())),
                activity.as_ref().map(|activity| format!("; {activity}")),
            ];
            let place: String = parts.into_iter().flatten().collect();
            let is_stopped = activity.is_some_and(|activity| activity.is_stopped());
            (Position { rank, beat, is_stopped }, format!("rank {rank} (pid {pid}): {place}"))
        };
        running.map(position).unzip()
    }

    /// The workers that have not ended, as those whose stacks are taken.
    pub fn subjects(&self) -> Vec<Subject> {
        let running = self.workers.iter().filter(|worker| worker.ended.is_none());
        let subject = |worker: &Worker| Subject {
            rank: worker.rank,
            pid: worker.pid(),
            place: worker.beat().map(|beat| beat.to_string()),
            file: self.voices[worker.index].path().map(|log| log.with_extension("stacks.txt")),
        };
        running.map(subject).collect()
    }

    /// What is kept of it; last lines only of the ranks that `keeps_lines` names.
    pub fn record(
        &self,
        cause: Option<Cause>,
        keeps_lines: impl Fn(usize) -> bool,
    ) -> AttemptRecord {
        let rank_record = |worker: &Worker| {
            let exit = worker.ended.map(|(exit, _)| exit);
            let beat = worker.beat();
            let voice = &self.voices[worker.index];
            let lines = voice.tail.lines().map(|line| String::from_utf8_lossy(line).into_owned());
            RankRecord {
                rank: worker.rank,
                pid: worker.pid(),
                exit,
                oom_killed: self.oom_killed.contains(&worker.rank),
                elapsed: worker.ended.map(|(_, after)| after),
                step: beat.as_ref().map(|beat| beat.step),
                phase: beat.map(|beat| beat.phase),
                log: voice.path().map(Path::to_owned),
                stacks: self.stacks.get(&worker.rank).cloned(),
                error: worker.error(),
                last_lines: if keeps_lines(worker.rank) { lines.collect() } else { Vec::new() },
            }
        };
        AttemptRecord {
            restart: self.number,
            cause,
            elapsed: self.started.elapsed(),
            ranks: self.workers.iter().map(rank_record).collect(),
        }
    }
}

/// What each pipe of so many workers is to hold.
fn pipe_size(workers: usize) -> i32 {
    let share = ALL_PIPES / i32::try_from(2 * workers).unwrap_or(i32::MAX);
    share.clamp(NARROW, PIPE_SIZE)
}

/// Watches a worker's end and output, in pipes of this size.
fn watch(
    worker: &mut Worker,
    pipes: &mut Vec<Pipe>,
    pipe_size: i32,
    epoll: &Epoll,
) -> io::Result<()> {
    if let Some(end) = worker.end_of_life() {
        epoll.add(end, Interest::Read, Token::End(worker.index).pack())?;
    }
    for stream in [Stream::Stdout, Stream::Stderr] {
        let Some(pipe) = worker.take_pipe(stream) else { continue };
        if pipe_size > NARROW {
            sys::widen_pipe(pipe.as_fd(), pipe_size);
        }
        epoll.add(pipe.as_fd(), Interest::Read, Token::Pipe(pipes.len()).pack())?;
        pipes.push(Pipe {
            file: Some(pipe.into()),
            worker: worker.index,
            stream,
            splitter: LineSplitter::default(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_of_many_workers_leave_others_theirs() {
        assert_eq!([1, 8, 32].map(pipe_size), [PIPE_SIZE; 3]);
        assert_eq!([64, 128, 1000].map(pipe_size), [PIPE_SIZE / 2, NARROW, NARROW]);
    }
}
