//! Scores kept on the disk while they are made: a job that is killed goes on where it was.
//!
//! A directory holds `job.json`, which says what is scored with what, and a log of each rank,
//! `rank-N.scores`, to which the rank appends a record for each chunk: number of the chunk (u64),
//! number of scores (u32), CRC-32 of these two and the scores (u32), and the scores (f32), all
//! little-endian. A record that a kill tore is cut off by the next start. Ranks read the logs of the
//! others, so the directory has to be on a file system that all of them see.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rr_launch::contract::preemption;
use serde_json::Value;

use super::job_dir::{self, JOB, LOG, OUTPUT, io, log_path};
use crate::atomic::{create_dir, write_synced};
use crate::comm::Communicator;
use crate::error::{Error, Result};

/// Bytes of a record before its scores.
const HEADER: usize = 16;
/// Between two looks at what other ranks have added.
const POLL: Duration = Duration::from_millis(20);
/// How long a lock may still be held by a worker that is being killed.
const PATIENCE: Duration = Duration::from_secs(3);

/// What an earlier job left in the directory of a [`ScoreStore`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Earlier {
    /// Nothing.
    Nothing,
    /// So many scores of the same job, which are kept.
    Scores(u64),
    /// Scores of another job, which were removed; the keys of the identity that differ.
    OtherJob(Vec<String>),
}

/// The scores of one job, by chunk, over the ranks of a world.
///
/// Chunk number `c` is scored by rank `c % world_size`, unless an earlier start has. Any number of
/// ranks may go on with what any other number has begun.
#[derive(Debug)]
pub struct ScoreStore {
    dir: PathBuf,
    rank: usize,
    world_size: usize,
    /// The logs of all ranks, of earlier and larger worlds too. The first `world_size` are this
    /// world's, in order.
    logs: Vec<Log>,
    /// Where each chunk's scores are, by number.
    places: Vec<Option<Place>>,
}

/// A rank's log, read up to some byte.
#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: File,
    /// Bytes of whole records read so far.
    read: u64,
}

/// The chunks that a rank has to score.
#[derive(Debug, Clone)]
pub struct Due {
    rank: u64,
    world_size: u64,
    done: Vec<bool>,
}

impl Due {
    /// Whether chunk number `chunk` is one of them.
    #[must_use]
    pub fn holds(&self, chunk: u64) -> bool {
        let done = usize::try_from(chunk).ok().and_then(|chunk| self.done.get(chunk));
        chunk % self.world_size == self.rank && done != Some(&true)
    }
}

#[derive(Debug, Clone, Copy)]
struct Place {
    log: u32,
    scores: u32,
    /// The first byte of the scores.
    at: u64,
}

impl ScoreStore {
    /// Opens `dir` for the job that `identity`, a JSON object, describes; every rank of `comm`
    /// calls it. Scores of the same job are kept, those of another one removed.
    ///
    /// # Errors
    /// [`Error::Usage`] when another process is at work there, when the directory holds something else,
    /// or when the ranks do not see the same directory; [`Error::Io`] from the disk; [`Error::Comm`] from `comm`.
    pub fn open(dir: &Path, identity: &Value, comm: &dyn Communicator) -> Result<(Self, Earlier)> {
        let (rank, world_size) = (comm.rank(), comm.world_size());
        let own_path = log_path(dir, rank);
        let mut other_job = Vec::new();
        let own = if rank == 0 {
            job_dir::check_own(dir, identity)?;
            create_dir(dir)?;
            // The lock before anything is removed: it may be another process's work.
            let own = open_own(&own_path)?;
            other_job = begin(dir, identity, &own_path, &own)?;
            comm.barrier()?;
            own
        } else {
            comm.barrier()?;
            if !dir.join(JOB).exists() {
                return Err(Error::Usage(format!(
                    "rank {rank} does not see {}, which rank 0 has made; all ranks need a file \
                     system that they share",
                    dir.join(JOB).display()
                )));
            }
            open_own(&own_path)?
        };
        let mut own = Log { path: own_path, file: own, read: 0 };
        own.cut_torn_end()?;
        // From here on every rank has its log, and nobody has added to one yet.
        comm.barrier()?;
        let mut store =
            Self { dir: dir.to_owned(), rank, world_size, logs: Vec::new(), places: Vec::new() };
        store.open_logs(own)?;
        store.read_on()?;
        comm.barrier()?;
        let earlier = match store.score_count() {
            _ if !other_job.is_empty() => Earlier::OtherJob(other_job),
            0 => Earlier::Nothing,
            scores => Earlier::Scores(scores),
        };
        Ok((store, earlier))
    }

