//! A queue in front of one of the launcher's own output streams.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};

use crate::sys;

/// What a write to a pipe may hold without the danger of waiting, once it is known to have room:
/// POSIX's smallest `PIPE_BUF` of Linux, one page. The stream may be shared with other programs, so it
/// cannot be switched to non-blocking. A terminal says that it has room when it has less: see
/// [`sys::reopen_terminal`].
const WRITE_AT_ONCE: usize = 4096;

/// From this many queued bytes on the workers' pipes are not read, so that they wait as they would
/// on the slow reader itself.
const HIGH_WATER: usize = 256 * 1024;

/// From this few on they are read again.
const LOW_WATER: usize = 64 * 1024;

/// Erases a terminal's current line and goes to its beginning.
const ERASE_LINE: &[u8] = b"\r\x1b[K";

/// How the reader of a sink keeps up, as the last flush found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// It has taken everything.
    Ready,
    /// It is slow; wait until there is room.
    Slow,
    /// It has gone away. Nothing is queued for it any more.
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Always has room.
    RegularFile,
    Terminal,
    /// A pipe, a socket, a device.
    Other,
}

/// One output stream: whole lines are queued, and written when there is room.
pub struct Sink {
    file: File,
    kind: Kind,
    queue: Vec<u8>,
    /// How much of `queue` is written.
    written: usize,
    /// The status to keep below all lines; empty for none.
    status: Vec<u8>,
    status_is_drawn: bool,
    reader: Reader,
    holds_back: bool,
}

impl Sink {
    /// A sink for an open stream.
    pub fn new(stream: BorrowedFd<'_>) -> io::Result<Self> {
        let mut file = File::from(stream.try_clone_to_owned()?);
        let kind = if file.is_terminal() {
            Kind::Terminal
        } else if file.metadata()?.is_file() {
            Kind::RegularFile
        } else {
            Kind::Other
        };
        if kind == Kind::Terminal {
            // One that may not be opened (it is another user's) is written to as it is.
            file = sys::reopen_terminal(stream).unwrap_or(file);
        }
        Ok(Self {
            file,
            kind,
            queue: Vec::new(),
            written: 0,
            status: Vec::new(),
            status_is_drawn: false,
            reader: Reader::Ready,
            holds_back: false,
        })
    }

    /// How the reader keeps up.
    pub fn reader(&self) -> Reader {
        self.reader
    }

    /// Queues one line, and ends it.
    pub fn line(&mut self, prefix: &[u8], line: &[u8]) {
        if self.reader == Reader::Gone {
            return;
        }
        self.erase_status();
        self.queue.reserve(prefix.len() + line.len() + 1);
        self.queue.extend_from_slice(prefix);
        self.queue.extend_from_slice(line);
        self.queue.push(b'\n');
    }

    /// Shows a status below all lines, in place of the last one. Only on a terminal.
    pub fn set_status(&mut self, status: &[u8]) {
        if self.kind == Kind::Terminal && self.reader != Reader::Gone {
            self.erase_status();
            let width = sys::terminal_width(self.file.as_fd()).unwrap_or(80);
            self.status = fit(status, width);
        }
    }

    /// Takes the status away.
    pub fn clear_status(&mut self) {
        self.erase_status();
        self.status.clear();
    }

    /// Writes what is queued, as far as there is room, and returns how the reader keeps up.
    pub fn flush(&mut self) -> Reader {
        if self.reader != Reader::Gone {
            self.draw_status();
            self.reader = self.write_queue();
        }
        self.reader
    }

    /// Whether the queue's length now changes whether workers should wait: `Some(true)` from the
    /// high mark on, until it is below the low mark, `Some(false)`.
    pub fn pressure_change(&mut self) -> Option<bool> {
        let mark = if self.holds_back { LOW_WATER } else { HIGH_WATER };
        let holds_back = self.pending() > mark;
        let changed = holds_back != self.holds_back;
        self.holds_back = holds_back;
        changed.then_some(holds_back)
    }

    /// Forgets that workers wait, as new ones do not yet.
    pub fn forget_pressure(&mut self) {
        self.holds_back = false;
    }

