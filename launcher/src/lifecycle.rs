//! What to do when something happens: a pure state machine, events in and orders out, without
//! processes or clocks of its own, so that every decision is tested as a table. The event loop
//! carries its orders out.
//!
//! Where several nodes take part, each launcher has one of these. What another node reports is one
//! more event, and what all of them know in the end replaces what this one saw.

use std::fmt;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::contract::exit_code;
use crate::restarts::{Restarts, Verdict};
use crate::sys;

/// How long killed processes may take to vanish. Only one that hangs inside the kernel, on a dead
/// file server or a broken driver, takes longer; the launcher does not hang with it.
const KILL_PATIENCE: Duration = Duration::from_secs(30);

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
            | Self::NodeLost { .. } => None,
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
        /// A worker has said that a checkpoint is saved.
        has_saved: bool,
        /// Workers had to be ended.
        was_stopped: bool,
        /// There can be no restart.
        is_final: bool,
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
    restarts: Restarts,
    phase: Phase,
    cause: Option<Cause>,
    /// A worker has said that a checkpoint is saved.
    saved: bool,
    verdict: Verdict,
}

impl Lifecycle {
    /// All workers run; `grace` is the time from TERM to KILL.
    pub fn new(grace: Duration, restarts: Restarts) -> Self {
        let (phase, verdict) = (Phase::Running, Verdict::End);
        Self { grace, restarts, phase, cause: None, saved: false, verdict }
    }

    /// Takes an event in, and says what to do.
    pub fn on(&mut self, event: Event, now: Instant) -> Option<Order> {
        match event {
            Event::WorkerEnded { rank, exit } => self.worker_ended(rank, exit, now),
            Event::Signalled(signal) => self.signalled(signal, now),
            Event::PreemptionAsked(signal) => self.preemption_asked(signal, now),
            Event::Hung { rank } => self.stop(Cause::Hang { rank }, libc::SIGTERM, now),
            Event::OutputClosed => self.stop(Cause::OutputClosed, libc::SIGTERM, now),
            Event::PeerEnds(cause) => self.peer_ends(cause, now),
            Event::PeerKills => self.may_kill().then(|| self.kill(now)),
            Event::Settled { cause, has_saved, was_stopped, is_final } => {
                (self.cause, self.saved) = (cause, has_saved);
                self.phase = match (is_final, was_stopped) {
                    (true, _) => Phase::Abandoned,
                    (false, true) => Phase::Stopping { kill_at: None },
                    (false, false) => Phase::Saving { kill_at: None },
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
                self.end_saving(now)
            }
            (_, Some(Cause::Preempted { .. })) => {
                let order = self.end_saving(now);
                if order.is_some() {
                    self.cause = Some(Cause::Failure { rank, exit });
                }
                order
            }
            _ => self.stop(Cause::Failure { rank, exit }, libc::SIGTERM, now),
        }
    }

    /// The signal is handed on; an INT while the job ends already, the user's second Ctrl-C, ends
    /// it at once. What asks workers to end that are saving anyway would only interrupt them.
    fn signalled(&mut self, signal: i32, now: Instant) -> Option<Order> {
        match self.phase {
            Phase::Running => self.stop(Cause::Signal(signal), signal, now),
            Phase::Saving { .. } | Phase::Stopping { .. } if signal == libc::SIGINT => {
                Some(self.kill(now))
            }
            Phase::Stopping { .. } => Some(Order::Signal(signal)),
            Phase::Saving { .. } | Phase::Killing { .. } | Phase::Abandoned => None,
        }
    }

    fn preemption_asked(&mut self, signal: i32, now: Instant) -> Option<Order> {
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
            Cause::Failure { .. } | Cause::NodeLost { .. } if self.is_saving() => {
                self.cause = Some(cause);
                self.end_saving(now)
            }
            _ => self.stop(cause, libc::SIGTERM, now),
        }
    }

    fn may_kill(&self) -> bool {
        !matches!(self.phase, Phase::Killing { .. } | Phase::Abandoned)
    }

    /// Nothing is left: the end, or all over again.
    fn all_gone(&mut self, step: Option<u64>) -> Option<Order> {
        self.verdict = Verdict::End;
        let cause = self.cause.filter(|_| self.phase != Phase::Abandoned)?;
        self.verdict = self.restarts.after(cause, step);
        let Verdict::Restart(number) = self.verdict else { return None };
        (self.phase, self.cause, self.saved) = (Phase::Running, None, false);
        Some(Order::Restart(number))
    }

