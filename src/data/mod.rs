//! Records, their loading, the plan of an epoch and text augmentation. Free of torch.
//!
//! A file becomes a [`Dataset`] ([`LoadOptions`], [`LoadReport`]); a [`Sampler`] turns it into the
//! micro-batches of an epoch, the same on every rank; [`Augment`] changes training text.

mod augment;
mod build;
mod cache;
mod chars;
mod encode;
mod groups;
mod input;
mod lines;
mod load;
mod record;
mod report;
mod rng;
pub mod sampler;
mod source;
mod store;
#[cfg(test)]
pub(crate) mod testing;

use std::ops::Range;
use std::path::PathBuf;

use store::{Bytes, Table, record, u32_at};

pub use augment::Augment;
pub use cache::CacheOptions;
pub use chars::is_cjk;
pub use encode::Encode;
pub(crate) use encode::QueryKey;
pub use input::{InputChunk, InputChunks, InputFormat, InputPair};
pub use load::LoadOptions;
pub(crate) use report::grouped;
pub use report::{DropReason, Dropped, LabelHistogram, LoadReport};
pub use sampler::{Epoch, MicroBatchPlan, Sampler, SamplerOptions, SamplerReport, StepPlan};
pub use source::{RecordForm, SourceRecord, SourceRecords};
pub use store::{Content, Tokens};

pub use crate::config::DatasetKind;

/// A document paired with its query.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    /// Number of the query, below [`Dataset::query_count`].
    pub query: u32,
    /// Number of the document, in file order.
    pub document: u32,
    /// The label as the losses use it: mapped onto `[0, 1]` for pointwise data, raw for grouped.
    pub label: f32,
    /// One-based line of the record in the file.
    pub line: u32,
}

/// Bytes of a pair in a data set.
const PAIR_BYTES: usize = 16;

impl Pair {
    fn to_bytes(self) -> [u8; PAIR_BYTES] {
        let words = [self.query, self.document, self.label.to_bits(), self.line];
        let mut bytes = [0; PAIR_BYTES];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn from_bytes(bytes: &[u8; PAIR_BYTES]) -> Self {
        let [query, document, label, line] = [0, 4, 8, 12].map(|at| u32_at(bytes, at));
        Self { query, document, label: f32::from_bits(label), line }
    }
}

/// The records of a data file, in memory or mapped from a cache on the disk.
///
/// Pairs, and groups of pairs, are numbered from 0. A query's text is kept once however many pairs
/// it has.
#[derive(Debug)]
pub struct Dataset {
    /// The file it came from.
    pub path: PathBuf,
    /// How the records are used.
    pub kind: DatasetKind,
    /// Distinct queries in order of first appearance.
    queries: Table,
    /// The document of each pair, in file order.
    documents: Table,
    /// In file order; of pointwise records read as grouped, gathered by query.
    pairs: Bytes,
    /// For each group, in file order, where it ends among the pairs; empty for pointwise data.
    groups: Bytes,
}

impl Dataset {
    /// Pairs in it.
    #[must_use]
    pub fn pair_count(&self) -> usize {
        self.pairs.len() / PAIR_BYTES
    }

    /// Distinct queries in it.
    #[must_use]
    pub fn query_count(&self) -> usize {
        self.queries.len()
    }

    /// Groups in it; 0 for pointwise data.
    #[must_use]
    pub fn group_count(&self) -> usize {
        self.groups.len() / 4
    }

    /// Pair number `pair`.
    #[must_use]
    pub fn pair(&self, pair: u32) -> Pair {
        Pair::from_bytes(record(&self.pairs, pair as usize))
    }

    /// All pairs, in order.
    pub fn pairs(&self) -> impl Iterator<Item = Pair> + Clone {
        self.pairs.as_chunks().0.iter().map(Pair::from_bytes)
    }

    /// The numbers of the pairs of group `group`, at least one.
    #[must_use]
    pub fn group(&self, group: u32) -> Range<u32> {
        let end = |group: u32| u32_at(record::<4>(&self.groups, group as usize), 0);
        group.checked_sub(1).map_or(0, end)..end(group)
    }

    /// All groups, in order.
    pub fn groups(&self) -> impl Iterator<Item = Range<u32>> {
        (0..self.group_count() as u32).map(|group| self.group(group))
    }

    /// The labels of pairs, in order.
    #[must_use]
    pub fn labels(&self, pairs: Range<u32>) -> Vec<f32> {
        pairs.map(|pair| self.pair(pair).label).collect()
    }

    /// Query number `query`.
    #[must_use]
    pub fn query(&self, query: u32) -> Content<'_> {
        self.queries.get(query)
    }

    /// The document of a pair.
    #[must_use]
    pub fn document(&self, pair: &Pair) -> Content<'_> {
        self.documents.get(pair.document)
    }

    /// Query and document of a pair, where both are kept as texts, as [`Dataset::load`] does.
    #[must_use]
    pub fn texts(&self, pair: &Pair) -> Option<(&str, &str)> {
        match (self.query(pair.query), self.document(pair)) {
            (Content::Text(query), Content::Text(document)) => Some((query, document)),
            _ => None,
        }
    }

    /// An estimate of the tokens that pair number `pair` comes to, from 1 to `max_len`.
    ///
    /// Good enough to balance work over ranks without tokenizing; see [`estimated_tokens`].
    #[must_use]
    pub fn cost(&self, pair: u32, max_len: usize) -> u32 {
        let pair = self.pair(pair);
        let tokens = self.queries.estimate(pair.query) + self.documents.estimate(pair.document);
        // The pair template of an encoder adds three or four special tokens.
        (tokens + 3).clamp(1, max_len.max(1)) as u32
    }
}

/// Roughly how many tokens a text comes to: one for each CJK character, one for every 4.5 bytes of
/// anything else.
#[must_use]
pub fn estimated_tokens(text: &str) -> usize {
    if text.is_ascii() {
        return text.len() * 2 / 9;
    }
    let (mut cjk, mut other_bytes) = (0, 0);
    for c in text.chars() {
        if is_cjk(c) { cjk += 1 } else { other_bytes += c.len_utf8() }
    }
    cjk + other_bytes * 2 / 9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn estimates_count_cjk_by_character_and_the_rest_by_bytes() {
        assert_eq!(estimated_tokens(""), 0);
        assert_eq!(estimated_tokens("a word of 18 bytes"), 4);
        assert_eq!(estimated_tokens("深度学习"), 4);
        assert_eq!(estimated_tokens("深度learning!"), 4);
    }

    #[test]
    fn cost_is_capped_by_max_len() {
        let pair = ("学习", "字".repeat(90), 1.0);
        let dataset = testing::dataset(DatasetKind::Pointwise, [pair], &[]);
        assert_eq!(dataset.cost(0, 512), 95);
        assert_eq!(dataset.cost(0, 64), 64);
        assert_eq!(dataset.cost(0, 0), 1);
    }
}
