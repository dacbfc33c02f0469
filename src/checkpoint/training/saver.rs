//! Saving beside training: states are copied to memory, and a thread writes the copy.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tracing::{info, warn};

use super::manifest::{FileRecord, Identity, Manifest, Progress, UnitRecord};
use super::states::{self, StateFiles, UnitStates};
use super::store::Store;
use super::{fail_point, io, model, read};
use crate::atomic::{create_dir, create_dir_synced, sync_dir, write_synced};
use crate::checkpoint::growing::tell_saving;
use crate::checkpoint::model_dir::ModelFiles;
use crate::comm::{Communicator, Groups, Reduction, reduce_values, wait_together};
use crate::error::{Error, Result};
use crate::optim::LossScale;
use crate::shard::FlatUnit;

/// Between two looks for a rank's receipt, or for the end of a thread that writes: at first, and at most.
const LOOKS: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(100)];

/// What is said of an old checkpoint that cannot be removed.
const STAYS: &str = "it takes up room until the next save or start removes it";

/// Room that must be left beside a checkpoint's own files, for manifests and the like.
const SPARE_BYTES: u64 = 1 << 20;

/// What does not change from one checkpoint of a run to the next.
#[derive(Debug)]
pub struct SaveOptions {
    /// What the run is.
    pub identity: Identity,
    /// Pairs or groups per optimizer step.
    pub items_per_step: usize,
    /// Checkpoints that stay.
    pub keep: usize,
    /// The longest wait for another rank's file once it is written.
    pub timeout: Duration,
    /// What the model directory needs beside weights.
    pub model: ModelFiles,
}

/// Where a run is when it saves, beside what its units hold.
#[derive(Debug)]
pub struct Moment {
    /// When training stopped for the save.
    pub began: Instant,
    /// How far it is.
    pub progress: Progress,
    /// The loss scale of an fp16 run.
    pub loss_scale: Option<LossScale>,
    /// What the job keeps besides.
    pub job: Value,
}

/// Saves a run's checkpoints from one rank.
#[derive(Debug)]
pub struct Saver {
    store: Store,
    options: Arc<SaveOptions>,
    /// Tells this run's attempts from those of an earlier start.
    nonce: u64,
    /// Memory for the copy, kept from one save to the next.
    buffers: Option<Vec<UnitStates>>,
    writing: Option<Writing>,
    others: Arc<Others>,
}

/// What rank 0 knows of the other ranks' part of a save; its thread waits for their files accordingly.
#[derive(Debug, Default)]
struct Others(AtomicU8);

impl Others {
    /// They may be writing, for as long as their disks take.
    const WRITING: u8 = 0;
    /// They have written: their files are there, or are as soon as a network file system shows them.
    const WRITTEN: u8 = 1;
    /// One of them cannot, or the run is over.
    const FAILED: u8 = 2;

    fn set(&self, state: u8) {
        self.0.store(state, Ordering::Relaxed);
    }

