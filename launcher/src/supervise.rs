//! The event loop: one thread that waits for the workers' ends, their output, signals and room to
//! write, and carries out what [`Lifecycle`] decides.

mod ending;
mod inspection;
mod peers;

use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use crate::attempt::{Attempt, Token};
use crate::error::LaunchError;
use crate::guardian::Guardian;
use crate::hang::{self, Position};
use crate::lifecycle::{Event, Exit, Lifecycle, Order};
use crate::nodes::Cluster;
use crate::oom::OomWatch;
use crate::output::{self, Output, Reader};
use crate::plan::Plan;
use crate::report;
use crate::requests::Requests;
use crate::restarts::{Restarts, Verdict};
use crate::stacks::Collection;
use crate::summary::Summary;
use crate::sys::{self, Epoll, Interest};

/// What one read takes from a pipe: as much as a pipe holds.
const READ_AT_ONCE: usize = 64 * 1024;

/// A turn of the loop that has read less than this is followed by a nap: workers that write line by
/// line would otherwise wake the launcher for each. Far less than what a pipe holds, so that a nap makes
/// nobody wait.
const LITTLE: usize = 16 * 1024;

/// How long it naps. It is also how much later it may hear of something else.
const NAP: Duration = Duration::from_millis(1);

/// How a job is watched.
#[derive(Debug, Clone)]
pub struct Options {
    /// From TERM to KILL, and from a request to make room to KILL.
    pub grace: Duration,
    /// Restarts after failures at most.
    pub max_restarts: u32,
    /// No heartbeat for so long is a hang; `None`: never.
    pub hang_timeout: Option<Duration>,
    /// Most time for taking stacks of workers that hang.
    pub stack_timeout: Duration,
    /// A signal that asks to make room, beside USR1 and USR2.
    pub preempt_signal: Option<i32>,
    /// The port that the user has named.
    pub master_port: Option<u16>,
    /// What becomes of the output.
    pub output: output::Options,
}

/// Starts the plan's workers, watches them until all have ended, and returns the exit code.
/// `cluster` are the other nodes, where there are any: whatever ends this launcher, they end with it.
pub fn run(
    plan: Plan,
    options: Options,
    requests: Requests,
    output: Output,
    cluster: Option<Cluster>,
) -> Result<u8, LaunchError> {
    let log_dir = options.output.log_dir.clone();
    let summary = Summary { run_id: plan.run_id().to_owned(), attempts: Vec::new() };
    match Supervisor::start(plan, options, requests, output, cluster.as_ref()) {
        Ok(mut supervisor) => {
            supervisor.cluster = cluster;
            // What an earlier launch left there is not taken for this one's.
            supervisor.write_summary(None);
            if let Err(error) = supervisor.watch_all() {
                supervisor.give_up(error.exit_code());
                return Err(error);
            }
            supervisor.finish().map_err(LaunchError::system("write the last output"))
        }
        Err(error) => {
            let code = error.exit_code();
            if let Some(cluster) = cluster {
                cluster.gives_up(code);
            }
            // The error itself says more than that this fails too.
            let _ = log_dir.map(|dir| summary.write(&dir, Verdict::End, Some(code)));
            Err(error)
        }
    }
}

/// Watches the guardian's end, where the kernel tells of it.
fn watch_guardian(epoll: &Epoll, guardian: &Guardian) -> io::Result<()> {
    let end = guardian.end_of_life();
    end.map_or(Ok(()), |end| epoll.add(end, Interest::Read, Token::Guardian.pack()))
}

struct Supervisor {
    plan: Plan,
    options: Options,
    epoll: Epoll,
    requests: Requests,
    // Dropped in this order: tracers let go of workers before these are waited for, and workers are
    // killed before the guardian looks for what they left.
    /// The stacks that are being taken of workers that hang.
    collection: Option<Collection>,
    attempt: Attempt,
    guardian: Guardian,
    output: Output,
    lifecycle: Lifecycle,
    oom: OomWatch,
    summary: Summary,
    /// The other nodes, where there are any.
    cluster: Option<Cluster>,
    /// Where the workers were in a hang.
    positions: Vec<Position>,
    /// Whether the other nodes know that nothing is left of the attempt here.
    is_part_told: bool,
    buffer: Vec<u8>,
    /// Bytes of output read in this turn of the loop.
    just_read: usize,
}

