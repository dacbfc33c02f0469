//! Chunks of pairs on their way to scores: tokenized ahead in the background, scored, kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rr_launch::contract::preemption;

use super::store::ScoreStore;
use super::{CrossEncoder, ScoreOptions};
use crate::error::{Error, Result};
use crate::ordered::ordered_map;
use crate::text::EncodedPair;

/// Threads that tokenize, and chunks that may wait.
const TOKENIZER_THREADS: usize = 2;
const CHUNKS_AHEAD: usize = 4;

/// Pairs in a chunk of [`score_pairs`].
const CHUNK_PAIRS: usize = 512;

/// Scores chunks as they come. `encode` runs in background threads; `sink` gets what it kept of each
/// chunk with the logits of its pairs, in order.
pub(super) fn score_chunks<C, K>(
    model: &CrossEncoder,
    chunks: impl Iterator<Item = Result<C>> + Send + 'static,
    encode: impl Fn(C) -> Result<(K, Vec<EncodedPair>)> + Send + Sync + 'static,
    batch_size: usize,
    mut sink: impl FnMut(K, Vec<f32>) -> Result<()>,
) -> Result<()>
where
    C: Send + 'static,
    K: Send + 'static,
{
    let starter = model.starter(batch_size)?;
    let start = move |chunk| encode(chunk).map(|(kept, pairs)| (kept, starter.start(pairs)));
    for chunk in ordered_map(chunks, TOKENIZER_THREADS, CHUNKS_AHEAD, start)? {
        let (kept, work) = chunk?;
        sink(kept, model.finish(work)?)?;
    }
    Ok(())
}

/// Scores those of numbered chunks that are due on this rank into `store`; returns the number of all
/// chunks. `chunks` gives the same on every rank, numbered from 0. `scored` is told how many pairs
/// each chunk had. Where the process listens for requests to make room, one ends the work after the
/// chunk at hand with [`Error::Preempted`].
pub(super) fn score_due<C: Send + 'static>(
    model: &CrossEncoder,
    store: &mut ScoreStore,
    chunks: impl Iterator<Item = Result<(u64, C)>> + Send + 'static,
    encode: impl Fn(&C) -> Result<Vec<EncodedPair>> + Send + Sync + 'static,
    batch_size: usize,
    mut scored: impl FnMut(usize),
) -> Result<u64> {
    let count = Arc::new(AtomicU64::new(0));
    let (due, counter) = (store.due(), Arc::clone(&count));
    let chunks = chunks.filter(move |chunk| match chunk {
        Ok((number, _)) => {
            counter.store(number + 1, Ordering::Relaxed);
            due.holds(*number)
        }
        Err(_) => true,
    });
    let encode = move |(number, chunk): (u64, C)| Ok((number, encode(&chunk)?));
    score_chunks(model, chunks, encode, batch_size, |number, logits| {
        store.put(number, &logits)?;
        scored(logits.len());
        if preemption::is_requested() { Err(Error::Preempted) } else { Ok(()) }
    })?;
    Ok(count.load(Ordering::Relaxed))
}

/// Scores `(query, document)` pairs into `store`, on this rank those that are its part and that no
/// earlier start has scored; returns the number of chunks that they come to. Every rank gives the
/// same pairs. [`ScoreStore::wait`] then waits for the other ranks' parts, and
/// [`ScoreStore::scores`] gives the logits of all pairs in their order, a chunk at a time.
///
/// Memory is bounded: a few chunks are tokenized ahead. `scored` is told of each number of pairs
/// that was scored.
///
/// # Errors
/// The first error of `pairs`; [`Error::Usage`] for options that cannot work;
/// [`Error::Torch`] when a batch does not fit; [`Error::Io`] from the disk; [`Error::Preempted`]
/// after [`preemption::listen`].
pub fn score_pairs<Q, D>(
    model: &CrossEncoder,
    store: &mut ScoreStore,
    pairs: impl Iterator<Item = Result<(Q, D)>> + Send + 'static,
    options: &ScoreOptions,
    scored: impl FnMut(usize),
) -> Result<u64>
where
    Q: AsRef<str> + Send + 'static,
    D: AsRef<str> + Send + 'static,
{
    let max_len = model.checked_max_len(options.max_len)?;
    let tokenizer = model.tokenizer();
    let encode = move |pairs: &Vec<(Q, D)>| -> Result<Vec<EncodedPair>> {
        let encoded = |(query, document): &(Q, D)| {
            tokenizer.encode_pair(query.as_ref(), document.as_ref(), max_len)
        };
        pairs.iter().map(encoded).collect()
    };
    let chunks = Numbered { pairs, number: 0 };
    score_due(model, store, chunks, encode, options.batch_size, scored)
}

/// Pairs in numbered lists; ends after the first error.
struct Numbered<I> {
    pairs: I,
    number: u64,
}

impl<P, I: Iterator<Item = Result<P>>> Iterator for Numbered<I> {
    type Item = Result<(u64, Vec<P>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let chunk: Result<Vec<P>> = self.pairs.by_ref().take(CHUNK_PAIRS).collect();
        match chunk {
            Ok(chunk) if chunk.is_empty() => None,
            Ok(chunk) => {
                self.number += 1;
                Some(Ok((self.number - 1, chunk)))
            }
            Err(error) => Some(Err(error)),
        }
    }
}
