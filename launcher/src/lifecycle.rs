//! What to do when something happens: a pure state machine, events in and orders out, without
//! processes or clocks of its own, so that every decision is tested as a table. The event loop
//! carries its orders out.
//!
//! Where several nodes take part, each launcher has one of these. What another node reports is one
//! more event, and what all of them know in the end replaces what this one saw.

#[cfg(test)]
mod tests;

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::contract::exit_code;
use crate::restarts::{Restarts, Verdict};
use crate::sys;

/// How long killed processes may take to vanish. Only one that hangs inside the kernel, on a dead
/// file server or a broken driver, takes longer; the launcher does not hang with it.
const KILL_PATIENCE: Duration = Duration::from_secs(30);

/// What ends workers that may be saving: to those TERM does nothing, as it comes when a scheduler's patience ends.
const END_OF_SAVING: i32 = libc::SIGHUP;

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// The end of a worker that has saved a checkpoint on request.
    pub const PREEMPTED: Self = Self::Code(exit_code::PREEMPTED as i32);

    /// The exit code that a shell would give.
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code as u8,
            Self::Signal(signal) => exit_code::of_signal(signal),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(out, "exited with code {code}"),
            Self::Signal(signal) => {
                let name = sys::signal_name(*signal);
                write!(out, "was killed by {name} (exit code {})", self.code())
            }
        }
    }
}

/// Why a job ends before all workers are done. The first cause stands; what follows from it never
/// replaces it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// A worker failed.
    Failure {
        /// Which.
        rank: usize,
        /// How.
        exit: Exit,
    },
    /// No worker made progress for too long.
    Hang {
        /// The one that the others seem to wait for.
        rank: Option<usize>,
    },
    /// The launcher was told to end.
    Signal(i32),
    /// The workers were asked to save and end.
    Preempted {
        /// By this signal to the launcher; `None`: they heard of it by themselves.
        signal: Option<i32>,
    },
    /// Nobody reads the launcher's output any more.
    OutputClosed,
    /// The launcher of another node is gone, or out of reach.
    NodeLost {
        /// Which.
        node: usize,
    },
    /// The launcher of a node cannot start its workers, or not go on.
    LauncherFailed {
        /// What it exits with.
        code: u8,
    },
}

impl Cause {
    /// The rank that is to blame, where one is.
    pub fn rank(self) -> Option<usize> {
        match self {
            Self::Failure { rank, .. } => Some(rank),
            Self::Hang { rank } => rank,
            Self::Signal(_)
            | Self::Preempted { .. }
            | Self::OutputClosed
            | Self::NodeLost { .. }
            | Self::LauncherFailed { .. } => None,
        }
    }
}

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A worker has ended. Success is never a reason to end the others.
    WorkerEnded {
        /// Which.
        rank: usize,
        /// How.
        exit: Exit,
    },
    /// The launcher was sent a signal that asks it to end.
    Signalled(i32),
    /// The launcher was sent a signal that asks it to make room.
    PreemptionAsked(i32),
    /// No worker has made progress for too long.
    Hung {
        /// The one that the others seem to wait for.
        rank: Option<usize>,
    },
    /// What there is to know of workers that hang is collected.
    Inspected,
    /// Writing to the launcher's own stdout or stderr has failed because nobody reads it. As for a
    /// program in a pipeline that is the end.
    OutputClosed,
    /// The workers of another node end, for this cause.
    PeerEnds(Cause),
    /// The user of another node wants everybody killed.
    PeerKills,
    /// What this attempt came to on all nodes; nothing is left of it anywhere.
    Settled {
        /// The first cause of all.
        cause: Option<Cause>,
        /// A checkpoint is saved: a worker has said so, and none of the others was ended before it was
        /// done.
        has_saved: bool,
        /// Workers had to be ended.
        was_stopped: bool,
        /// There can be no restart.
        is_final: bool,
        /// What has asked for the end since, on any node.
        called_off: Option<Cause>,
    },
    /// Nothing of this attempt is left.
    AllGone {
        /// The newest step that a heartbeat told of.
        step: Option<u64>,
    },
    /// Time has passed, perhaps a deadline.
    TimePassed,
}

