//! What a directory says of its tokenizer outside `tokenizer.json`: a BERT `vocab.txt`, and
//! `tokenizer_config.json`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{Tokenizer, TruncationDirection};

use crate::error::{Error, Result};

/// What transformers keeps of a tokenizer beside its vocabulary.
pub const SETTINGS_FILE: &str = "tokenizer_config.json";

/// The special tokens in their customary order, with their keys in `tokenizer_config.json`.
const SPECIAL_TOKENS: [(&str, &str); 5] = [
    ("pad_token", "[PAD]"),
    ("unk_token", "[UNK]"),
    ("cls_token", "[CLS]"),
    ("sep_token", "[SEP]"),
    ("mask_token", "[MASK]"),
];

/// `BertTokenizer` under all of its names.
const BERT_CLASSES: [&str; 6] = [
    "BertTokenizer",
    "ElectraTokenizer",
    "LayoutLMTokenizer",
    "LxmertTokenizer",
    "MobileBertTokenizer",
    "SqueezeBertTokenizer",
];

/// The same tokenizer that transformers' conversion of a slow `BertTokenizer` gives, with the
/// settings in `tokenizer_config.json` where there is one. `model` is the `config.json` of the model.
///
/// # Errors
/// [`Error::File`] when a special token is not in the vocabulary, a file is no such file, or the
/// tokenizer is of a class that splits texts otherwise.
pub(super) fn bert_tokenizer(dir: &Path, model: &Value) -> Result<Tokenizer> {
    let path = dir.join("vocab.txt");
    let file_error = |message| Error::File { path: path.clone(), message };
    let vocabulary = read_vocabulary(&path)?;
    let config = settings(dir)?;
    let class = class(&config, model);
    if !(class.is_empty() || BERT_CLASSES.contains(&slow(class))) {
        return Err(file_error(format!(
            "is read as BertTokenizer does, but the tokenizer is a {class}, which splits texts otherwise; \
             expected a tokenizer.json beside it, which save_pretrained of transformers' AutoTokenizer \
             writes for most classes"
        )));
    }

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
    added.extend(added_tokens(dir, &config, &added)?);
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": flag(&config, "tokenize_chinese_chars", true),
            "strip_accents": config.get("strip_accents"),
            "lowercase": flag(&config, "do_lower_case", true),
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

/// The tokens that a directory adds to its `vocab.txt`, in the order of their ids, but for those in
/// `known`: of `added_tokens_decoder` in `config`, else of the older `added_tokens.json`.
fn added_tokens(dir: &Path, config: &Map<String, Value>, known: &[Value]) -> Result<Vec<Value>> {
    let mut tokens = Vec::new();
    if let Some(decoder) = config.get("added_tokens_decoder").and_then(Value::as_object) {
        for (key, token) in decoder {
            let (Ok(id), Value::Object(token)) = (key.parse::<u32>(), token) else {
                return Err(Error::File {
                    path: dir.join(SETTINGS_FILE),
                    message: format!(
                        "added_tokens_decoder: {key:?} is {token}, expected objects under the tokens' numbers"
                    ),
                });
            };
            let mut token = token.clone();
            token.insert("id".to_owned(), id.into());
            tokens.push(token.into());
        }
    } else {
        let lists = ["additional_special_tokens", "extra_special_tokens"];
        let special: Vec<_> = lists.iter().filter_map(|key| config.get(*key)?.as_array()).collect();
        for (content, id) in read_config(&dir.join("added_tokens.json"))? {
            let is_special = special
                .iter()
                .any(|all| all.iter().any(|one| token_text(Some(one)) == Some(&content)));
            tokens.push(json!({
                "id": id, "content": content, "special": is_special, "normalized": !is_special,
                "single_word": false, "lstrip": false, "rstrip": false,
            }));
        }
    }
    tokens.retain(|token| known.iter().all(|known| known["content"] != token["content"]));
    tokens.sort_by_key(|token| token["id"].as_u64());
    Ok(tokens)
}

/// Does to the tokenizer of a `tokenizer.json` what transformers' BERT and RoBERTa classes do to it: the
/// settings in `tokenizer_config.json`, or their defaults, take the place of its own. `model` is the
/// `config.json` of the model.
///
/// # Errors
/// [`Error::File`] or [`Error::Io`] when a file with settings cannot be read.
pub(super) fn apply_settings(dir: &Path, model: &Value, tokenizer: &mut Tokenizer) -> Result<()> {
    let config = settings(dir)?;
    match slow(class(&config, model)) {
        class if BERT_CLASSES.contains(&class) => {
            let Some(NormalizerWrapper::BertNormalizer(own)) = tokenizer.get_normalizer() else {
                return Ok(());
            };
            let mut normalizer = *own;
            normalizer.lowercase = flag(&config, "do_lower_case", true);
            normalizer.handle_chinese_chars = flag(&config, "tokenize_chinese_chars", true);
            normalizer.strip_accents = config.get("strip_accents").and_then(Value::as_bool);
            tokenizer.with_normalizer(Some(normalizer)).map_err(|error| Error::File {
                path: dir.join("tokenizer.json"),
                message: format!("does not take the settings of tokenizer_config.json: {error}"),
            })?;
        }
        "RobertaTokenizer" => {
            let Some(PreTokenizerWrapper::ByteLevel(own)) = tokenizer.get_pre_tokenizer() else {
                return Ok(());
            };
            let mut pre_tokenizer = *own;
            pre_tokenizer.add_prefix_space = flag(&config, "add_prefix_space", false);
            tokenizer.with_pre_tokenizer(Some(pre_tokenizer));
        }
        _ => {}
    }
    Ok(())
}

/// The class that transformers reads a tokenizer of these settings with, for a model with this `config.json`;
/// empty where nothing names one.
fn class<'a>(settings: &'a Map<String, Value>, model: &'a Value) -> &'a str {
    let named = |class: Option<&'a Value>| class.and_then(Value::as_str);
    let class =
        named(settings.get("tokenizer_class")).or_else(|| named(model.get("tokenizer_class")));
    class.unwrap_or_else(|| match named(model.get("model_type")) {
        Some("bert") => "BertTokenizer",
        Some("roberta") => "RobertaTokenizer",
        _ => "",
    })
}

/// The name of a class without the ending of its fast form, which reads the same.
fn slow(class: &str) -> &str {
    class.strip_suffix("Fast").unwrap_or(class)
}

/// The `tokenizer_config.json` of the tokenizer in `dir` for a place where the `config.json` of its model is
/// missing (`model`): with the class that only that one tells. `None` where it needs no change.
///
/// # Errors
/// [`Error::File`] or [`Error::Io`] when it cannot be read.
pub fn settings_with_class(dir: &Path, model: &Value) -> Result<Option<Value>> {
    let mut settings = settings(dir)?;
    let class = class(&settings, model).to_owned();
    let is_named = settings.get("tokenizer_class").is_some_and(Value::is_string);
    if is_named || class.is_empty() {
        return Ok(None);
    }
    settings.insert("tokenizer_class".to_owned(), class.into());
    Ok(Some(settings.into()))
}

/// Which side of a text that is too long transformers cuts off, where `tokenizer_config.json` says so.
///
/// # Errors
/// [`Error::File`] or [`Error::Io`] when it cannot be read or names no side.
pub(super) fn truncation_side(dir: &Path) -> Result<Option<TruncationDirection>> {
    match settings(dir)?.get("truncation_side") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(side)) if side == "right" => Ok(Some(TruncationDirection::Right)),
        Some(Value::String(side)) if side == "left" => Ok(Some(TruncationDirection::Left)),
        Some(other) => Err(Error::File {
            path: dir.join(SETTINGS_FILE),
            message: format!("truncation_side is {other}, expected \"right\" or \"left\""),
        }),
    }
}

