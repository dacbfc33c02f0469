//! BM25, the lexical baseline that a trained reranker has to beat.

use std::collections::{HashMap, HashSet};

use crate::data::{Dataset, is_cjk};

/// Term saturation.
const K1: f64 = 1.2;
/// Weight of length normalisation.
const B: f64 = 0.75;

/// Statistics of a collection, which score documents against queries.
///
/// Okapi BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond",
/// 2009) with Lucene's inverse document frequency, which is never negative:
///
/// `Σ_t idf(t) · tf · (k1 + 1) / (tf + k1 · (1 − b + b · length / mean length))`,
/// `idf(t) = ln(1 + (N − n_t + 0.5) / (n_t + 0.5))`, `k1 = 1.2`, `b = 0.75`,
///
/// summed over the terms of the query, a repeated term as often as it occurs. Terms are lower-cased
/// runs of letters and digits; Chinese, Japanese and Korean text gives each character and each pair
/// of neighbours.
#[derive(Debug, Clone)]
pub struct Bm25 {
    documents: usize,
    mean_length: f64,
    /// In how many documents a term occurs.
    frequencies: HashMap<String, u32>,
}

impl Bm25 {
    /// Collects the statistics of `documents`; a text that comes twice counts once.
    pub fn new<'a>(documents: impl IntoIterator<Item = &'a str>) -> Self {
        let mut frequencies = HashMap::new();
        let mut total_length = 0;
        let mut seen = HashSet::new();
        for document in documents {
            if !seen.insert(document) {
                continue;
            }
            let terms = terms(document);
            total_length += terms.len();
            for term in terms.into_iter().collect::<HashSet<_>>() {
                *frequencies.entry(term).or_default() += 1;
            }
        }
        let mean_length = total_length as f64 / seen.len().max(1) as f64;
        Self { documents: seen.len(), mean_length, frequencies }
    }

    /// Statistics of all distinct documents of a data set that is kept as texts.
    #[must_use]
    pub fn of_dataset(dataset: &Dataset) -> Self {
        Self::new(dataset.pairs().filter_map(|pair| Some(dataset.texts(&pair)?.1)))
    }

    /// The scores of documents for a query, in their order; 0 where they share no term.
    #[must_use]
    pub fn scores(&self, query: &str, documents: &[&str]) -> Vec<f32> {
        let query = terms(query);
        documents.iter().map(|document| self.score(&query, document) as f32).collect()
    }

    fn score(&self, query: &[String], document: &str) -> f64 {
        let terms = terms(document);
        let mut counts: HashMap<&str, f64> = HashMap::new();
        for term in &terms {
            *counts.entry(term).or_default() += 1.0;
        }
        // An empty collection has no mean length; then every length is as good as the mean.
        let length = terms.len() as f64 / self.mean_length;
        let length = if length.is_finite() { length } else { 1.0 };
        let weight = |term: &String| {
            let count = counts.get(term.as_str())?;
            let saturated = count * (K1 + 1.0) / (count + K1 * (1.0 - B + B * length));
            Some(self.inverse_document_frequency(term) * saturated)
        };
        // A sum of nothing would be −0.
        query.iter().filter_map(weight).fold(0.0, |sum, weight| sum + weight)
    }

    fn inverse_document_frequency(&self, term: &str) -> f64 {
        let containing = self.frequencies.get(term).copied().map_or(0.0, f64::from);
        ((self.documents as f64 - containing + 0.5) / (containing + 0.5)).ln_1p()
    }
}

/// The terms of a text, in order.
fn terms(text: &str) -> Vec<String> {
    let mut terms = Vec::new();
    let mut word = String::new();
    let mut previous_cjk = None;
    for c in text.chars().flat_map(char::to_lowercase) {
        let is_word = c.is_alphanumeric() && !is_cjk(c);
        if is_word {
            word.push(c);
        } else if !word.is_empty() {
            terms.push(std::mem::take(&mut word));
        }
        let cjk = is_cjk(c).then_some(c);
        if let Some(c) = cjk {
            terms.push(c.to_string());
            terms.extend(previous_cjk.map(|previous: char| [previous, c].iter().collect()));
        }
        previous_cjk = cjk;
    }
    if !word.is_empty() {
        terms.push(word);
    }
    terms
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_are_words_and_cjk_characters_with_bigrams() {
        let cases: [(&str, &[&str]); 5] = [
            ("", &[]),
            ("The GPU-based model, v2.", &["the", "gpu", "based", "model", "v2"]),
            ("深度学", &["深", "度", "深度", "学", "度学"]),
            ("用BERT排 序", &["用", "bert", "排", "序"]),
            ("ÉTÉ", &["été"]),
        ];
        for (text, expected) in cases {
            assert_eq!(terms(text), expected, "{text}");
        }
    }

    /// Three documents of 2, 3 and 4 terms: mean length 3.
    #[test]
    fn a_score_worked_out_by_hand() {
        let collection = ["cat dog", "cat cat bird", "one two three four", "cat dog"];
        let bm25 = Bm25::new(collection);
        let scores = bm25.scores("Cat bird", &collection[..3]);
        let idf = |n: f64| (1.0 + (3.0 - n + 0.5) / (n + 0.5)).ln();
        let term = |tf: f64, length: f64| tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / 3.0));
        let expected =
            [idf(2.0) * term(1.0, 2.0), idf(2.0) * term(2.0, 3.0) + idf(1.0) * term(1.0, 3.0), 0.0];
        for (score, expected) in scores.into_iter().zip(expected) {
            assert!((f64::from(score) - expected).abs() < 1e-6, "{score} is not {expected}");
        }
    }

    #[test]
    fn a_repeated_query_term_counts_twice_and_an_empty_collection_gives_numbers() {
        let bm25 = Bm25::new(["cat dog", "bird"]);
        let once = bm25.scores("cat", &["cat dog"])[0];
        let twice = bm25.scores("cat cat", &["cat dog"])[0];
        assert!((twice - 2.0 * once).abs() < 1e-6 && once > 0.0);
        let empty = Bm25::new([]);
        assert!(empty.scores("cat", &["cat", ""]).iter().all(|score| score.is_finite()));
    }
}
