//! Scoring a file into a file, over any number of ranks, so that a job that is killed goes on.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use rr_launch::contract::heartbeat;
use serde_json::{Value, json};

use super::pipeline::score_due;
use super::store::{Earlier, ScoreStore};
use super::stream::{Scored, encoder};
use super::{CrossEncoder, ScoreOptions};
use crate::atomic::publish;
use crate::comm::Communicator;
use crate::data::{InputChunk, InputChunks, InputFormat, InputPair};
use crate::error::{Error, Result, tell};

/// What is added to the output's name while it is being made.
const PARTIAL: &str = ".partial";
/// Changes when the same input would come to other chunks or the same pair to another score.
const VERSION: u32 = 2;

/// A file of pairs to be scored into a file.
#[derive(Debug, Clone)]
pub struct FileJob {
    /// The pairs; a regular file, plain or compressed, that does not change meanwhile.
    pub input: PathBuf,
    /// How its lines hold pairs.
    pub format: InputFormat,
    /// Where a JSON line for each pair goes, in order. It appears whole, at the end, in the place
    /// of what was there; until then `OUTPUT.partial` holds the scores.
    pub output: PathBuf,
    /// Repeat the texts in the output.
    pub echo: bool,
}

/// An input that has been read once, with no bad line in this rank's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checked {
    /// Its chunks.
    pub chunks: u64,
    /// CRC-32 of its lines: a file that was replaced may have the size and the time of the old one.
    pub crc: u32,
}

/// How far a rank is.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Chunks that this start has to score, on this rank.
    pub due: u64,
    /// Those of them that are scored.
    pub done: u64,
    /// Pairs that this start has scored, on this rank.
    pub pairs: u64,
}

impl FileJob {
    /// Reads the whole input, on each rank a part: a bad line ends a job before it begins rather than
    /// after hours.
    ///
    /// # Errors
    /// [`Error::Data`] with the first bad line of this rank's part.
    pub fn check(&self, comm: &dyn Communicator) -> Result<Checked> {
        let mut chunks = 0;
        let mut crc = crc32fast::Hasher::new();
        for chunk in InputChunks::open(&self.input, self.format)? {
            let chunk = chunk?;
            chunks += 1;
            chunk.digest(&mut crc);
            if chunk.number % comm.world_size() as u64 == comm.rank() as u64 {
                chunk.pairs()?;
            }
        }
        Ok(Checked { chunks, crc: crc.finalize() })
    }

    /// Opens the scores of this job, whose input [`FileJob::check`] has read.
    ///
    /// # Errors
    /// As [`ScoreStore::open`].
    pub fn open(
        &self,
        model: &CrossEncoder,
        checked: Checked,
        options: &ScoreOptions,
        comm: &dyn Communicator,
    ) -> Result<(ScoreStore, Earlier)> {
        let mut name = self.output.clone().into_os_string();
        name.push(PARTIAL);
        ScoreStore::open(Path::new(&name), &self.identity(model, checked, options)?, comm)
    }

    /// What the scores depend on: batches and the number of ranks are no part of it.
    fn identity(
        &self,
        model: &CrossEncoder,
        checked: Checked,
        options: &ScoreOptions,
    ) -> Result<Value> {
        let read = |source| Error::Io { path: self.input.clone(), action: "read", source };
        Ok(json!({
            "version": VERSION,
            "model": model.identity()?,
            "max_len": model.checked_max_len(options.max_len)?,
            "input": {
                // As Rust writes it: a name need not be UTF-8, which JSON has to be.
                "path": format!("{:?}", self.input),
                "bytes": self.input.metadata().map_err(read)?.len(),
                "crc": format!("{:08x}", checked.crc),
                "format": format!("{:?}", self.format),
            },
        }))
    }

    /// Scores this rank's part of the `chunks` chunks into `store`. Rank 0 then waits for the
    /// others, writes the output and removes the store; it returns the number of pairs, other ranks
    /// nothing.
    ///
    /// # Errors
    /// What reading, scoring or writing reports; [`Error::Comm`] when a rank ends without its part;
    /// [`Error::Preempted`] on a request to make room.
    pub fn run(
        &self,
        model: &CrossEncoder,
        mut store: ScoreStore,
        chunks: u64,
        options: &ScoreOptions,
        mut progress: impl FnMut(Progress),
    ) -> Result<Option<u64>> {
        let encode = encoder(model, options)?;
        let encode = move |chunk: &InputChunk| encode(&chunk.pairs()?);
        let input = InputChunks::open(&self.input, self.format)?;
        let input = input.map(|chunk| chunk.map(|chunk| (chunk.number, chunk)));
        let due = store.due();
        let due = (0..chunks).filter(|&chunk| due.holds(chunk)).count() as u64;
        let mut at = Progress { due, done: 0, pairs: 0 };
        progress(at);
        let found = score_due(model, &mut store, input, encode, options.batch_size, |pairs| {
            at = Progress { due, done: at.done + 1, pairs: at.pairs + pairs as u64 };
            heartbeat::working(format_args!("scoring, {} of {due} chunks", at.done));
            progress(at);
        })?;
        if found != chunks {
            return Err(self.changed());
        }
        if store.rank() != 0 {
            return Ok(None);
        }
        heartbeat::waiting(format_args!("the scores of the other ranks"));
        store.wait(chunks)?;
        heartbeat::working(format_args!("writing the scores"));
        let pairs = self.write(&store, chunks)?;
        if let Err(error) = store.remove() {
            // The output is whole, whatever becomes of what it was made of.
            tell(format_args!("note: {error}"));
        }
        Ok(Some(pairs))
    }

    /// Writes the output out of whole scores.
    fn write(&self, store: &ScoreStore, chunks: u64) -> Result<u64> {
        let staging = store.output();
        let failed = |action| move |source| Error::Io { path: self.output.clone(), action, source };
        let file = File::create(&staging).map_err(failed("create"))?;
        let mut out = BufWriter::with_capacity(1 << 18, file);
        let input = || InputChunks::open(&self.input, self.format);
        let mut texts = self.echo.then(input).transpose()?;
        let mut index = 0;
        for logits in store.scores(chunks) {
            let logits = logits?;
            let pairs: Vec<InputPair> = match &mut texts {
                None => Vec::new(),
                Some(texts) => texts.next().ok_or_else(|| self.changed())??.pairs()?,
            };
            if self.echo && pairs.len() != logits.len() {
                return Err(self.changed());
            }
            let mut pairs = pairs.into_iter();
            for logit in logits {
                let scored = Scored::new(index, logit, pairs.next());
                let line = serde_json::to_string(&scored).unwrap_or_default();
                writeln!(out, "{line}").map_err(failed("write"))?;
                index += 1;
            }
        }
        let file = out.into_inner().map_err(|error| failed("write")(error.into_error()))?;
        publish(&file, &staging, &self.output)?;
        Ok(index)
    }

    fn changed(&self) -> Error {
        Error::File {
            path: self.input.clone(),
            message: "changed while it was read, so the scores are of no use; start again".into(),
        }
    }
}
