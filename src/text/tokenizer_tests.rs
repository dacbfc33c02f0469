//! The form of pairs, with tiny tokenizers written for the purpose.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use serde_json::{Value, json};

use super::*;

/// `[CLS]` is 2 and `[SEP]` is 3; the words follow.
pub(in crate::text) const VOCABULARY: &str =
    "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhow\nto\nbake\nbread\n##s\n,\n面\n包\nCafe\ncafe\n";

pub(in crate::text) fn bert_dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("vocab.txt"), VOCABULARY).unwrap();
    dir
}

/// A directory with a `tokenizer.json` of whole words and the given post-processor, which asks for
/// truncation and padding.
fn word_dir(post_processor: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = json!({
        "version": "1.0",
        "truncation": {
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        },
        "padding": {
            "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
        },
        "added_tokens": [{
            "id": 9, "content": "<s>", "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        }],
        "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "post_processor": post_processor,
        "decoder": null,
        "model": {
            "type": "WordLevel",
            "vocab": {
                "<pad>": 0, "?": 1, "a": 2, "b": 3, "c": 4, "q:": 5, "d:": 6, "\u{21b5}": 7,
                "yes": 8, "<s>": 9,
            },
            "unk_token": "?",
        },
    });
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    dir
}

fn roberta() -> Value {
    json!({
        "type": "RobertaProcessing", "sep": ["<s>", 9], "cls": ["<s>", 9],
        "trim_offsets": true, "add_prefix_space": false,
    })
}

#[test]
fn a_bert_pair_has_segments_and_special_tokens() {
    let dir = bert_dir();
    let tokenizer = PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap();
    let pair = tokenizer.encode_pair(" How to bake ", "BREADs, 面包 zzz\n", 64).unwrap();
    assert_eq!(pair.input_ids, [2, 5, 6, 7, 3, 8, 9, 10, 11, 12, 1, 3]);
    assert_eq!(pair.type_ids, [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1]);
    assert_eq!((pair.truncated, pair.full_len), (Truncation::None, 12));
    assert_eq!((tokenizer.fixed_tokens(), tokenizer.max_token_id()), (3, 14));
}

/// As in transformers, which then gives the model none.
#[test]
fn segments_that_the_model_is_not_given_are_zero() {
    let dir = bert_dir();
    for (names, expected) in [
        (json!(["input_ids", "token_type_ids", "attention_mask"]), [0, 0, 0, 1, 1]),
        (json!(["input_ids", "attention_mask"]), [0; 5]),
    ] {
        let config = json!({ "model_input_names": names }).to_string();
        fs::write(dir.path().join("tokenizer_config.json"), config).unwrap();
        let tokenizer = PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap();
        assert_eq!(tokenizer.encode_pair("how", "bread", 64).unwrap().type_ids, expected);
        assert_eq!(tokenizer.max_type_id(), *expected.last().unwrap());
    }
}

/// (`max_len`, ids, what is cut) for the query "how to" (5 6) and the document "bake bread" (7 8).
#[test]
fn the_document_is_cut_before_the_query() {
    let dir = bert_dir();
    let tokenizer = PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap();
    let cases: [(usize, &[u32], Truncation); 6] = [
        (8, &[2, 5, 6, 3, 7, 8, 3], Truncation::None),
        (7, &[2, 5, 6, 3, 7, 8, 3], Truncation::None),
        (6, &[2, 5, 6, 3, 7, 3], Truncation::Document),
        (5, &[2, 5, 6, 3, 3], Truncation::Document),
        (4, &[2, 5, 3, 3], Truncation::Query),
        (3, &[2, 3, 3], Truncation::Query),
    ];
    for (max_len, ids, truncated) in cases {
        let pair = tokenizer.encode_pair("how to", "bake bread", max_len).unwrap();
        assert_eq!(pair.input_ids, ids, "{max_len}");
        assert_eq!((pair.truncated, pair.full_len), (truncated, 7), "{max_len}");
        assert_eq!(pair.type_ids.len(), ids.len());
    }
    assert!(tokenizer.check_max_len(5).is_ok());
    let error = tokenizer.check_max_len(4).unwrap_err().to_string();
    let expected = "max_len 4 leaves no room for text: the template takes 3 tokens, \
                    expected at least 5";
    assert_eq!(error, expected);
}

#[test]
fn any_post_processor_gives_its_template_and_truncation_in_the_file_is_off() {
    let template = json!({
        "type": "TemplateProcessing",
        "single": [{ "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [
            { "Sequence": { "id": "A", "type_id": 0 } },
            { "SpecialToken": { "id": "<s>", "type_id": 0 } },
            { "Sequence": { "id": "B", "type_id": 1 } },
        ],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [9], "tokens": ["<s>"] } },
    });
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true });
    let sequence = json!({ "type": "Sequence", "processors": [byte_level, template] });
    let cases: [(Value, &[u32], &[u8]); 4] = [
        (roberta(), &[9, 2, 3, 9, 9, 4, 2, 9], &[0; 8]),
        (template.clone(), &[2, 3, 9, 4, 2], &[0, 0, 0, 1, 1]),
        (sequence, &[2, 3, 9, 4, 2], &[0, 0, 0, 1, 1]),
        (Value::Null, &[2, 3, 4, 2], &[0, 0, 1, 1]),
    ];
    for (post_processor, ids, type_ids) in cases {
        let dir = word_dir(&post_processor);
        let tokenizer = PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap();
        let pair = tokenizer.encode_pair("a b", "c a", 64).unwrap();
        assert_eq!((pair.input_ids.as_slice(), pair.type_ids.as_slice()), (ids, type_ids));
        // The same as the tokenizers crate on the pair as a whole.
        let mut whole = Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
        whole.with_padding(None).with_truncation(None).unwrap();
        let whole = whole.encode(("a b", "c a"), true).unwrap();
        assert_eq!(whole.get_ids(), ids);
        assert!(whole.get_type_ids().iter().copied().eq(type_ids.iter().copied().map(u32::from)));
    }
}

