//! Lines on standard output or in a file.

use std::io;
use std::path::Path;

use crate::atomic::whole_file;
use crate::convert::Output;
use crate::error::{Error, Result};

/// Stands for standard input or output, never for a file of that name.
pub(super) const STANDARD: &str = "-";

/// Where result lines go, as [`Output`] has it; whoever reads them may leave before the end.
pub(super) struct Sink(Output);

impl Sink {
    pub(super) fn open(path: &Path) -> Result<Self> {
        Output::create(path).map(Self)
    }

    pub(super) fn line(&mut self, line: &str) -> Result<()> {
        done(self.0.line(line))
    }

    /// Ends the output; a file takes its place.
    pub(super) fn finish(self) -> Result<()> {
        done(self.0.finish())
    }
}

fn done(result: Result<()>) -> Result<()> {
    match result {
        // `| head` has seen enough: a good end.
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => {
            std::process::exit(0)
        }
        result => result,
    }
}

/// Whether a file at `output`, which need not be there yet, would be put in the place of `other`.
pub(super) fn is_same_file(output: &Path, other: &Path) -> bool {
    let place = |path: &Path| {
        let path = whole_file(path).filter(|_| path != Path::new(STANDARD))?;
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        Some(parent.unwrap_or(Path::new(".")).canonicalize().ok()?.join(path.file_name()?))
    };
    place(output).is_some_and(|output| place(other) == Some(output))
}

/// Writes all of `text`, which has any number of lines.
pub(super) fn write(path: &Path, text: &str) -> Result<()> {
    let mut sink = Sink::open(path)?;
    text.lines().try_for_each(|line| sink.line(line))?;
    sink.finish()
}

/// Prints text on standard output.
pub(super) fn print(text: &str) -> Result<()> {
    let mut sink = Sink::open(Path::new(STANDARD))?;
    sink.line(text.trim_end())?;
    sink.finish()
}
