//! Rankings and judgements in TREC's files.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::path::Path;

use super::{Evaluation, Measure};
use crate::data::{Dataset, text_lines};
use crate::error::{Error, Result};
use crate::metrics::{Ranked, order};

/// The judgements of each query: labels by document.
pub type Qrels = BTreeMap<String, HashMap<String, f32>>;

/// The documents of each query, best first.
pub type Run = BTreeMap<String, Vec<String>>;

/// A TREC file's lines as columns, of which there have to be as many as `expected` names.
fn columns<const N: usize>(
    path: &Path,
    expected: &str,
    mut each: impl FnMut([&str; N]) -> Result<(), String>,
) -> Result<()> {
    text_lines(path, |line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        match columns.try_into() {
            Ok(columns) => each(columns),
            Err(columns) if columns.is_empty() => Ok(()),
            Err(columns) => Err(format!("{} columns, expected {N}: {expected}", columns.len())),
        }
    })
}

/// Reads judgements: query, anything, document, label a line; plain, gzip or zstd.
///
/// # Errors
/// [`Error::Data`] with the line that cannot be used; [`Error::Io`] when the file cannot be opened.
pub fn read_qrels(path: &Path) -> Result<Qrels> {
    let mut qrels = Qrels::new();
    columns(path, "query iteration document label", |[query, _, document, label]| {
        let label = number(label, "label")?;
        let labels = qrels.entry(query.to_owned()).or_default();
        match labels.insert(document.to_owned(), label) {
            None => Ok(()),
            Some(_) => Err(twice(document, query)),
        }
    })?;
    Ok(qrels)
}

/// Reads a run: query, anything, document, rank, score, tag a line; plain, gzip or zstd. As
/// `trec_eval` does, it orders documents by falling score, of equal scores the one with the greater
/// name first; ranks are not looked at.
///
/// # Errors
/// As [`read_qrels`].
pub fn read_run(path: &Path) -> Result<Run> {
    let mut scored: BTreeMap<String, Vec<(f32, String)>> = BTreeMap::new();
    let mut seen: HashMap<String, HashSet<String>> = HashMap::new();
    columns(path, "query Q0 document rank score tag", |[query, _, document, _, score, _]| {
        let score = number(score, "score")?;
        if !seen.entry(query.to_owned()).or_default().insert(document.to_owned()) {
            return Err(twice(document, query));
        }
        scored.entry(query.to_owned()).or_default().push((score, document.to_owned()));
        Ok(())
    })?;
    let sorted = |mut documents: Vec<(f32, String)>| {
        documents.sort_by(|(a, x), (b, y)| b.total_cmp(a).then_with(|| y.cmp(x)));
        documents.into_iter().map(|(_, document)| document).collect()
    };
    Ok(scored.into_iter().map(|(query, documents)| (query, sorted(documents))).collect())
}

fn number(text: &str, what: &str) -> Result<f32, String> {
    let number = text.parse().ok().filter(|number: &f32| number.is_finite());
    // −0 plus 0 is 0: the two are equal scores, but not to `total_cmp`.
    number
        .map(|number| number + 0.0)
        .ok_or_else(|| format!("the {what} is {text:?}, expected a number"))
}

fn twice(document: &str, query: &str) -> String {
    format!("document {document:?} stands twice under query {query:?}, expected it once")
}

/// Measures runs, each with its name, against judgements. Only queries of both are measured, as
/// `trec_eval` does; with `complete` a judged query that a run lacks counts as 0.
///
/// # Errors
/// [`Error::Usage`] when nothing can be measured.
pub fn evaluate(
    runs: &[(String, Run)],
    qrels: &Qrels,
    measure: Measure,
    complete: bool,
) -> Result<Evaluation> {
    let mut evaluation = Evaluation::new(measure);
    for (name, run) in runs {
        let mut absent = 0;
        let mut row = evaluation.row(name);
        for (query, labels) in qrels {
            let documents = run.get(query);
            if documents.is_none() && !complete {
                absent += 1;
                continue;
            }
            let documents = documents.map_or(&[][..], Vec::as_slice);
            let label = |document: &String| labels.get(document).copied().unwrap_or(0.0);
            let ranked: Vec<f32> = documents.iter().map(label).collect();
            let judged: Vec<f32> = labels.values().copied().collect();
            row.add(query, Ranked { ranked: &ranked, judged: &judged });
        }
        if row.is_empty() {
            return Err(Error::Usage(format!(
                "{name} and the judgements have no query in common that has a relevant document"
            )));
        }
        let unjudged = run.keys().filter(|&query| !qrels.contains_key(query)).count();
        if absent > 0 {
            row.note(format!(
                "{absent} judged queries are not in {name} and left out (--complete)"
            ));
        }
        if unjudged > 0 {
            row.note(format!("{unjudged} queries of {name} are not judged and left out"));
        }
        evaluation.push(row);
    }
    Ok(evaluation)
}

/// What query number `query` and its document number `document` (both from 1, in the order of the
/// data) are called in TREC's files.
fn names(query: usize, document: usize) -> (String, String) {
    (format!("q{query}"), format!("q{query}-d{document}"))
}

/// The ranking of `dataset`'s pairs by `scores` as the lines of a TREC run.
#[must_use]
pub fn run_lines(dataset: &Dataset, scores: &[f32], tag: &str) -> String {
    let mut text = String::new();
    // The tag is one word.
    let tag = tag.replace(char::is_whitespace, "_");
    for (number, group) in dataset.groups().enumerate() {
        let scores = &scores[group.start as usize..group.end as usize];
        let scores: Vec<f32> = scores.iter().map(|score| score + 0.0).collect();
        let order = order(&scores);
        for (rank, hit) in order.into_iter().enumerate() {
            let (query, document) = names(number + 1, hit + 1);
            let score = scores[hit];
            let _ = writeln!(text, "{query} Q0 {document} {} {score} {tag}", rank + 1);
        }
    }
    text
}

/// The labels of `dataset` as the lines of TREC judgements, under the names of [`run_lines`].
///
/// # Errors
/// [`Error::File`] for labels that are not whole numbers, which those files cannot hold.
pub fn qrels_lines(dataset: &Dataset) -> Result<String> {
    let mut text = String::new();
    for (number, group) in dataset.groups().enumerate() {
        for (hit, label) in dataset.labels(group).into_iter().enumerate() {
            if label.fract() != 0.0 {
                return Err(Error::File {
                    path: dataset.path.clone(),
                    message: format!(
                        "has the label {label}, but TREC judgements are whole numbers"
                    ),
                });
            }
            let (query, document) = names(number + 1, hit + 1);
            let _ = writeln!(text, "{query} 0 {document} {label}");
        }
    }
    Ok(text)
}
