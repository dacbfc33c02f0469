//! The directory of a run's checkpoints: which there are, building one, removing old ones.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tracing::warn;

use super::manifest::{self, FileRecord, Manifest};
use super::{fail_point, io, states};
use crate::atomic::{READY, remove, replace, sync_dir};
use crate::error::{Error, Result};

/// What a checkpoint's directory begins with.
const PREFIX: &str = "step-";
/// What a directory under construction ends with.
const PARTIAL: &str = ".partial";
/// What a directory on its way out ends with.
const REMOVED: &str = ".removed";

/// `<output_dir>/checkpoints`.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    /// Steps whose checkpoints are of no past that was left, though they are later than the newest.
    spared: Vec<usize>,
}

impl Store {
    /// The checkpoints below `root`, which need not exist.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self { root, spared: Vec::new() }
    }

    /// Leaves the checkpoints of these steps alone until the run has come as far.
    pub(super) fn spare(&mut self, steps: Vec<usize>) {
        self.spared = steps;
    }

    /// The directory of the checkpoint after `step` steps.
    #[must_use]
    pub fn path(&self, step: usize) -> PathBuf {
        self.root.join(format!("{PREFIX}{step}"))
    }

    /// Where the checkpoint after `step` steps is built by the attempt `nonce`.
    pub(super) fn staging(&self, step: usize, nonce: u64) -> PathBuf {
        self.root.join(format!(".{PREFIX}{step}.{nonce:016x}{PARTIAL}"))
    }

    /// A file by which the start `nonce` sees whether its ranks share this directory; one that stays is a
    /// leftover.
    pub(super) fn mark(&self, nonce: u64) -> PathBuf {
        self.root.join(format!(".mark.{nonce:016x}{PARTIAL}"))
    }

    /// The steps of all checkpoints, newest first. The step decides, never a clock.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory cannot be read.
    pub fn steps(&self) -> Result<Vec<usize>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(io(&self.root, "read")(error)),
        };
        let mut steps = Vec::new();
        for entry in entries {
            let name = entry.map_err(io(&self.root, "read"))?.file_name();
            let step = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
            steps.extend(step.and_then(|step| step.parse::<usize>().ok()));
        }
        steps.sort_unstable_by(|a, b| b.cmp(a));
        Ok(steps)
    }

    /// Removes what earlier runs left half-built or half-removed. What cannot be removed, because
    /// another program reads it over NFS for example, takes up room and harms nobody.
    pub fn clear_leftovers(&self) {
        let Ok(entries) = fs::read_dir(&self.root) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.')
                && [PARTIAL, REMOVED, READY].iter().any(|end| name.ends_with(end))
            {
                let path = entry.path();
                if let Err(error) = remove(&path) {
                    warn!("{}: cannot remove the leftover: {error}", path.display());
                }
            }
        }
    }

    /// Moves a finished checkpoint to its place. One of the same step that is there already is
    /// replaced: it is from before a resume, and damaged or of a past that was left.
    pub(super) fn publish(&self, staging: &Path, step: usize) -> Result<()> {
        sync_dir(staging)?;
        fail_point("before_rename");
        let target = self.path(step);
        let replaces = target.exists();
        if replaces {
            replace(staging, &target, &self.aside(step)).map_err(io(&target, "replace"))?;
        } else {
            fs::rename(staging, &target).map_err(io(&target, "rename to"))?;
        }
        fail_point("after_rename");
        sync_dir(&self.root)?;
        fail_point("after_sync");
        if replaces
            && staging.exists()
            && let Err(error) = fs::remove_dir_all(staging)
        {
            warn!("{}: cannot remove what was replaced: {error}", staging.display());
        }
        Ok(())
    }

    /// Removes whole checkpoints beyond the newest `keep` up to `newest`, which was just saved, and
    /// later ones, which a run that went on from an earlier one has left behind, but for those it
    /// spares. What is no whole checkpoint neither counts nor is touched. One that cannot be removed keeps no other.
    pub(super) fn prune(&self, keep: usize, newest: usize) -> Result<()> {
        let whole = |step: &usize| self.looks_whole(*step);
        let (later, kept): (Vec<_>, Vec<_>) =
            self.steps()?.into_iter().filter(whole).partition(|&step| step > newest);
        let left = later.into_iter().filter(|step| !self.spared.contains(step));
        let mut outcome = Ok(());
        for step in left.chain(kept.into_iter().skip(keep.max(1))) {
            fail_point("before_prune");
            outcome = outcome.and(self.remove(step));
        }
        outcome
    }

    /// Removes whole checkpoints beyond the newest `keep` up to `newest`, and nothing else.
    pub(super) fn trim(&self, keep: usize, newest: usize) -> Result<()> {
        let counts = |step: &usize| *step <= newest && self.looks_whole(*step);
        let mut outcome = Ok(());
        for step in self.steps()?.into_iter().filter(counts).skip(keep.max(1)) {
            outcome = outcome.and(self.remove(step));
        }
        outcome
    }

    /// Whether the manifest of a checkpoint is in order and all of its files have their lengths.
    fn looks_whole(&self, step: usize) -> bool {
        let dir = self.path(step);
        let has_length = |file: &FileRecord| {
            fs::metadata(dir.join(&file.name)).is_ok_and(|found| found.len() == file.bytes)
        };
        Manifest::read(&dir).is_ok_and(|manifest| manifest.files.iter().all(has_length))
    }

    /// Removes all checkpoints, whole or not.
    ///
    /// # Errors
    /// [`Error::Io`] when one cannot be removed.
    pub fn remove_all(&self) -> Result<()> {
        self.steps()?.into_iter().try_for_each(|step| self.remove(step))
    }

    /// Takes a checkpoint out of sight in one step, then removes it.
    fn remove(&self, step: usize) -> Result<()> {
        let (path, aside) = (self.path(step), self.aside(step));
        match fs::rename(&path, &aside) {
            // A layer of a container's image holds it there: without its manifest it is none any more.
            Err(error) if error.kind() == ErrorKind::CrossesDevices => {
                match fs::remove_file(path.join(manifest::FILE_NAME)) {
                    Err(error) if error.kind() != ErrorKind::NotFound => {
                        return Err(io(&path, "remove the manifest of")(error));
                    }
                    _ => {}
                }
                fail_point("in_remove");
                fs::remove_dir_all(&path).map_err(io(&path, "remove"))
            }
            renamed => {
                renamed.map_err(io(&path, "remove"))?;
                fail_point("in_remove");
                fs::remove_dir_all(&aside).map_err(io(&aside, "remove"))
            }
        }
    }

    /// Where a checkpoint lies out of sight on its way out.
    fn aside(&self, step: usize) -> PathBuf {
        self.root.join(format!(".{PREFIX}{step}.{}{REMOVED}", std::process::id()))
    }

    /// Reads every byte of those files of a checkpoint that fall to `rank` of `world_size`, and its
    /// manifest.
    ///
    /// # Errors
    /// What is wrong with the first file that is not as it was written.
    pub fn verify(&self, step: usize, rank: usize, world_size: usize) -> Result<Manifest> {
        let dir = self.path(step);
        let manifest = Manifest::read(&dir)?;
        let own = |(index, _): &(usize, &FileRecord)| index % world_size == rank;
        for (_, file) in manifest.files.iter().enumerate().filter(own) {
            states::verify(&dir, file)?;
        }
        Ok(manifest)
    }
}

