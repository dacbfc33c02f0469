//! Where a run writes, checked before it starts and created only when it trains.

use std::path::Path;

use rustix::fs::{Access, access};

use crate::config::Plan;
use crate::error::Result;

/// The final model, inside the output directory.
pub(super) const MODEL: &str = "model";
/// The model of the best validation, inside the output directory.
pub(super) const BEST: &str = "best";
/// Logs and metrics, inside the output directory.
pub(super) const RUNS: &str = "runs";

/// Whether an earlier run began here and did not end.
pub(super) fn unfinished(plan: &Plan) -> bool {
    let dir = &plan.saving.output_dir;
    dir.join(RUNS).exists() && !dir.join(MODEL).exists()
}

/// Checks that the run may write to its output directory and overwrites no finished run.
///
/// # Errors
/// [`crate::Error::Config`] that names the setting.
pub fn check(plan: &Plan) -> Result<()> {
    let dir = &plan.saving.output_dir;
    let refuse = |message: String| Err(plan.error("output_dir", message));
    if dir.exists() && !dir.is_dir() {
        return refuse(format!("{} is a file, expected a directory", dir.display()));
    }
    if dir.join(MODEL).exists() && !plan.saving.overwrite {
        return refuse(format!(
            "{} already holds a finished run; choose another directory or pass --overwrite",
            dir.display()
        ));
    }
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
    let existing = absolute.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    if !existing.is_dir() {
        return refuse(format!("{} is a file, expected a directory", existing.display()));
    }
    let writable = access(existing, Access::WRITE_OK | Access::EXEC_OK).map_err(Into::into);
    if let Err(error) = writable.and_then(|()| try_creating(existing)) {
        return refuse(format!("cannot write to {}: {error}", existing.display()));
    }
    Ok(())
}

/// Permissions do not tell of file systems that refuse regardless (`/sys`, NFS without root), so
/// a directory is made in `dir` and removed again.
fn try_creating(dir: &Path) -> std::io::Result<()> {
    let probe = dir.join(format!(".reranker-{}", std::process::id()));
    match std::fs::create_dir(&probe) {
        // A worker on another host of a shared file system has the same process id, and may write.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        made => made.and_then(|()| std::fs::remove_dir(&probe)),
    }
}
