//! One error type for the library. Every variant ends in one clear line that says where the
//! trouble is and what was expected.

use std::fmt::Display;
use std::io::Write as _;
use std::path::PathBuf;

/// The result of everything in this crate that a user, a disk or a peer can make fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Writes a line to stderr. Where that fails, on a full disk or for a reader that has left, it is lost:
/// `eprintln!` would end the process over it.
pub fn tell(line: impl Display) {
    // One write, so that lines of several processes stay whole.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// What can go wrong. `Display` is the one line a user reads: lower case, no trailing full stop.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration file holds something that cannot be used.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Config {
        /// The YAML file, or `--set key=value` for an override.
        path: PathBuf,
        /// One-based line.
        line: usize,
        /// One-based column.
        column: usize,
        /// What is wrong and what was expected.
        message: String,
    },
    /// A data file holds something that cannot be used.
    #[error("{}:{line}: {message}", path.display())]
    Data {
        /// The data file.
        path: PathBuf,
        /// One-based line.
        line: usize,
        /// What is wrong and what was expected.
        message: String,
    },
    /// A file as a whole (a model directory, a tokenizer, an empty data set) cannot be used.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong and what was expected.
        message: String,
    },
    /// The command line or the environment asks for something that cannot be done.
    #[error("{0}")]
    Usage(String),
    /// The operating system refused a file operation.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried, as a verb phrase: "read", "create the directory".
        action: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A checkpoint could not be saved, and the run ends over it.
    #[error(
        "cannot save a checkpoint: {0}; any earlier ones are whole, start again to go on from them"
    )]
    Save(Box<Error>),
    /// A model could not be saved, and the run ends over it.
    #[error(
        "cannot save the model: {0}; make room or mend the disk, and start again: the run goes on \
         from its newest checkpoint"
    )]
    SaveModel(Box<Error>),
    /// A checkpoint is of a version of the format that this program does not know.
    #[error(
        "{}: format_version is {found}, this program reads {known}; it was written by {program}: go on \
         with that, or begin anew with --resume never --overwrite",
        path.display()
    )]
    OtherVersion {
        /// The manifest.
        path: PathBuf,
        /// The version that it gives.
        found: String,
        /// The version that this program reads.
        known: u32,
        /// The program that wrote it.
        program: String,
    },
    /// A rank cannot read a checkpoint, which says nothing of whether it is whole: what a mount or another
    /// start may mend.
    #[error("{}: {message}", path.display())]
    CannotRead {
        /// The checkpoint.
        path: PathBuf,
        /// Who cannot, and what to look at.
        message: String,
    },
    /// The disk has no room for what must be written.
    #[error(
        "{}: {:.1} MB needed, {:.1} MB free; make room, or lower num_max_checkpoints",
        path.display(), *needed as f64 / 1e6, *free as f64 / 1e6
    )]
    NoRoom {
        /// The directory.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// Another rank could not save its part of a checkpoint, and says why.
    #[error("rank {0} could not save its part of the checkpoint; its own message says why")]
    PeerCannotSave(usize),
    /// Another rank could not take up what the run goes on from, and says why.
    #[error("rank {0} could not take up what the run goes on from; its own message says why")]
    PeerCannotLoad(usize),
    /// libtorch refused an operation; ours to mend, not the user's.
    #[error("libtorch: {0}")]
    Torch(String),
    /// Another worker, or the way to it, failed.
    #[error("rank {rank}: {operation} failed: {message}")]
    Comm {
        /// The rank that noticed.
        rank: usize,
        /// The collective or the rendezvous step.
        operation: String,
        /// What the backend said.
        message: String,
    },
    /// Training ran off to values that are not finite: every start from the same weights would.
    #[error("{0}")]
    Diverged(String),
    /// Asked to make room in the middle of scoring; what is scored is kept.
    #[error("asked to make room; what is scored is kept, start again to go on")]
    Preempted,
    /// Training arrived at something it cannot go on from.
    #[error("{0}")]
    Training(String),
}

impl Error {
    /// The process exit code for this error: 2 where the user can mend it, 4 where
    /// a checkpoint or a model could not be saved, 41 where it made room, 43 where starting again would end alike, 1 otherwise.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config { .. }
            | Self::Data { .. }
            | Self::File { .. }
            | Self::Usage(_)
            | Self::OtherVersion { .. }
            | Self::Io { .. } => 2,
            Self::Save(_) | Self::SaveModel(_) => rr_launch::contract::exit_code::CANNOT_SAVE,
            Self::Diverged(_) => rr_launch::contract::exit_code::DO_NOT_REQUEUE,
            Self::Preempted => rr_launch::contract::exit_code::PREEMPTED,
            Self::CannotRead { .. }
            | Self::NoRoom { .. }
            | Self::PeerCannotSave(_)
            | Self::PeerCannotLoad(_)
            | Self::Torch(_)
            | Self::Comm { .. }
            | Self::Training(_) => 1,
        }
    }
}
