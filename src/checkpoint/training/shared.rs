//! Whether the ranks of all machines see one directory of checkpoints, into which each of them writes.

use std::cell::Cell;
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use rr_launch::contract::heartbeat;

use super::io;
use super::saver::{agree, common_nonce, is_listed};
use super::store::Store;
use crate::atomic::{create_dir_synced, write_synced};
use crate::comm::{Groups, Reduction, reduce_values, wait_together};
use crate::error::Result;

/// How long a file system may take to show a file of another machine: NFS may remember for half a minute
/// that it was not there.
const NFS_MEMORY: Duration = Duration::from_secs(30);

/// The first rank that does not see in `store` what rank 0 writes there, if any. All ranks call it
/// together, before the first save. They look for half a minute, or `timeout`, the longest wait for a rank,
/// where that is less.
///
/// # Errors
/// [`crate::Error::Io`] where rank 0 cannot write there, [`crate::Error::Comm`] when a peer went away.
pub fn first_apart(store: &Store, groups: &Groups, timeout: Duration) -> Result<Option<usize>> {
    let comm = groups.world.as_ref();
    let (rank, is_first) = (comm.rank(), comm.rank() == 0);
    let mark = store.mark(common_nonce(comm)?);
    let dir = mark.parent().unwrap_or(Path::new("."));
    let is_new = is_first && !dir.exists();
    let put = || create_dir_synced(dir).and_then(|()| write_synced(&mark, b""));
    agree(if is_first { put() } else { Ok(()) }, groups)?;
    let (began, seen) = (Instant::now(), Cell::new(is_first));
    let is_done = || {
        seen.set(seen.get() || is_seen(&mark));
        seen.get() || began.elapsed() > NFS_MEMORY.min(timeout)
    };
    wait_together(comm, is_done, || {
        let seconds = began.elapsed().as_secs();
        heartbeat::working(format_args!("looking for rank 0's output_dir, {seconds} s"));
    })?;
    // The lowest rank is the largest of these.
    let mut apart = [if seen.get() { 0.0 } else { (comm.world_size() - rank) as f64 }];
    reduce_values(comm, &mut apart, Reduction::Max)?;
    if is_first {
        fs::remove_file(&mark).map_err(io(&mark, "remove"))?;
        if is_new {
            // The run may never save. One that is not empty stays.
            let _ = fs::remove_dir(dir);
        }
    }
    Ok((apart[0] > 0.0).then(|| comm.world_size() - apart[0] as usize))
}

/// Whether `path` is there now. What NFS remembers of names that were not there, be it of directories on
/// the way, it asks its server about anew when the directory around them is opened.
fn is_seen(path: &Path) -> bool {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut dirs: Vec<&Path> = path.ancestors().skip(1).collect();
    dirs.reverse();
    for dir in dirs {
        // Some may be searched, but not read.
        let _ = File::open(dir);
    }
    is_listed(&path)
}
