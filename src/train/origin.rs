//! Whose the checkpoints of an output directory are, this run's or an earlier one's, and so whether a
//! start goes on from them, is sent to another, or begins anew.

use std::path::Path;

use serde_json::{Value, json};

use super::checkpoints::{settings, store};
use super::output::{self, launch};
use crate::checkpoint::training::Manifest;
use crate::config::{Plan, Resume};
use crate::error::Result;

/// Where a checkpoint names the launch that saved it.
pub(super) const LAUNCH: &str = "launch";

/// Where a checkpoint keeps the [`origin`] of its run.
pub(super) const ORIGIN: &str = "origin";

/// Whether the run begins anew, whatever is in its output directory.
pub(super) fn begins_anew(plan: &Plan) -> bool {
    (plan.saving.resume == Resume::Never || !output::unfinished(plan)) && !goes_on(plan)
}

/// Whether this launch was restarted after a failure and has saved a checkpoint before, or was sent to
/// a checkpoint, and so was the unfinished run that is there: it goes on from that run's own, whatever
/// the flags say.
pub(super) fn goes_on(plan: &Plan) -> bool {
    own_steps(plan).is_ok_and(|steps| !steps.is_empty())
}

/// Whether the run goes on from the checkpoint that the plan names.
pub(super) fn is_sent(plan: &Plan) -> bool {
    matches!(plan.saving.resume, Resume::Path(_)) && !goes_on(plan)
}

/// The steps of the checkpoints that earlier attempts of this launch have saved, or starts that were
/// sent to the same checkpoint; newest first.
pub(super) fn own_steps(plan: &Plan) -> Result<Vec<usize>> {
    let launch = launch().filter(|_| output::is_restart()).map(Value::from);
    let origin = origin(plan).filter(|_| output::unfinished(plan));
    let marks = [(LAUNCH, launch), (ORIGIN, origin)];
    let marks: Vec<_> =
        marks.iter().filter_map(|(key, mark)| Some((key, mark.as_ref()?))).collect();
    if marks.is_empty() {
        return Ok(Vec::new());
    }
    let store = store(plan);
    let is_own = |step: &usize| {
        let manifest = Manifest::read(&store.path(*step));
        manifest.is_ok_and(|manifest| marks.iter().any(|&(key, mark)| manifest.job[key] == *mark))
    };
    Ok(store.steps()?.into_iter().filter(is_own).collect())
}

/// What the checkpoints of a run keep of the one that the plan names, so that the same command given
/// again goes on from them. A command that asks for another training goes back to where it is sent.
pub(super) fn origin(plan: &Plan) -> Option<Value> {
    let Resume::Path(path) = &plan.saving.resume else { return None };
    let mut settings = settings(plan);
    settings.extend([
        ("batch_size".into(), json!(plan.training.batch_size)),
        ("gradient_accumulation_steps".into(), json!(plan.training.accumulation)),
    ]);
    // The checkpoint itself may be gone: later ones have taken its room.
    let absolute = std::path::absolute(path).ok()?;
    let name = absolute.file_name()?;
    let dir = absolute.parent()?;
    let path = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned()).join(name);
    let settings = crc32fast::hash(json!(settings).to_string().as_bytes());
    Some(json!({"checkpoint": path, "settings (CRC-32)": format!("{settings:08x}")}))
}

/// Whether the plan names a checkpoint of another directory, and the run has saved none yet.
pub(super) fn comes_from_elsewhere(plan: &Plan) -> bool {
    let Resume::Path(path) = &plan.saving.resume else { return false };
    let named = std::fs::canonicalize(path).ok();
    let own = std::fs::canonicalize(plan.saving.output_dir.join(output::CHECKPOINTS)).ok();
    let is_own = own.is_some_and(|own| named.is_some_and(|named| named.parent() == Some(&own)));
    !is_own && is_sent(plan)
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
pub(super) fn check_mixture(plan: &Plan) -> Result<()> {
    let is_other =
        (plan.saving.resume == Resume::Never && !goes_on(plan)) || comes_from_elsewhere(plan);
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
