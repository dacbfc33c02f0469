//! Scoring a stream of pairs: tokenized ahead in the background, scored in chunks, given back in
//! order.

use serde::Serialize;

use super::{CrossEncoder, ScoreOptions, sigmoid};
use crate::data::InputPair;
use crate::error::{Error, Result};
use crate::ordered::ordered_map;
use crate::text::EncodedPair;

/// Batches per chunk: enough pairs to sort by length, few enough to stream.
const BATCHES_PER_CHUNK: usize = 32;

/// Threads that tokenize, and chunks that may wait.
const TOKENIZER_THREADS: usize = 2;
const CHUNKS_AHEAD: usize = 2;

/// The score of one input line.
#[derive(Debug, Clone, Serialize)]
pub struct Scored {
    /// Number of the pair, from 0 in the order of the input.
    pub index: usize,
    /// The sigmoid of the logit.
    pub score: f32,
    /// The model's output.
    pub logit: f32,
    /// The pair itself, where it is to be repeated.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub pair: Option<Texts>,
}

/// A pair's texts as they were scored.
#[derive(Debug, Clone, Serialize)]
pub struct Texts {
    /// The query.
    pub query: String,
    /// The document.
    pub content: String,
}

/// Scores `pairs` as they come and hands each result to `sink`, in order. `echo` repeats the
/// texts in the results.
///
/// # Errors
/// The first bad pair; what the model or the sink reports.
pub fn score_stream(
    model: &CrossEncoder,
    pairs: impl Iterator<Item = Result<InputPair>> + Send + 'static,
    options: &ScoreOptions,
    echo: bool,
    mut sink: impl FnMut(&Scored) -> Result<()>,
) -> Result<usize> {
    let max_len = model.checked_max_len(options.max_len)?;
    let tokenizer = model.tokenizer();
    let size = options.batch_size.max(1) * BATCHES_PER_CHUNK;
    let chunks = Chunks { pairs, size, error: None };
    let tokenize = move |chunk: Vec<InputPair>| -> Result<Vec<(InputPair, EncodedPair)>> {
        chunk
            .into_iter()
            .map(|pair| {
                let encoded = tokenizer.encode_pair(&pair.query, &pair.content, max_len)?;
                Ok((pair, encoded))
            })
            .collect()
    };
    let mut index = 0;
    for chunk in ordered_map(chunks, TOKENIZER_THREADS, CHUNKS_AHEAD, tokenize)? {
        let (texts, encoded): (Vec<_>, Vec<_>) = chunk?.into_iter().unzip();
        let logits = model.score_encoded(&encoded, options.batch_size)?;
        for (text, logit) in texts.into_iter().zip(logits) {
            let pair = echo.then_some(Texts { query: text.query, content: text.content });
            sink(&Scored { index, score: sigmoid(logit), logit, pair })?;
            index += 1;
        }
    }
    Ok(index)
}

/// Groups a stream into lists of `size`; an error comes out after the pairs before it.
struct Chunks<I> {
    pairs: I,
    size: usize,
    error: Option<Error>,
}

impl<I: Iterator<Item = Result<InputPair>>> Iterator for Chunks<I> {
    type Item = Result<Vec<InputPair>>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(error) = self.error.take() {
            return Some(Err(error));
        }
        let mut chunk = Vec::new();
        for pair in self.pairs.by_ref().take(self.size) {
            match pair {
                Ok(pair) => chunk.push(pair),
                Err(error) if chunk.is_empty() => return Some(Err(error)),
                Err(error) => {
                    self.error = Some(error);
                    break;
                }
            }
        }
        (!chunk.is_empty()).then_some(Ok(chunk))
    }
}
