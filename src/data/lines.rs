//! Lines of a plain or compressed file, with bounded memory.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};

/// The longest line that is read; a longer one is a bad record, not a reason to run out of memory.
const MAX_LINE_BYTES: usize = 64 << 20;

/// What is said of a line that is too long.
pub(crate) fn too_long() -> String {
    format!("the line is over {} MiB long, expected one record a line", MAX_LINE_BYTES >> 20)
}

/// Hands each line of a plain, gzip or zstd file to `each`, which may say what is wrong with it.
///
/// # Errors
/// [`Error::Data`] with the line; [`Error::Io`] or [`Error::File`] when the file cannot be read.
pub fn text_lines(path: &Path, mut each: impl FnMut(&str) -> Result<(), String>) -> Result<()> {
    let mut lines = Lines::open(path)?.0;
    loop {
        let before = lines.number();
        let line = lines.next().map_err(|source| Error::File {
            path: path.to_owned(),
            message: format!("cannot read on after line {before}: {source}"),
        })?;
        let done = match line {
            None => return Ok(()),
            Some(Line::TooLong) => Err(too_long()),
            Some(Line::Bytes(bytes)) => utf8(bytes).and_then(&mut each),
        };
        let line = before as usize + 1;
        done.map_err(|message| Error::Data { path: path.to_owned(), line, message })?;
    }
}

/// The text of a line.
pub(super) fn utf8(line: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(line).map_err(|error| {
        format!("not UTF-8 at byte {} of the line, expected UTF-8", error.valid_up_to() + 1)
    })
}

const BUFFER_BYTES: usize = 1 << 18;

/// One line of input, without its end (`\n` or `\r\n`).
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    /// The bytes of the line, not yet checked to be UTF-8.
    Bytes(&'a [u8]),
    /// The line was longer than the limit and has been skipped.
    TooLong,
}

/// Reads lines one at a time into one buffer, and counts them.
pub(crate) struct Lines<R> {
    reader: R,
    buffer: Vec<u8>,
    limit: usize,
    line: u32,
}

impl Lines<Box<dyn BufRead + Send>> {
    /// Opens a file; gzip and zstd are recognised by their first bytes, whatever the name. Also
    /// gives the number of bytes of the file that have been read, which grows.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be opened or its first bytes cannot be read.
    pub(crate) fn open(path: &Path) -> Result<(Self, Arc<AtomicU64>)> {
        let io_error = |action| move |source| Error::Io { path: path.to_owned(), action, source };
        let file = File::open(path).map_err(io_error("open"))?;
        let read = Arc::new(AtomicU64::new(0));
        let file = Counted { file, read: Arc::clone(&read) };
        Ok((Self::from_reader(file).map_err(io_error("read"))?, read))
    }

    /// Lines of any input, which may be compressed.
    ///
    /// # Errors
    /// What the reader says of its first bytes.
    pub(crate) fn from_reader(reader: impl Read + Send + 'static) -> io::Result<Self> {
        Ok(Self::new(decompress(reader)?))
    }
}

impl<R: BufRead> Lines<R> {
    /// Lines of at most [`MAX_LINE_BYTES`].
    pub(crate) fn new(reader: R) -> Self {
        Self { reader, buffer: Vec::new(), limit: MAX_LINE_BYTES, line: 0 }
    }

    /// The one-based number of the line read last.
    pub(crate) fn number(&self) -> u32 {
        self.line
    }

    /// The next line, or `None` at the end. A byte order mark before the first line is dropped.
    ///
    /// # Errors
    /// What the reader says; for compressed input also a damaged stream.
    pub(crate) fn next(&mut self) -> io::Result<Option<Line<'_>>> {
        self.buffer.clear();
        // One byte for "\n" and one more for "\r".
        let limit = self.limit as u64 + 2;
        if self.reader.by_ref().take(limit).read_until(b'\n', &mut self.buffer)? == 0 {
            return Ok(None);
        }
        self.line += 1;
        let ended = self.buffer.last() == Some(&b'\n');
        if !ended && self.buffer.len() as u64 == limit {
            skip_line(&mut self.reader)?;
            return Ok(Some(Line::TooLong));
        }
        let mut bytes = self.buffer.strip_suffix(b"\n").unwrap_or(&self.buffer);
        bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
        if self.line == 1 {
            bytes = bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes);
        }
        Ok(Some(if bytes.len() > self.limit { Line::TooLong } else { Line::Bytes(bytes) }))
    }
}

/// A file that counts what is read from it.
struct Counted {
    file: File,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.file.read(buffer)?;
        self.read.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}

/// Plain, gzip (RFC 1952) or Zstandard (RFC 8878) input by its magic number.
fn decompress(input: impl Read + Send + 'static) -> io::Result<Box<dyn BufRead + Send>> {
    let mut file = BufReader::with_capacity(BUFFER_BYTES, input);
    let start = file.fill_buf()?;
    Ok(if start.starts_with(&[0x1f, 0x8b]) {
        let decoder = flate2::bufread::MultiGzDecoder::new(file);
        Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder))
    } else if start.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        let decoder = zstd::stream::read::Decoder::with_buffer(file)?;
        Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder))
    } else {
        Box::new(file)
    })
}

fn skip_line(reader: &mut impl BufRead) -> io::Result<()> {
    loop {
        let available = reader.fill_buf()?;
        if available.is_empty() {
            return Ok(());
        }
        let newline = available.iter().position(|&byte| byte == b'\n');
        let used = newline.map_or(available.len(), |at| at + 1);
        reader.consume(used);
        if newline.is_some() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn read(bytes: &[u8], limit: usize) -> Vec<Option<Vec<u8>>> {
        let mut lines = Lines::new(bytes);
        lines.limit = limit;
        let mut out = Vec::new();
        while let Some(line) = lines.next().unwrap() {
            out.push(match line {
                Line::Bytes(bytes) => Some(bytes.to_vec()),
                Line::TooLong => None,
            });
        }
        assert_eq!(lines.number() as usize, out.len());
        out
    }

    #[test]
    fn line_ends_and_byte_order_mark_are_dropped() {
        let expected = vec![Some(b"a".to_vec()), Some(b"".to_vec()), Some(b"b".to_vec())];
        assert_eq!(read("\u{feff}a\r\n\nb".as_bytes(), 10), expected);
        assert_eq!(read(b"a\n\r\nb\n", 10), expected);
        assert!(read(b"", 10).is_empty());
    }

    #[test]
    fn a_long_line_is_skipped_whole() {
        let expected = vec![Some(b"1234".to_vec()), None, Some(b"x".to_vec())];
        assert_eq!(read(b"1234\r\n12345\nx", 4), expected);
        assert_eq!(read(b"1234\n1234567890123\nx\n", 4), expected);
        assert_eq!(read(b"1234567890123", 4), vec![None]);
    }
}