impl Supervisor {
    /// Starts the guardian and the first attempt.
    fn start(
        plan: Plan,
        options: Options,
        requests: Requests,
        mut output: Output,
        cluster: Option<&Cluster>,
    ) -> Result<Self, LaunchError> {
        let guardian = Guardian::start(plan.launcher_id(), plan.workers())
            .map_err(LaunchError::system("start the guardian"))?;
        sys::adopt_orphans().map_err(LaunchError::system("become the parent of orphans"))?;
        let oom = OomWatch::start();
        let watching = || LaunchError::system("watch the workers");
        let epoll = Epoll::new().map_err(watching())?;
        requests.watch(&epoll, Token::Signals.pack()).map_err(watching())?;
        watch_guardian(&epoll, &guardian).map_err(watching())?;
        cluster.map_or(Ok(()), |cluster| cluster.watch(&epoll)).map_err(watching())?;
        let timeout = options.hang_timeout;
        let attempt = Attempt::start(&plan, 0, &guardian, &epoll, &mut output, timeout)?;
        let restarts = Restarts::new(options.max_restarts);
        Ok(Self {
            lifecycle: Lifecycle::new(
                options.grace,
                options.stack_timeout,
                requests.ending_signal(),
                restarts,
            ),
            summary: Summary { run_id: plan.run_id().to_owned(), attempts: Vec::new() },
            plan,
            options,
            epoll,
            requests,
            attempt,
            collection: None,
            guardian,
            output,
            oom,
            cluster: None,
            positions: Vec::new(),
            is_part_told: false,
            buffer: vec![0; READ_AT_ONCE],
            just_read: 0,
        })
    }

    /// Runs attempt after attempt.
    fn watch_all(&mut self) -> Result<(), LaunchError> {
        loop {
            self.watch().map_err(LaunchError::system("watch the workers"))?;
            let restart = self.conclude().map_err(LaunchError::system("watch the workers"))?;
            let Some(Order::Restart(number)) = restart else { return Ok(()) };
            let rendezvous = self.next_rendezvous(number)?;
            self.plan.restart(number, rendezvous);
            let Self { plan, guardian, epoll, output, .. } = self;
            let timeout = self.options.hang_timeout;
            self.attempt = Attempt::start(plan, number, guardian, epoll, output, timeout)?;
        }
    }

    /// Runs until every worker, its group and what left it are gone.
    fn watch(&mut self) -> io::Result<()> {
        self.tidy(Instant::now());
        while !self.is_over()? {
            let timeout = self.deadline().map(|at| at.saturating_duration_since(Instant::now()));
            for token in self.epoll.wait(timeout)? {
                self.handle(Token::unpack(token))?;
            }
            let now = Instant::now();
            self.hear_others(now);
            // With nothing left to kill here, only the others are waited for.
            if !self.attempt.is_gone() {
                self.tell(Event::TimePassed, now);
            }
            self.look_for_hang(now);
            self.tend_inspection(now);
            self.tidy(now);
            self.write_out()?;
            if (1..LITTLE).contains(&std::mem::take(&mut self.just_read)) {
                std::thread::sleep(NAP);
            }
        }
        Ok(())
    }

    /// Looks after what ended workers have left behind.
    fn tidy(&mut self, now: Instant) {
        let Attempt { workers, strays, .. } = &mut self.attempt;
        for worker in workers.iter_mut() {
            worker.tidy(now, &self.guardian);
        }
        if workers.iter().all(|worker| worker.ended.is_some() || worker.is_gone()) {
            strays.tidy(workers, &self.guardian, now);
        }
    }

    /// Tells the state machine what has happened, and does as it says.
    fn tell(&mut self, event: Event, now: Instant) -> Option<Order> {
        let order = self.decide(event, now)?;
        self.obey(order, now);
        Some(order)
    }

