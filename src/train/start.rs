//! Which checkpoint a run goes on from: rank 0 chooses, and all ranks see that it is whole and that
//! they see the same one.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use tracing::{info, warn};

use super::checkpoints::{compare, store};
use super::launch::Attempt;
use super::origin::{begins_anew, check_mixture, is_sent, left_behind, own_steps};
use super::output;
use crate::atomic::StagedDir;
use crate::checkpoint::training::{Identity, Manifest, Progress, Store};
use crate::checkpoint::{Sidecar, copy_dir, tell_reading};
use crate::comm::{Communicator, Groups, Reduction, reduce_values, work_together};
use crate::config::{Plan, Resume};
use crate::error::{Error, Result};

/// A checkpoint to go on from.
pub(super) struct Start {
    pub(super) path: PathBuf,
    pub(super) manifest: Manifest,
    /// Newer ones that some rank could not read: they may be whole.
    pub(super) passed: Vec<usize>,
}

/// What may be gone on from, as rank 0 sees the disk.
#[derive(Default)]
struct Candidates {
    /// Newest first; none for a run that begins anew.
    steps: Vec<usize>,
    /// The plan names the one: it or nothing.
    is_named: bool,
}

fn candidates(attempt: &Attempt<'_>) -> Result<Candidates> {
    check_mixture(attempt)?;
    let plan = attempt.plan;
    if let Resume::Path(path) = &plan.saving.resume
        && is_sent(attempt)
    {
        return Ok(Candidates { steps: vec![named(plan, path)?.1], is_named: true });
    }
    if begins_anew(attempt) {
        return Ok(Candidates::default());
    }
    // A launch that began from elsewhere, or anew, does not go on from what others have left.
    let is_auto = plan.saving.resume == Resume::Auto;
    let steps = if is_auto { store(plan).steps()? } else { own_steps(attempt)? };
    Ok(Candidates { steps, is_named: false })
}

/// The checkpoint to go on from, if any: a whole one of this run. Every byte is read, shared out
/// over the ranks, which all call it together. Rank 0 says which are tried: machines that share a
/// file system may see it as it was at different times, and would go on from different steps.
pub(super) fn find(
    attempt: &Attempt<'_>,
    identity: &Identity,
    groups: &Groups,
) -> Result<Option<Start>> {
    let plan = attempt.plan;
    let is_first = groups.world.rank() == 0;
    let Candidates { steps, is_named } =
        if is_first { candidates(attempt)? } else { Candidates::default() };
    let (mut tried, mut passed, mut unread) = (0, Vec::new(), None);
    loop {
        let next = steps.get(tried).map_or(-1.0, |&step| step as f64);
        // The others have nothing to say.
        let mut said = if is_first { [next, f64::from(u8::from(is_named))] } else { [-1.0, 0.0] };
        reduce_values(groups.world.as_ref(), &mut said, Reduction::Max)?;
        let is_named = said[1] > 0.0;
        if said[0] < 0.0 {
            break;
        }
        let step = said[0] as usize;
        let store = match &plan.saving.resume {
            // Rank 0 sees it. Whether the others do is agreed upon.
            Resume::Path(path) if is_named => {
                parts(path).map_or_else(|| store(plan), |parts| parts.0)
            }
            _ => store(plan),
        };
        match verified(&store, step, groups) {
            Ok(manifest) => {
                let start = Start { path: store.path(step), manifest, passed };
                tell(attempt, identity, &start, groups)?;
                return Ok(Some(start));
            }
            Err(error @ (Error::Comm { .. } | Error::OtherVersion { .. })) => return Err(error),
            Err(error) if is_named => return Err(error),
            Err(error) => {
                warn!("{error}; trying the checkpoint before");
                if matches!(error, Error::CannotRead { .. }) {
                    passed.push(step);
                    unread.get_or_insert(error);
                }
            }
        }
        tried += 1;
    }
    if tried == 0 {
        return Ok(None);
    }
    let message = format!(
        "none of the checkpoints in {} is whole; begin anew with --resume never --overwrite",
        plan.saving.output_dir.display()
    );
    // What cannot be read may be whole, and is not to be thrown away.
    Err(unread.unwrap_or_else(|| plan.error("resume", message)))
}

/// `…/step-N`, as the plan names it, as a store and a step.
pub(super) fn named(plan: &Plan, path: &Path) -> Result<(Store, usize)> {
    parts(path).filter(|_| path.is_dir()).ok_or_else(|| {
        let message = format!(
            "{} is no checkpoint, expected auto, never, or a directory such as \
             output/checkpoints/step-100",
            path.display()
        );
        plan.error("resume", message)
    })
}

/// `…/step-N` as a store and a step, whether it is there or not.
fn parts(path: &Path) -> Option<(Store, usize)> {
    let absolute = std::path::absolute(path).ok()?;
    let step = absolute.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()?;
    Some((Store::new(absolute.parent()?.to_owned()), step))
}

/// The manifest of a checkpoint that all ranks have found whole, and the same.
fn verified(store: &Store, step: usize, groups: &Groups) -> Result<Manifest> {
    let comm = groups.world.as_ref();
    // A rank's part may take longer to read than a rank waits for another.
    let (rank, ranks) = (comm.rank(), comm.world_size());
    let own = work_together(comm, || store.verify(step, rank, ranks), tell_reading)?;
    agreed(own, store.path(step), comm)
}

