//! Text to token ids: tokenizers, the form of a pair, and tokenizing ahead of the step.
//!
//! [`PairTokenizer`] turns a query and a document into the input of an encoder or a decoder;
//! [`token_batches`] does so for whole micro-batches in background threads. Free of torch.

mod lengths;
mod pipeline;
mod prompt;
mod tokenizer;
mod vocab;

use std::path::{Path, PathBuf};

pub use crate::config::TextFormat;
pub use lengths::LengthReport;
pub use pipeline::{PipelineOptions, TokenBatch, WorkItem, token_batches};
pub use prompt::TokenPrompt;
pub use tokenizer::{
    DecoderTemplate, EncodedPair, Ending, PairTokenizer, Truncation, pad_token_id,
};
pub use vocab::{SETTINGS_FILE, model_max_length, settings_with_class};

/// The file that a model directory's tokenizer is read from, where it has one: `tokenizer.json`, or a BERT
/// `vocab.txt`.
#[must_use]
pub fn tokenizer_file(dir: &Path) -> Option<PathBuf> {
    let files = ["tokenizer.json", "vocab.txt"].map(|name| dir.join(name));
    files.into_iter().find(|file| file.is_file())
}

/// Files that belong to the tokenizer of a model directory, as far as it has them.
pub const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "tokenizer.model",
];