    fn look_for_hang(&mut self, now: Instant) {
        if !self.lifecycle.is_running() {
            // Its looks are over, and must not wake the loop any more.
            self.attempt.monitor = None;
            return;
        }
        let Some(is_stuck) = self.attempt.is_stuck(now) else { return };
        if self.cluster.is_some() {
            self.look_for_hang_of_all(is_stuck, now);
        } else if is_stuck {
            let (positions, lines) = self.attempt.positions(now);
            let rank = hang::suspect(&positions);
            let timeout = self.options.hang_timeout.unwrap_or_default().as_secs_f64();
            self.output.say(&hang::verdict(rank, positions.len(), timeout));
            for line in lines {
                self.output.say(&line);
            }
            self.positions = positions;
            self.tell(Event::Hung { rank }, now);
        }
    }

    /// The next time at which something is to be done without an event.
    fn deadline(&self) -> Option<Instant> {
        let attempt = self.attempt.deadline(Instant::now());
        let lifecycle = self.lifecycle.deadline().filter(|_| !self.attempt.is_gone());
        let cluster = self.cluster.as_ref().and_then(Cluster::deadline);
        attempt.into_iter().chain(lifecycle).chain(cluster).min()
    }

    fn handle(&mut self, token: Token) -> io::Result<()> {
        match token {
            Token::Signals => {
                while let Some(signal) = self.requests.next() {
                    self.on_signal(signal)?;
                }
                Ok(())
            }
            Token::End(index) => self.on_end(index),
            Token::Pipe(index) => self.on_output(index),
            Token::Node(node) => {
                self.cluster.iter_mut().for_each(|cluster| cluster.read(node, Instant::now()));
                Ok(())
            }
            Token::Caller => {
                self.cluster.iter().for_each(Cluster::refuse_caller);
                Ok(())
            }
            Token::Guardian => self.replace_guardian(),
            // Its room is used by the next write_out.
            Token::Sink(_) => Ok(()),
        }
    }

    /// The guardian has ended, which nothing but a KILL makes it do: without one, what workers have
    /// started would outlive a launcher that is killed next.
    fn replace_guardian(&mut self) -> io::Result<()> {
        if let Some(end) = self.guardian.end_of_life() {
            self.epoll.remove(end)?;
        }
        match self.guardian.replace() {
            Ok(()) => {
                self.output.say("the guardian was killed; another has taken its place");
                watch_guardian(&self.epoll, &self.guardian)
            }
            Err(error) => {
                self.output.say(&format!("the guardian was killed and not replaced: {error}"));
                Ok(())
            }
        }
    }

    fn on_signal(&mut self, signal: i32) -> io::Result<()> {
        if signal != libc::SIGCHLD {
            let event = if self.requests.asks_to_make_room(signal) {
                Event::PreemptionAsked(signal)
            } else {
                Event::Signalled(signal)
            };
            self.tell(event, Instant::now());
            return Ok(());
        }
        // Before it is collected with what else has ended.
        self.tend_inspection(Instant::now());
        // Workers with a pidfd are collected in the order of their ends, by their own events;
        // leftovers by `watch` after every wake-up.
        for index in 0..self.attempt.workers.len() {
            if self.attempt.workers[index].end_of_life().is_none() {
                self.on_end(index)?;
            }
        }
        let Attempt { workers, strays, .. } = &mut self.attempt;
        strays.tidy(workers, &self.guardian, Instant::now());
        Ok(())
    }

    /// A worker may have ended.
    fn on_end(&mut self, index: usize) -> io::Result<()> {
        let now = Instant::now();
        let worker = &mut self.attempt.workers[index];
        let rank = worker.rank;
        let Some(exit) = worker.collect(now, &self.guardian) else { return Ok(()) };
        if let Some(end) = worker.end_of_life() {
            self.epoll.remove(end)?;
        }
        if exit == Exit::Signal(libc::SIGKILL) && self.oom.killed(worker.pid()) {
            self.attempt.oom_killed.push(rank);
        }
        if let Some(order) = self.decide(Event::WorkerEnded { rank, exit }, now) {
            self.announce(rank, exit);
            self.obey(order, now);
        }
        Ok(())
    }

    /// Says at once that the job is ending; the report with the last lines comes when all output
    /// is in.
    fn announce(&mut self, rank: usize, exit: Exit) {
        let others = self.plan.world_size() - self.plan.workers() + self.attempt.running();
        if others > 0 {
            let line = format!("rank {rank} {exit}; ending the other {}", report::workers(others));
            self.output.say(&line);
        }
    }

