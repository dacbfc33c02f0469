//! One worker's share of the output: how its lines are marked and remembered, and its own file.

use std::time::{Duration, Instant};

use super::template::Prefix;
use super::{LogFile, Stream, Tail};

/// A progress bar writes a status many times a second. A file takes one so often, so that it shows
/// that the worker is alive.
const STATUS_EVERY: Duration = Duration::from_secs(10);

/// One worker's output.
pub struct Voice {
    /// Its rank.
    pub rank: usize,
    /// Its last lines.
    pub tail: Tail,
    /// Whether the console shows it.
    pub(super) is_shown: bool,
    /// Its file in the log directory.
    pub(super) file: Option<LogFile>,
    streams: [StreamState; 2],
}

/// What is kept of one of its streams.
struct StreamState {
    prefix: Prefix,
    /// The status that stands, while no file has it.
    status: Option<Vec<u8>>,
    /// When a file had one last, or the first one came.
    sampled: Option<Instant>,
}

impl Voice {
    /// The prefixes are those of stdout and stderr.
    pub(super) fn new(
        rank: usize,
        prefixes: [Prefix; 2],
        is_shown: bool,
        file: Option<LogFile>,
    ) -> Self {
        let state = |prefix| StreamState { prefix, status: None, sampled: None };
        Self { rank, tail: Tail::default(), is_shown, file, streams: prefixes.map(state) }
    }

    /// Whether the console shows it, so that it may have to wait for the console's reader.
    pub fn is_shown(&self) -> bool {
        self.is_shown
    }

    /// The file that has all its lines.
    pub fn path(&self) -> Option<&std::path::Path> {
        self.file.as_ref().map(LogFile::path)
    }

    /// What lines of a stream begin with, and the file that they go to.
    pub(super) fn parts(&mut self, stream: Stream) -> (&mut Prefix, Option<&mut LogFile>) {
        (&mut self.streams[stream as usize].prefix, self.file.as_mut())
    }

    /// Takes a new status of a stream, and gives it back where a file is to have it.
    pub(super) fn set_status(
        &mut self,
        stream: Stream,
        status: &[u8],
        now: Instant,
    ) -> Option<Vec<u8>> {
        let state = &mut self.streams[stream as usize];
        let kept = state.status.get_or_insert_default();
        kept.clear();
        kept.extend_from_slice(status);
        let due = *state.sampled.get_or_insert(now) + STATUS_EVERY;
        if now < due {
            return None;
        }
        state.sampled = Some(now);
        state.status.take()
    }

    /// Takes the status of a stream away: a line stands in its place, or the stream has ended.
    pub(super) fn take_status(&mut self, stream: Stream) -> Option<Vec<u8>> {
        self.streams[stream as usize].status.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::template::{Fields, Template};

    #[test]
    fn a_progress_bar_is_sampled() {
        let fields = Fields { rank: 0, local_rank: 0, host: "", stream: "" };
        let prefix = || Template::default().fill(fields);
        let mut voice = Voice::new(0, [prefix(), prefix()], true, None);
        let start = Instant::now();
        let mut given = Vec::new();
        for second in 0..25 {
            let status = format!("{second} %");
            let now = start + Duration::from_secs(second);
            given.extend(voice.set_status(Stream::Stderr, status.as_bytes(), now));
        }
        assert_eq!(given, [b"10 %", b"20 %"]);
        assert_eq!(voice.take_status(Stream::Stdout), None);
        assert_eq!(voice.take_status(Stream::Stderr).as_deref(), Some(&b"24 %"[..]));
        assert_eq!(voice.take_status(Stream::Stderr), None, "once");
    }
}
