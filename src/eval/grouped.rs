//! Rankings of grouped data.

use std::path::Path;

use super::Row;
use crate::comm::{Communicator, Reduction, reduce_values};
use crate::config::DatasetKind;
use crate::data::{Content, Dataset, LoadOptions};
use crate::error::{Error, Result};
use crate::metrics::{Bm25, Ranked, ranked};
use crate::score::{CrossEncoder, ScoreOptions};

/// Pairs that one rank scores before it is the next rank's turn.
const SHARE: usize = 256;

/// Reads grouped data for evaluation into memory; labels stay as they are.
///
/// # Errors
/// User errors with file and line.
pub fn load(path: &Path, label_key: &str) -> Result<Dataset> {
    let options = LoadOptions {
        kind: Some(DatasetKind::Grouped),
        label_key: Some(label_key.to_owned()),
        ..LoadOptions::new(path)
    };
    Ok(Dataset::load(&options)?.0)
}

fn pairs(dataset: &Dataset) -> Vec<(&str, &str)> {
    dataset.pairs().filter_map(|pair| dataset.texts(&pair)).collect()
}

/// The BM25 score of every pair, over the statistics of all documents of `dataset`.
#[must_use]
pub fn bm25_scores(dataset: &Dataset) -> Vec<f32> {
    let bm25 = Bm25::of_dataset(dataset);
    let pairs = pairs(dataset);
    let mut scores = Vec::with_capacity(pairs.len());
    for group in dataset.groups() {
        let hits = &pairs[group.start as usize..group.end as usize];
        let documents: Vec<&str> = hits.iter().map(|&(_, document)| document).collect();
        scores.extend(bm25.scores(hits[0].0, &documents));
    }
    scores
}

/// The logit of every pair, the same on every rank of `comm`, each of which scores its part.
///
/// # Errors
/// What scoring reports; [`Error::Comm`] when a rank goes away.
pub fn model_scores(
    model: &CrossEncoder,
    dataset: &Dataset,
    options: &ScoreOptions,
    comm: &dyn Communicator,
) -> Result<Vec<f32>> {
    let pairs = pairs(dataset);
    let is_own = |i: usize| i / SHARE % comm.world_size() == comm.rank();
    let own: Vec<usize> = (0..pairs.len()).filter(|&i| is_own(i)).collect();
    let texts: Vec<(&str, &str)> = own.iter().map(|&i| pairs[i]).collect();
    // Logits: a sigmoid in fp32 would tie documents that the model tells apart.
    let options = ScoreOptions { normalize: false, ..*options };
    // A double holds every logit, and 0 added to it, as it is.
    let mut logits = vec![0.0; pairs.len()];
    for (i, logit) in own.into_iter().zip(model.compute_score(&texts, &options)?) {
        logits[i] = f64::from(logit);
    }
    reduce_values(comm, &mut logits, Reduction::Sum)?;
    Ok(logits.into_iter().map(|logit| logit as f32).collect())
}

/// Fills `row` with the queries of `dataset`, ranked by `scores`.
///
/// # Errors
/// [`Error::Training`] when a score is NaN; [`Error::File`] when no query has a relevant document.
pub fn rank(mut row: Row, dataset: &Dataset, scores: &[f32]) -> Result<Row> {
    for group in dataset.groups() {
        let labels = dataset.labels(group.clone());
        let ranked = ranked(&scores[group.start as usize..group.end as usize], &labels)?;
        let query = match dataset.query(dataset.pair(group.start).query) {
            Content::Text(text) => text,
            Content::Tokens(_) => "",
        };
        row.add(query, Ranked { ranked: &ranked, judged: &labels });
    }
    if row.is_empty() {
        return Err(Error::File {
            path: dataset.path.clone(),
            message: "no query has a document with a label above 0, so nothing can be measured"
                .into(),
        });
    }
    Ok(row)
}