#[test]
fn a_template_without_a_document_is_refused() {
    let post_processor = json!({
        "type": "TemplateProcessing",
        "single": [{ "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [
            { "Sequence": { "id": "A", "type_id": 0 } },
            { "Sequence": { "id": "B", "type_id": 1 } },
            { "Sequence": { "id": "A", "type_id": 0 } },
        ],
        "special_tokens": {},
    });
    let dir = word_dir(&post_processor);
    let error = PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap_err().to_string();
    let expected = "the tokenizer's pair template holds 2 queries and 1 documents, expected one of \
                    each";
    assert_eq!(error, format!("{}: {expected}", dir.path().display()));
}

fn decoder_template() -> DecoderTemplate {
    DecoderTemplate {
        query_format: TextFormat::parse("q: {}", "query_format").unwrap(),
        seq: "\u{21b5}".into(),
        document_format: TextFormat::parse("d: {} c", "document_format").unwrap(),
        special_token: "yes".into(),
    }
}

#[test]
fn a_decoder_pair_is_four_parts_and_only_the_document_is_cut() {
    // The post-processor of the file has no say.
    let dir = word_dir(&roberta());
    let template = decoder_template();
    let tokenizer =
        PairTokenizer::from_dir_for_decoder(dir.path(), &Value::Null, &template).unwrap();
    let cases: [(usize, &[u32], Truncation); 4] = [
        (64, &[5, 2, 7, 6, 3, 3, 4, 8], Truncation::None),
        (7, &[5, 2, 7, 6, 3, 3, 8], Truncation::Document),
        (4, &[5, 2, 7, 8], Truncation::Document),
        (3, &[5, 7, 8], Truncation::Query),
    ];
    for (max_len, ids, truncated) in cases {
        let pair = tokenizer.encode_pair(" a\n", "b b ", max_len).unwrap();
        assert_eq!(pair.input_ids, ids, "{max_len}");
        assert_eq!((pair.truncated, pair.full_len), (truncated, 8), "{max_len}");
        assert!(pair.type_ids.iter().all(|&type_id| type_id == 0));
    }
    let empty = DecoderTemplate { seq: String::new(), special_token: String::new(), ..template };
    let tokenizer = PairTokenizer::from_dir_for_decoder(dir.path(), &Value::Null, &empty).unwrap();
    assert_eq!(tokenizer.fixed_tokens(), 0);
}

#[test]
fn vocab_txt_honours_the_tokenizer_config() {
    let dir = bert_dir();
    let ids = |config: &Value, text: &str| {
        fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap().document_ids(text).unwrap()
    };
    // Lower-casing takes accents along unless told otherwise.
    assert_eq!(ids(&json!({}), "Café 面包"), [14, 11, 12]);
    assert_eq!(ids(&json!({ "do_lower_case": false }), "Cafe"), [13]);
    assert_eq!(ids(&json!({ "do_lower_case": false }), "Café"), [1]);
    assert_eq!(ids(&json!({ "do_lower_case": false, "strip_accents": true }), "Café"), [13]);
    assert_eq!(ids(&json!({ "strip_accents": false }), "Café"), [1]);
    assert_eq!(ids(&json!({ "tokenize_chinese_chars": false }), "面包"), [1]);
    assert_eq!(ids(&json!({ "unk_token": { "content": "[MASK]" } }), "zzz"), [4]);
}

#[test]
fn directories_without_a_usable_tokenizer_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = || PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap_err();
    let path = dir.path().display().to_string();
    let message = "no tokenizer: expected tokenizer.json (or vocab.txt, for BERT) beside the \
                   model; save_pretrained of transformers' AutoTokenizer writes it";
    assert_eq!(error().to_string(), format!("{path}: {message}"));
    assert_eq!(error().exit_code(), 2);
    fs::write(dir.path().join("vocab.txt"), "[PAD]\n[UNK]\n[CLS]\nword\n").unwrap();
    let message = "the special token [SEP] is not in the vocabulary";
    assert_eq!(error().to_string(), format!("{path}/vocab.txt: {message}"));
    fs::write(dir.path().join("tokenizer_config.json"), "[]").unwrap();
    let text = error().to_string();
    let start = format!("{path}/tokenizer_config.json: expected a JSON object: ");
    assert!(text.starts_with(&start), "{text}");
    fs::write(dir.path().join("tokenizer.json"), "{\"version\": \"1.0\", ").unwrap();
    let text = error().to_string();
    assert!(text.starts_with(&format!("{path}/tokenizer.json: not a tokenizer: EOF")), "{text}");
}

