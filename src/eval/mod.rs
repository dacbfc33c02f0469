//! Ranking metrics of a model, and of BM25, on grouped data.

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::config::DatasetKind;
use crate::data::{Dataset, LoadOptions};
use crate::error::{Error, Result};
use crate::metrics::{Bm25, RankingMetrics, RankingSums};
use crate::score::{CrossEncoder, ScoreOptions};

/// The rankings of one data set, by name, in the order they were made.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    rows: Vec<(String, RankingMetrics)>,
}

impl Evaluation {
    /// One JSON object per ranking, by name.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let rows = self.rows.iter().map(|(name, metrics)| (name.clone(), metrics.to_json()));
        Value::Object(rows.collect::<Map<_, _>>())
    }

    /// An aligned table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!("{:<10}{:>10}{:>10}{:>10}\n", "ranking", "nDCG@10", "MRR@10", "MAP");
        for (name, m) in &self.rows {
            let (ndcg, mrr, map) = (m.ndcg_at_10, m.mrr_at_10, m.map);
            let _ = writeln!(text, "{name:<10}{ndcg:>10.4}{mrr:>10.4}{map:>10.4}");
        }
        if let Some((_, m)) = self.rows.first() {
            let _ = write!(text, "over {} queries", m.queries);
            if m.skipped > 0 {
                let _ = write!(text, "; {} without a relevant document left out", m.skipped);
            }
        }
        text
    }
}

/// Reads grouped data for evaluation; labels stay as they are.
///
/// # Errors
/// User errors with file and line.
pub fn load(path: &std::path::Path, label_key: &str) -> Result<Dataset> {
    let options = LoadOptions {
        kind: Some(DatasetKind::Grouped),
        label_key: Some(label_key.to_owned()),
        ..LoadOptions::new(path)
    };
    Ok(Dataset::load(&options)?.0)
}

/// Ranks every query's documents by the model, and by BM25 where `with_bm25`.
///
/// # Errors
/// [`Error::File`] when no query has a relevant document; what scoring reports.
pub fn evaluate(
    model: Option<&CrossEncoder>,
    dataset: &Dataset,
    options: &ScoreOptions,
    with_bm25: bool,
) -> Result<Evaluation> {
    let mut rows = Vec::new();
    let pairs: Vec<(&str, &str)> =
        dataset.pairs().filter_map(|pair| dataset.texts(&pair)).collect();
    if with_bm25 {
        let bm25 = Bm25::of_dataset(dataset);
        let mut scores = Vec::with_capacity(pairs.len());
        for group in dataset.groups() {
            let hits = &pairs[group.start as usize..group.end as usize];
            let documents: Vec<&str> = hits.iter().map(|&(_, document)| document).collect();
            scores.extend(bm25.scores(hits[0].0, &documents));
        }
        rows.push(("bm25".to_owned(), metrics(dataset, &scores)?));
    }
    if let Some(model) = model {
        // Logits: a sigmoid in fp32 would tie documents that the model tells apart.
        let options = ScoreOptions { normalize: false, ..*options };
        let scores = model.compute_score(&pairs, &options)?;
        rows.push(("model".to_owned(), metrics(dataset, &scores)?));
    }
    Ok(Evaluation { rows })
}

fn metrics(dataset: &Dataset, scores: &[f32]) -> Result<RankingMetrics> {
    let mut sums = RankingSums::default();
    for group in dataset.groups() {
        let labels = dataset.labels(group.clone());
        sums.add(&scores[group.start as usize..group.end as usize], &labels)?;
    }
    sums.metrics().ok_or_else(|| Error::File {
        path: dataset.path.clone(),
        message: "no query has a document with a label above 0, so nothing can be measured".into(),
    })
}