    fn obey(&mut self, order: Order, now: Instant) {
        // Whoever is to hear of an order must not be held by a tracer.
        self.end_inspection();
        let Attempt { workers, .. } = &mut self.attempt;
        match order {
            Order::Signal(signal) => {
                for worker in workers {
                    worker.signal(signal);
                    // One that is stopped hears of it only so.
                    worker.signal(libc::SIGCONT);
                }
            }
            Order::Ask(signal) => workers.iter().for_each(|worker| worker.ask(signal)),
            Order::Kill => {
                let running = workers.iter().filter(|worker| worker.ended.is_none()).count();
                if running > 0 {
                    self.output
                        .say(&format!("killing {} that did not end", report::workers(running)));
                }
                for worker in workers {
                    worker.kill(now);
                }
            }
            Order::Abandon => {
                for worker in workers.iter_mut().filter(|worker| !worker.is_gone()) {
                    let (rank, pid) = (worker.rank, worker.pid());
                    self.output.say(&format!(
                        "rank {rank} (pid {pid}) cannot be killed; it hangs in a system call"
                    ));
                    worker.abandon();
                }
            }
            Order::Inspect => self.inspect(),
            // Carried out by `watch_all`, once the attempt is concluded.
            Order::Restart(_) => {}
        }
    }

    fn on_output(&mut self, index: usize) -> io::Result<()> {
        let pipe = &mut self.attempt.pipes[index];
        let Some(file) = &mut pipe.file else { return Ok(()) };
        match file.read(&mut self.buffer) {
            Ok(0) => {
                self.epoll.remove(file.as_fd())?;
                self.end_of_output(index);
            }
            Ok(count) => self.take_in(index, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Passes on what was read from a pipe into the first `count` bytes of the buffer.
    fn take_in(&mut self, index: usize, count: usize) {
        self.just_read += count;
        let Self { attempt: Attempt { pipes, voices, .. }, output, buffer, .. } = self;
        let pipe = &mut pipes[index];
        let (voice, stream) = (&mut voices[pipe.worker], pipe.stream);
        pipe.splitter.push(&buffer[..count], |piece| output.pass_on(voice, stream, piece));
    }

    fn end_of_output(&mut self, index: usize) {
        let Self { attempt: Attempt { pipes, voices, .. }, output, .. } = self;
        let pipe = &mut pipes[index];
        pipe.file = None;
        let (voice, stream) = (&mut voices[pipe.worker], pipe.stream);
        pipe.splitter.finish(|piece| output.pass_on(voice, stream, piece));
        output.end(voice, stream);
    }

    /// Writes what is queued, and settles who has to wait for whom.
    fn write_out(&mut self) -> io::Result<()> {
        self.output.write_files(&mut self.attempt.voices);
        let mut closed = false;
        for (index, sink) in self.output.console.sinks().iter_mut().enumerate() {
            let before = sink.reader();
            let after = sink.flush();
            closed |= before != Reader::Gone && after == Reader::Gone;
            match (before == Reader::Slow, after == Reader::Slow) {
                (false, true) => {
                    self.epoll.add(sink.as_fd(), Interest::Write, Token::Sink(index).pack())?;
                }
                (true, false) => self.epoll.remove(sink.as_fd())?,
                (false, false) | (true, true) => {}
            }
        }
        self.hold_back()?;
        if closed {
            self.tell(Event::OutputClosed, Instant::now());
        }
        Ok(())
    }

    /// Stops reading pipes whose sink is full, and reads them again when it has room. A pipe that
    /// is not read is taken out of the set: its end would wake the loop without end.
    fn hold_back(&mut self) -> io::Result<()> {
        for (sink_index, hold) in self.output.console.pressure() {
            for (index, pipe) in self.attempt.pipes.iter().enumerate() {
                let Some(file) = &pipe.file else { continue };
                let sink = self.output.console.index_of(pipe.stream);
                if sink != sink_index || !self.attempt.voices[pipe.worker].is_shown() {
                    continue;
                }
                if hold {
                    self.epoll.remove(file.as_fd())?;
                } else {
                    self.epoll.add(file.as_fd(), Interest::Read, Token::Pipe(index).pack())?;
                }
            }
        }
        Ok(())
    }
}
