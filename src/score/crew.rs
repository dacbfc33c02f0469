//! Threads that score batches side by side on the CPU.
//!
//! A forward pass is hundreds of short operations, and threads that share each of them wait for one
//! another hundreds of times. A thread that takes a whole batch for itself waits for nobody.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use tch::Device;

use super::batch::{Batch, BatchLimits, batches};
use super::{host_scores, pack};
use crate::engine::Reader;
use crate::error::{Error, Result};
use crate::text::EncodedPair;

/// A batch on its way to a thread.
struct Job {
    batch: Batch,
    scores: Sender<(Vec<usize>, Result<Vec<f32>>)>,
    /// Nobody waits for its scores any more.
    cancelled: Arc<AtomicBool>,
}

/// The threads. Dropping the crew ends them, each after the batch in hand.
#[derive(Debug)]
pub(super) struct Crew {
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

/// Pairs that are being scored. Dropping it takes back what no thread has begun.
pub(super) struct Flight {
    pairs: Vec<EncodedPair>,
    scores: Receiver<(Vec<usize>, Result<Vec<f32>>)>,
    batches: usize,
    cancelled: Arc<AtomicBool>,
}

/// Begins to score pairs; see `CrossEncoder::finish`.
#[derive(Debug, Clone)]
pub(super) struct Starter {
    crew: Option<Arc<Crew>>,
    limits: BatchLimits,
}

/// Pairs on their way to scores.
pub(super) enum Work {
    /// Being scored.
    Under(Flight),
    /// To be scored in such batches by the thread that wants the scores.
    Ahead(Vec<EncodedPair>, BatchLimits),
}

impl Starter {
    /// Has `crew`, where there is one, score in batches of these limits.
    pub(super) fn new(crew: Option<Arc<Crew>>, limits: BatchLimits) -> Self {
        Self { crew, limits }
    }

    /// Begins to score tokenized pairs, where there are threads for it and enough to share.
    pub(super) fn start(&self, pairs: Vec<EncodedPair>) -> Work {
        let started = match &self.crew {
            Some(crew) => crew.start(pairs, self.limits),
            None => Err(pairs),
        };
        started.map_or_else(|pairs| Work::Ahead(pairs, self.limits), Work::Under)
    }
}

impl Crew {
    /// One thread for each of `readers`, which computes alone.
    ///
    /// # Errors
    /// [`Error::Training`] when the system gives no more threads.
    pub(super) fn new(readers: Vec<Reader>) -> Result<Self> {
        let threads = tch::get_num_threads();
        let (jobs, queue) = unbounded::<Job>();
        let (ready, all_ready) = bounded(readers.len());
        let mut crew = Self { jobs: Some(jobs), threads: Vec::new() };
        for (number, reader) in readers.into_iter().enumerate() {
            let (queue, ready) = (queue.clone(), ready.clone());
            let work = move || {
                compute_alone();
                drop(ready);
                queue.into_iter().for_each(|job| job.run(&reader));
            };
            let thread = thread::Builder::new().name(format!("score-{number}")).spawn(work);
            crew.threads.push(
                thread
                    .map_err(|error| Error::Training(format!("cannot start a thread: {error}")))?,
            );
        }
        drop(ready);
        // Ends when the last thread has let go of its end.
        let _: Option<()> = all_ready.recv().ok();
        // What threads that come later begin with.
        tch::set_num_threads(threads);
        Ok(crew)
    }

    /// Begins to score pairs in batches; gives them back where these are too few to keep the threads
    /// busy, which then share each operation instead. Batches are cut as without
    /// threads.
    pub(super) fn start(
        &self,
        pairs: Vec<EncodedPair>,
        limits: BatchLimits,
    ) -> std::result::Result<Flight, Vec<EncodedPair>> {
        let batches = batches(&pairs, limits);
        let are_enough = batches.len() >= self.threads.len().div_ceil(2).max(2);
        let Some(jobs) = self.jobs.as_ref().filter(|_| are_enough) else {
            return Err(pairs);
        };
        let (answer, scores) = bounded(batches.len());
        let cancelled = Arc::new(AtomicBool::new(false));
        let flight =
            Flight { pairs, scores, batches: batches.len(), cancelled: Arc::clone(&cancelled) };
        for batch in batches {
            let (scores, cancelled) = (answer.clone(), Arc::clone(&cancelled));
            // Threads outlive the crew's end of the queue; were they gone, `wait` would tell.
            let _ = jobs.send(Job { batch, scores, cancelled });
        }
        Ok(flight)
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A thread catches the panics of its work, so there is nothing to hear here.
            let _ = thread.join();
        }
    }
}

impl Flight {
    /// The pairs with their logits, in their order, once all are there.
    ///
    /// # Errors
    /// [`Error::Torch`] when a batch does not fit; [`Error::Training`] when a thread broke down.
    pub(super) fn wait(mut self) -> Result<(Vec<EncodedPair>, Vec<f32>)> {
        let mut logits = vec![0.0; self.pairs.len()];
        for _ in 0..self.batches {
            let gone = |_| Error::Training("a scoring thread ended without an answer".into());
            let (places, scores) = self.scores.recv().map_err(gone)?;
            for (place, score) in places.into_iter().zip(scores?) {
                logits[place] = score;
            }
        }
        Ok((std::mem::take(&mut self.pairs), logits))
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

impl Job {
    fn run(self, reader: &Reader) {
        if self.cancelled.load(Ordering::Relaxed) {
            return;
        }
        let tokens = &self.batch.tokens;
        let score = || host_scores(&reader.score(&pack(tokens, Device::Cpu)?)?, tokens.len());
        let broken = |_| Err(Error::Training("a scoring thread panicked".into()));
        let scores = catch_unwind(AssertUnwindSafe(score)).unwrap_or_else(broken);
        // Whoever asked may be gone.
        let _ = self.scores.send((self.batch.places, scores));
    }
}

/// Has libtorch use no thread beside the calling one for what this one computes.
fn compute_alone() {
    // The first question sets a thread up with the number that all begin with; one number set before
    // it would be overwritten by that.
    let _ = tch::get_num_threads();
    tch::set_num_threads(1);
}
