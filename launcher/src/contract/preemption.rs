//! Being asked to make room: a scheduler, or the launcher on its behalf, sends USR1, USR2 or the
//! signal in [`vars::RR_PREEMPT_SIGNAL`] before it ends a job. A worker that listens saves a
//! checkpoint and exits with [`exit_code::PREEMPTED`](super::exit_code::PREEMPTED).
//!
//! The signals work alike whoever sends them: rr-launch, `srun`, torchrun, or a person.

use super::{ContractError, vars};
use crate::sys;

/// The signals that ask for it, `also` beside USR1 and USR2.
#[must_use]
pub fn signals(also: Option<i32>) -> Vec<i32> {
    let mut all = vec![libc::SIGUSR1, libc::SIGUSR2];
    all.extend(also.filter(|signal| !all.contains(signal)));
    all
}

/// Signals that cannot be caught, or mean something else: a fault of the program, a child's end, that
/// a job stops or goes on. To wait for such a fault would hide it.
const NOT_ASKING: [i32; 14] = [
    libc::SIGKILL,
    libc::SIGSTOP,
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGABRT,
    libc::SIGSYS,
];

/// A signal by its name (`TERM`, `SIGTERM`) or number that can ask for it.
#[must_use]
pub fn parse_signal(text: &str) -> Option<i32> {
    sys::signal_number(text).filter(|signal| !NOT_ASKING.contains(signal))
}

/// What [`vars::RR_PREEMPT_SIGNAL`] holds. Empty it counts as unset.
#[must_use]
pub fn variable() -> Option<String> {
    std::env::var(vars::RR_PREEMPT_SIGNAL).ok().filter(|text| !text.is_empty())
}

/// What it is to hold for a signal: its name, where [`parse_signal`] knows that, or its number.
#[must_use]
pub fn value(signal: i32) -> String {
    let name = sys::signal_name(signal);
    if parse_signal(&name) == Some(signal) { name } else { signal.to_string() }
}

/// From now on the signals end this process no more, but are remembered; after the first, TERM does
/// not interrupt the saving either, which a scheduler sends when its patience ends. One that came
/// before counts, where whoever started this process has it blocked until now, as rr-launch does. To be
/// called before the process has other threads.
///
/// # Errors
/// [`ContractError`] where [`vars::RR_PREEMPT_SIGNAL`] names no signal, and where no thread can be started.
pub fn listen() -> Result<(), ContractError> {
    let also = match variable() {
        Some(text) => Some(parse_signal(&text).ok_or(ContractError::Invalid {
            name: vars::RR_PREEMPT_SIGNAL,
            value: text,
            expected: "a signal that can ask for it, such as TERM or USR1".to_owned(),
        })?),
        None => None,
    };
    sys::remember_signals(&signals(also)).map_err(|error| ContractError::Signals(error.to_string()))
}

/// Whether one has come since [`listen`].
#[must_use]
pub fn is_requested() -> bool {
    sys::remembered_signal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_understand_every_signal_that_the_launcher_takes() {
        assert_eq!(value(libc::SIGTERM), "SIGTERM");
        for signal in (1..64).filter(|signal| !NOT_ASKING.contains(signal)) {
            assert_eq!(parse_signal(&value(signal)), Some(signal));
        }
    }
}