    /// All logs of the directory, `own` in the place of this rank's.
    fn open_logs(&mut self, own: Log) -> Result<()> {
        let mut own = Some(own);
        for rank in 0.. {
            let path = log_path(&self.dir, rank);
            let log = match own.take_if(|_| rank == self.rank) {
                Some(own) => own,
                None if rank >= self.world_size && !path.exists() => break,
                None => {
                    let file = File::open(&path).map_err(io(&path, "open"))?;
                    Log { path, file, read: 0 }
                }
            };
            self.logs.push(log);
        }
        Ok(())
    }

    /// Which chunks this rank has to score, as things stand now.
    #[must_use]
    pub fn due(&self) -> Due {
        let done = self.places.iter().map(Option::is_some).collect();
        Due { rank: self.rank as u64, world_size: self.world_size as u64, done }
    }

    /// This rank, from 0.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Scores in the store.
    #[must_use]
    pub fn score_count(&self) -> u64 {
        self.places.iter().flatten().map(|place| u64::from(place.scores)).sum()
    }

    fn place(&self, chunk: u64) -> Option<Place> {
        self.places.get(usize::try_from(chunk).ok()?).copied().flatten()
    }

    /// Keeps the scores of a chunk that is due.
    ///
    /// # Errors
    /// [`Error::Io`] from the disk.
    pub fn put(&mut self, chunk: u64, scores: &[f32]) -> Result<()> {
        let log = &mut self.logs[self.rank];
        let record = record(chunk, scores);
        // In one call: a kill between two would leave half a record more often.
        log.file.write_all(&record).map_err(io(&log.path, "write"))?;
        let at = log.read + HEADER as u64;
        log.read += record.len() as u64;
        self.keep(chunk, Place { log: self.rank as u32, scores: scores.len() as u32, at });
        Ok(())
    }

    fn keep(&mut self, chunk: u64, place: Place) {
        let chunk = chunk as usize;
        if chunk >= self.places.len() {
            self.places.resize(chunk + 1, None);
        }
        self.places[chunk] = Some(place);
    }

    /// Takes up what ranks have added to their logs.
    fn read_on(&mut self) -> Result<()> {
        for number in 0..self.logs.len() {
            let log = &mut self.logs[number];
            for (chunk, scores, at) in log.records()? {
                self.keep(chunk, Place { log: number as u32, scores, at });
            }
        }
        Ok(())
    }

    /// Returns when the scores of the first `chunks` chunks are there, of whichever rank. This
    /// rank's own have to be.
    ///
    /// # Errors
    /// [`Error::Comm`] when a rank ended without its part; [`Error::Io`] from the disk;
    /// [`Error::Preempted`] on a request to make room.
    pub fn wait(&mut self, chunks: u64) -> Result<()> {
        loop {
            let missing = (0..chunks).find(|&chunk| self.place(chunk).is_none());
            let Some(missing) = missing else { return Ok(()) };
            let rank = (missing % self.world_size as u64) as usize;
            // Before the look at its log: what it wrote, it wrote before it ended.
            let gone = rank == self.rank || self.logs[rank].is_without_writer();
            self.read_on()?;
            if self.place(missing).is_some() {
                continue;
            }
            // The others have been asked too, and end.
            if preemption::is_requested() {
                return Err(Error::Preempted);
            }
            if gone {
                return Err(Error::Comm {
                    rank: self.rank,
                    operation: "waiting for the scores of the other ranks".into(),
                    message: format!("rank {rank} ended before its part was done"),
                });
            }
            thread::sleep(POLL);
        }
    }

    /// The writer of rank `rank`'s scores, for a rank that waits for it beyond its own part.
    #[must_use]
    pub fn writer(&self, rank: usize) -> Writer {
        Writer(log_path(&self.dir, rank))
    }

    /// The scores of the first `chunks` chunks, a list for each, in order.
    pub fn scores(&self, chunks: u64) -> impl Iterator<Item = Result<Vec<f32>>> {
        (0..chunks).map(|chunk| {
            let place = self.place(chunk).ok_or_else(|| Error::File {
                path: self.dir.clone(),
                message: format!("the scores of chunk {chunk} are not there"),
            })?;
            let log = &self.logs[place.log as usize];
            let mut bytes = vec![0; place.scores as usize * 4];
            log.file.read_exact_at(&mut bytes, place.at).map_err(io(&log.path, "read"))?;
            Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
        })
    }

    /// Where it lies.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where in it the output is made.
    pub(super) fn output(&self) -> PathBuf {
        self.dir.join(OUTPUT)
    }

    /// Removes the scores and their directory; one rank does, when nobody waits any more.
    ///
    /// # Errors
    /// [`Error::File`] that names what else is in the directory, which stays with it; [`Error::Io`] from
    /// the disk.
    pub fn remove(self) -> Result<()> {
        let Self { dir, logs, .. } = self;
        // NFS keeps a file that is open, under another name.
        drop(logs);
        job_dir::remove(&dir)
    }
}

