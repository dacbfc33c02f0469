//! nDCG, MRR, MAP and Recall of scored documents, per query and as means over queries.
//!
//! A document is relevant when its label is above 0. [`ranked`] keeps documents with equal scores in
//! the order they were given in (`trec_eval` and `pytrec_eval` order them by document id instead, and
//! so does `eval::trec` for their files), so a model that gives every document the same
//! score is judged on the input order.

use std::fmt;

use serde_json::{Value, json};

use crate::error::{Error, Result};

/// The cut-off of the reported nDCG, MRR and Recall.
const CUTOFF: usize = 10;

/// The largest label whose exponential gain is taken as it is; `2^1024` is beyond a double.
const LARGEST_LABEL: f32 = 1000.0;

/// Labels in the order of falling scores; equal scores keep their order.
///
/// # Errors
/// [`Error::Training`] when a score is NaN or the lengths differ.
pub fn ranked(scores: &[f32], labels: &[f32]) -> Result<Vec<f32>> {
    if scores.len() != labels.len() {
        let (scores, labels) = (scores.len(), labels.len());
        return Err(Error::Training(format!("{scores} scores for {labels} labels")));
    }
    if let Some(at) = scores.iter().position(|score| score.is_nan()) {
        let count = scores.len();
        let message = format!("the score of document {} of {count} is NaN", at + 1);
        return Err(Error::Training(message));
    }
    Ok(order(scores).into_iter().map(|document| labels[document]).collect())
}

/// The documents in the order of falling scores; equal ones, which 0 and −0 are, keep theirs.
#[must_use]
pub fn order(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| (scores[b] + 0.0).total_cmp(&(scores[a] + 0.0)));
    order
}

/// What a relevant document is worth to nDCG.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gain {
    /// `2^label − 1`, as Burges et al., "Learning to Rank using Gradient Descent" (2005).
    Exponential,
    /// The label itself, as Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR
    /// techniques" (2002), and `trec_eval`.
    Linear,
}

impl Gain {
    /// Labels below 0 are worth nothing. An exponential gain is divided by `2^shift`.
    fn of(self, label: f32, shift: f64) -> f64 {
        let label = f64::from(label.max(0.0));
        match self {
            Self::Exponential => (label - shift).exp2() - (-shift).exp2(),
            Self::Linear => label,
        }
    }
}

/// `Σ_{rank ≤ k} gain(label) / log2(rank + 1)`.
fn dcg(labels: &[f32], k: usize, gain: Gain, shift: f64) -> f64 {
    let discounted = |(i, &label): (usize, &f32)| gain.of(label, shift) / (i as f64 + 2.0).log2();
    // A sum of nothing would be −0.
    labels.iter().take(k).enumerate().map(discounted).fold(0.0, |sum, gain| sum + gain)
}

/// A query's documents, best first, with what is known of all its documents.
///
/// They differ where a ranking lacks judged documents or holds some that nobody judged.
#[derive(Debug, Clone, Copy)]
pub struct Ranked<'a> {
    /// Labels of the ranked documents, best first; 0 for one that nobody judged.
    pub ranked: &'a [f32],
    /// Labels of all judged documents, in any order.
    pub judged: &'a [f32],
}

impl<'a> Ranked<'a> {
    /// A ranking of all judged documents.
    fn whole(ranked: &'a [f32]) -> Self {
        Self { ranked, judged: ranked }
    }

    /// How many of the first `k` are relevant.
    fn found(self, k: usize) -> f64 {
        self.ranked.iter().take(k).filter(|&&label| label > 0.0).count() as f64
    }

    /// How many documents are relevant; `None` for none.
    fn relevant(self) -> Option<f64> {
        let count = self.judged.iter().filter(|&&label| label > 0.0).count();
        (count > 0).then_some(count as f64)
    }

    fn ndcg(self, k: usize, gain: Gain) -> Option<f64> {
        let mut ideal = self.judged.to_vec();
        ideal.sort_by(|a, b| b.total_cmp(a));
        // A ratio, in which a common factor does not matter: labels whose gain no double holds, such
        // as clicks, are shifted down.
        let shift = f64::from(ideal.first().copied().unwrap_or(0.0) - LARGEST_LABEL).max(0.0);
        let best = dcg(&ideal, k, gain, shift);
        (best > 0.0).then(|| dcg(self.ranked, k, gain, shift) / best)
    }

