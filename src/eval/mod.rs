//! Ranking metrics: of models and of BM25 on grouped data, and of rankings in TREC's files.

mod grouped;
mod table;
pub mod trec;

use serde_json::{Map, Value, json};

pub use grouped::{bm25_scores, load, model_scores, rank};

use crate::metrics::{Gain, Ranked, measure_names};

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measure {
    /// The `k` of nDCG@k, MRR@k and Recall@k.
    pub cutoffs: Vec<usize>,
    /// What a relevant document is worth to nDCG.
    pub gain: Gain,
}

/// The figures of several rankings side by side, in the order they were made.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    measure: Measure,
    rows: Vec<Row>,
}

/// The figures of one ranking.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    name: String,
    measure: Measure,
    /// Every measured query with its figures.
    queries: Vec<(String, Vec<f64>)>,
    /// Queries without a relevant document, which are left out.
    skipped: usize,
    notes: Vec<String>,
}

impl Row {
    /// Measures a query; one without a relevant document is counted as skipped.
    pub fn add(&mut self, query: &str, ranked: Ranked<'_>) {
        match ranked.measures(&self.measure.cutoffs, self.measure.gain) {
            Some(measures) => self.queries.push((query.to_owned(), measures)),
            None => self.skipped += 1,
        }
    }

    /// Whether no query was measured.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queries.is_empty()
    }

    /// Adds a line to be read with the figures.
    pub fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// The means over queries, by name.
    #[must_use]
    pub fn means(&self) -> Vec<(String, f64)> {
        let names = measure_names(&self.measure.cutoffs);
        let mean = |(at, name): (usize, String)| {
            let sum: f64 = self.queries.iter().map(|(_, measures)| measures[at]).sum();
            (name, sum / self.queries.len() as f64)
        };
        names.into_iter().enumerate().map(mean).collect()
    }
}

impl Evaluation {
    /// One without rankings.
    #[must_use]
    pub fn new(measure: Measure) -> Self {
        Self { measure, rows: Vec::new() }
    }

    /// An empty row, to be filled and pushed.
    #[must_use]
    pub fn row(&self, name: &str) -> Row {
        Row {
            name: name.to_owned(),
            measure: self.measure.clone(),
            queries: Vec::new(),
            skipped: 0,
            notes: Vec::new(),
        }
    }

    /// Adds a ranking.
    pub fn push(&mut self, row: Row) {
        self.rows.push(row);
    }

    /// One JSON object per ranking, by name.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let row = |row: &Row| {
            let mut figures: Map<String, Value> =
                row.means().into_iter().map(|(name, mean)| (name, json!(mean))).collect();
            figures.insert("queries".to_owned(), json!(row.queries.len()));
            figures.insert("skipped".to_owned(), json!(row.skipped));
            (row.name.clone(), Value::Object(figures))
        };
        Value::Object(self.rows.iter().map(row).collect())
    }

    /// A JSON object for each query of each ranking.
    #[must_use]
    pub fn per_query(&self) -> Vec<Value> {
        let names = measure_names(&self.measure.cutoffs);
        let mut lines = Vec::new();
        for row in &self.rows {
            for (query, measures) in &row.queries {
                let mut line = json!({"ranking": row.name, "query": query});
                for (name, measure) in names.iter().zip(measures) {
                    line[name] = json!(measure);
                }
                lines.push(line);
            }
        }
        lines
    }
}
