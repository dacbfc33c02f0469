//! Where a run writes, checked before it starts and created only when it trains.

use std::path::Path;

use rr_launch::contract::WorkerEnv;
use rustix::fs::{Access, access};

use super::launch::{Launch, may_have_begun};
use crate::atomic::{remove_dir, remove_file, sync_dir, write_synced};
use crate::checkpoint::SIDECAR;
use crate::checkpoint::training::fail_point;
use crate::config::Plan;
use crate::error::Result;

/// The final model, inside the output directory.
pub(super) const MODEL: &str = "model";
/// The model of the best validation, inside the output directory.
pub(super) const BEST: &str = "best";
/// Logs and metrics, inside the output directory.
pub(super) const RUNS: &str = "runs";

/// What a run goes on from, inside the output directory.
pub(super) const CHECKPOINTS: &str = "checkpoints";

/// Says, inside the directory of logs, that what lies at [`MODEL`] is of an earlier run, which the
/// present one replaces when it ends.
const BEGUN: &str = ".begun";

fn has_begun(plan: &Plan) -> bool {
    plan.saving.output_dir.join(RUNS).join(BEGUN).exists()
}

/// Whether an earlier run began here and did not end.
pub(super) fn unfinished(plan: &Plan) -> bool {
    let dir = &plan.saving.output_dir;
    let is_begun = dir.join(RUNS).exists() || dir.join(CHECKPOINTS).exists();
    is_begun && (!dir.join(MODEL).exists() || has_begun(plan))
}

/// A run of `launch` begins to train here, `anew` or where an earlier one stopped.
///
/// # Errors
/// [`crate::Error::Io`] when that cannot be noted.
pub(super) fn begin(plan: &Plan, launch: &Launch, anew: bool) -> Result<()> {
    let is_there = |name| plan.saving.output_dir.join(name).exists();
    match (anew, is_there(MODEL), is_there(BEST)) {
        (true, _, true) => note_begun(plan, BEST)?,
        (true, true, false) => note_begun(plan, "")?,
        (false, true, _) if !has_begun(plan) => note_begun(plan, "")?,
        _ => {}
    }
    // From here on a final model that is there is an earlier run's by that note, or this launch's own.
    launch.note(plan)
}

/// Notes that a run has begun whose `replaced` model is still an earlier run's, beside the final one.
fn note_begun(plan: &Plan, replaced: &str) -> Result<()> {
    let dir = plan.saving.output_dir.join(RUNS);
    write_synced(&dir.join(BEGUN), replaced.as_bytes())?;
    sync_dir(&dir)
}

/// Whether what lies at [`BEST`] is an earlier run's.
fn replaces_best(plan: &Plan) -> bool {
    let noted = std::fs::read_to_string(plan.saving.output_dir.join(RUNS).join(BEGUN));
    noted.is_ok_and(|replaced| replaced == BEST)
}

/// What lies at [`BEST`] is this run's from now on.
///
/// # Errors
/// [`crate::Error::Io`] when that cannot be noted.
pub(super) fn has_own_best(plan: &Plan) -> Result<()> {
    if replaces_best(plan) { note_begun(plan, "") } else { Ok(()) }
}

/// The run has saved its model. Where it has no best one, an earlier run's goes.
///
/// # Errors
/// [`crate::Error::Io`] when that cannot be removed, or the end not be noted.
pub(super) fn end(plan: &Plan, has_best: bool) -> Result<()> {
    let best = plan.saving.output_dir.join(BEST);
    if !has_best && replaces_best(plan) && best.exists() {
        // First: after the note is gone, nobody would know whose it is.
        remove_dir(&best)?;
    }
    if has_begun(plan) {
        remove_file(&plan.saving.output_dir.join(RUNS).join(BEGUN))?;
    }
    fail_point("after_end");
    Ok(())
}

/// Whether an earlier attempt of this launch has saved the final model, and failed only then.
pub(super) fn is_complete(plan: &Plan, launch: &Launch) -> bool {
    launch.has_begun && plan.saving.output_dir.join(MODEL).exists() && !has_begun(plan)
}

/// Checks that the run may write to its output directory and overwrites no finished run.
///
/// # Errors
/// [`crate::Error::Config`] that names the setting.
pub fn check(plan: &Plan) -> Result<()> {
    check_in(plan, Launch::alone(plan).has_begun)
}

/// As [`check`], of a worker that has not met the others yet: what may be its own launch's model is judged
/// when it has.
///
/// # Errors
/// As [`check`].
pub(super) fn check_early(plan: &Plan, env: &WorkerEnv) -> Result<()> {
    check_in(plan, may_have_begun(plan, env))
}

/// As [`check`], where it is known whether the run that is there `is_own`, of this launch.
///
/// # Errors
/// As [`check`].
pub(super) fn check_in(plan: &Plan, is_own: bool) -> Result<()> {
    let dir = &plan.saving.output_dir;
    let refuse = |message: String| Err(plan.error("output_dir", message));
    if dir.exists() && !dir.is_dir() {
        return refuse(format!("{} is a file, expected a directory", dir.display()));
    }
    if dir.join(MODEL).exists() && !has_begun(plan) && !plan.saving.overwrite && !is_own {
        return refuse(format!(
            "{} already holds a finished run; choose another directory or pass --overwrite",
            dir.display()
        ));
    }
    // Somebody's own directory of that name is not for a run to replace.
    let best = dir.join(BEST);
    if best.exists() && !best.join(SIDECAR).exists() {
        return refuse(format!(
            "{} is no model of a run, but that is where a run's best model goes; move it away, or \
             choose another output_dir",
            best.display()
        ));
    }
    let is_leftover = !dir.join(MODEL).exists() && !unfinished(plan);
    if best.exists() && is_leftover && !plan.saving.overwrite && !is_own {
        return refuse(format!(
            "{} is an earlier run's best model; choose another directory or pass --overwrite",
            best.display()
        ));
    }
    let absolute = std::path::absolute(dir).unwrap_or_else(|_| dir.clone());
    let is_there = |path: &&Path| path.symlink_metadata().is_ok();
    let existing = absolute.ancestors().find(is_there).unwrap_or(Path::new("/"));
    if !existing.exists() {
        return refuse(format!("{} is a symbolic link to nothing", existing.display()));
    }
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