    fn get(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A save under way.
#[derive(Debug)]
struct Writing {
    thread: JoinHandle<(Vec<UnitStates>, Result<()>)>,
    /// Where it writes.
    staging: PathBuf,
}

/// A thread with a copy of the states, which waits to be told where to write it.
struct Started {
    thread: JoinHandle<(Vec<UnitStates>, Result<()>)>,
    job: mpsc::Sender<Job>,
}

/// Everything the writing thread needs.
struct Job {
    store: Store,
    options: Arc<SaveOptions>,
    staging: PathBuf,
    /// This rank's number among the writers, and how many they are.
    writer: (usize, usize),
    /// What rank 0 writes last.
    manifest: Option<Manifest>,
    /// How long training stood still for the copy.
    pause: Duration,
    others: Arc<Others>,
}

impl Saver {
    /// A saver into `store`; all ranks make one together.
    ///
    /// # Errors
    /// [`Error::Comm`] when a peer went away.
    pub fn new(store: Store, options: SaveOptions, groups: &Groups) -> Result<Self> {
        Ok(Self {
            store,
            options: Arc::new(options),
            nonce: common_nonce(groups.world.as_ref())?,
            buffers: None,
            writing: None,
            others: Arc::default(),
        })
    }

    /// Copies the states of `units`, and starts writing them as the checkpoint of `now`.
    /// [`Saver::finish`] has ended an earlier save. All ranks call it together.
    ///
    /// # Errors
    /// What the save failed with so far, on this rank or another; [`Error::Comm`] when a peer went
    /// away.
    ///
    /// # Panics
    /// When an earlier save has not been finished.
    pub fn save(&mut self, now: Moment, units: &[FlatUnit], groups: &Groups) -> Result<()> {
        assert!(self.writing.is_none(), "finish() comes between two saves");
        // One rank holds what its replicas hold as well.
        let writes = groups.replicas().is_none_or(|replicas| replicas.rank() == 0);
        // A rank that cannot write says so before the others begin: rank 0 would wait for its file.
        let copied = if writes { self.copy(units, groups).map(Some) } else { Ok(None) };
        // So does one that gets no thread to write in.
        let started = copied.and_then(|buffers| buffers.map(Started::new).transpose());
        let Some(started) = agree(started, groups)? else { return Ok(()) };
        let manifest = (groups.world.rank() == 0).then(|| Manifest {
            format_version: Manifest::version(),
            program: format!("reranker {}", env!("CARGO_PKG_VERSION")),
            progress: now.progress,
            items_per_step: self.options.items_per_step,
            world_size: groups.world.world_size(),
            rank_files: groups.shard().world_size(),
            loss_scale: now.loss_scale,
            identity: self.options.identity.clone(),
            job: now.job,
            units: units.iter().map(UnitRecord::of).collect(),
            files: Vec::new(),
        });
        let job = Job {
            store: self.store.clone(),
            options: Arc::clone(&self.options),
            staging: self.store.staging(now.progress.step, self.nonce),
            writer: (groups.shard().rank(), groups.shard().world_size()),
            manifest,
            pause: now.began.elapsed(),
            others: Arc::clone(&self.others),
        };
        self.writing = Some(started.write(job));
        Ok(())
    }

    /// Removes whole checkpoints beyond those that are kept, where the run goes on from the one of `step`
    /// at `path`: a disk that was full may have room again.
    pub fn trim(&self, path: &Path, step: usize) {
        if self.store.path(step) != path {
            return;
        }
        if let Err(error) = self.store.trim(self.options.keep, step) {
            warn!("{error}; {STAYS}");
        }
    }

    /// Leaves later checkpoints alone that the run has passed over though they may be whole.
    pub fn spare(&mut self, steps: Vec<usize>) {
        self.store.spare(steps);
    }

    /// A copy of the states of `units` in memory, if there is room on the disk for it.
    fn copy(&mut self, units: &[FlatUnit], groups: &Groups) -> Result<Vec<UnitStates>> {
        self.check_room(units, groups)?;
        let buffers = match self.buffers.take() {
            Some(buffers) => buffers,
            None => units
                .iter()
                .map(|unit| UnitStates::zeros(unit.own_part().len()))
                .collect::<Result<_>>()?,
        };
        for (unit, UnitStates(states)) in units.iter().zip(&buffers) {
            unit.copy_states(states)?;
        }
        Ok(buffers)
    }

    /// The error of a save under way that has failed on this rank; does not wait for one that has
    /// not ended.
    ///
    /// # Errors
    /// What the save failed with.
    pub fn poll(&mut self) -> Result<()> {
        match &self.writing {
            Some(writing) if writing.thread.is_finished() => self.join(),
            _ => Ok(()),
        }
    }

    /// Waits until the last save is on the disk. All ranks call it together.
    ///
    /// # Errors
    /// What the save failed with, on this rank or another.
    pub fn finish(&mut self, groups: &Groups) -> Result<()> {
        groups.set_place(None);
        let waits_for_others = groups.world.rank() == 0;
        let is_writing = |this: &Self| {
            this.writing.as_ref().is_some_and(|writing| !writing.thread.is_finished())
        };
        // Any rank may write for longer than a rank waits for another. Rank 0's thread, which waits for
        // the others' files, comes last.
        let is_done = || waits_for_others || !is_writing(self);
        wait_together(groups.world.as_ref(), is_done, tell_saving)?;
        let outcome = if waits_for_others { Ok(()) } else { self.join() };
        let others = agree(outcome, groups);
        if waits_for_others {
            // It would wait for the file of a rank that has failed.
            self.others.set(if others.is_err() { Others::FAILED } else { Others::WRITTEN });
        }
        let is_done = || !waits_for_others || !is_writing(self);
        wait_together(groups.world.as_ref(), is_done, tell_saving)?;
        if waits_for_others {
            let staging = self.writing.as_ref().map(|writing| writing.staging.clone());
            let own = self.join();
            self.others.set(Others::WRITING);
            if let (Some(staging), true) = (staging, others.is_err() || own.is_err()) {
                // A rank that was slower may have put its file there after rank 0 had cleared up.
                let _ = std::fs::remove_dir_all(staging);
            }
            return agree(others.and(own), groups);
        }
        others.and(agree(Ok(()), groups))
    }

    fn join(&mut self) -> Result<()> {
        let Some(writing) = self.writing.take() else { return Ok(()) };
        while !writing.thread.is_finished() {
            tell_saving();
            std::thread::sleep(LOOKS[0]);
        }
        match writing.thread.join() {
            Ok((buffers, outcome)) => {
                self.buffers = Some(buffers);
                outcome
            }
            Err(_) => Err(Error::Training("the thread that saves checkpoints panicked".into())),
        }
    }

    /// Whether the disk has room for what this rank writes, and on rank 0 the model.
    fn check_room(&self, units: &[FlatUnit], groups: &Groups) -> Result<()> {
        let root = self.store.staging(0, 0);
        let root = root.parent().unwrap_or(Path::new("."));
        create_dir_synced(root)?;
        let Ok(disk) = rustix::fs::statvfs(root) else { return Ok(()) };
        let ranks = groups.shard().world_size() as u64;
        let states = states::bytes_per_rank(units) * ranks;
        let needed = states + states / 3 + SPARE_BYTES;
        let free = disk.f_bavail * disk.f_frsize;
        if free >= needed {
            return Ok(());
        }
        Err(Error::NoRoom { path: root.to_owned(), needed, free })
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        // The run has failed, or finish() was called; a save under way is not waited for by rank 0.
        self.others.set(Others::FAILED);
        let _ = self.join();
    }
}

/// This rank's error, or that another has one.
pub(crate) fn agree<T>(outcome: Result<T>, groups: &Groups) -> Result<T> {
    agree_or(outcome, groups, Error::PeerCannotSave)
}

/// This rank's error, or `other` of the rank that has one.
pub(crate) fn agree_or<T>(
    outcome: Result<T>,
    groups: &Groups,
    other: impl FnOnce(usize) -> Error,
) -> Result<T> {
    let mut failed = [if outcome.is_err() { groups.world.rank() as f64 + 1.0 } else { 0.0 }];
    let reduced = reduce_values(groups.world.as_ref(), &mut failed, Reduction::Max);
    let outcome = outcome?;
    reduced?;
    if failed[0] == 0.0 { Ok(outcome) } else { Err(other(failed[0] as usize - 1)) }
}

/// Whether `path` is in its directory, which is read for it: NFS remembers for up to half a minute that a
/// name was not there, but asks its server anew when the directory is opened.
pub(super) fn is_listed(path: &Path) -> bool {
    let entries = path.parent().and_then(|dir| std::fs::read_dir(dir).ok());
    entries
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| Some(&*entry.file_name()) == path.file_name())
}

/// A number that no other start has, the same on all ranks, which call it together.
pub(super) fn common_nonce(comm: &dyn Communicator) -> Result<u64> {
    let mut nonce = [if comm.rank() == 0 { fresh_nonce() } else { 0.0 }];
    reduce_values(comm, &mut nonce, Reduction::Max)?;
    Ok(nonce[0] as u64)
}

/// A number that no other start has, small enough for an f64.
fn fresh_nonce() -> f64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let time = since.map_or(0, |time| time.as_nanos() as u64);
    ((time ^ (u64::from(std::process::id()) << 32)) >> 12) as f64
}

