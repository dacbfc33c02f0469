//! The bytes of a data set: sections in memory or in files, tables of texts and tokens in them.
//!
//! Numbers are little endian. A section is written once, front to back, and then only read.

use std::fmt;
use std::fs::File;
use std::io::{BufWriter, IntoInnerError, Write as _};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::mapped::Mapped;

/// Where the sections of a data set are put.
#[derive(Debug, Clone)]
pub(super) enum Place {
    Memory,
    /// Files in this directory, one a section.
    Directory(PathBuf),
}

/// What a section has to be, for finding damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Checksum {
    pub(super) bytes: u64,
    pub(super) crc32: u32,
}

impl Checksum {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, crc32: crc32fast::hash(bytes) }
    }
}

/// A section that is being written.
pub(super) enum Sink {
    Memory(Vec<u8>),
    File { path: PathBuf, file: BufWriter<File>, crc32: crc32fast::Hasher, bytes: u64 },
}

impl Sink {
    const BUFFER_BYTES: usize = 1 << 18;

    pub(super) fn new(place: &Place, name: &str) -> Result<Self> {
        let Place::Directory(dir) = place else { return Ok(Self::Memory(Vec::new())) };
        let path = dir.join(name);
        let file = File::create(&path).map_err(|source| Error::Io {
            path: path.clone(),
            action: "create",
            source,
        })?;
        let file = BufWriter::with_capacity(Self::BUFFER_BYTES, file);
        Ok(Self::File { path, file, crc32: crc32fast::Hasher::new(), bytes: 0 })
    }

    pub(super) fn write(&mut self, new: &[u8]) -> Result<()> {
        match self {
            Self::Memory(bytes) => bytes.extend_from_slice(new),
            Self::File { path, file, crc32, bytes } => {
                crc32.update(new);
                *bytes += new.len() as u64;
                file.write_all(new).map_err(|source| cannot_write(path, source))?;
            }
        }
        Ok(())
    }

    /// The section, flushed to the disk where it is a file.
    pub(super) fn finish(self) -> Result<(Bytes, Checksum)> {
        match self {
            Self::Memory(bytes) => {
                let checksum = Checksum { bytes: bytes.len() as u64, crc32: 0 };
                Ok((Bytes::Memory(bytes), checksum))
            }
            Self::File { path, file, crc32, bytes } => {
                let file = file.into_inner().map_err(IntoInnerError::into_error);
                file.and_then(|file| file.sync_all())
                    .map_err(|source| cannot_write(&path, source))?;
                let checksum = Checksum { bytes, crc32: crc32.finalize() };
                Ok((Bytes::Mapped(Mapped::open(&path)?), checksum))
            }
        }
    }
}

fn cannot_write(path: &Path, source: std::io::Error) -> Error {
    if source.kind() != std::io::ErrorKind::StorageFull {
        return Error::Io { path: path.to_owned(), action: "write", source };
    }
    let message = "the disk is full while the data cache is written; make room, or set cache_dir \
                   to a directory on another disk";
    Error::File { path: path.to_owned(), message: message.to_owned() }
}

/// A section that is complete.
pub(super) enum Bytes {
    Memory(Vec<u8>),
    Mapped(Mapped),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Memory(bytes) => bytes,
            Self::Mapped(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if matches!(self, Self::Memory(_)) { "memory" } else { "mapped" };
        write!(f, "{} bytes ({kind})", self.len())
    }
}

/// Record number `index` of `N` bytes.
pub(super) fn record<const N: usize>(bytes: &[u8], index: usize) -> &[u8; N] {
    let record = &bytes[index * N..(index + 1) * N];
    record.try_into().expect("the slice is N bytes long")
}

/// The 32-bit number at byte `at` of a record.
pub(super) fn u32_at(record: &[u8], at: usize) -> u32 {
    let word = record[at..at + 4].try_into();
    u32::from_le_bytes(word.expect("the slice is four bytes long"))
}

/// What the entries of a table are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Form {
    /// UTF-8 text.
    Text,
    /// Token ids below 65,536, two bytes each.
    Tokens16,
    /// Token ids of four bytes.
    Tokens32,
}

impl Form {
    /// The narrowest form for ids up to `max_id`.
    pub(super) fn of_tokens(max_id: u32) -> Self {
        if u16::try_from(max_id).is_ok() { Self::Tokens16 } else { Self::Tokens32 }
    }

    /// Appends tokens to `out`. Ids are at most what [`Form::of_tokens`] was told.
    pub(super) fn put_tokens(self, ids: &[u32], out: &mut Vec<u8>) {
        match self {
            Self::Tokens16 => out.extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes())),
            Self::Text | Self::Tokens32 => out.extend(ids.iter().flat_map(|id| id.to_le_bytes())),
        }
    }
}

