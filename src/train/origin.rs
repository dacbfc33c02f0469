//! Whose the checkpoints of an output directory are, this run's or an earlier one's, and so whether a
//! start goes on from them, is sent to another, or begins anew.

use std::path::Path;

use serde_json::{Value, json};

use super::checkpoints::{items_per_step, settings, store};
use super::launch::Attempt;
use super::output;
use super::start::{cannot_read, is_barred};
use crate::checkpoint::training::Manifest;
use crate::config::{Plan, Resume};
use crate::error::Result;

/// Where a checkpoint names the launch that saved it.
pub(super) const LAUNCH: &str = "launch";

/// Where a checkpoint keeps the [`origin`] of its run.
pub(super) const ORIGIN: &str = "origin";

/// Whether the run begins anew, whatever is in its output directory.
pub(super) fn begins_anew(attempt: &Attempt<'_>) -> bool {
    let plan = attempt.plan;
    (plan.saving.resume == Resume::Never || !output::unfinished(plan)) && !goes_on(attempt)
}

/// Whether this launch was restarted after a failure and has saved a checkpoint before, or was sent to
/// a checkpoint, and so was the unfinished run that is there: it goes on from that run's own, whatever
/// the flags say.
pub(super) fn goes_on(attempt: &Attempt<'_>) -> bool {
    own_steps(attempt).is_ok_and(|steps| !steps.is_empty())
}

/// Whether the run goes on from the checkpoint that the plan names.
pub(super) fn is_sent(attempt: &Attempt<'_>) -> bool {
    matches!(attempt.plan.saving.resume, Resume::Path(_)) && !goes_on(attempt)
}

/// The steps of the checkpoints that earlier attempts of this launch have saved, or starts that were
/// sent to the same checkpoint; newest first.
pub(super) fn own_steps(attempt: &Attempt<'_>) -> Result<Vec<usize>> {
    let launch = attempt.launch.has_begun.then(|| attempt.launch.name());
    let origin = origin(attempt).filter(|_| output::unfinished(attempt.plan));
    if launch.is_none() && origin.is_none() {
        return Ok(Vec::new());
    }
    let store = store(attempt.plan);
    let is_own = |job: &Value| {
        launch.as_ref().is_some_and(|launch| job[LAUNCH] == *launch)
            || origin.as_ref().is_some_and(|origin| is_same_origin(&job[ORIGIN], origin))
    };
    let mut own = Vec::new();
    for step in store.steps()? {
        match Manifest::read(&store.path(step)) {
            Ok(manifest) if is_own(&manifest.job) => own.push(step),
            Err(error) if is_barred(&error) => {
                return Err(cannot_read(store.path(step), 0, &format!(" ({error})")));
            }
            _ => {}
        }
    }
    Ok(own)
}

/// What the checkpoints of a run keep of the one that the plan names, so that the same command given
/// again goes on from them. A command that asks for another training goes back to where it is sent.
pub(super) fn origin(attempt: &Attempt<'_>) -> Option<Value> {
    let Resume::Path(path) = &attempt.plan.saving.resume else { return None };
    // The checkpoint itself may be gone: later ones have taken its room.
    let absolute = std::path::absolute(path).ok()?;
    let name = absolute.file_name()?;
    let dir = absolute.parent()?;
    let path = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned()).join(name);
    let settings = crc32fast::hash(json!(settings(attempt.plan)).to_string().as_bytes());
    Some(json!({
        "checkpoint": path,
        "settings (CRC-32)": format!("{settings:08x}"),
        "items per step": items_per_step(attempt.plan, attempt.world_size),
        "workers": attempt.world_size,
    }))
}

/// Whether two starts were sent to the same checkpoint with the same training to do. Other workers may
/// make steps of another size, as in `compare`; the same ones only on purpose.
fn is_same_origin(there: &Value, here: &Value) -> bool {
    let is_same = |key| there[key] == here[key];
    is_same("checkpoint")
        && is_same("settings (CRC-32)")
        && (!is_same("workers") || is_same("items per step"))
}

/// Whether the plan names a checkpoint of another directory, and the run has saved none yet.
pub(super) fn comes_from_elsewhere(attempt: &Attempt<'_>) -> bool {
    let Resume::Path(path) = &attempt.plan.saving.resume else { return false };
    let named = std::fs::canonicalize(path).ok();
    let own = std::fs::canonicalize(attempt.plan.saving.output_dir.join(output::CHECKPOINTS)).ok();
    let is_own = own.is_some_and(|own| named.is_some_and(|named| named.parent() == Some(&own)));
    !is_own && is_sent(attempt)
}

/// The checkpoints behind the one at `path` that is gone on from, newest first: they are of a past that
/// the run leaves, and go when it saves.
pub(super) fn left_behind(plan: &Plan, path: &Path, step: usize) -> Vec<usize> {
    let store = store(plan);
    let is_here = std::fs::canonicalize(store.path(step)).ok() == std::fs::canonicalize(path).ok();
    let steps = if is_here { store.steps().unwrap_or_default() } else { Vec::new() };
    steps.into_iter().filter(|&other| other > step).collect()
}

/// Refuses to mix a run's checkpoints with those of an earlier one.
///
/// # Errors
/// [`crate::Error::Config`] that says what to do.
pub(super) fn check_mixture(attempt: &Attempt<'_>) -> Result<()> {
    let plan = attempt.plan;
    // What cannot be read may be the run's own: then nothing is removed that would be in the way.
    own_steps(attempt)?;
    let is_other =
        (plan.saving.resume == Resume::Never && !goes_on(attempt)) || comes_from_elsewhere(attempt);
    let steps = store(plan).steps()?;
    let (Some(newest), true, false) = (steps.first(), is_other, plan.saving.overwrite) else {
        return Ok(());
    };
    Err(plan.error(
        "resume",
        format!(
            "{} holds the checkpoints of an earlier run, up to step {newest}; go on from them with \
             --resume auto, choose another output_dir, or pass --overwrite to remove them",
            plan.saving.output_dir.display()
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_another_size_are_another_training_on_the_same_workers_only() {
        let origin = |workers: usize, items: usize| {
            let settings = "settings (CRC-32)";
            json!({"checkpoint": "step-2", settings: "0", "items per step": items, "workers": workers})
        };
        let first = origin(2, 8);
        assert!(is_same_origin(&first, &origin(2, 8)));
        assert!(is_same_origin(&first, &origin(1, 8)) && is_same_origin(&first, &origin(3, 9)));
        assert!(!is_same_origin(&first, &origin(2, 16)));
        assert!(!is_same_origin(&Value::Null, &first));
    }
}
