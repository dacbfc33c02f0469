//! What a directory says of its tokenizer outside `tokenizer.json`: a BERT `vocab.txt`, and
//! `tokenizer_config.json`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// The special tokens in their customary order, with their keys in `tokenizer_config.json`.
const SPECIAL_TOKENS: [(&str, &str); 5] = [
    ("pad_token", "[PAD]"),
    ("unk_token", "[UNK]"),
    ("cls_token", "[CLS]"),
    ("sep_token", "[SEP]"),
    ("mask_token", "[MASK]"),
];

/// The same tokenizer that transformers' conversion of a slow `BertTokenizer` gives, with the
/// settings in `tokenizer_config.json` where there is one.
///
/// # Errors
/// [`Error::File`] when a special token is not in the vocabulary or a file is no such file.
pub(super) fn bert_tokenizer(dir: &Path) -> Result<Tokenizer> {
    let path = dir.join("vocab.txt");
    let file_error = |message| Error::File { path: path.clone(), message };
    let vocabulary = read_vocabulary(&path)?;
    let config = read_config(&dir.join("tokenizer_config.json"))?;

    let mut special = HashMap::new();
    let mut added = Vec::new();
    for (key, default) in SPECIAL_TOKENS {
        let token = token_text(config.get(key)).unwrap_or(default);
        let Some(id) = vocabulary.get(token) else {
            return Err(file_error(format!("the special token {token} is not in the vocabulary")));
        };
        special.insert(key, (token, id));
        added.push(json!({
            "id": id, "content": token, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        }));
    }
    let flag = |key, default: bool| config.get(key).and_then(Value::as_bool).unwrap_or(default);
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": flag("tokenize_chinese_chars", true),
            "strip_accents": config.get("strip_accents"),
            "lowercase": flag("do_lower_case", true),
        },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": {
            "type": "BertProcessing", "sep": special["sep_token"], "cls": special["cls_token"],
        },
        "decoder": null,
        "model": {
            "type": "WordPiece",
            "vocab": vocabulary,
            "unk_token": special["unk_token"].0,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
    });
    serde_json::from_value(tokenizer)
        .map_err(|error| file_error(format!("gives no BERT tokenizer: {error}")))
}

/// Whether transformers hands the segment ids of the tokenizer in `dir` to the model: not where
/// `model_input_names` in `tokenizer_config.json` leaves them out.
///
/// # Errors
/// [`Error::File`] or [`Error::Io`] when that file cannot be read.
pub(super) fn gives_type_ids(dir: &Path) -> Result<bool> {
    let config = read_config(&dir.join("tokenizer_config.json"))?;
    let names = config.get("model_input_names").and_then(Value::as_array);
    Ok(names.is_none_or(|names| names.iter().any(|name| name == "token_type_ids")))
}

/// One token a line, numbered from 0; of a token that occurs twice the later number counts.
fn read_vocabulary(path: &Path) -> Result<Map<String, Value>> {
    let text = read(path)?;
    let tokens = text.strip_suffix('\n').unwrap_or(&text).split('\n').enumerate();
    Ok(tokens
        .map(|(id, token)| (token.strip_suffix('\r').unwrap_or(token).to_owned(), id.into()))
        .collect())
}

fn read_config(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    serde_json::from_str(&read(path)?).map_err(|error| Error::File {
        path: path.to_owned(),
        message: format!("expected a JSON object: {error}"),
    })
}

fn read(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|source| Error::Io {
        path: path.to_owned(),
        action: "read",
        source,
    })?;
    String::from_utf8(bytes).map_err(|error| Error::File {
        path: path.to_owned(),
        message: format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to() + 1),
    })
}

/// A special token is given as a string or as an object with `content`.
fn token_text(value: Option<&Value>) -> Option<&str> {
    match value? {
        Value::String(token) => Some(token),
        Value::Object(token) => token.get("content")?.as_str(),
        _ => None,
    }
}