/// A query or a document as it is kept: as text, or tokenized already.
#[derive(Debug, Clone, Copy)]
pub enum Content<'a> {
    /// Stripped text.
    Text(&'a str),
    /// Its tokens, formatted and without special tokens.
    Tokens(Tokens<'a>),
}

/// Token ids, two or four bytes each.
#[derive(Debug, Clone, Copy)]
pub struct Tokens<'a> {
    bytes: &'a [u8],
    wide: bool,
}

impl Tokens<'_> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() / if self.wide { 4 } else { 2 }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The ids.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u32> {
        let id = |bytes: &[u8]| bytes.iter().rev().fold(0, |id, &byte| id << 8 | u32::from(byte));
        self.bytes.chunks_exact(if self.wide { 4 } else { 2 }).map(id).collect()
    }
}

/// Texts or token lists, one after another, with an estimate of the tokens of each.
#[derive(Debug)]
pub(super) struct Table {
    form: Form,
    /// For each entry, the byte in `contents` where it ends and its estimate.
    ends: Bytes,
    contents: Bytes,
}

/// `u64` end and `u32` estimate.
const ENTRY_BYTES: usize = 12;

impl Table {
    pub(super) fn new(form: Form, ends: Bytes, contents: Bytes) -> Self {
        Self { form, ends, contents }
    }

    pub(super) fn len(&self) -> usize {
        self.ends.len() / ENTRY_BYTES
    }

    fn end(&self, index: usize) -> usize {
        let [end @ .., _, _, _, _] = record::<ENTRY_BYTES>(&self.ends, index);
        u64::from_le_bytes(*end) as usize
    }

    pub(super) fn get(&self, index: u32) -> Content<'_> {
        let index = index as usize;
        let start = if index == 0 { 0 } else { self.end(index - 1) };
        let bytes = &self.contents[start..self.end(index)];
        match self.form {
            Form::Text => Content::Text(
                std::str::from_utf8(bytes).expect("texts were checked before they were written"),
            ),
            Form::Tokens16 => Content::Tokens(Tokens { bytes, wide: false }),
            Form::Tokens32 => Content::Tokens(Tokens { bytes, wide: true }),
        }
    }

    pub(super) fn estimate(&self, index: u32) -> usize {
        u32_at(record::<ENTRY_BYTES>(&self.ends, index as usize), 8) as usize
    }
}

/// A table that is being written.
pub(super) struct TableSink {
    form: Form,
    ends: Sink,
    contents: Sink,
    end: u64,
    entries: usize,
}

impl TableSink {
    /// A table in the sections `name` and `name.ends`.
    pub(super) fn new(place: &Place, name: &str, form: Form) -> Result<Self> {
        let ends = Sink::new(place, &format!("{name}.ends"))?;
        Ok(Self { form, ends, contents: Sink::new(place, name)?, end: 0, entries: 0 })
    }

    pub(super) fn len(&self) -> usize {
        self.entries
    }

    pub(super) fn push(&mut self, contents: &[u8], estimate: u32) -> Result<()> {
        self.end += contents.len() as u64;
        self.entries += 1;
        self.contents.write(contents)?;
        self.ends.write(&self.end.to_le_bytes())?;
        self.ends.write(&estimate.to_le_bytes())
    }

    /// The table, and the checksums of its ends and its contents.
    pub(super) fn finish(self) -> Result<(Table, [Checksum; 2])> {
        let ((ends, of_ends), (contents, of_contents)) =
            (self.ends.finish()?, self.contents.finish()?);
        Ok((Table::new(self.form, ends, contents), [of_ends, of_contents]))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn tables_give_back_what_they_took_from_memory_and_from_files() {
        let dir = tempfile::tempdir().unwrap();
        for place in [Place::Memory, Place::Directory(dir.path().to_owned())] {
            let mut texts = TableSink::new(&place, "texts", Form::Text).unwrap();
            for (i, text) in ["a", "", "学习"].into_iter().enumerate() {
                texts.push(text.as_bytes(), i as u32).unwrap();
            }
            let (texts, _) = texts.finish().unwrap();
            let text = |i| match texts.get(i) {
                Content::Text(text) => text,
                Content::Tokens(_) => panic!("not a text"),
            };
            assert_eq!([text(0), text(1), text(2)], ["a", "", "学习"]);
            assert_eq!((texts.len(), texts.estimate(2)), (3, 2));
            for ids in [vec![1, 65_535, 7], vec![1, 65_536, u32::MAX], vec![]] {
                let form = Form::of_tokens(ids.iter().copied().max().unwrap_or(0));
                let mut tokens = TableSink::new(&place, "tokens", form).unwrap();
                let mut bytes = Vec::new();
                form.put_tokens(&ids, &mut bytes);
                tokens.push(&bytes, 0).unwrap();
                let (tokens, _) = tokens.finish().unwrap();
                let Content::Tokens(tokens) = tokens.get(0) else { panic!("not tokens") };
                assert_eq!((tokens.len(), tokens.to_vec()), (ids.len(), ids.clone()));
                assert_eq!(tokens.is_empty(), ids.is_empty());
            }
        }
    }
}