/// Whether transformers hands the segment ids of the tokenizer in `dir` to the model: not where
/// `model_input_names` in `tokenizer_config.json` leaves them out.
///
/// # Errors
/// [`Error::File`] or [`Error::Io`] when that file cannot be read.
pub(super) fn gives_type_ids(dir: &Path) -> Result<bool> {
    let config = settings(dir)?;
    let names = config.get("model_input_names").and_then(Value::as_array);
    Ok(names.is_none_or(|names| names.iter().any(|name| name == "token_type_ids")))
}

/// The most tokens of an input that transformers makes, where the settings of the tokenizer in `dir` hold
/// such a number: they give an enormous one for none.
///
/// # Errors
/// [`Error::File`] or [`Error::Io`] when they cannot be read.
pub fn model_max_length(dir: &Path) -> Result<Option<usize>> {
    let length = settings(dir)?.get("model_max_length").and_then(Value::as_u64);
    Ok(length.filter(|&length| length > 0).and_then(|length| usize::try_from(length).ok()))
}

fn flag(config: &Map<String, Value>, key: &str, default: bool) -> bool {
    config.get(key).and_then(Value::as_bool).unwrap_or(default)
}

fn settings(dir: &Path) -> Result<Map<String, Value>> {
    read_config(&dir.join(SETTINGS_FILE))
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