/// A directory with a `tokenizer.json` and these settings.
fn dir_with(tokenizer: &Value, settings: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    dir
}

/// Without the tokens of the template.
fn ids_in(dir: &tempfile::TempDir, text: &str) -> Vec<u32> {
    PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap().document_ids(text).unwrap()
}

/// transformers builds the normalizer anew from these; other classes take what the file says.
#[test]
fn settings_of_a_bert_tokenizer_take_the_place_of_its_own() {
    let plain =
        serde_json::to_value(vocab::bert_tokenizer(bert_dir().path(), &Value::Null).unwrap())
            .unwrap();
    for (settings, expected) in [
        (json!({}), &[14, 11, 12][..]),
        (json!({"tokenizer_class": "TokenizersBackend", "do_lower_case": false}), &[14, 11, 12]),
        (json!({"tokenizer_class": "BertTokenizer"}), &[14, 11, 12]),
        (json!({"tokenizer_class": "BertTokenizer", "do_lower_case": false}), &[13, 11, 12]),
        (json!({"tokenizer_class": "BertTokenizerFast", "do_lower_case": false}), &[13, 11, 12]),
        (json!({"tokenizer_class": "BertTokenizer", "tokenize_chinese_chars": false}), &[14, 1]),
    ] {
        assert_eq!(ids_in(&dir_with(&plain, &settings), "Cafe 面包"), expected, "{settings}");
    }
    let mut cased = plain.clone();
    cased["normalizer"]["lowercase"] = false.into();
    let dir = dir_with(&cased, &json!({}));
    assert_eq!(ids_in(&dir, "Cafe"), [13]);
    // Nothing but the model's type or its config.json names the class, and its default is lower case.
    let ids_for = |model: &Value| {
        PairTokenizer::from_dir(dir.path(), model).unwrap().document_ids("Cafe").unwrap()
    };
    assert_eq!(ids_for(&json!({"model_type": "bert"})), [14]);
    let other = json!({"model_type": "bert", "tokenizer_class": "PreTrainedTokenizerFast"});
    assert_eq!(ids_for(&other), [13]);
}

/// An adapter's directory has no `config.json`: what that tells goes into its settings.
#[test]
fn settings_name_the_class_where_only_the_model_does() {
    let plain =
        serde_json::to_value(vocab::bert_tokenizer(bert_dir().path(), &Value::Null).unwrap());
    let plain = plain.unwrap();
    let named = |settings: &Value, model: &Value| {
        vocab::settings_with_class(dir_with(&plain, settings).path(), model).unwrap()
    };
    let bert = json!({"model_type": "bert"});
    assert_eq!(
        named(&json!({"a": 1}), &bert),
        Some(json!({"a": 1, "tokenizer_class": "BertTokenizer"}))
    );
    assert!(named(&json!({"tokenizer_class": null}), &bert).is_some());
    assert_eq!(named(&json!({"tokenizer_class": "X"}), &bert), None);
    assert_eq!(named(&json!({}), &json!({"model_type": "qwen2"})), None);
}