/// A rank's log, to be written to, under a lock that lasts as long as the process.
fn open_own(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).append(true).create(true).open(path);
    let file = file.map_err(io(path, "create"))?;
    let patience = Instant::now() + PATIENCE;
    loop {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) if Instant::now() < patience => thread::sleep(POLL),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Usage(format!(
                    "{} is being written by another process; wait for it, end it, or choose \
                     another output",
                    path.display()
                )));
            }
            // A file system without locks cannot say.
            Ok(()) | Err(TryLockError::Error(_)) => return Ok(file),
        }
    }
}

/// Makes `dir` the directory of `identity`'s job. Returns the keys in which the job that it was of
/// differs; its logs are then empty.
fn begin(dir: &Path, identity: &Value, own_path: &Path, own: &File) -> Result<Vec<String>> {
    let path = dir.join(JOB);
    let earlier: Option<Value> =
        fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok());
    if earlier.as_ref() == Some(identity) {
        return Ok(Vec::new());
    }
    let mut cleared = false;
    for entry in fs::read_dir(dir).map_err(io(dir, "read the directory"))? {
        let path = entry.map_err(io(dir, "read the directory"))?.path();
        if path.to_string_lossy().ends_with(LOG) {
            // Under its lock: a worker of a killed job may be about to add to it.
            let other = if path == own_path { None } else { Some(open_own(&path)?) };
            let file = other.as_ref().unwrap_or(own);
            cleared |= file.metadata().map_err(io(&path, "read"))?.len() > 0;
            file.set_len(0).map_err(io(&path, "empty"))?;
        }
    }
    write_synced(&path, format!("{identity:#}\n").as_bytes())?;
    Ok(if cleared { differences(earlier.as_ref(), identity) } else { Vec::new() })
}

fn differences(earlier: Option<&Value>, identity: &Value) -> Vec<String> {
    let earlier = earlier.unwrap_or(&Value::Null);
    let keys = identity.as_object().into_iter().flat_map(|object| object.keys());
    let differing: Vec<String> =
        keys.filter(|key| earlier[key.as_str()] != identity[key.as_str()]).cloned().collect();
    if differing.is_empty() { vec!["job".to_owned()] } else { differing }
}