/// What the event loop has to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Collect where the workers that hang are, before they end.
    Inspect,
    /// Send this signal to all workers' process groups.
    Signal(i32),
    /// Send this signal, which asks to make room, to the workers themselves: what they have started
    /// need not know it.
    Ask(i32),
    /// Kill all workers' process groups.
    Kill,
    /// Wait no longer for what cannot even be killed.
    Abandon,
    /// Start all workers again; the number of this restart, from 1.
    Restart(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// The workers hang, and are looked at.
    Inspecting {
        until: Option<Instant>,
    },
    /// The workers save, and end by themselves.
    Saving {
        kill_at: Option<Instant>,
    },
    Stopping {
        kill_at: Option<Instant>,
    },
    Killing {
        abandon_at: Instant,
    },
    Abandoned,
}

/// The life of a job, over all its restarts.
#[derive(Debug)]
pub struct Lifecycle {
    grace: Duration,
    inspection: Duration,
    /// The signal by which workers are told to end where nobody has sent one.
    ending: i32,
    restarts: Restarts,
    phase: Phase,
    cause: Option<Cause>,
    /// A worker has said that a checkpoint is saved.
    saved: bool,
    /// A worker that was asked to save has ended without.
    is_incomplete: bool,
    /// The attempt has failed after it was asked to save, or cannot be ended: there is no restart.
    is_final: bool,
    /// What has asked for the end of the job while the attempt was ending over a failure: it takes
    /// the place of the restart.
    called_off: Option<Cause>,
    verdict: Verdict,
}

impl Lifecycle {
    /// All workers run; `ending` is the signal that ends them where nobody has sent one, `grace` the time
    /// from it to KILL, `inspection` that for looking at workers that hang.
    pub fn new(grace: Duration, inspection: Duration, ending: i32, restarts: Restarts) -> Self {
        let (phase, verdict) = (Phase::Running, Verdict::End);
        Self {
            grace,
            inspection,
            ending,
            restarts,
            phase,
            cause: None,
            saved: false,
            is_incomplete: false,
            is_final: false,
            called_off: None,
            verdict,
        }
    }

    /// Takes an event in, and says what to do.
    pub fn on(&mut self, event: Event, now: Instant) -> Option<Order> {
        match event {
            Event::WorkerEnded { rank, exit } => self.worker_ended(rank, exit, now),
            Event::Signalled(signal) => self.signalled(signal, now),
            Event::PreemptionAsked(signal) => self.preemption_asked(signal, now),
            Event::Hung { rank } => self.inspect(Cause::Hang { rank }, now),
            Event::Inspected => self.end_inspection(self.ending, now),
            Event::OutputClosed => {
                self.call_off(Cause::OutputClosed);
                self.stop(Cause::OutputClosed, self.ending, now)
            }
            Event::PeerEnds(cause) => self.peer_ends(cause, now),
            Event::PeerKills => self.may_kill().then(|| self.kill(now)),
            Event::Settled { cause, has_saved, was_stopped, is_final, called_off } => {
                (self.cause, self.saved, self.is_incomplete) = (cause, has_saved, false);
                (self.is_final, self.called_off) = (is_final, called_off);
                self.phase = if was_stopped {
                    Phase::Stopping { kill_at: None }
                } else {
                    Phase::Saving { kill_at: None }
                };
                None
            }
            Event::AllGone { step } => self.all_gone(step),
            Event::TimePassed => self.time_passed(now),
        }
    }

    fn worker_ended(&mut self, rank: usize, exit: Exit, now: Instant) -> Option<Order> {
        match (exit, self.cause) {
            (Exit::Code(0), _) => None,
            (Exit::PREEMPTED, _) => {
                self.saved = true;
                // One that heard of it by itself: all ranks have agreed on the step with it.
                self.begin_saving(None, now);
                None
            }
            // A program that knows nothing of preemption is ended by the signal.
            (Exit::Signal(by), Some(Cause::Preempted { signal: Some(sent) })) if by == sent => {
                self.is_incomplete = true;
                self.end_saving(self.ending)
            }
            (_, Some(Cause::Preempted { .. })) => {
                self.is_incomplete = true;
                let order = self.end_saving(END_OF_SAVING);
                if order.is_some() {
                    (self.cause, self.is_final) = (Some(Cause::Failure { rank, exit }), true);
                }
                order
            }
            _ => self.stop(Cause::Failure { rank, exit }, self.ending, now),
        }
    }