/// How a checkpoint looks to one rank.
#[derive(Clone, Copy, PartialEq)]
enum Look {
    Whole,
    /// Not as it was written.
    Damaged,
    /// The system does not let it be read.
    Barred,
    /// Nothing is there.
    Unseen,
}

/// Whether the system keeps a file from being read, which says nothing of what is in it; not so where it is
/// missing or too short.
pub(super) fn is_barred(error: &Error) -> bool {
    use ErrorKind::{IsADirectory, NotADirectory, NotFound, UnexpectedEof};
    let damage = [NotFound, UnexpectedEof, IsADirectory, NotADirectory];
    matches!(error, Error::Io { source, .. } if !damage.contains(&source.kind()))
}

/// The error where a rank cannot read a checkpoint, and perhaps says why.
pub(super) fn cannot_read(path: PathBuf, rank: usize, why: &str) -> Error {
    let message = format!(
        "rank {rank} cannot read it{why}; is output_dir mounted on its machine, and the same directory \
         for all ranks?"
    );
    Error::CannotRead { path, message }
}

impl Look {
    fn of(own: &Result<Manifest>, path: &Path) -> Self {
        match own {
            Ok(_) => Self::Whole,
            Err(error) if is_barred(error) => Self::Barred,
            Err(_) if !Manifest::is_in(path) => Self::Unseen,
            Err(_) => Self::Damaged,
        }
    }
}

/// What all ranks say of the checkpoint at `path`, of which this one says `own`.
///
/// # Errors
/// [`Error::CannotRead`] where some of them cannot read what others can, or see something else: a file system
/// that is not mounted everywhere, or fails for a moment, is no damage.
fn agreed(own: Result<Manifest>, path: PathBuf, comm: &dyn Communicator) -> Result<Manifest> {
    let look = Look::of(&own, &path);
    let (one, sum) = (comm.rank() as f64 + 1.0, own.as_ref().map_or(0, Manifest::fingerprint));
    let here = |is: bool| if is { one } else { 0.0 };
    let mut all = [
        here(look == Look::Damaged),
        here(look == Look::Barred),
        here(look == Look::Unseen),
        here(look != Look::Unseen),
        f64::from(sum),
        -f64::from(sum),
    ];
    reduce_values(comm, &mut all, Reduction::Max)?;
    let [damaged, barred, unseen, seen, most, least] = all;
    let cannot = if barred > 0.0 || seen == 0.0 { barred } else { unseen };
    match own {
        Err(error) if look == Look::Damaged => Err(error),
        _ if damaged > 0.0 => {
            let message = format!("rank {} did not find it whole", damaged - 1.0);
            Err(Error::File { path, message })
        }
        own if cannot > 0.0 => {
            let why = match own {
                Err(Error::Io { source, .. }) if cannot == one => format!(" ({source})"),
                _ => String::new(),
            };
            Err(cannot_read(path, cannot as usize - 1, &why))
        }
        Ok(_) if most != -least => {
            let message = "the ranks see different checkpoints there; is the directory shared by \
                           all machines?";
            Err(Error::CannotRead { path, message: message.into() })
        }
        own => own,
    }
}

/// Sees to it that the best model which a checkpoint speaks of is in the output directory, on rank
/// 0; false where it is nowhere.
pub(super) fn bring_best(
    attempt: &Attempt<'_>,
    Start { path, manifest, .. }: &Start,
) -> Result<bool> {
    let plan = attempt.plan;
    let target = plan.saving.output_dir.join(output::BEST);
    StagedDir::clear_leftovers(&target)?;
    let best = &manifest.job["best"];
    let Some(value) = best["found"][0].as_f64() else { return Ok(true) };
    let figure = best["metric"].as_str().unwrap_or_default();
    let of = |dir: &Path| Sidecar::from_dir(dir).ok().flatten()?.metrics[figure].as_f64();
    let found = of(&target);
    // A run that went on after this checkpoint may have found a better one, and finds it again. One that
    // was sent back to it leaves that past behind.
    if found == Some(value) || (found.is_some() && !is_sent(attempt)) {
        return Ok(true);
    }
    // A checkpoint of another directory has its best model beside it.
    let output_dir = path.parent().and_then(Path::parent).unwrap_or(Path::new("."));
    let from = output_dir.join(output::BEST);
    if of(&from) == Some(value) {
        info!("taking the best model so far over from {}", from.display());
        copy_dir(&from, &target)?;
        return output::has_own_best(plan).map(|()| true);
    }
    warn!(
        "the best model so far, {figure} {value}, is not in {}; the next validation is the best again",
        from.display()
    );
    Ok(false)
}

/// Compares the run of what is gone on from with this one, and says what is to be said of it.
fn tell(
    attempt: &Attempt<'_>,
    identity: &Identity,
    Start { path, manifest, .. }: &Start,
    groups: &Groups,
) -> Result<()> {
    let notes = compare(attempt.plan, identity, path, manifest, attempt.world_size)?;
    if groups.world.rank() == 0 {
        for note in notes {
            warn!("{note}");
        }
        let Progress { step, epoch, .. } = manifest.progress;
        info!("going on from {}: step {step}, epoch {}", path.display(), epoch + 1);
        if let (Some(newest), true) =
            (left_behind(attempt.plan, path, step).first(), is_sent(attempt))
        {
            warn!(
                "the checkpoints after it, up to step {newest}, are left behind: the next save removes \
                 them"
            );
        }
    }
    Ok(())
}
