//! An evaluation as an aligned table for people.

use std::fmt::Write as _;

use super::{Evaluation, Row};
use crate::metrics::{Gain, measure_names};

/// The least widths of the column of names and of a figure.
const NAME: usize = 10;
const FIGURE: usize = 11;

impl Evaluation {
    /// An aligned table for people, a line for each ranking.
    #[must_use]
    pub fn table(&self) -> String {
        let width = self.rows.iter().map(|row| row.name.chars().count() + 2).fold(NAME, usize::max);
        let names = measure_names(&self.measure.cutoffs);
        let figure = names.iter().map(|name| name.len() + 2).fold(FIGURE, usize::max);
        let mut text = format!("{:<width$}", "ranking");
        for name in &names {
            let _ = write!(text, "{:>figure$}", heading(name));
        }
        text.push('\n');
        for row in &self.rows {
            let _ = write!(text, "{:<width$}", row.name);
            for (_, mean) in row.means() {
                let _ = write!(text, "{mean:>figure$.4}");
            }
            text.push('\n');
        }
        for note in self.rows.iter().flat_map(|row| &row.notes) {
            let _ = writeln!(text, "{note}");
        }
        if self.measure.gain == Gain::Linear {
            text.push_str("nDCG with the label as gain, as trec_eval\n");
        }
        let over: Vec<String> = self.rows.iter().map(Row::over).collect();
        if over.iter().all(|line| *line == over[0]) {
            text.extend(over.into_iter().next());
        } else {
            let lines =
                self.rows.iter().zip(over).map(|(row, over)| format!("{}: {over}\n", row.name));
            text.extend(lines);
        }
        text
    }
}

impl Row {
    /// How many queries the figures are of.
    fn over(&self) -> String {
        let mut line = format!("over {} queries", self.queries.len());
        if self.skipped > 0 {
            let _ = write!(line, "; {} without a relevant document left out", self.skipped);
        }
        line
    }
}

/// `ndcg@10` as it is usually written.
fn heading(name: &str) -> String {
    name.replace("ndcg", "nDCG")
        .replace("mrr", "MRR")
        .replace("map", "MAP")
        .replace("recall", "Recall")
}
