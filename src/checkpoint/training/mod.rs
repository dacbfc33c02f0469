//! Checkpoints of a run: everything that training goes on from.
//!
//! `checkpoints/step-N/` holds one file of states a rank (`rank-K-of-N.safetensors`: fp32 weights
//! and both moments of the rank's part of every flat unit), the model as a Hugging Face directory
//! (`model/`), and a manifest that is written last. Random numbers need no state: every one is
//! drawn from the run's seed and a place in the run.
//!
//! A checkpoint is built beside its place and moved there in one step, so that it is whole or not
//! there. Each rank writes its own file, from a copy in memory, while training goes on; rank 0 sees
//! by a receipt beside the file that it is on the disk.

mod manifest;
mod model;
mod saver;
mod shared;
mod states;
mod store;

pub use manifest::{Identity, Manifest, Progress};
pub use saver::{Moment, SaveOptions, Saver};
pub(crate) use saver::{agree, agree_or};
pub use shared::first_apart;
pub use states::{StateFiles, UnitStates};
pub use store::{Lock, Store};

use std::path::Path;

use crate::error::{Error, Result};

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, action, source }
}

fn damaged(path: &Path, message: impl Into<String>) -> Error {
    Error::File { path: path.to_owned(), message: message.into() }
}

/// Kills the process at a place of the commit protocol, where a test asks for that: the variable
/// `RR_FAIL_POINT` names the place, with `:N` for its N-th visit and `@R` for rank R alone.
pub(crate) fn fail_point(place: &str) {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static VISITS: AtomicUsize = AtomicUsize::new(0);
    let Some(wanted) = std::env::var("RR_FAIL_POINT").ok() else { return };
    let (wanted, rank) = wanted.split_once('@').map_or((&*wanted, None), |(w, r)| (w, Some(r)));
    if rank.is_some_and(|rank| std::env::var("RANK").is_ok_and(|own| own != rank)) {
        return;
    }
    let (name, visit) = wanted.split_once(':').unwrap_or((wanted, "1"));
    if name == place && VISITS.fetch_add(1, Ordering::Relaxed) + 1 == visit.parse().unwrap_or(1) {
        crate::torch_ext::runtime::kill_this_process();
    }
}

/// CRC-32 of a file's bytes.
///
/// # Errors
/// [`Error::Io`] with the file.
pub fn file_crc32(path: &Path) -> Result<u32> {
    let (dir, name) = (path.parent().unwrap_or(Path::new("")), path.file_name());
    let name = name.unwrap_or_default().to_string_lossy();
    Ok(states::record(dir, &name)?.crc32)
}

/// Reads a whole small file.
fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(io(path, "read"))
}
