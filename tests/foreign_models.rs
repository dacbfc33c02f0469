//! Scoring with models that other programs saved: what they keep beside a model is heeded, what nobody
//! says is asked for, and what cannot be a reranker is named.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/launch.rs"]
mod launch;

use std::fs;
use std::path::Path;

use launch::{copy_model, output_of, reranker, run};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A workplace with a golden model as `m`, and a pair to score.
fn workplace(case: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_model(case, &dir.path().join("m"));
    let pair = json!({"query": "boil water", "content": "tea water river bank loan ".repeat(20)});
    fs::write(dir.path().join("pairs.jsonl"), pair.to_string()).unwrap();
    dir
}

fn command(dir: &TempDir, more: &[&str]) -> std::process::Command {
    let args = ["score", "--model", "m", "--input", "pairs.jsonl", "--device", "cpu"];
    reranker(dir.path(), &[&args[..], more].concat())
}

fn scores(dir: &TempDir, more: &[&str]) -> String {
    output_of(&mut command(dir, more))
}

fn error_of(dir: &TempDir, more: &[&str]) -> String {
    let outcome = run(&mut command(dir, more));
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    outcome.stderr
}

/// Changes keys of a JSON file of the model, which need not be there.
fn set(dir: &TempDir, file: &str, change: &Value) {
    let path = dir.path().join("m").join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|_| "{}".into());
    let mut value: Value = serde_json::from_str(&text).unwrap();
    for (key, to) in change.as_object().unwrap() {
        value[key] = to.clone();
    }
    fs::write(path, value.to_string()).unwrap();
}

const GIVEN: [&str; 8] = [
    "--query-format",
    "- boil {}",
    "--document-format",
    "{} tea",
    "--seq",
    "\n",
    "--special-token",
    "bank",
];

#[test]
fn what_stands_around_a_pair_can_be_given() {
    let dir = workplace("qwen2_tiny");
    let outcome = run(&mut command(&dir, &[]));
    let bare = outcome.stdout;
    let note = "note: m is a decoder without reranker.json; query and document are put together as they \
                are (--query-format, --document-format, --seq, --special-token)\n";
    assert_eq!((outcome.code, &*outcome.stderr), (Some(0), note));
    let outcome = run(&mut command(&dir, &GIVEN));
    assert_eq!((outcome.code, &*outcome.stderr), (Some(0), ""));
    let given = outcome.stdout;
    assert_ne!(given, bare);

    let [_, query_format, _, document_format, _, seq, _, special_token] = GIVEN;
    let sidecar = json!({
        "format_version": 1, "model_type": "llm_decoder", "query_format": query_format,
        "document_format": document_format, "seq": seq, "special_token": special_token,
        "max_len": 64, "min_label": 0.0, "max_label": 1.0, "base_model": "x", "run": null,
        "metrics": null,
    });
    set(&dir, "reranker.json", &sidecar);
    assert_eq!(scores(&dir, &[]), given);
    let plain = ["--query-format={}", "--document-format={}", "--seq=", "--special-token="];
    assert_eq!(scores(&dir, &plain), bare);
}

#[test]
fn texts_that_have_no_place_are_refused() {
    let encoder = workplace("bert_tiny");
    assert_ne!(scores(&encoder, &GIVEN[..4]), scores(&encoder, &[]));
    let expected = "error: --seq is for decoders, but m is an encoder\n";
    assert_eq!(error_of(&encoder, &GIVEN), expected);
    let error = error_of(&encoder, &["--query-format", "boil"]);
    assert!(error.contains("query_format \"boil\" has no gap"), "{error}");
    let asked = workplace("qwen3_prompt");
    let error = error_of(&asked, &["--document-format", "{}", "--prompt", "qwen3-reranker"]);
    assert!(error.contains("--document-format does not go with m, a language model"), "{error}");
}