    /// When [`Event::TimePassed`] has an effect next.
    pub fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Saving { kill_at } | Phase::Stopping { kill_at } => kill_at,
            Phase::Killing { abandon_at } => Some(abandon_at),
            Phase::Running | Phase::Abandoned => None,
        }
    }

    fn time_passed(&mut self, now: Instant) -> Option<Order> {
        if self.deadline().is_none_or(|deadline| now < deadline) {
            return None;
        }
        if matches!(self.phase, Phase::Killing { .. }) {
            self.phase = Phase::Abandoned;
            return Some(Order::Abandon);
        }
        Some(self.kill(now))
    }

    /// Why this attempt ended, if not by all workers' success.
    pub fn cause(&self) -> Option<Cause> {
        self.cause
    }

    /// What followed from it.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Whether a worker has said that a checkpoint is saved.
    pub fn has_saved(&self) -> bool {
        self.saved
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

    /// The launcher's exit code, once all workers have ended for good.
    pub fn exit_code(&self) -> u8 {
        match (self.verdict, self.cause) {
            (Verdict::Exhausted, _) => exit_code::OUT_OF_RESTARTS,
            (Verdict::NoProgress, _) => exit_code::DO_NOT_REQUEUE,
            (Verdict::End | Verdict::Restart(_), cause) => match cause {
                None => exit_code::OK,
                Some(Cause::Failure { exit, .. }) => exit.code(),
                Some(Cause::Hang { .. }) => exit_code::HANG,
                Some(Cause::Signal(signal)) => exit_code::of_signal(signal),
                Some(Cause::Preempted { .. }) if self.saved => exit_code::PREEMPTED,
                // Without a kill they were done before they heard of it.
                Some(Cause::Preempted { .. }) if self.is_saving() => exit_code::OK,
                Some(Cause::Preempted { signal }) => {
                    exit_code::of_signal(signal.unwrap_or(libc::SIGKILL))
                }
                Some(Cause::NodeLost { .. }) => exit_code::NODE_LOST,
                Some(Cause::OutputClosed) => exit_code::of_signal(libc::SIGPIPE),
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

    /// One has ended without saving: the others end too.
    fn end_saving(&mut self, now: Instant) -> Option<Order> {
        self.is_saving().then(|| {
            self.phase = Phase::Stopping { kill_at: now.checked_add(self.grace) };
            Order::Signal(libc::SIGTERM)
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

#[cfg(test)]
mod tests {
    use libc::{SIGHUP, SIGINT, SIGSEGV, SIGTERM, SIGUSR1};

    use super::*;

    const GRACE: Duration = Duration::from_secs(10);

    fn life(max_restarts: u32) -> Lifecycle {
        Lifecycle::new(GRACE, Restarts::new(max_restarts))
    }

    fn ended(rank: usize, code: i32) -> Event {
        Event::WorkerEnded { rank, exit: Exit::Code(code) }
    }

    fn killed(rank: usize, signal: i32) -> Event {
        Event::WorkerEnded { rank, exit: Exit::Signal(signal) }
    }

    const GONE: Event = Event::AllGone { step: None };
    const TERM: Option<Order> = Some(Order::Signal(SIGTERM));

    /// Events, all at one moment, with the order that each gives; then the launcher's exit code.
    fn check(max_restarts: u32, events: &[(Event, Option<Order>)], code: u8) {
        let (mut life, now) = (life(max_restarts), Instant::now());
        for (number, &(event, order)) in events.iter().enumerate() {
            assert_eq!(life.on(event, now), order, "event {number} of {events:?}");
        }
        assert_eq!(life.exit_code(), code, "{events:?}");
    }

    #[test]
    fn success_ends_nobody() {
        check(0, &[(ended(0, 0), None), (ended(1, 0), None), (GONE, None)], 0);
    }

    #[test]
    fn the_first_failure_is_the_cause() {
        let events =
            [(ended(2, 0), None), (killed(1, SIGSEGV), TERM), (ended(0, 1), None), (GONE, None)];
        check(0, &events, 139);
        check(0, &[(Event::Hung { rank: Some(3) }, TERM), (ended(0, 1), None), (GONE, None)], 40);
    }

    #[test]
    fn term_comes_before_kill() {
        let (mut life, start) = (life(0), Instant::now());
        assert_eq!(life.on(killed(1, SIGSEGV), start), TERM);
        assert_eq!(life.on(Event::TimePassed, start + GRACE / 2), None);
        assert_eq!(life.on(Event::TimePassed, start + GRACE), Some(Order::Kill));
        assert_eq!(life.on(Event::TimePassed, start + GRACE), None, "once");
        let late = start + GRACE + KILL_PATIENCE;
        assert_eq!(life.on(Event::TimePassed, late), Some(Order::Abandon));
        assert_eq!(life.deadline(), None);
        let exit = Exit::Signal(SIGSEGV);
        assert_eq!(life.cause(), Some(Cause::Failure { rank: 1, exit }));
        assert_eq!(life.on(GONE, late), None, "what cannot be killed holds its GPU");
    }

    #[test]
    fn signals_are_handed_on_and_a_second_int_kills() {
        let events = [
            (Event::Signalled(SIGTERM), TERM),
            (Event::Signalled(SIGHUP), Some(Order::Signal(SIGHUP))),
            (killed(0, SIGTERM), None),
            (Event::Signalled(SIGINT), Some(Order::Kill)),
            (Event::Signalled(SIGINT), None),
            (GONE, None),
        ];
        check(5, &events, 143);
    }

    #[test]
    fn a_closed_output_ends_the_job_like_sigpipe() {
        check(5, &[(Event::OutputClosed, TERM), (Event::OutputClosed, None), (GONE, None)], 141);
    }

    #[test]
    fn an_endless_grace_has_no_deadline() {
        let mut life = Lifecycle::new(Duration::MAX, Restarts::new(0));
        life.on(Event::Signalled(SIGINT), Instant::now());
        assert_eq!(life.deadline(), None);
    }

    #[test]
    fn workers_that_are_asked_to_make_room_save_and_end() {
        let asked = (Event::PreemptionAsked(SIGUSR1), Some(Order::Ask(SIGUSR1)));
        let again = (Event::PreemptionAsked(SIGUSR1), None);
        let saved = |rank| (ended(rank, 41), None);
        check(5, &[asked, again, saved(0), saved(1), (GONE, None)], 41);
        // A scheduler's TERM at the end of its patience does not interrupt them.
        check(0, &[asked, (Event::Signalled(SIGTERM), None), saved(1), saved(0), (GONE, None)], 41);
        check(0, &[asked, (Event::Signalled(SIGINT), Some(Order::Kill))], 138);
        let int = (Event::PreemptionAsked(SIGINT), Some(Order::Ask(SIGINT)));
        let second = (Event::PreemptionAsked(SIGINT), Some(Order::Kill));
        check(0, &[int, second], 130);
        check(0, &[int, (ended(1, 5), TERM), second], 5);
        check(0, &[asked, (ended(0, 0), None), (ended(1, 0), None), (GONE, None)], 0);
        // Srun sends the signal to the workers, and not to us.
        check(5, &[saved(1), saved(0), (GONE, None)], 41);
        // A program that knows nothing of it, and one that fails over it.
        check(
            5,
            &[asked, (killed(0, SIGUSR1), TERM), (killed(1, SIGUSR1), None), (GONE, None)],
            138,
        );
        check(0, &[asked, (ended(1, 4), TERM), (ended(0, 1), None), (GONE, None)], 4);
    }

    #[test]
    fn who_does_not_save_in_time_is_killed() {
        let (mut life, now) = (life(3), Instant::now());
        life.on(Event::PreemptionAsked(SIGUSR1), now);
        assert_eq!(life.on(Event::TimePassed, now + GRACE), Some(Order::Kill));
        assert_eq!(life.on(killed(0, libc::SIGKILL), now + GRACE), None);
        assert_eq!(life.on(GONE, now + GRACE), None);
        assert_eq!(life.exit_code(), 138);
    }

    #[test]
    fn a_failure_is_restarted_until_there_are_none_left() {
        let fails = (ended(1, 3), TERM);
        let again = |number| (GONE, Some(Order::Restart(number)));
        check(2, &[fails, again(1), fails, again(2), fails, (GONE, None)], 42);
        check(2, &[fails, again(1), (ended(0, 0), None), (ended(1, 0), None), (GONE, None)], 0);
        check(2, &[(ended(1, 2), TERM), (GONE, None)], 2);
        check(2, &[fails, again(1), (ended(0, 43), TERM), (GONE, None)], 43);
    }

    #[test]
    fn what_happens_on_another_node_happens_here() {
        let lost = Cause::NodeLost { node: 1 };
        let failed = Cause::Failure { rank: 5, exit: Exit::Code(9) };
        let settled = |cause, has_saved, was_stopped, is_final| {
            (Event::Settled { cause: Some(cause), has_saved, was_stopped, is_final }, None)
        };
        let ends = |cause| (Event::PeerEnds(cause), TERM);
        // The first cause of all replaces what this node saw first.
        let events = [(ended(0, 1), TERM), settled(failed, false, true, false), (GONE, None)];
        check(0, &events, 9);
        check(3, &[ends(lost), settled(lost, false, true, true), (GONE, None)], 44);
        let again = (GONE, Some(Order::Restart(1)));
        let events = [ends(failed), settled(failed, false, true, false), again];
        check(1, &events, 0);
        let asked = Cause::Preempted { signal: Some(SIGUSR1) };
        let ask = (Event::PeerEnds(asked), Some(Order::Ask(SIGUSR1)));
        check(
            3,
            &[ask, (ended(0, 41), None), settled(asked, true, false, false), (GONE, None)],
            41,
        );
        check(3, &[ask, ends(failed), settled(failed, true, true, false), again], 0);
        let int = Cause::Signal(SIGINT);
        let events = [
            (Event::PeerEnds(int), Some(Order::Signal(SIGINT))),
            (Event::PeerEnds(int), None),
            (Event::PeerKills, Some(Order::Kill)),
            (Event::PeerKills, None),
            settled(int, false, true, false),
            (GONE, None),
        ];
        check(3, &events, 130);
    }

    #[test]
    fn exits_read_well() {
        assert_eq!(Exit::Code(3).to_string(), "exited with code 3");
        assert_eq!(Exit::Signal(11).to_string(), "was killed by SIGSEGV (exit code 139)");
    }
}
