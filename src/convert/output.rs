//! Where converted records go.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::atomic::StagedFile;
use crate::error::{Error, Result};

/// Lines to standard output, or to a file that appears whole once it is complete: `.gz` and `.zst`
/// names are compressed.
pub struct Output {
    path: PathBuf,
    writer: Writer,
    staged: Option<StagedFile>,
}

enum Writer {
    Plain(BufWriter<Box<dyn Write>>),
    Gzip(BufWriter<flate2::write::GzEncoder<File>>),
    Zstd(BufWriter<zstd::Encoder<'static, File>>),
}

impl Output {
    /// Opens `path`, or standard output for `-`.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        const BUFFER_BYTES: usize = 1 << 18;
        let path = path.to_owned();
        if path == Path::new("-") {
            let writer = BufWriter::new(Box::new(io::stdout()) as Box<dyn Write>);
            return Ok(Self { path, writer: Writer::Plain(writer), staged: None });
        }
        if path.is_dir() {
            let message = "is a directory, expected a file".to_owned();
            return Err(Error::File { path, message });
        }
        let staged = StagedFile::new(&path)?;
        let file = staged.writer()?;
        let extension = path.extension().unwrap_or_default();
        let writer = if extension == "gz" {
            let encoder = flate2::write::GzEncoder::new(file, flate2::Compression::default());
            Writer::Gzip(BufWriter::with_capacity(BUFFER_BYTES, encoder))
        } else if extension == "zst" {
            let encoder = zstd::Encoder::new(file, zstd::DEFAULT_COMPRESSION_LEVEL)
                .map_err(|source| Error::Io { path: path.clone(), action: "write", source })?;
            Writer::Zstd(BufWriter::with_capacity(BUFFER_BYTES, encoder))
        } else {
            Writer::Plain(BufWriter::with_capacity(BUFFER_BYTES, Box::new(file)))
        };
        Ok(Self { path, writer, staged: Some(staged) })
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

fn inner<W: Write>(writer: BufWriter<W>) -> io::Result<W> {
    writer.into_inner().map_err(io::IntoInnerError::into_error)
}
