//! Where lines of results go.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use rustix::io::Errno;

use crate::atomic::{StagedFile, whole_file};
use crate::error::{Error, Result};

/// Stands for standard output.
const STANDARD: &str = "-";

/// Lines to standard output, a pipe or a device at once, or to a file that appears whole once it is
/// complete: `.gz` and `.zst` names are compressed.
pub struct Output {
    path: PathBuf,
    writer: Writer,
    staged: Option<StagedFile>,
}

/// How a file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// `.gz`
    Gzip,
    /// `.zst`
    Zstd,
}

impl Compression {
    /// What the name of an output asks for, if anything.
    #[must_use]
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "gz" => Some(Self::Gzip),
            "zst" => Some(Self::Zstd),
            _ => None,
        }
    }
}

enum Writer {
    Plain(BufWriter<Box<dyn Write>>),
    Gzip(BufWriter<flate2::write::GzEncoder<File>>),
    Zstd(BufWriter<zstd::Encoder<'static, File>>),
}

impl Output {
    /// Opens `path`, or standard output for `-`. A symbolic link stays; the file that it leads to is
    /// replaced.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        // What is read as it comes should not wait for long.
        const STAGED_BYTES: usize = 1 << 18;
        const STRAIGHT_BYTES: usize = 1 << 13;
        if path == Path::new(STANDARD) {
            let writer = BufWriter::new(Box::new(io::stdout()) as Box<dyn Write>);
            return Ok(Self {
                path: "<stdout>".into(),
                writer: Writer::Plain(writer),
                staged: None,
            });
        }
        let path = path.to_owned();
        let staged = whole_file(&path).map(|file| StagedFile::unnamed(&file)).transpose()?;
        let (file, buffer) = match &staged {
            Some(staged) => (staged.writer()?, STAGED_BYTES),
            None => match open_straight(&path) {
                Ok(file) => (file, STRAIGHT_BYTES),
                Err(source) => return Err(Error::Io { path, action: "create", source }),
            },
        };
        let writer = match Compression::of(&path) {
            Some(Compression::Gzip) => {
                let encoder = flate2::write::GzEncoder::new(file, flate2::Compression::default());
                Writer::Gzip(BufWriter::with_capacity(buffer, encoder))
            }
            Some(Compression::Zstd) => {
                let encoder = zstd::Encoder::new(file, zstd::DEFAULT_COMPRESSION_LEVEL)
                    .map_err(|source| Error::Io { path: path.clone(), action: "write", source })?;
                Writer::Zstd(BufWriter::with_capacity(buffer, encoder))
            }
            None => Writer::Plain(BufWriter::with_capacity(buffer, Box::new(file))),
        };
        Ok(Self { path, writer, staged })
    }

    /// Whether [`Output::create`] would do, as far as that can be told without touching what is there:
    /// for those who have much to do first.
    ///
    /// # Errors
    /// [`Error::Io`] when it would not.
    pub fn check(path: &Path) -> Result<()> {
        if path == Path::new(STANDARD) {
            return Ok(());
        }
        if let Some(file) = whole_file(path) {
            return StagedFile::unnamed(&file).map(drop);
        }
        let refused =
            if path.is_dir() { Err(Errno::ISDIR) } else { access(path, Access::WRITE_OK) };
        let io = |errno: Errno| Error::Io {
            path: path.to_owned(),
            action: "create",
            source: errno.into(),
        };
        refused.map_err(io)
    }

    /// Writes a line.
    ///
    /// # Errors
    /// [`Error::Io`], of a closed pipe too.
    pub fn line(&mut self, line: &str) -> Result<()> {
        let out: &mut dyn Write = match &mut self.writer {
            Writer::Plain(writer) => writer,
            Writer::Gzip(writer) => writer,
            Writer::Zstd(writer) => writer,
        };
        writeln!(out, "{line}").map_err(|source| self.failed(source))
    }

    /// Ends the output; a file takes its place.
    ///
    /// # Errors
    /// [`Error::Io`]; what was at the path before is then untouched.
    pub fn finish(self) -> Result<()> {
        let Self { path, writer, staged } = self;
        let ended = match writer {
            Writer::Plain(mut writer) => writer.flush(),
            Writer::Gzip(writer) => inner(writer).and_then(|encoder| encoder.finish().map(drop)),
            Writer::Zstd(writer) => inner(writer).and_then(|encoder| encoder.finish().map(drop)),
        };
        ended.map_err(|source| Error::Io { path, action: "write", source })?;
        staged.map_or(Ok(()), StagedFile::publish)
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), action: "write", source }
    }
}

/// Opens what bytes can only be appended to. Standard output by another name is written to at its own
/// position, behind what `>>` has before it.
fn open_straight(path: &Path) -> io::Result<File> {
    let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let (open, named) = (stdout.metadata()?, path.metadata()?);
    if (open.dev(), open.ino()) == (named.dev(), named.ino()) {
        return Ok(stdout);
    }
    OpenOptions::new().append(true).open(path)
}

fn inner<W: Write>(writer: BufWriter<W>) -> io::Result<W> {
    writer.into_inner().map_err(io::IntoInnerError::into_error)
}