impl Started {
    fn new(buffers: Vec<UnitStates>) -> Result<Self> {
        let (job, given) = mpsc::channel::<Job>();
        let write = move || {
            // No job comes where another rank cannot save.
            let outcome = given.recv().map_or(Ok(()), |job| job.run(&buffers));
            (buffers, outcome)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write);
        let failed = |error| Error::Training(format!("cannot start a thread that saves: {error}"));
        Ok(Self { thread: thread.map_err(failed)?, job })
    }

    fn write(self, job: Job) -> Writing {
        let staging = job.staging.clone();
        // The thread waits for it.
        let _ = self.job.send(job);
        Writing { thread: self.thread, staging }
    }
}

impl Job {
    fn run(mut self, buffers: &[UnitStates]) -> Result<()> {
        let started = Instant::now();
        create_dir(&self.staging)?;
        fail_point("staging_made");
        let (rank, count) = self.writer;
        fail_point("before_states");
        let record = states::write(&self.staging, &states::file_name(rank, count), buffers)?;
        fail_point("after_states");
        if let Some(manifest) = self.manifest.take() {
            let step = manifest.progress.step;
            let bytes = self.commit(manifest, record).inspect_err(|_| {
                // What is half-built helps nobody; what cannot be removed, the next start removes.
                let _ = std::fs::remove_dir_all(&self.staging);
            })?;
            let (megabytes, seconds) = (bytes as f64 / 1e6, started.elapsed().as_secs_f64());
            let path = self.store.path(step);
            let (path, pause) = (path.display(), self.pause.as_secs_f64());
            info!(
                "saved {path} ({megabytes:.1} MB) in {seconds:.1} s; training paused for {pause:.3} s"
            );
            return Ok(());
        }
        let receipt = serde_json::to_vec(&record).unwrap_or_default();
        let path = self.receipt(rank);
        let partial = path.with_extension("partial");
        write_synced(&partial, &receipt)?;
        sync_dir(&self.staging)?;
        fail_point("before_receipt");
        std::fs::rename(&partial, &path).map_err(io(&path, "rename to"))?;
        fail_point("after_receipt");
        Ok(())
    }