    fn reciprocal_rank(self, k: usize) -> Option<f64> {
        let first = self.ranked.iter().take(k).position(|&label| label > 0.0);
        self.relevant().map(|_| first.map_or(0.0, |i| 1.0 / (i as f64 + 1.0)))
    }

    fn average_precision(self) -> Option<f64> {
        let (mut found, mut sum) = (0.0, 0.0);
        for (i, &label) in self.ranked.iter().enumerate() {
            if label > 0.0 {
                found += 1.0;
                sum += found / (i as f64 + 1.0);
            }
        }
        self.relevant().map(|relevant| sum / relevant)
    }

    fn recall(self, k: usize) -> Option<f64> {
        self.relevant().map(|relevant| self.found(k) / relevant)
    }

    /// The figures that [`measure_names`] names, in that order; `None` without a relevant document.
    #[must_use]
    pub fn measures(self, cutoffs: &[usize], gain: Gain) -> Option<Vec<f64>> {
        let ndcg = cutoffs.iter().map(|&k| self.ndcg(k, gain));
        let mrr = cutoffs.iter().map(|&k| self.reciprocal_rank(k));
        let recall = cutoffs.iter().map(|&k| self.recall(k));
        ndcg.chain(mrr).chain([self.average_precision()]).chain(recall).collect()
    }
}

/// nDCG, MRR at each cut-off, MAP, and Recall at each cut-off: `ndcg@10`, `mrr@10`, `map`, `recall@10`.
#[must_use]
pub fn measure_names(cutoffs: &[usize]) -> Vec<String> {
    let at = |name: &'static str| cutoffs.iter().map(move |k| format!("{name}@{k}"));
    at("ndcg").chain(at("mrr")).chain(["map".to_owned()]).chain(at("recall")).collect()
}

/// nDCG@k with exponential gain, as Burges et al., "Learning to Rank using Gradient Descent"
/// (2005): gain `2^label − 1`, discount `log2(rank + 1)`, divided by that of the ideal order of
/// all the documents. `None` without a relevant document.
///
/// # Errors
/// [`Error::Training`] when a score is NaN or the lengths differ.
pub fn ndcg_at_k(scores: &[f32], labels: &[f32], k: usize) -> Result<Option<f64>> {
    Ok(Ranked::whole(&ranked(scores, labels)?).ndcg(k, Gain::Exponential))
}

/// One over the rank of the first relevant document, 0 when that is beyond `k`. `None` without a
/// relevant document.
///
/// # Errors
/// As [`ndcg_at_k`].
pub fn reciprocal_rank_at_k(scores: &[f32], labels: &[f32], k: usize) -> Result<Option<f64>> {
    Ok(Ranked::whole(&ranked(scores, labels)?).reciprocal_rank(k))
}

/// The mean of the precision at each relevant document, over all documents. `None` without a
/// relevant document.
///
/// # Errors
/// As [`ndcg_at_k`].
pub fn average_precision(scores: &[f32], labels: &[f32]) -> Result<Option<f64>> {
    Ok(Ranked::whole(&ranked(scores, labels)?).average_precision())
}

/// The share of the relevant documents among the first `k`. `None` without a relevant document.
///
/// # Errors
/// As [`ndcg_at_k`].
pub fn recall_at_k(scores: &[f32], labels: &[f32], k: usize) -> Result<Option<f64>> {
    Ok(Ranked::whole(&ranked(scores, labels)?).recall(k))
}

/// Sums over queries, to be added up over ranks and divided at the end.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RankingSums {
    ndcg: f64,
    reciprocal_rank: f64,
    average_precision: f64,
    recall: f64,
    queries: f64,
    skipped: f64,
}

