//! The files in which workers record the exceptions that end them.
//!
//! They are files on disk, in a directory that this launcher alone has: who records one may remove what is
//! there first (PyTorch's `dump_error_file` does), which nobody can do to a file in memory.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::contract::error_file::{MOST_BYTES, WorkerError};
use crate::sys;

/// The directory of a launcher, removed when this is dropped.
pub struct ErrorDir {
    place: Option<PathBuf>,
    is_there: bool,
}

impl ErrorDir {
    /// That of the launcher `launcher_id`, not made yet.
    pub fn new(launcher_id: &str) -> Self {
        let temporary = std::path::absolute(std::env::temp_dir()).ok();
        let place = temporary.map(|path| path.join(format!("rr-launch-{launcher_id}")));
        Self { place, is_there: false }
    }

    /// Makes it, once somebody is there who removes it after a KILL. Where it cannot be made, files are in
    /// memory.
    pub fn make(&mut self) {
        // One that is there may be anybody's.
        let make = |place: &PathBuf| DirBuilder::new().mode(0o700).create(place).is_ok();
        self.is_there = self.place.as_ref().is_some_and(make);
    }

    /// Where it is.
    pub fn path(&self) -> Option<&Path> {
        self.place().filter(|_| self.is_there)
    }

    /// Where it is or will be.
    pub fn place(&self) -> Option<&Path> {
        self.place.as_deref()
    }
}

impl Drop for ErrorDir {
    fn drop(&mut self) {
        self.path().into_iter().for_each(remove);
    }
}

/// Removes such a directory, as far as that can be done.
pub fn remove(dir: &Path) {
    let _ = fs::remove_dir_all(dir);
}

/// The file of one worker.
pub enum ErrorFile {
    /// Of this name, once the worker has recorded something.
    Named(PathBuf),
    /// Without a name.
    InMemory(File),
}

impl ErrorFile {
    /// That of the worker of this rank, in the directory of its launcher if that has one. It is in memory
    /// where that of an attempt before cannot be removed: the disk is read-only by now, or no file is there.
    pub fn new(dir: Option<&Path>, rank: usize) -> io::Result<Self> {
        // Its name becomes the value of a variable.
        let dir = dir.filter(|dir| dir.to_str().is_some());
        let path = dir.map(|dir| dir.join(format!("rank-{rank}.json")));
        let is_free = |path: &PathBuf| match fs::remove_file(path) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        match path.filter(is_free) {
            Some(path) => Ok(Self::Named(path)),
            None => sys::memory_file(c"rr-error-file").map(Self::InMemory),
        }
    }

    /// What the worker is told.
    pub fn name(&self) -> String {
        match self {
            Self::Named(path) => path.to_string_lossy().into_owned(),
            Self::InMemory(file) => sys::path_of(file),
        }
    }

    /// What a worker that was started then has recorded.
    pub fn read(&self, started: SystemTime) -> Option<WorkerError> {
        let opened;
        let file = match self {
            Self::InMemory(file) => file,
            Self::Named(path) => {
                // Whatever is there, opening it does not wait.
                let mut options = File::options();
                opened = options.read(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
                &opened
            }
        };
        let meta = file.metadata().ok().filter(|meta| meta.is_file() && meta.len() > 0)?;
        let after = meta.modified().ok()?.duration_since(started).unwrap_or_default();
        let size = usize::try_from(meta.len()).unwrap_or(usize::MAX).min(MOST_BYTES);
        let mut record = vec![0; size];
        file.read_exact_at(&mut record, 0).ok()?;
        WorkerError::decode(&record, after)
    }
}
