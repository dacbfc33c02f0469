//! How long the pairs of a data set are in tokens, and what truncation takes from them.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::Serialize;

use super::tokenizer::PairTokenizer;
use crate::data::{Content, Dataset};
use crate::error::Result;

/// Token lengths over a data set, measured on all of its pairs or an evenly spaced sample.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LengthReport {
    /// Pairs measured.
    pub measured: usize,
    /// Pairs in the data set.
    pub pairs: usize,
    /// The longest sequence allowed.
    pub max_len: usize,
    /// Lengths before truncation, special tokens included, at the 50th, 90th and 99th percentile
    /// (nearest rank).
    pub percentiles: [usize; 3],
    /// The longest measured.
    pub longest: usize,
    /// Tokens that a bin of `bins` spans: 1, 2 or 5 times a power of ten.
    pub bin_width: usize,
    /// How many pairs measured have 1 to `bin_width` tokens, one more to twice that, and so on to
    /// the longest; at most [`LengthReport::MAX_BINS`].
    pub bins: Vec<usize>,
    /// Pairs measured that are truncated.
    pub truncated: usize,
    /// Queries of the whole data set that alone are too long, so that no document is left.
    pub long_queries: usize,
    /// The file lines of the first few of these.
    pub long_query_lines: Vec<u32>,
}

impl LengthReport {
    /// The most bins of the histogram.
    pub const MAX_BINS: usize = 20;

    /// Measures every pair where the data set holds tokens, else tokenizes up to `sample` of them;
    /// also every query that may be too long.
    ///
    /// # Errors
    /// When the tokenizer refuses a text.
    pub fn measure(
        dataset: &Dataset,
        tokenizer: &PairTokenizer,
        max_len: usize,
        sample: usize,
    ) -> Result<Self> {
        let pairs = dataset.pair_count();
        let has_tokens = |pair| matches!(dataset.document(&pair), Content::Tokens(_));
        let all = dataset.pairs().next().is_some_and(has_tokens);
        let measured = if all { pairs } else { pairs.min(sample) };
        let mut lengths = Lengths::default();
        for i in 0..measured {
            let pair = dataset.pair((i * pairs / measured) as u32);
            let query = match dataset.query(pair.query) {
                Content::Text(text) => tokenizer.query_ids(text)?.len(),
                Content::Tokens(tokens) => tokens.len(),
            };
            let document = match dataset.document(&pair) {
                Content::Text(text) => tokenizer.document_ids(text)?.len(),
                Content::Tokens(tokens) => tokens.len(),
            };
            lengths.add(tokenizer.fixed_tokens() + query + document);
        }
        let (bin_width, bins) = lengths.histogram();
        let (long_queries, long_query_lines) = long_queries(dataset, tokenizer, max_len)?;
        Ok(Self {
            measured,
            pairs,
            max_len,
            percentiles: [50, 90, 99].map(|percent| lengths.percentile(percent)),
            longest: lengths.longest(),
            bin_width,
            bins,
            truncated: lengths.counts.range(max_len + 1..).map(|(_, &count)| count).sum(),
            long_queries,
            long_query_lines,
        })
    }
}

/// How often each length occurs.
#[derive(Default)]
struct Lengths {
    counts: BTreeMap<usize, usize>,
    total: usize,
}

impl Lengths {
    fn add(&mut self, length: usize) {
        *self.counts.entry(length).or_default() += 1;
        self.total += 1;
    }

    fn longest(&self) -> usize {
        self.counts.keys().next_back().copied().unwrap_or(0)
    }

    /// The width of the bins, as round as possible, and what they count.
    fn histogram(&self) -> (usize, Vec<usize>) {
        let longest = self.longest();
        let widths = (0..).flat_map(|power| [1, 2, 5].map(|digit| digit * 10_usize.pow(power)));
        let fits = |width: &usize| longest.div_ceil(*width) <= LengthReport::MAX_BINS;
        let width = widths.into_iter().find(fits).unwrap_or(longest);
        let mut bins = vec![0; longest.div_ceil(width)];
        for (&length, &count) in &self.counts {
            // Without any token it is with the shortest.
            bins[length.saturating_sub(1) / width] += count;
        }
        (width, bins)
    }

    /// The smallest length that at least `percent` of 100 lengths do not exceed.
    fn percentile(&self, percent: usize) -> usize {
        let rank = (self.total * percent).div_ceil(100);
        let reached = self.counts.iter().scan(0, |seen, (&length, &count)| {
            *seen += count;
            Some((length, *seen))
        });
        reached.into_iter().find(|&(_, seen)| seen >= rank).map_or(0, |(length, _)| length)
    }
}

/// How many distinct queries alone exceed `max_len`, and the first few lines they stand on.
fn long_queries(
    dataset: &Dataset,
    tokenizer: &PairTokenizer,
    max_len: usize,
) -> Result<(usize, Vec<u32>)> {
    const SHOWN: usize = 5;
    let room = max_len.saturating_sub(tokenizer.fixed_tokens());
    let around_query = tokenizer.query_ids("")?.len();
    let mut long = HashSet::new();
    for query in 0..dataset.query_count() as u32 {
        let is_long = match dataset.query(query) {
            // Tokens are hardly ever more than bytes, so most queries need not be tokenized.
            Content::Text(text) => {
                around_query + text.len() > room && tokenizer.query_ids(text)?.len() > room
            }
            Content::Tokens(tokens) => tokens.len() > room,
        };
        if is_long {
            long.insert(query);
        }
    }
    let count = long.len();
    let first_lines = dataset.pairs().filter(|pair| long.remove(&pair.query));
    Ok((count, first_lines.map(|pair| pair.line).take(SHOWN.min(count)).collect()))
}

impl fmt::Display for LengthReport {
    /// A few lines to follow a [`crate::data::LoadReport`], without a line end after the last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p90, p99] = self.percentiles;
        write!(
            f,
            "  tokens: half up to {p50}, 90 % up to {p90}, 99 % up to {p99}, longest {}",
            self.longest
        )?;
        if self.measured < self.pairs {
            write!(f, " ({} of {} pairs measured)", self.measured, self.pairs)?;
        }
        let share = 100.0 * self.truncated as f64 / self.measured.max(1) as f64;
        write!(f, "\n  truncated to max_len {}: {share:.1} % of the pairs", self.max_len)?;
        if self.long_queries > 0 {
            let lines: Vec<_> = self.long_query_lines.iter().map(u32::to_string).collect();
            write!(
                f,
                "\n  {} queries alone exceed max_len and are cut (first at line {})",
                self.long_queries,
                lines.join(", ")
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Lengths;

    #[test]
    fn bins_are_round_few_and_hold_every_length() {
        for (longest, width) in [(1, 1), (20, 1), (21, 2), (40, 2), (41, 5), (101, 10), (8192, 500)]
        {
            let mut lengths = Lengths::default();
            (1..=longest).for_each(|length| lengths.add(length));
            let (found, bins) = lengths.histogram();
            assert_eq!(found, width, "{longest}");
            assert_eq!(bins.iter().sum::<usize>(), longest);
            assert!(bins[..bins.len() - 1].iter().all(|&count| count == width), "{bins:?}");
        }
        assert_eq!(Lengths::default().histogram(), (1, vec![]));
    }
}