impl RankingSums {
    /// Adds a query: the scores and labels of its documents. One without a relevant document is
    /// skipped and counted.
    ///
    /// # Errors
    /// As [`ndcg_at_k`].
    pub fn add(&mut self, scores: &[f32], labels: &[f32]) -> Result<()> {
        let ranked = ranked(scores, labels)?;
        let ranked = Ranked::whole(&ranked);
        let (Some(ndcg), Some(reciprocal_rank), Some(average_precision), Some(recall)) = (
            ranked.ndcg(CUTOFF, Gain::Exponential),
            ranked.reciprocal_rank(CUTOFF),
            ranked.average_precision(),
            ranked.recall(CUTOFF),
        ) else {
            self.skipped += 1.0;
            return Ok(());
        };
        self.ndcg += ndcg;
        self.reciprocal_rank += reciprocal_rank;
        self.average_precision += average_precision;
        self.recall += recall;
        self.queries += 1.0;
        Ok(())
    }

    /// Adds the queries of another part.
    pub fn merge(&mut self, other: &Self) {
        let (mine, theirs) = (self.to_array(), other.to_array());
        *self = Self::from_array(std::array::from_fn(|i| mine[i] + theirs[i]));
    }

    /// All sums as numbers that may be added element by element, for an all-reduce.
    #[must_use]
    pub fn to_array(&self) -> [f64; 6] {
        [
            self.ndcg,
            self.reciprocal_rank,
            self.average_precision,
            self.recall,
            self.queries,
            self.skipped,
        ]
    }

    /// The inverse of [`RankingSums::to_array`].
    #[must_use]
    pub fn from_array(sums: [f64; 6]) -> Self {
        let [ndcg, reciprocal_rank, average_precision, recall, queries, skipped] = sums;
        Self { ndcg, reciprocal_rank, average_precision, recall, queries, skipped }
    }

    /// The means over queries; `None` when no query had a relevant document.
    #[must_use]
    pub fn metrics(&self) -> Option<RankingMetrics> {
        (self.queries > 0.0).then(|| RankingMetrics {
            ndcg_at_10: self.ndcg / self.queries,
            mrr_at_10: self.reciprocal_rank / self.queries,
            map: self.average_precision / self.queries,
            recall_at_10: self.recall / self.queries,
            queries: self.queries as usize,
            skipped: self.skipped as usize,
        })
    }
}

/// Means over the queries that have a relevant document.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RankingMetrics {
    /// Normalised discounted cumulative gain of the first ten.
    pub ndcg_at_10: f64,
    /// Mean reciprocal rank within the first ten.
    pub mrr_at_10: f64,
    /// Mean average precision.
    pub map: f64,
    /// Recall of the first ten.
    pub recall_at_10: f64,
    /// Queries in the means.
    pub queries: usize,
    /// Queries left out because none of their documents is relevant.
    pub skipped: usize,
}

impl RankingMetrics {
    /// The figures under their usual names.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "ndcg@10": self.ndcg_at_10,
            "mrr@10": self.mrr_at_10,
            "map": self.map,
            "recall@10": self.recall_at_10,
            "queries": self.queries,
            "skipped": self.skipped,
        })
    }
}

