//! Lines on standard output or in a file.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::atomic::StagedFile;
use crate::error::{Error, Result};

/// Where result lines go: standard output, a pipe or a device at once, a file when it is whole.
pub(super) struct Sink {
    path: PathBuf,
    out: Box<dyn Write>,
    staged: Option<StagedFile>,
}

impl Sink {
    pub(super) fn open(path: &Path) -> Result<Self> {
        if path == Path::new("-") {
            let out = Box::new(BufWriter::new(io::stdout().lock()));
            return Ok(Self { path: "<stdout>".into(), out, staged: None });
        }
        let path = path.to_owned();
        if path.is_file() || !path.exists() {
            let staged = StagedFile::new(&path)?;
            let out = Box::new(BufWriter::new(staged.writer()?));
            return Ok(Self { path, out, staged: Some(staged) });
        }
        match File::create(&path) {
            Ok(file) => Ok(Self { path, out: Box::new(BufWriter::new(file)), staged: None }),
            Err(source) => Err(Error::Io { path, action: "create", source }),
        }
    }

    pub(super) fn line(&mut self, line: &str) -> Result<()> {
        let written = writeln!(self.out, "{line}");
        self.done(written)
    }

    /// Ends the output; a file takes its place.
    pub(super) fn finish(mut self) -> Result<()> {
        let flushed = self.out.flush();
        self.done(flushed)?;
        self.staged.map_or(Ok(()), StagedFile::publish)
    }

    fn done(&self, result: io::Result<()>) -> Result<()> {
        match result {
            // `| head` has seen enough: a good end.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
            result => result.map_err(|source| Error::Io {
                path: self.path.clone(),
                action: "write",
                source,
            }),
        }
    }
}

/// Prints text on standard output.
pub(super) fn print(text: &str) -> Result<()> {
    let mut sink = Sink::open(Path::new("-"))?;
    sink.line(text.trim_end())?;
    sink.finish()
}
