//! Large files that come to the disk while they are written, or are read, and how far that is.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rr_launch::contract::heartbeat;

use crate::atomic::{StagedDir, sync_dir};
use crate::error::{Error, Result};

/// After so many bytes those before are brought to the disk. The system may else collect a fifth of its
/// memory first, and a single flush at the end take minutes in which nothing shows that it goes on.
const PART: usize = 64 << 20;

/// Bytes that are copied at once.
const BLOCK: usize = 1 << 20;

/// Bytes that this process has written to such files.
static WRITTEN: AtomicU64 = AtomicU64::new(0);

/// Bytes that it has read of them.
static READ: AtomicU64 = AtomicU64::new(0);

/// A file that is written from its beginning to its end.
#[derive(Debug)]
pub(super) struct GrowingFile {
    file: File,
    /// Bytes that may not be on the disk yet.
    pending: usize,
}

impl GrowingFile {
    /// An empty file in the place of what is at `path`.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        File::create(path).map(|file| Self { file, pending: 0 })
    }

    /// Brings all of it to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

impl Write for GrowingFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(&bytes[..bytes.len().min(PART)])?;
        WRITTEN.fetch_add(count as u64, Ordering::Relaxed);
        self.pending += count;
        if self.pending >= PART {
            self.file.sync_data()?;
            self.pending = 0;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Tells the launcher that this rank saves, and how much it has written: while that grows, it does not
/// hang, however long it takes.
pub(crate) fn tell_saving() {
    let megabytes = WRITTEN.load(Ordering::Relaxed) as f64 / 1e6;
    heartbeat::working(format_args!("saving, {megabytes:.3} MB written"));
}

/// Counts bytes that were read.
pub(super) fn count_read(bytes: usize) {
    READ.fetch_add(bytes as u64, Ordering::Relaxed);
}

/// Tells the launcher that this rank reads what it goes on from, and how much it has read, as
/// [`tell_saving`].
pub(crate) fn tell_reading() {
    let megabytes = READ.load(Ordering::Relaxed) as f64 / 1e6;
    heartbeat::working(format_args!("reading, {megabytes:.3} MB read"));
}

/// Copies the directory `from` to `target`, which appears whole: its files, and those of the directories
/// in it. What is neither, such as a link to a directory, is left out.
///
/// # Errors
/// [`Error::Io`] with the file or directory.
pub(crate) fn copy_dir(from: &Path, target: &Path) -> Result<()> {
    let staged = StagedDir::new(target)?;
    copy_entries(from, staged.path())?;
    staged.publish()
}

fn copy_entries(from: &Path, to: &Path) -> Result<()> {
    let failed = |path: &Path, action| {
        let path = path.to_owned();
        move |source| Error::Io { path, action, source }
    };
    for entry in fs::read_dir(from).map_err(failed(from, "read"))? {
        let entry = entry.map_err(failed(from, "read"))?;
        let (path, to) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().map_err(failed(&path, "read"))?.is_dir() {
            fs::create_dir(&to).map_err(failed(&to, "create the directory"))?;
            copy_entries(&path, &to)?;
            sync_dir(&to)?;
        } else if path.is_file() {
            copy_file(&path, &to).map_err(failed(&path, "copy"))?;
        }
    }
    Ok(())
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(BLOCK, GrowingFile::create(to)?);
    io::copy(&mut File::open(from)?, &mut out)?;
    out.into_inner()?.sync()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn what_is_written_counts_while_the_file_grows() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let mut file = GrowingFile::create(&path).unwrap();
        let before = WRITTEN.load(Ordering::Relaxed);
        let bytes = vec![7; PART + 1000];
        assert_eq!(file.write(&bytes).unwrap(), PART, "a part of what is large");
        assert!(WRITTEN.load(Ordering::Relaxed) >= before + PART as u64);
        file.write_all(&bytes[PART..]).unwrap();
        assert_eq!(file.pending, 1000, "those before are on the disk");
        file.sync().unwrap();
        assert!(fs::read(path).unwrap() == bytes);
    }

    #[test]
    fn a_copy_of_a_directory_has_the_files_of_those_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| folder.path().join(name));
        fs::create_dir_all(from.join("onnx/empty")).unwrap();
        let large = vec![7; BLOCK + 1000];
        fs::write(from.join("model"), &large).unwrap();
        fs::write(from.join("onnx/model"), "small").unwrap();
        // Round and round.
        std::os::unix::fs::symlink(&from, from.join("onnx/link")).unwrap();
        copy_dir(&from, &to).unwrap();
        assert!(fs::read(to.join("model")).unwrap() == large);
        assert_eq!(fs::read(to.join("onnx/model")).unwrap(), b"small");
        assert!(to.join("onnx/empty").is_dir() && !to.join("onnx/link").exists());
    }
}