#[test]
fn the_length_that_a_tokenizer_was_saved_with_is_kept_to() {
    let dir = workplace("bert_tiny");
    let (long, short) = (scores(&dir, &[]), scores(&dir, &["--max-len", "8"]));
    assert_ne!(long, short);
    set(&dir, "tokenizer_config.json", &json!({"model_max_length": 8}));
    assert_eq!(scores(&dir, &[]), short);
    assert_eq!(scores(&dir, &["--max-len", "64"]), long);
    // Transformers' word for none, and a number beyond the model's positions.
    for none in ["1000000000000000019884624838656", "100", "null"] {
        let none: Value = serde_json::from_str(none).unwrap();
        set(&dir, "tokenizer_config.json", &json!({"model_max_length": none}));
        assert_eq!(scores(&dir, &[]), long, "{none}");
    }
}

#[test]
fn the_default_prompt_of_sentence_transformers_stands_before_the_query() {
    const FILE: &str = "config_sentence_transformers.json";
    let dir = workplace("bert_tiny");
    let plain = scores(&dir, &[]);
    let prompts = json!({"prompts": {"river": "river {bank} "}, "default_prompt_name": null});
    set(&dir, FILE, &prompts);
    set(&dir, FILE, &json!({"model_type": "CrossEncoder"}));
    assert_eq!(scores(&dir, &[]), plain, "no default");
    set(&dir, FILE, &json!({"default_prompt_name": "river"}));
    let prompted = scores(&dir, &[]);
    assert_ne!(prompted, plain);
    assert_eq!(scores(&dir, &["--query-format", "river {{bank}} {}"]), prompted);
    assert_eq!(scores(&dir, &["--query-format", "{}"]), plain);
    set(&dir, FILE, &json!({"default_prompt_name": "lake"}));
    let error = error_of(&dir, &[]);
    assert!(error.contains("its default_prompt_name \"lake\" is none of its prompts"), "{error}");
    set(&dir, FILE, &json!({"model_type": "SentenceTransformer"}));
    assert_eq!(scores(&dir, &[]), plain, "an embedding model's");
}

#[test]
fn a_classifier_is_named_as_such() {
    let dir = workplace("bert_tiny");
    let weights = dir.path().join("m/model.safetensors");
    let tensors = tch::Tensor::read_safetensors(&weights).unwrap();
    let doubled = |name: &str, tensor: &tch::Tensor| match name {
        "classifier.weight" | "classifier.bias" => tch::Tensor::cat(&[tensor, tensor], 0),
        _ => tensor.shallow_clone(),
    };
    let tensors: Vec<_> = tensors.iter().map(|(name, t)| (name, doubled(name, t))).collect();
    tch::Tensor::write_safetensors(&tensors, &weights).unwrap();
    let expected = "error: m/config.json: a classifier with 2 labels, whose classifier.weight gives a \
                    number for each; expected a model with one, or, to be trained, one without a head, \
                    as the model that it was made of\n";
    let two = [json!({"id2label": {"0": "no", "1": "yes"}}), json!({"num_labels": 2}), json!({})];
    for labels in two {
        let mut all = json!({"id2label": null, "num_labels": null});
        all.as_object_mut().unwrap().extend(labels.as_object().unwrap().clone());
        set(&dir, "config.json", &all);
        assert_eq!(error_of(&dir, &[]), expected);
    }
    train_refuses(dir.path(), "m/config.json: a classifier with 2 labels");
}

fn train_refuses(dir: &Path, expected: &str) {
    let record = r#"{"query": "boil water", "content": "tea", "label": 1}"#;
    fs::write(dir.join("train.jsonl"), format!("{record}\n{record}\n")).unwrap();
    let config = "model_name_or_path: m\nmodel_type: bert_encoder\ntrain_dataset: train.jsonl\n\
                  max_len: 32\n";
    fs::write(dir.join("t.yaml"), config).unwrap();
    let outcome = run(&mut reranker(dir, &["check", "--config", "t.yaml"]));
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains(expected), "{}", outcome.stderr);
}
