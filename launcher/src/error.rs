//! What can keep a job from starting, or the launcher from watching it.

use std::io;

use crate::contract::exit_code;
use crate::sys;

/// A failure of the launcher itself; the failure of a worker is not an error but an outcome.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The command line or the machine cannot give what was asked for.
    #[error("{0}")]
    Usage(String),
    /// The launch ends with this exit code, and the user has been told why: by the check step, or
    /// before others had to be told.
    #[error("ended with exit code {0}")]
    Told(u8),
    /// The launcher was told to end before it had started a worker.
    #[error("{} by {} before any worker was started", if *makes_room { "preempted" } else { "ended" },
        sys::signal_name(*signal))]
    Signalled {
        /// By this signal.
        signal: i32,
        /// Whether it asks to make room.
        makes_room: bool,
    },
    /// The nodes do not come together.
    #[error("{line}")]
    Nodes {
        /// Why.
        line: String,
        /// What all of them exit with.
        code: u8,
    },
    /// The operating system refused something that a launch needs.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried, as a verb phrase.
        action: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl LaunchError {
    /// Wraps an I/O error together with what was tried, for `map_err`.
    pub fn system(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::System { action, source }
    }

    /// The line to show, or `None` where the user has already seen one.
    pub fn line(&self) -> Option<String> {
        match self {
            Self::Told(_) => None,
            Self::Usage(_) | Self::Signalled { .. } | Self::Nodes { .. } | Self::System { .. } => {
                Some(self.to_string())
            }
        }
    }

    /// The launcher's exit code for this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => exit_code::USER_ERROR,
            Self::Told(code) | Self::Nodes { code, .. } => *code,
            // Nothing is lost: another start does all that this one would have done.
            Self::Signalled { makes_room: true, .. } => exit_code::PREEMPTED,
            Self::Signalled { signal, .. } => exit_code::of_signal(*signal),
            Self::System { .. } => exit_code::FAILURE,
        }
    }
}