    /// Whether both write to the same file, pipe or terminal.
    pub fn is_same_as(&self, other: &Self) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt as _;
        let (own, other) = (self.file.metadata()?, other.file.metadata()?);
        Ok((own.dev(), own.ino()) == (other.dev(), other.ino()))
    }

    fn write_queue(&mut self) -> Reader {
        while self.pending() > 0 {
            if !sys::is_writable(self.file.as_fd()) {
                return Reader::Slow;
            }
            let rest = &self.queue[self.written..];
            let size = match self.kind {
                Kind::RegularFile => rest.len(),
                Kind::Terminal | Kind::Other => rest.len().min(WRITE_AT_ONCE),
            };
            match self.file.write(&rest[..size]) {
                Ok(count) => self.written += count,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => return Reader::Slow,
                    io::ErrorKind::BrokenPipe => {
                        self.forget();
                        return Reader::Gone;
                    }
                    // A full disk, a terminal that went away: the output is lost, the job is not.
                    _ => self.forget(),
                },
            }
        }
        self.forget();
        Reader::Ready
    }

    fn pending(&self) -> usize {
        self.queue.len() - self.written
    }

    fn draw_status(&mut self) {
        if !self.status.is_empty() && !self.status_is_drawn {
            self.queue.extend_from_slice(&self.status);
            self.status_is_drawn = true;
        }
    }

    fn erase_status(&mut self) {
        if self.status_is_drawn {
            self.queue.extend_from_slice(ERASE_LINE);
            self.status_is_drawn = false;
        }
    }

    fn forget(&mut self) {
        self.queue.clear();
        self.queue.shrink_to(LOW_WATER);
        self.written = 0;
    }
}

impl AsFd for Sink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Cuts a status so that it fills less than one row, counting one column a character and none for
/// colours (`ESC [ … letter`), all of which are kept.
fn fit(status: &[u8], width: usize) -> Vec<u8> {
    let text = String::from_utf8_lossy(status);
    let mut fitted = String::new();
    let mut columns = 0;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character == '\x1b' {
            fitted.push(character);
            for code in characters.by_ref() {
                fitted.push(code);
                if code.is_ascii_alphabetic() {
                    break;
                }
            }
        } else if columns + 1 < width {
            fitted.push(character);
            columns += 1;
        }
    }
    fitted.into_bytes()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use std::io::{PipeReader, Read as _};

    use super::*;

    fn piped() -> (PipeReader, Sink) {
        let (reader, writer) = io::pipe().unwrap();
        (reader, Sink::new(writer.as_fd()).unwrap())
    }

    #[test]
    fn lines_go_out_whole_and_in_order() {
        let (mut reader, mut sink) = piped();
        sink.line(b"[0] ", b"a");
        sink.line(b"[1] ", b"");
        sink.set_status(b"50%");
        assert_eq!(sink.flush(), Reader::Ready);
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "[0] a\n[1] \n", "a status is not for pipes");
    }

    #[test]
    fn a_full_pipe_blocks_nobody_and_loses_nothing() {
        let (mut reader, mut sink) = piped();
        let line = vec![b'x'; 999];
        for _ in 0..1000 {
            sink.line(b"", &line);
        }
        assert_eq!(sink.pressure_change(), Some(true));
        assert_eq!(sink.flush(), Reader::Slow);
        assert_eq!(sink.pressure_change(), None);
        let mut read = 0;
        let mut buffer = vec![0; 1 << 16];
        while read < 1_000_000 {
            read += reader.read(&mut buffer).unwrap();
            sink.flush();
        }
        assert_eq!((read, sink.flush()), (1_000_000, Reader::Ready));
        assert_eq!(sink.pressure_change(), Some(false));
    }

    #[test]
    fn nothing_is_queued_for_a_reader_that_went_away() {
        let (reader, mut sink) = piped();
        drop(reader);
        sink.line(b"", b"x");
        assert_eq!(sink.flush(), Reader::Gone);
        sink.line(b"", b"x");
        assert_eq!((sink.flush(), sink.pending()), (Reader::Gone, 0));
    }

    #[test]
    fn a_status_is_redrawn_below_the_lines() {
        let (mut reader, mut sink) = piped();
        sink.kind = Kind::Terminal;
        sink.set_status(b"50%");
        sink.flush();
        sink.line(b"[1] ", b"a");
        sink.flush();
        sink.clear_status();
        sink.flush();
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "50%\r\x1b[K[1] a\n50%\r\x1b[K");
    }

    #[test]
    fn a_status_fits_one_row() {
        assert_eq!(fit(b"12345678", 6), b"12345");
        assert_eq!(fit("\x1b[31m█████\x1b[0m".as_bytes(), 4), "\x1b[31m███\x1b[0m".as_bytes());
        assert_eq!(fit(b"ok", 80), b"ok");
    }
}