#[test]
fn a_vocabulary_of_another_class_is_refused() {
    let dir = bert_dir();
    let class = |settings: &Value, model: &Value| {
        fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
        let tokenizer = PairTokenizer::from_dir(dir.path(), model);
        tokenizer.map(|_| ()).map_err(|error| error.to_string())
    };
    let bert = json!({"model_type": "bert"});
    for settings in ["BertTokenizer", "BertTokenizerFast", "ElectraTokenizer"] {
        class(&json!({"tokenizer_class": settings}), &bert).unwrap();
    }
    class(&json!({}), &bert).unwrap();
    let japanese = json!({"tokenizer_class": "BertJapaneseTokenizer", "model_type": "bert"});
    for (settings, model) in [(&japanese, &bert), (&json!({}), &japanese)] {
        let error = class(settings, model).unwrap_err();
        let expected = "vocab.txt: is read as BertTokenizer does, but the tokenizer is a \
                        BertJapaneseTokenizer, which splits texts otherwise; expected a tokenizer.json";
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn settings_of_a_roberta_tokenizer_take_the_place_of_its_own() {
    let tokenizer = |space: bool| {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "post_processor": null, "decoder": null,
            "pre_tokenizer": {
                "type": "ByteLevel", "add_prefix_space": space, "trim_offsets": true, "use_regex": true,
            },
            "model": {
                "type": "BPE", "vocab": {"a": 0, "Ġ": 1, "Ġa": 2}, "merges": [["Ġ", "a"]],
            },
        })
    };
    for (own, settings, expected) in [
        (false, json!({"add_prefix_space": true}), 0),
        (true, json!({}), 2),
        (false, json!({"tokenizer_class": "RobertaTokenizer", "add_prefix_space": true}), 2),
        (true, json!({"tokenizer_class": "RobertaTokenizerFast"}), 0),
    ] {
        assert_eq!(ids_in(&dir_with(&tokenizer(own), &settings), "a"), [expected], "{settings}");
    }
}

#[test]
fn tokens_that_were_added_to_a_vocabulary_are_known() {
    let dir = bert_dir();
    assert_eq!(ids_in(&dir, "how <Q> <r>"), [5, 1, 1, 1, 1, 1, 1]);
    let added = json!({"<r>": 16, "<Q>": 15, "[CLS]": 2}).to_string();
    fs::write(dir.path().join("added_tokens.json"), added).unwrap();
    assert_eq!(ids_in(&dir, "how <Q> <r>"), [5, 15, 16]);
    // Newer files keep them with the settings.
    let token = |content: &str| {
        json!({
            "content": content, "lstrip": false, "normalized": false, "rstrip": false,
            "single_word": false, "special": true,
        })
    };
    let decoder = json!({"16": token("<Q>"), "15": token("<r>"), "2": token("[CLS]")});
    let settings = json!({"added_tokens_decoder": decoder}).to_string();
    fs::write(dir.path().join("tokenizer_config.json"), settings).unwrap();
    assert_eq!(ids_in(&dir, "how <Q> <r>"), [5, 16, 15]);
    for (key, token) in [("5", json!("x")), ("x", token("x")), ("-1", token("x"))] {
        let settings = json!({"added_tokens_decoder": {key: token}}).to_string();
        fs::write(dir.path().join("tokenizer_config.json"), settings).unwrap();
        let error = PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap_err().to_string();
        let expected =
            format!("tokenizer_config.json: added_tokens_decoder: {key:?} is {token}, expected");
        assert!(error.contains(&expected), "{error}");
    }
}

/// The document "bake bread," is 7 8 10.
#[test]
fn the_side_that_is_cut_is_the_tokenizers() {
    let dir = bert_dir();
    for (side, expected) in [("right", [2, 5, 6, 3, 7, 8, 3]), ("left", [2, 5, 6, 3, 8, 10, 3])] {
        let settings = json!({ "truncation_side": side }).to_string();
        fs::write(dir.path().join("tokenizer_config.json"), settings).unwrap();
        let tokenizer = PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap();
        let pair = tokenizer.encode_pair("how to", "bake bread,", 7).unwrap();
        assert_eq!((&pair.input_ids[..], pair.truncated), (&expected[..], Truncation::Document));
    }
    fs::write(dir.path().join("tokenizer_config.json"), r#"{"truncation_side": "top"}"#).unwrap();
    let error = PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap_err().to_string();
    assert!(
        error.contains("truncation_side is \"top\", expected \"right\" or \"left\""),
        "{error}"
    );
    // A tokenizer.json may say so itself.
    let dir = word_dir(&roberta());
    let path = dir.path().join("tokenizer.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(
        &path,
        text.replace(
            "\"direction\":\"Right\",\"max_length\"",
            "\"direction\":\"Left\",\"max_length\"",
        ),
    )
    .unwrap();
    let tokenizer = PairTokenizer::from_dir(dir.path(), &Value::Null).unwrap();
    assert_eq!(tokenizer.encode_pair("a", "b c", 6).unwrap().input_ids, [9, 2, 9, 9, 4, 9]);
}
