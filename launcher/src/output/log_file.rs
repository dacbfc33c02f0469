//! A file that lines are appended to, for as long as the disk lets it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use memchr::{memchr_iter, memrchr};

/// Lines are collected up to this size, or until the event loop has nothing else to do.
const BUFFER: usize = 64 * 1024;

/// One log file. A line that the disk does not take is left out whole and counted; the gap is
/// marked as soon as there is room again.
pub struct LogFile {
    file: File,
    path: PathBuf,
    buffer: Vec<u8>,
    /// Lines left out since the last one that was written.
    lost: u64,
    error: Option<io::Error>,
}

impl LogFile {
    /// Opens a file to append to: what an earlier launch has left there stays.
    pub fn open(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        Ok(Self { file, path, buffer: Vec::new(), lost: 0, error: None })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes a line, and ends it.
    pub fn line(&mut self, prefix: &[u8], line: &[u8]) {
        if self.buffer.len() + prefix.len() + line.len() >= BUFFER {
            self.write();
        }
        self.buffer.extend_from_slice(prefix);
        self.buffer.extend_from_slice(line);
        self.buffer.push(b'\n');
    }

    /// Writes what has been taken. `gap` makes the line that marks a gap of so many lines. The error
    /// is the first one since the last call; the lines that it cost are forgotten.
    pub fn flush(&mut self, gap: impl FnOnce(u64) -> Vec<u8>) -> io::Result<()> {
        if !self.buffer.is_empty() && self.lost > 0 {
            let mut mark = gap(self.lost);
            mark.push(b'\n');
            match self.file.write(&mark) {
                Ok(count) if count == mark.len() => self.lost = 0,
                Ok(count) => self.take_back(count),
                // The lines behind it fail as well, and say why.
                Err(_) => {}
            }
        }
        self.write();
        self.error.take().map_or(Ok(()), Err)
    }

    fn write(&mut self) {
        let mut written = 0;
        while written < self.buffer.len() {
            match self.file.write(&self.buffer[written..]) {
                Ok(count) if count > 0 => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                failed => {
                    self.give_up(written);
                    let error = failed.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                    self.error.get_or_insert(error);
                    break;
                }
            }
        }
        self.buffer.clear();
        // One huge line does not stay in memory.
        self.buffer.shrink_to(BUFFER);
    }

    /// The disk has taken so much of the buffer and no more: half a line is taken back.
    fn give_up(&mut self, written: usize) {
        let whole = memrchr(b'\n', &self.buffer[..written]).map_or(0, |at| at + 1);
        self.lost += memchr_iter(b'\n', &self.buffer[whole..]).count() as u64;
        if written > whole {
            self.take_back(written - whole);
        }
    }

    /// Removes the last `bytes` of the file, the beginning of a line.
    fn take_back(&self, bytes: usize) {
        // Best effort: making a file shorter needs no room, but a disk may have other troubles.
        let length = self.file.metadata().map(|metadata| metadata.len());
        let _ = length.and_then(|length| self.file.set_len(length.saturating_sub(bytes as u64)));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use std::fs;

    use super::*;

    fn gap(lines: u64) -> Vec<u8> {
        format!("{lines} missing").into_bytes()
    }

    #[test]
    fn lines_are_appended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        for text in ["one", "two"] {
            let mut file = LogFile::open(path.clone()).unwrap();
            file.line(b"> ", text.as_bytes());
            file.flush(gap).unwrap();
        }
        assert_eq!(fs::read_to_string(path).unwrap(), "> one\n> two\n");
    }

    #[test]
    fn what_a_full_disk_does_not_take_is_counted_and_marked() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = LogFile::open("/dev/full".into()).unwrap();
        for line in 0..3000 {
            file.line(b"", format!("{line:0100}").as_bytes());
        }
        let error = file.flush(gap).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(file.lost, 3000);
        file.flush(gap).unwrap();
        // The disk has room again.
        let path = folder.path().join("a.log");
        file.file = LogFile::open(path.clone()).unwrap().file;
        file.line(b"", b"next");
        file.flush(gap).unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "3000 missing\nnext\n");
    }

    #[test]
    fn half_a_line_is_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.log");
        let mut file = LogFile::open(path.clone()).unwrap();
        file.buffer.extend_from_slice(b"one\ntwo\nthree\n");
        fs::write(&path, b"one\ntw").unwrap();
        file.give_up(6);
        assert_eq!(file.lost, 2);
        assert_eq!(fs::read_to_string(path).unwrap(), "one\n");
    }
}
