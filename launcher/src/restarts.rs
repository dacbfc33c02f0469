//! Whether a job that has failed is started again: pure, so that the launchers of several nodes, which
//! have the same facts, come to the same verdict.

use crate::contract::exit_code;
use crate::lifecycle::{Cause, Exit};

/// Restarts in a row that may end without a step that no attempt reached before.
const MAX_WITHOUT_PROGRESS: u32 = 3;

/// What follows an attempt that did not end well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Start all workers again; the number of this restart, from 1.
    Restart(u32),
    /// The end, with the attempt's own exit code.
    End,
    /// The end: all restarts are used up.
    Exhausted,
    /// The end: the last restarts came no further than the one before them.
    NoProgress,
    /// The end, in place of a restart: this has asked for it while the attempt was ending.
    CalledOff(Cause),
}

/// The restarts of a job so far.
#[derive(Debug, Clone, Copy)]
pub struct Restarts {
    max: u32,
    used: u32,
    /// The newest step that any attempt has reached, as far as heartbeats tell.
    newest: Option<u64>,
    /// Restarts in a row that did not reach a newer one.
    without_progress: u32,
}

impl Restarts {
    /// At most `max` of them.
    pub fn new(max: u32) -> Self {
        Self { max, used: 0, newest: None, without_progress: 0 }
    }

    /// An attempt has ended for `cause`; `step` is the newest that a heartbeat told of, `None`
    /// where none did: what a silent program has done cannot be known, and counts as progress.
    pub fn after(&mut self, cause: Cause, step: Option<u64>) -> Verdict {
        let is_further = step.is_none_or(|step| self.newest.is_none_or(|newest| step > newest));
        self.without_progress = if is_further { 0 } else { self.without_progress + 1 };
        self.newest = self.newest.max(step);
        if self.max == 0 || !is_curable(cause) {
            return Verdict::End;
        }
        if self.used == self.max {
            return Verdict::Exhausted;
        }
        if self.without_progress == MAX_WITHOUT_PROGRESS {
            return Verdict::NoProgress;
        }
        self.used += 1;
        Verdict::Restart(self.used)
    }
}

/// Whether another attempt may end otherwise.
fn is_curable(cause: Cause) -> bool {
    const INCURABLE: [u8; 2] = [exit_code::USER_ERROR, exit_code::DO_NOT_REQUEUE];
    match cause {
        Cause::Failure { exit: Exit::Code(code), .. } => !INCURABLE.map(i32::from).contains(&code),
        Cause::Failure { exit: Exit::Signal(_), .. } | Cause::Hang { .. } => true,
        Cause::Signal(_)
        | Cause::Preempted { .. }
        | Cause::OutputClosed
        | Cause::NodeLost { .. }
        | Cause::LauncherFailed { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(code: i32) -> Cause {
        Cause::Failure { rank: 0, exit: Exit::Code(code) }
    }

    #[test]
    fn restarts_are_counted_and_used_up() {
        let mut restarts = Restarts::new(2);
        assert_eq!(restarts.after(failure(1), Some(5)), Verdict::Restart(1));
        assert_eq!(restarts.after(Cause::Hang { rank: None }, Some(9)), Verdict::Restart(2));
        assert_eq!(restarts.after(failure(1), Some(12)), Verdict::Exhausted);
        assert_eq!(Restarts::new(0).after(failure(1), None), Verdict::End);
    }

    #[test]
    fn what_would_fail_again_is_not_restarted() {
        for cause in [
            failure(2),
            failure(43),
            Cause::Signal(15),
            Cause::Preempted { signal: None },
            Cause::OutputClosed,
            Cause::NodeLost { node: 1 },
            Cause::LauncherFailed { code: 1 },
        ] {
            assert_eq!(Restarts::new(9).after(cause, None), Verdict::End, "{cause:?}");
        }
    }

    #[test]
    fn three_restarts_without_progress_are_the_end() {
        let mut restarts = Restarts::new(99);
        let steps = [7, 7, 5, 8, 8, 8];
        for (number, step) in (1..).zip(steps) {
            assert_eq!(restarts.after(failure(1), Some(step)), Verdict::Restart(number));
        }
        assert_eq!(restarts.after(failure(1), Some(8)), Verdict::NoProgress);
    }

    #[test]
    fn a_silent_program_is_restarted_as_often_as_allowed() {
        let mut restarts = Restarts::new(10);
        for number in 1..=10 {
            assert_eq!(restarts.after(failure(1), None), Verdict::Restart(number));
        }
        assert_eq!(restarts.after(failure(1), None), Verdict::Exhausted);
    }
}