fn record(chunk: u64, scores: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + scores.len() * 4);
    bytes.extend(chunk.to_le_bytes());
    bytes.extend((scores.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(scores.iter().flat_map(|score| score.to_le_bytes()));
    let crc = crc_of(&bytes[..12], &bytes[HEADER..]);
    bytes[12..HEADER].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn crc_of(head: &[u8], scores: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(scores);
    hasher.finalize()
}

impl Log {
    /// The whole records behind what is read: number of the chunk, scores, first byte of these.
    fn records(&mut self) -> Result<Vec<(u64, u32, u64)>> {
        let mut found = Vec::new();
        let length = self.file.metadata().map_err(io(&self.path, "read"))?.len();
        if length <= self.read {
            return Ok(found);
        }
        let mut reader = BufReader::with_capacity(1 << 18, &self.file);
        reader.seek(SeekFrom::Start(self.read)).map_err(io(&self.path, "read"))?;
        let (mut header, mut scores) = ([0; HEADER], Vec::new());
        loop {
            let left = length - self.read;
            if left < HEADER as u64 {
                break;
            }
            reader.read_exact(&mut header).map_err(io(&self.path, "read"))?;
            let [chunk, count_and_crc] = *header.as_chunks::<8>().0 else { break };
            let [count, crc] = *count_and_crc.as_chunks::<4>().0 else { break };
            let count = u32::from_le_bytes(count);
            let bytes = u64::from(count) * 4;
            if left < HEADER as u64 + bytes {
                break;
            }
            scores.resize(bytes as usize, 0);
            reader.read_exact(&mut scores).map_err(io(&self.path, "read"))?;
            if crc_of(&header[..12], &scores) != u32::from_le_bytes(crc) {
                break;
            }
            found.push((u64::from_le_bytes(chunk), count, self.read + HEADER as u64));
            self.read += HEADER as u64 + bytes;
        }
        Ok(found)
    }

    /// Removes what a kill left half written.
    fn cut_torn_end(&mut self) -> Result<()> {
        self.records()?;
        self.file.set_len(self.read).map_err(io(&self.path, "cut"))?;
        self.read = 0;
        Ok(())
    }

    fn is_without_writer(&self) -> bool {
        is_without_writer(&self.file)
    }
}

/// Whether the process that wrote a log has ended: nobody holds its lock.
fn is_without_writer(log: &File) -> bool {
    let free = log.try_lock_shared().is_ok();
    if free {
        // Whoever else asks at this moment sees it held, and asks again.
        let _ = log.unlock();
    }
    free
}

/// The rank that writes a log of scores, as other ranks see it.
#[derive(Debug)]
pub struct Writer(PathBuf);

impl Writer {
    /// Whether it is done with its store, or its process has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        // Opened for the moment alone: NFS would keep it, and its directory, for whoever has it open.
        File::open(&self.0).map_or(true, |log| is_without_writer(&log))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use serde_json::json;

    use super::*;
    use crate::comm::Solo;

    fn open(dir: &Path, job: &str) -> Result<(ScoreStore, Earlier)> {
        ScoreStore::open(dir, &json!({"model": job, "max_len": 8}), &Solo)
    }

    fn due(store: &ScoreStore, chunks: u64) -> Vec<u64> {
        let due = store.due();
        (0..chunks).filter(|&chunk| due.holds(chunk)).collect()
    }

    fn all(store: &ScoreStore, chunks: u64) -> Vec<Vec<f32>> {
        store.scores(chunks).map(|scores| scores.unwrap()).collect()
    }

    #[test]
    fn scores_come_back_after_a_kill_and_a_torn_record_is_cut_off() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("out.partial");
        let (mut store, earlier) = open(&dir, "a").unwrap();
        assert_eq!(earlier, Earlier::Nothing);
        store.put(1, &[0.5, -1.0]).unwrap();
        store.put(0, &[f32::MIN]).unwrap();
        drop(store);
        let log = log_path(&dir, 0);
        let whole = fs::read(&log).unwrap();
        // A record whose end is missing, one with a wrong byte, a length beyond the file.
        let next = record(2, &[4.0; 3]);
        let mut wrong = next.clone();
        wrong[HEADER + 1] ^= 1;
        let mut endless = next.clone();
        endless[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        for torn in [&next[..next.len() - 1], &next[..3], &wrong, &endless] {
            fs::write(&log, [&whole, torn].concat()).unwrap();
            let (mut store, earlier) = open(&dir, "a").unwrap();
            assert_eq!(earlier, Earlier::Scores(3));
            assert_eq!(due(&store, 4), [2, 3]);
            assert!(store.wait(3).is_err(), "its own part is not there");
            store.put(2, &[]).unwrap();
            store.wait(3).unwrap();
            assert_eq!(all(&store, 3), [vec![f32::MIN], vec![0.5, -1.0], vec![]]);
        }
    }

    #[test]
    fn another_job_starts_anew_and_says_what_differs() {
        let root = tempfile::tempdir().unwrap();
        let (mut store, _) = open(root.path(), "a").unwrap();
        store.put(0, &[1.0]).unwrap();
        drop(store);
        let (store, earlier) = open(root.path(), "b").unwrap();
        assert_eq!(earlier, Earlier::OtherJob(vec!["model".to_owned()]));
        assert_eq!((due(&store, 1), store.score_count()), (vec![0], 0));
        drop(store);
        assert_eq!(open(root.path(), "b").unwrap().1, Earlier::Nothing);
    }

    #[test]
    fn a_directory_of_something_else_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let (kept, log) = (root.path().join("notes.txt"), log_path(root.path(), 0));
        fs::write(&kept, "").unwrap();
        let error = open(root.path(), "a").unwrap_err().to_string();
        assert!(error.contains("holds notes.txt, which no scoring put there"), "{error}");
        assert!(kept.exists() && !log.exists());
        // What a start leaves that is killed at once is taken up.
        fs::rename(&kept, &log).unwrap();
        open(root.path(), "a").unwrap().0.remove().unwrap();
    }

    #[test]
    fn two_processes_do_not_write_the_same_log() {
        let root = tempfile::tempdir().unwrap();
        let (store, _) = open(root.path(), "a").unwrap();
        let error = open(root.path(), "b").unwrap_err().to_string();
        assert!(error.contains("rank-0.scores is being written by another process"), "{error}");
        store.remove().unwrap();
        assert!(!root.path().exists());
    }

    /// What a larger world left is kept: its logs are read, and only what is missing is due.
    #[test]
    fn a_smaller_world_goes_on_with_the_scores_of_a_larger_one() {
        let root = tempfile::tempdir().unwrap();
        drop(open(root.path(), "a").unwrap());
        fs::write(log_path(root.path(), 1), [record(1, &[1.0]), record(3, &[3.0])].concat())
            .unwrap();
        let (mut store, earlier) = open(root.path(), "a").unwrap();
        assert_eq!(earlier, Earlier::Scores(2));
        assert_eq!(due(&store, 5), [0, 2, 4]);
        for chunk in due(&store, 5) {
            store.put(chunk, &[chunk as f32]).unwrap();
        }
        assert_eq!(all(&store, 5).concat(), [0.0, 1.0, 2.0, 3.0, 4.0]);
    }
}
