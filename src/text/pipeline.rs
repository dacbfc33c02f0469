//! Micro-batches, tokenized in background threads ahead of the step.

use std::sync::Arc;

use super::tokenizer::{EncodedPair, PairTokenizer};
use crate::data::{Augment, Content, Dataset, MicroBatchPlan};
use crate::error::Result;
use crate::ordered::{OrderedMap, ordered_map};

/// One rank's share of a micro-batch, to be tokenized.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkItem {
    /// Numbers of pairs; empty for a rank without work, which still takes part.
    pub pairs: Vec<u32>,
    /// Offsets of groups in `pairs`, starting with 0; empty for pointwise data.
    pub cu_groups: Vec<u32>,
    /// The epoch, counted from 0, which text augmentation depends on.
    pub epoch: usize,
}

impl WorkItem {
    /// The share of `rank` in a planned micro-batch.
    #[must_use]
    pub fn of_rank(micro_batch: &MicroBatchPlan, rank: usize, epoch: usize) -> Self {
        let cu_groups = micro_batch.cu_groups.get(rank).cloned().unwrap_or_default();
        Self { pairs: micro_batch.per_rank[rank].clone(), cu_groups, epoch }
    }
}

/// A tokenized micro-batch: `B` sequences of `T` tokens in all, packed one after another.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenBatch {
    /// `[T]` token ids.
    pub input_ids: Vec<i64>,
    /// `[T]` segment ids.
    pub type_ids: Vec<i64>,
    /// `[T]` positions, from 0 in each sequence.
    pub position_ids: Vec<i64>,
    /// `[B + 1]` where sequences begin and end; starts with 0.
    pub cu_seqlens: Vec<i32>,
    /// `[B]` labels; empty where there are none.
    pub labels: Vec<f32>,
    /// `[groups + 1]` where groups begin and end, counted in sequences; empty for pointwise data.
    pub cu_groups: Vec<i64>,
    /// `[B]` numbers of pairs; empty where the pairs are of no data set.
    pub pairs: Vec<u32>,
}

impl Default for TokenBatch {
    fn default() -> Self {
        Self {
            input_ids: Vec::new(),
            type_ids: Vec::new(),
            position_ids: Vec::new(),
            cu_seqlens: vec![0],
            labels: Vec::new(),
            cu_groups: Vec::new(),
            pairs: Vec::new(),
        }
    }
}

impl TokenBatch {
    /// Appends a sequence (its tokens, not a label).
    pub fn push(&mut self, pair: &EncodedPair) {
        self.input_ids.extend(pair.input_ids.iter().copied().map(i64::from));
        self.type_ids.extend(pair.type_ids.iter().copied().map(i64::from));
        self.position_ids.extend(0..pair.input_ids.len() as i64);
        self.cu_seqlens.push(self.input_ids.len() as i32);
    }

    /// Sequences in the batch, `B`.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    /// Whether there is no sequence in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How far and how wide to tokenize ahead.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PipelineOptions {
    /// Threads that tokenize.
    pub threads: usize,
    /// Micro-batches that may wait for the consumer.
    pub ahead: usize,
    /// The longest sequence, special tokens included.
    pub max_len: usize,
    /// Augmentation of documents; for training only.
    pub augment: Option<Augment>,
}

/// Tokenizes the shares that `items` yields; the batches come out in the same order.
///
/// # Errors
/// [`crate::error::Error::Usage`] when `max_len` leaves no room for text. A batch that cannot be
/// tokenized comes out as an `Err` and ends the stream.
pub fn token_batches(
    dataset: Arc<Dataset>,
    tokenizer: Arc<PairTokenizer>,
    items: impl Iterator<Item = WorkItem> + Send + 'static,
    options: PipelineOptions,
) -> Result<OrderedMap<TokenBatch>> {
    tokenizer.check_max_len(options.max_len)?;
    let work = move |item: WorkItem| tokenize(&dataset, &tokenizer, item, &options);
    ordered_map(items.map(Ok), options.threads, options.ahead, work)
}

fn tokenize(
    dataset: &Dataset,
    tokenizer: &PairTokenizer,
    item: WorkItem,
    options: &PipelineOptions,
) -> Result<TokenBatch> {
    let mut batch = TokenBatch::default();
    // The hits of a group stand together: their query is tokenized once.
    let mut last_query: Option<(u32, Vec<u32>)> = None;
    for &number in &item.pairs {
        let pair = dataset.pair(number);
        let query = match last_query.take() {
            Some((index, ids)) if index == pair.query => ids,
            _ => match dataset.query(pair.query) {
                Content::Text(text) => tokenizer.query_ids(text)?,
                Content::Tokens(tokens) => tokens.to_vec(),
            },
        };
        let document = match (dataset.document(&pair), &options.augment) {
            (Content::Text(text), Some(augment)) => {
                tokenizer.document_ids(&augment.apply(text, item.epoch, number))?
            }
            (Content::Text(text), None) => tokenizer.document_ids(text)?,
            (Content::Tokens(tokens), _) => tokens.to_vec(),
        };
        batch.push(&tokenizer.join(&query, &document, options.max_len));
        batch.labels.push(pair.label);
        last_query = Some((pair.query, query));
    }
    batch.cu_groups = item.cu_groups.iter().copied().map(i64::from).collect();
    batch.pairs = item.pairs;
    Ok(batch)
}

#[cfg(test)]
#[path = "pipeline_tests.rs"]
mod tests;