    /// The signal is handed on; an INT while the job ends already, the user's second Ctrl-C, ends
    /// it at once. What asks workers to end that are saving anyway would only interrupt them.
    fn signalled(&mut self, signal: i32, now: Instant) -> Option<Order> {
        self.call_off(Cause::Signal(signal));
        match self.phase {
            Phase::Running => self.stop(Cause::Signal(signal), signal, now),
            Phase::Inspecting { .. } => self.end_inspection(signal, now),
            Phase::Saving { .. } | Phase::Stopping { .. } if signal == libc::SIGINT => {
                Some(self.kill(now))
            }
            Phase::Stopping { .. } => Some(Order::Signal(signal)),
            Phase::Saving { .. } | Phase::Killing { .. } | Phase::Abandoned => None,
        }
    }

    fn preemption_asked(&mut self, signal: i32, now: Instant) -> Option<Order> {
        self.call_off(Cause::Preempted { signal: Some(signal) });
        match self.phase {
            Phase::Saving { .. } | Phase::Stopping { .. } if signal == libc::SIGINT => {
                Some(self.kill(now))
            }
            _ => self.begin_saving(Some(signal), now).then_some(Order::Ask(signal)),
        }
    }

    /// The same happens here, as if it had happened to this node.
    fn peer_ends(&mut self, cause: Cause, now: Instant) -> Option<Order> {
        match cause {
            Cause::Preempted { signal } => {
                let begins = self.begin_saving(signal, now);
                signal.filter(|_| begins).map(Order::Ask)
            }
            Cause::Signal(signal) => self.stop(cause, signal, now),
            Cause::Hang { .. } => self.inspect(cause, now),
            Cause::Failure { .. } | Cause::NodeLost { .. } | Cause::LauncherFailed { .. }
                if self.is_saving() =>
            {
                self.cause = Some(cause);
                self.end_saving(END_OF_SAVING)
            }
            _ => self.stop(cause, self.ending, now),
        }
    }

    /// The job is to end. An attempt that is ending anyway keeps its cause, but nothing follows it.
    fn call_off(&mut self, by: Cause) {
        let fails = matches!(self.cause, Some(Cause::Failure { .. } | Cause::Hang { .. }));
        if fails && self.called_off.is_none() {
            self.called_off = Some(by);
        }
    }

    fn may_kill(&self) -> bool {
        !matches!(self.phase, Phase::Killing { .. } | Phase::Abandoned)
    }

    /// Nothing is left: the end, or all over again.
    fn all_gone(&mut self, step: Option<u64>) -> Option<Order> {
        self.verdict = Verdict::End;
        let is_final = self.is_final || self.is_abandoned();
        let cause = self.cause.filter(|_| !is_final)?;
        self.verdict = self.restarts.after(cause, step);
        let Verdict::Restart(number) = self.verdict else { return None };
        if let Some(by) = self.called_off {
            self.verdict = Verdict::CalledOff(by);
            return None;
        }
        (self.phase, self.cause) = (Phase::Running, None);
        (self.saved, self.is_incomplete) = (false, false);
        Some(Order::Restart(number))
    }