    fn receipt(&self, rank: usize) -> PathBuf {
        self.staging.join(format!("rank-{rank:05}.receipt"))
    }

    /// Rank 0: waits for the others' files, adds the model and the manifest, moves the checkpoint
    /// to its place, and removes old ones. Returns the bytes written.
    fn commit(&self, mut manifest: Manifest, own: FileRecord) -> Result<u64> {
        manifest.files.push(own);
        for rank in 1..self.writer.1 {
            manifest.files.push(self.wait_for(rank)?);
        }
        fail_point("before_model");
        let states = StateFiles::open(&self.staging, &manifest)?;
        let model = model::write(
            &self.staging,
            &states,
            &manifest.units,
            &self.options.model,
            &manifest.job["metrics"],
        )?;
        manifest.files.extend(model);
        fail_point("before_manifest");
        manifest.write(&self.staging)?;
        fail_point("after_manifest");
        self.store.publish(&self.staging, manifest.progress.step)?;
        // The checkpoint is whole: an old one that stays ends no run.
        if let Err(error) = self.store.prune(self.options.keep, manifest.progress.step) {
            warn!("{error}; {STAYS}");
        }
        Ok(manifest.files.iter().map(|file| file.bytes).sum())
    }

    fn wait_for(&self, rank: usize) -> Result<FileRecord> {
        let path = self.receipt(rank);
        let [mut pause, longest] = LOOKS;
        let mut deadline = None;
        while !is_listed(&path) {
            match self.others.get() {
                Others::FAILED => return Err(Error::PeerCannotSave(rank)),
                Others::WRITTEN => {
                    let now = Instant::now();
                    if now >= *deadline.get_or_insert(now + self.options.timeout) {
                        let message = "another rank's file does not come; is the directory shared by \
                                       all machines?";
                        return Err(Error::File { path, message: message.into() });
                    }
                }
                _ => {}
            }
            std::thread::sleep(pause);
            pause = (2 * pause).min(longest);
        }
        let record = serde_json::from_slice(&read(&path)?)
            .map_err(|error| super::damaged(&path, format!("not a receipt: {error}")))?;
        std::fs::remove_file(&path).map_err(io(&path, "remove"))?;
        Ok(record)
    }
}

impl Manifest {
    /// Takes up the weights and moments of `units` from the checkpoint `dir`. All ranks call it
    /// together.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] when the files do not hold what the model needs.
    pub fn restore(&self, dir: &Path, units: &[FlatUnit], groups: &Groups) -> Result<()> {
        let files = StateFiles::open(dir, self)?;
        for unit in units {
            let UnitStates(states) = files.read(unit.layout(), unit.slice())?;
            unit.restore_states(&states)?;
            unit.share_update(groups.shard())?.wait()?;
        }
        Ok(())
    }
}
