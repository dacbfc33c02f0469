//! The signals to the launcher, which it takes over before it does anything else: as the first process
//! of a container it would not hear of one that it does not handle.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use crate::contract::preemption;
use crate::error::LaunchError;
use crate::sys::{self, Epoll, Interest, SignalFd};

/// What is asked of the launcher by signals.
pub struct Requests {
    signals: SignalFd,
    /// The signals that ask to make room.
    preempting: Vec<i32>,
}

impl Requests {
    /// From now on signals end this process no more, and none is lost. `also` asks to make room beside
    /// USR1 and USR2. To be called while there is one thread.
    pub fn take_over(also: Option<i32>) -> Result<Self, LaunchError> {
        let preempting = preemption::signals(also);
        let signals = SignalFd::open(&handled_signals(&preempting))
            .map_err(LaunchError::system("block signals"))?;
        Ok(Self { signals, preempting })
    }

    /// The next signal that has come, SIGCHLD included.
    pub fn next(&self) -> Option<i32> {
        self.signals.next()
    }

    /// Whether a signal asks to make room.
    pub fn asks_to_make_room(&self, signal: i32) -> bool {
        self.preempting.contains(&signal)
    }

    /// The signal that ends workers where nobody has sent one: TERM, and where that asks to make room HUP.
    /// Workers start with neither ignored, and hardly a program handles HUP: an INT would find a Python program
    /// that waits for its peers in a collective deaf until that returns.
    pub fn ending_signal(&self) -> i32 {
        if self.asks_to_make_room(libc::SIGTERM) { libc::SIGHUP } else { libc::SIGTERM }
    }

    /// Before any worker is started: a signal is the end.
    ///
    /// # Errors
    /// One has come.
    pub fn heed(&self) -> Result<(), LaunchError> {
        while let Some(signal) = self.next() {
            if signal != libc::SIGCHLD {
                let makes_room = self.asks_to_make_room(signal);
                return Err(LaunchError::Signalled { signal, makes_room });
            }
        }
        Ok(())
    }

    /// Waits for so long.
    ///
    /// # Errors
    /// A signal has come.
    pub fn pause(&self, time: Duration) -> Result<(), LaunchError> {
        let until = Instant::now() + time;
        let waiting = || LaunchError::system("wait");
        let mut epoll = Epoll::new().map_err(waiting())?;
        epoll.add(self.as_fd(), Interest::Read, 0).map_err(waiting())?;
        loop {
            self.heed()?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            epoll.wait(Some(left)).map_err(waiting())?;
        }
    }

    /// Wakes `epoll` when one has come, under this token.
    pub fn watch(&self, epoll: &Epoll, token: u64) -> io::Result<()> {
        epoll.add(self.as_fd(), Interest::Read, token)
    }
}

impl AsFd for Requests {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }
}

/// The signals that the launcher handles. One that it inherited as ignored (`nohup`, a background
/// job of a script) stays ignored, but for TERM, by which schedulers end a job.
fn handled_signals(preempting: &[i32]) -> Vec<i32> {
    let mut signals = vec![libc::SIGTERM, libc::SIGCHLD];
    let asked = [libc::SIGINT, libc::SIGHUP].iter().chain(preempting);
    signals.extend(asked.filter(|&&signal| !sys::is_ignored(signal)));
    signals
}
