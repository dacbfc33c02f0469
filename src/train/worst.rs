//! The validation queries that the model ranks worst, over all ranks.

use crate::comm::{Communicator, Reduction, reduce_values};
use crate::error::Result;
use crate::metrics::{ndcg_at_k, order};

/// Queries that are kept.
const KEPT: usize = 20;

/// First documents of a query's ranking that are kept.
const TOP: usize = 5;

/// Numbers that a query is sent as: nDCG, hits, the most relevant hit, and the first of the ranking.
const WORDS: usize = 2 + 3 + 2 * TOP;

/// Bins of the histogram of nDCG.
const BINS: usize = 10;

/// How well the queries of a validation were ranked, the same on every rank.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct QueryReport {
    /// Queries with nDCG@10 from 0 to 0.1, to 0.2, and so on; the last bin holds 1 too.
    pub(super) bins: [usize; BINS],
    /// The worst, lowest nDCG@10 first; those ranked perfectly are not among them.
    pub(super) worst: Vec<RankedQuery>,
}

/// A query as the model ranked its hits.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RankedQuery {
    /// nDCG@10.
    pub(super) ndcg: f64,
    /// Hits of the query.
    pub(super) hits: usize,
    /// Of the hits with the highest label, the one ranked first.
    pub(super) relevant: RankedHit,
    /// The first of the ranking.
    pub(super) top: Vec<RankedHit>,
}

/// A document in a ranking.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct RankedHit {
    /// Number of the pair in the data set.
    pub(super) pair: u32,
    /// Its place, from 1.
    pub(super) rank: usize,
    /// The model's logit.
    pub(super) score: f64,
}

impl RankedQuery {
    /// Ranks the hits `pairs` of a query; equal scores keep their order. `None` where no hit is
    /// relevant.
    fn new(pairs: &[u32], scores: &[f32], labels: &[f32]) -> Result<Option<Self>> {
        let Some(ndcg) = ndcg_at_k(scores, labels, 10)? else { return Ok(None) };
        let order = order(scores);
        let hit = |(place, &at): (usize, &usize)| RankedHit {
            pair: pairs[at],
            rank: place + 1,
            score: scores[at].into(),
        };
        let highest = labels.iter().copied().fold(f32::MIN, f32::max);
        let relevant = order.iter().enumerate().find(|&(_, &at)| labels[at] >= highest).map(hit);
        Ok(relevant.map(|relevant| Self {
            ndcg,
            hits: pairs.len(),
            relevant,
            top: order.iter().enumerate().take(TOP).map(hit).collect(),
        }))
    }

    /// The same order on any number of ranks.
    fn key(&self) -> (f64, u32) {
        (self.ndcg, self.relevant.pair)
    }

    fn to_words(&self) -> [f64; WORDS] {
        let mut words = [0.0; WORDS];
        let RankedHit { pair, rank, score } = self.relevant;
        words[..5].copy_from_slice(&[
            self.ndcg,
            self.hits as f64,
            f64::from(pair),
            rank as f64,
            score,
        ]);
        for (place, hit) in words[5..].chunks_exact_mut(2).zip(&self.top) {
            place.copy_from_slice(&[f64::from(hit.pair), hit.score]);
        }
        words
    }

    /// The inverse; `None` for a place that nobody filled.
    fn from_words(words: &[f64]) -> Option<Self> {
        let (ndcg, hits) = (words[0], words[1] as usize);
        let top = words[5..].chunks_exact(2).take(hits).enumerate();
        (hits > 0).then(|| Self {
            ndcg,
            hits,
            relevant: RankedHit { pair: words[2] as u32, rank: words[3] as usize, score: words[4] },
            top: top
                .map(|(i, hit)| RankedHit { pair: hit[0] as u32, rank: i + 1, score: hit[1] })
                .collect(),
        })
    }
}

impl QueryReport {
    /// Adds a query's hits, their scores and labels.
    ///
    /// # Errors
    /// As [`ndcg_at_k`].
    pub(super) fn add(&mut self, pairs: &[u32], scores: &[f32], labels: &[f32]) -> Result<()> {
        if let Some(query) = RankedQuery::new(pairs, scores, labels)? {
            self.bins[((query.ndcg * BINS as f64) as usize).min(BINS - 1)] += 1;
            // A sum of gains over the same sum in another order is 1 up to rounding.
            if query.ndcg < 1.0 - 1e-9 {
                self.keep(query);
            }
        }
        Ok(())
    }