impl fmt::Display for RankingMetrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ndcg_at_10, mrr_at_10, map, recall_at_10, queries, skipped } = self;
        write!(f, "nDCG@10 {ndcg_at_10:.4}, MRR@10 {mrr_at_10:.4}, MAP {map:.4}")?;
        write!(f, ", Recall@10 {recall_at_10:.4} over {queries} queries")?;
        if *skipped > 0 {
            write!(f, " ({skipped} without a relevant document left out)")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
    }

    /// Worked out by hand: ranked labels 1, 0, 2, 0, 1.
    #[test]
    fn a_query_worked_out_by_hand() {
        let scores = [0.1, 5.0, -3.0, 4.0, 1.0];
        let labels = [0.0, 1.0, 1.0, 0.0, 2.0];
        let dcg = 1.0 + 3.0 / 4_f64.log2() + 1.0 / 6_f64.log2();
        let ideal = 3.0 + 1.0 / 3_f64.log2() + 1.0 / 4_f64.log2();
        close(ndcg_at_k(&scores, &labels, 10).unwrap().unwrap(), dcg / ideal);
        let ideal_at_2 = 3.0 + 1.0 / 3_f64.log2();
        close(ndcg_at_k(&scores, &labels, 2).unwrap().unwrap(), 1.0 / ideal_at_2);
        close(reciprocal_rank_at_k(&scores, &labels, 10).unwrap().unwrap(), 1.0);
        let precision = (1.0 + 2.0 / 3.0 + 3.0 / 5.0) / 3.0;
        close(average_precision(&scores, &labels).unwrap().unwrap(), precision);
        close(recall_at_k(&scores, &labels, 3).unwrap().unwrap(), 2.0 / 3.0);
    }

    #[test]
    fn labels_beyond_a_double_s_exponents_and_empty_rankings_have_an_ndcg() {
        let discount = 1.0 / 3_f64.log2();
        close(ndcg_at_k(&[1.0, 0.0], &[5.0, 1e5], 10).unwrap().unwrap(), discount);
        close(ndcg_at_k(&[1.0, 0.0], &[2001.0, 2000.0], 10).unwrap().unwrap(), 1.0);
        let swapped = (1.0 + 2.0 * discount) / (2.0 + discount);
        close(ndcg_at_k(&[0.0, 1.0], &[2001.0, 2000.0], 10).unwrap().unwrap(), swapped);
        let empty = Ranked { ranked: &[], judged: &[1.0] }.ndcg(10, Gain::Linear).unwrap();
        assert_eq!(empty.to_string(), "0");
    }

    #[test]
    fn reciprocal_rank_is_zero_beyond_the_cutoff() {
        let scores: Vec<f32> = (0..12).map(|i| -i as f32).collect();
        let labels: Vec<f32> = (0..12).map(|i| f32::from(u8::from(i == 10))).collect();
        assert_eq!(reciprocal_rank_at_k(&scores, &labels, 10).unwrap(), Some(0.0));
        close(reciprocal_rank_at_k(&scores, &labels, 11).unwrap().unwrap(), 1.0 / 11.0);
    }

    #[test]
    fn equal_scores_keep_the_input_order() {
        assert_eq!(reciprocal_rank_at_k(&[1.0; 3], &[0.0, 1.0, 0.0], 10).unwrap(), Some(0.5));
        for zeros in [[0.0, -0.0], [-0.0, 0.0]] {
            assert_eq!(reciprocal_rank_at_k(&zeros, &[0.0, 1.0], 10).unwrap(), Some(0.5));
        }
    }

    #[test]
    fn queries_without_a_relevant_document_are_counted_apart() {
        let mut sums = RankingSums::default();
        sums.add(&[1.0, 2.0], &[0.0, -1.0]).unwrap();
        sums.add(&[], &[]).unwrap();
        assert_eq!(sums.metrics(), None);
        sums.add(&[2.0, 1.0], &[1.0, -3.0]).unwrap();
        let metrics = sums.metrics().unwrap();
        assert_eq!((metrics.queries, metrics.skipped), (1, 2));
        close(metrics.ndcg_at_10, 1.0);
        let text = "nDCG@10 1.0000, MRR@10 1.0000, MAP 1.0000, Recall@10 1.0000 over 1 queries \
                    (2 without a relevant document left out)";
        assert_eq!(metrics.to_string(), text);
    }

    #[test]
    fn parts_merge_into_the_whole() {
        let queries = [
            (vec![0.3, 0.1, 0.2], vec![0.0, 1.0, 2.0]),
            (vec![0.5, 0.9], vec![1.0, 0.0]),
            (vec![0.5, 0.9], vec![0.0, 0.0]),
        ];
        let sums_of = |queries: &[(Vec<f32>, Vec<f32>)]| {
            let mut sums = RankingSums::default();
            for (scores, labels) in queries {
                sums.add(scores, labels).unwrap();
            }
            sums
        };
        let whole = sums_of(&queries);
        let mut parts = sums_of(&queries[..1]);
        parts.merge(&RankingSums::from_array(sums_of(&queries[1..]).to_array()));
        assert_eq!(parts, whole);
    }

    #[test]
    fn nan_and_uneven_input_are_errors() {
        let mut sums = RankingSums::default();
        let error = sums.add(&[1.0, f32::NAN], &[0.0, 1.0]).unwrap_err().to_string();
        assert_eq!(error, "the score of document 2 of 2 is NaN");
        let error = sums.add(&[1.0], &[0.0, 1.0]).unwrap_err().to_string();
        assert_eq!(error, "1 scores for 2 labels");
        assert_eq!(sums, RankingSums::default());
    }
}
