//! Files mapped into memory, read only.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use memmap2::{Advice, Mmap};

use crate::error::{Error, Result};

/// The bytes of a file that nobody changes, in pages that all processes share and that the system
/// may drop and read again.
///
/// It stays whole when the file is removed or another is renamed to its place.
#[derive(Debug)]
pub struct Mapped(Mmap);

impl Mapped {
    /// Maps a file that is never written to again, only replaced.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let io = |action| move |source| Error::Io { path: path.to_owned(), action, source };
        let file = File::open(path).map_err(io("open"))?;
        // SAFETY: the caller's promise: the file is published whole by a rename and not written to
        // afterwards, so the bytes behind the slice do not change while it is borrowed.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map into memory"))?;
        // Advice only: pairs are read in a shuffled order, so reading ahead is wasted.
        let _ = map.advise(Advice::Random);
        Ok(Self(map))
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn bytes_stay_when_the_file_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"bytes").unwrap();
        let mapped = Mapped::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(&*mapped, b"bytes");
        std::fs::write(&path, b"").unwrap();
        assert!(Mapped::open(&path).unwrap().is_empty());
        let error = Mapped::open(&dir.path().join("none")).unwrap_err().to_string();
        assert!(error.contains("none: cannot open: "), "{error}");
    }
}