    fn keep(&mut self, query: RankedQuery) {
        let is_better = |kept: &RankedQuery| {
            let ((a, first), (b, second)) = (kept.key(), query.key());
            a.total_cmp(&b).then(first.cmp(&second)).is_lt()
        };
        let place = self.worst.partition_point(is_better);
        self.worst.insert(place, query);
        self.worst.truncate(KEPT);
    }

    /// What all ranks found, each on its share of the queries; all call it.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] when a peer went away.
    pub(super) fn reduce(&self, comm: &dyn Communicator) -> Result<Self> {
        let mut values = vec![0.0; BINS + comm.world_size() * KEPT * WORDS];
        for (value, &count) in values.iter_mut().zip(&self.bins) {
            *value = count as f64;
        }
        let own = BINS + comm.rank() * KEPT * WORDS;
        for (place, query) in values[own..].chunks_exact_mut(WORDS).zip(&self.worst) {
            place.copy_from_slice(&query.to_words());
        }
        reduce_values(comm, &mut values, Reduction::Sum)?;
        let (bins, queries) = values.split_at(BINS);
        let mut all = Self { bins: std::array::from_fn(|i| bins[i] as usize), worst: Vec::new() };
        queries.chunks_exact(WORDS).filter_map(RankedQuery::from_words).for_each(|q| all.keep(q));
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;
    use crate::comm::Solo;

    #[test]
    fn the_worst_are_kept_in_order_and_survive_the_way_over_the_ranks() {
        let mut report = QueryReport::default();
        // Query q has its one relevant hit at rank q % 10 + 1 of ten.
        for query in 0..100_u32 {
            let pairs: Vec<u32> = (query * 10..query * 10 + 10).collect();
            let scores: Vec<f32> = (0..10_u8).map(|i| -f32::from(i)).collect();
            let label = |i| if i == query % 10 { 1.0 } else { 0.0 };
            let labels: Vec<f32> = (0..10).map(label).collect();
            report.add(&pairs, &scores, &labels).unwrap();
        }
        report.add(&[7], &[1.0], &[0.0]).unwrap();
        let report = report.reduce(&Solo).unwrap();
        assert_eq!(report.bins.iter().sum::<usize>(), 100, "without a relevant hit it is no query");
        assert_eq!(report.bins[9], 10);
        let ranks: Vec<usize> = report.worst.iter().map(|query| query.relevant.rank).collect();
        assert_eq!(ranks, [[10; 10], [9; 10]].concat());
        let pairs: Vec<u32> = report.worst.iter().map(|query| query.relevant.pair).collect();
        assert!(pairs[..10].is_sorted() && pairs[10..].is_sorted(), "{pairs:?}");
        let first = &report.worst[0];
        assert_eq!((first.hits, first.relevant.pair, first.relevant.score), (10, 99, -9.0));
        let top: Vec<_> = first.top.iter().map(|hit| (hit.pair, hit.rank)).collect();
        assert_eq!(top, [(90, 1), (91, 2), (92, 3), (93, 4), (94, 5)]);
    }

    #[test]
    fn scores_of_either_zero_are_equal_as_the_metric_has_it() {
        let mut report = QueryReport::default();
        report.add(&[1, 2, 3], &[-0.0, 0.0, -0.0], &[0.0, 0.0, 1.0]).unwrap();
        let pairs: Vec<u32> = report.worst[0].top.iter().map(|hit| hit.pair).collect();
        assert_eq!(pairs, [1, 2, 3]);
    }

    #[test]
    fn a_query_of_few_hits_has_a_short_top() {
        let mut report = QueryReport::default();
        report.add(&[4, 5], &[0.5, 0.1], &[0.0, 2.0]).unwrap();
        let report = report.reduce(&Solo).unwrap();
        assert_eq!(report.worst[0].top.len(), 2);
        assert_eq!(
            report.worst[0].relevant,
            RankedHit { pair: 5, rank: 2, score: f64::from(0.1_f32) }
        );
    }
}