/// Says that a run holds an output directory. The kernel lets go of it when the process ends; the
/// file goes with an orderly end.
#[derive(Debug)]
pub struct Lock {
    path: PathBuf,
    _file: File,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // A file that stays holds nothing.
        let _ = fs::remove_file(&self.path);
    }
}

impl Lock {
    /// Takes the lock file `path` for this process, and writes `holder` into it.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the holder when another process has it.
    pub fn take(path: &Path, holder: &str) -> Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io(path, "create"))?;
        match lock_alone(&file) {
            Err(Errno::WOULDBLOCK) => return Err(held(path, &mut file)),
            Ok(()) => {}
            Err(Errno::NOSYS | Errno::NOTSUP | Errno::NOLCK) => {
                let dir = path.parent().unwrap_or(path).display();
                warn!(
                    "the file system of {dir} has no locks: see to it yourself that no second run \
                     uses this directory"
                );
            }
            Err(error) => return Err(io(path, "lock")(error.into())),
        }
        // Its holder may have removed it between the two calls: then it is nobody's lock.
        let held = file.metadata().map_err(io(path, "read"))?;
        let same = |named: &fs::Metadata| (named.dev(), named.ino()) == (held.dev(), held.ino());
        if !fs::metadata(path).is_ok_and(|named| same(&named)) {
            return Self::take(path, holder);
        }
        file.set_len(0).and_then(|()| writeln!(file, "{holder}")).map_err(io(path, "write"))?;
        Ok(Self { path: path.to_owned(), _file: file })
    }

    /// Looks whether a run holds the lock file `path`, which stays as it is: several processes may look at
    /// a time.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the run.
    pub fn check(path: &Path) -> Result<()> {
        let mut file = match File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            file => file.map_err(io(path, "open"))?,
        };
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => Err(held(path, &mut file)),
            // Of a file system without locks the run itself tells.
            Ok(()) | Err(Errno::NOSYS | Errno::NOTSUP | Errno::NOLCK) => Ok(()),
            Err(error) => Err(io(path, "lock")(error.into())),
        }
    }
}

/// Locks a file against all others. Those that only look hold it for a moment, which is waited for; a run keeps
/// them out too, by which it is known.
fn lock_alone(file: &File) -> rustix::io::Result<()> {
    const MOMENT: Duration = Duration::from_secs(2);
    let until = Instant::now() + MOMENT;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < until => {}
            result => return result,
        }
        flock(file, FlockOperation::NonBlockingLockShared)?;
        flock(file, FlockOperation::Unlock)?;
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Another run holds a lock file.
fn held(path: &Path, file: &mut File) -> Error {
    let mut holder = String::new();
    // Only for the message.
    let _ = file.read_to_string(&mut holder);
    Error::Usage(format!(
        "{0} is held by {1}; wait for it, end it, or choose another output_dir (where its machine is lost \
         and a shared file system still holds the lock, remove {0})",
        path.display(),
        if holder.trim().is_empty() { "another run" } else { holder.trim() }
    ))
}