    /// When [`Event::TimePassed`] has an effect next.
    pub fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Inspecting { until: at }
            | Phase::Saving { kill_at: at }
            | Phase::Stopping { kill_at: at } => at,
            Phase::Killing { abandon_at } => Some(abandon_at),
            Phase::Running | Phase::Abandoned => None,
        }
    }

    fn time_passed(&mut self, now: Instant) -> Option<Order> {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return None;
        }
        match self.phase {
            Phase::Inspecting { .. } => self.end_inspection(self.ending, now),
            Phase::Killing { .. } => {
                self.phase = Phase::Abandoned;
                Some(Order::Abandon)
            }
            _ => Some(self.kill(now)),
        }
    }

    /// Why this attempt ended, if not by all workers' success.
    pub fn cause(&self) -> Option<Cause> {
        self.cause
    }

    /// What has asked for the end of the job since.
    pub fn called_off(&self) -> Option<Cause> {
        self.called_off
    }

    /// What followed from it.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Whether a worker has said that a checkpoint is saved.
    pub fn has_saved(&self) -> bool {
        self.saved
    }

    /// Whether a worker that was asked to save has ended without.
    pub fn is_incomplete(&self) -> bool {
        self.is_incomplete
    }

    /// Whether the workers were told to end.
    pub fn was_stopped(&self) -> bool {
        !matches!(self.phase, Phase::Running | Phase::Saving { .. })
    }

    /// Whether something is left that cannot be killed.
    pub fn is_abandoned(&self) -> bool {
        self.phase == Phase::Abandoned
    }

    /// Whether the workers may still be doing what they were started for.
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// Whether the workers hang, and are looked at.
    pub fn is_inspecting(&self) -> bool {
        matches!(self.phase, Phase::Inspecting { .. })
    }

    /// The launcher's exit code, once all workers have ended for good.
    pub fn exit_code(&self) -> u8 {
        match (self.verdict, self.cause) {
            (Verdict::Exhausted, _) => exit_code::OUT_OF_RESTARTS,
            (Verdict::NoProgress, _) => exit_code::DO_NOT_REQUEUE,
            (Verdict::CalledOff(by), _) => code_of(by),
            (Verdict::End | Verdict::Restart(_), cause) => match cause {
                None => exit_code::OK,
                Some(Cause::Preempted { .. }) if self.saved && !self.is_incomplete => {
                    exit_code::PREEMPTED
                }
                // Without a kill they were done before they heard of it.
                Some(Cause::Preempted { .. }) if self.is_saving() => exit_code::OK,
                Some(cause) => code_of(cause),
            },
        }
    }

    fn is_saving(&self) -> bool {
        matches!(self.phase, Phase::Saving { .. })
    }

    fn begin_saving(&mut self, signal: Option<i32>, now: Instant) -> bool {
        let begins = self.phase == Phase::Running;
        if begins {
            self.cause = Some(Cause::Preempted { signal });
            self.phase = Phase::Saving { kill_at: now.checked_add(self.grace) };
        }
        begins
    }

    /// One has ended without saving: the others end too, by `signal`, and are killed when they would have been.
    fn end_saving(&mut self, signal: i32) -> Option<Order> {
        let Phase::Saving { kill_at } = self.phase else { return None };
        self.phase = Phase::Stopping { kill_at };
        Some(Order::Signal(signal))
    }

    fn inspect(&mut self, cause: Cause, now: Instant) -> Option<Order> {
        if self.cause.is_some() {
            return None;
        }
        self.cause = Some(cause);
        self.phase = Phase::Inspecting { until: now.checked_add(self.inspection) };
        Some(Order::Inspect)
    }

    fn end_inspection(&mut self, signal: i32, now: Instant) -> Option<Order> {
        self.is_inspecting().then(|| {
            self.phase = Phase::Stopping { kill_at: now.checked_add(self.grace) };
            Order::Signal(signal)
        })
    }

    fn stop(&mut self, cause: Cause, signal: i32, now: Instant) -> Option<Order> {
        if self.cause.is_some() {
            return None;
        }
        self.cause = Some(cause);
        // A grace beyond what the clock can count is no deadline.
        self.phase = Phase::Stopping { kill_at: now.checked_add(self.grace) };
        Some(Order::Signal(signal))
    }

    fn kill(&mut self, now: Instant) -> Order {
        self.phase = Phase::Killing { abandon_at: now + KILL_PATIENCE };
        Order::Kill
    }
}

/// The exit code of a job that ends for a cause, and has saved nothing over it.
fn code_of(cause: Cause) -> u8 {
    match cause {
        Cause::Failure { exit, .. } => exit.code(),
        Cause::Hang { .. } => exit_code::HANG,
        Cause::Signal(signal) => exit_code::of_signal(signal),
        Cause::Preempted { signal } => exit_code::of_signal(signal.unwrap_or(libc::SIGKILL)),
        Cause::NodeLost { .. } => exit_code::NODE_LOST,
        Cause::LauncherFailed { code } => code,
        Cause::OutputClosed => exit_code::of_signal(libc::SIGPIPE),
    }
}
