//! Scoring a stream of pairs, each result given out as soon as it is there.

use std::io::BufRead;

use serde::Serialize;

use super::pipeline::score_chunks;
use super::{CrossEncoder, ScoreOptions, sigmoid};
use crate::data::{InputChunk, InputChunks, InputPair};
use crate::error::Result;
use crate::text::EncodedPair;

/// The score of one pair of the input.
#[derive(Debug, Clone, Serialize)]
pub struct Scored {
    /// Number of the pair, from 0 in the order of the input.
    pub index: u64,
    /// The sigmoid of the logit.
    pub score: f32,
    /// The model's output.
    pub logit: f32,
    /// The pair itself, where it is to be repeated.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub pair: Option<InputPair>,
}

impl Scored {
    pub(super) fn new(index: u64, logit: f32, pair: Option<InputPair>) -> Self {
        Self { index, score: sigmoid(logit), logit, pair }
    }
}

/// Scores the pairs of `chunks` as they come and hands each result to `sink`, in order. `echo`
/// repeats the texts in the results.
///
/// # Errors
/// The first bad line; what the model or the sink reports.
pub fn score_stream<R: BufRead + Send + 'static>(
    model: &CrossEncoder,
    chunks: InputChunks<R>,
    options: &ScoreOptions,
    echo: bool,
    mut sink: impl FnMut(&Scored) -> Result<()>,
) -> Result<u64> {
    let encode = encoder(model, options)?;
    let encode = move |chunk: InputChunk| {
        let pairs = chunk.pairs()?;
        let encoded = encode(&pairs)?;
        Ok((if echo { pairs } else { Vec::new() }, encoded))
    };
    let mut index = 0;
    score_chunks(model, chunks, encode, options.batch_size, |pairs, logits| {
        let mut pairs = pairs.into_iter();
        for logit in logits {
            sink(&Scored::new(index, logit, pairs.next()))?;
            index += 1;
        }
        Ok(())
    })?;
    Ok(index)
}

/// What turns pairs of an input into tokens, for background threads.
pub(super) fn encoder(
    model: &CrossEncoder,
    options: &ScoreOptions,
) -> Result<impl Fn(&[InputPair]) -> Result<Vec<EncodedPair>> + Send + Sync + use<>> {
    let max_len = model.checked_max_len(options.max_len)?;
    let tokenizer = model.tokenizer();
    Ok(move |pairs: &[InputPair]| {
        let encoded = |pair: &InputPair| tokenizer.encode_pair(&pair.query, &pair.content, max_len);
        pairs.iter().map(encoded).collect()
    })
}
