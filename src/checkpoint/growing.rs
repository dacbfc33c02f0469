//! Large files that come to the disk while they are written, and how far that is.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rr_launch::contract::heartbeat;

/// After so many bytes those before are brought to the disk. The system may else collect a fifth of its
/// memory first, and a single flush at the end take minutes in which nothing shows that it goes on.
const PART: usize = 64 << 20;

/// Bytes that this process has written to such files.
static WRITTEN: AtomicU64 = AtomicU64::new(0);

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
pub(super) fn tell_saving() {
    let megabytes = WRITTEN.load(Ordering::Relaxed) as f64 / 1e6;
    heartbeat::working(format_args!("saving, {megabytes:.3} MB written"));
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
        assert!(std::fs::read(path).unwrap() == bytes);
    }
}
