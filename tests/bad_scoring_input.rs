//! What a user can get wrong in scoring and evaluation: one line, exit code 2.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/launch.rs"]
mod launch;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use launch::{Outcome, copy_model, reranker, run};
use tempfile::TempDir;

const PAIR: &str = r#"{"query": "tea", "content": "water"}"#;

/// A model and an input that work.
fn workplace() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_model("bert_tiny", &dir.path().join("model"));
    write(dir.path(), "pairs.jsonl", PAIR);
    dir
}

fn write(dir: &Path, name: &str, text: impl AsRef<[u8]>) {
    fs::write(dir.join(name), text).unwrap();
}

fn call(dir: &Path, args: &[&str]) -> Outcome {
    run(&mut reranker(dir, args))
}

/// `reranker SUBCOMMAND --model model ARGS` fails with the one line.
fn refused(dir: &Path, subcommand: &str, args: &[&str], message: &str) {
    let outcome = call(dir, &[&[subcommand, "--model", "model"][..], args].concat());
    assert_eq!(outcome.stderr, format!("error: {message}\n"), "{args:?}");
    assert_eq!(outcome.code, Some(2), "{args:?}");
}

#[test]
fn inputs_of_score() {
    let dir = workplace();
    let dir = dir.path();
    write(dir, "broken.jsonl", format!("{PAIR}\n{{\"query\": \"q\"\n{PAIR}\n"));
    write(dir, "broken.tsv", "tea\twater\ntea\n");
    for (input, message) in [
        ("no.jsonl", "no.jsonl: cannot open: No such file or directory (os error 2)"),
        (".", ".: cannot read: Is a directory (os error 21)"),
        (
            "broken.jsonl",
            "broken.jsonl:2: broken JSON at column 13: EOF while parsing an object; expected one \
             object a line",
        ),
        ("broken.tsv", "broken.tsv:2: 1 column, expected a query, a tab and a document"),
    ] {
        refused(dir, "score", &["--input", input], message);
    }
    let outcome = call(dir, &["score", "--model", "no", "--input", "pairs.jsonl"]);
    assert_eq!(
        outcome.stderr,
        "error: no directory \"no\" here, and the Hugging Face cache hf/hub does not hold that model \
         in full, while HF_HUB_OFFLINE forbids fetching it; give a directory, or fetch the model once \
         without HF_HUB_OFFLINE\n"
    );
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""));
}

#[test]
fn options_of_score_are_refused_before_the_output_is_made() {
    let dir = workplace();
    let dir = dir.path();
    for (option, value, message) in [
        ("--batch-size", "0", "--batch-size is 0, expected at least 1"),
        ("--max-len", "65", "max_len 65 is more than the model's 64 positions"),
        (
            "--max-len",
            "4",
            "max_len 4 leaves no room for text: the template takes 3 tokens, expected at least 5",
        ),
    ] {
        let args = ["--input", "pairs.jsonl", "--output", "scores.jsonl", option, value];
        refused(dir, "score", &args, message);
        assert!(!dir.join("scores.jsonl").exists(), "{option} {value}");
    }
}

#[test]
fn outputs_of_score() {
    let dir = workplace();
    for (output, message) in [
        (
            "no/scores.jsonl",
            "no/scores.jsonl: cannot create: No such file or directory (os error 2)",
        ),
        ("model", "model: cannot create: Is a directory (os error 21)"),
        ("/dev/full", "/dev/full: cannot write: No space left on device (os error 28)"),
    ] {
        refused(dir.path(), "score", &["--input", "pairs.jsonl", "--output", output], message);
    }
}

#[test]
fn an_input_is_not_replaced_by_its_scores() {
    let dir = workplace();
    let message =
        "--output ./pairs.jsonl is the input, which scores would replace; name another file";
    refused(dir.path(), "score", &["--input", "pairs.jsonl", "--output", "./pairs.jsonl"], message);
    assert_eq!(fs::read_to_string(dir.path().join("pairs.jsonl")).unwrap(), PAIR);
}

#[test]
fn an_output_appears_whole_from_standard_input_too() {
    let dir = workplace();
    let dir = dir.path();
    write(dir, "many.jsonl", format!("{PAIR}\n").repeat(600) + "no record\n");
    write(dir, "scores.jsonl", "earlier");
    let args = ["score", "--model", "model", "--output", "scores.jsonl"];
    let before = launch::snapshot(dir);
    let many = fs::File::open(dir.join("many.jsonl")).unwrap();
    let outcome = run(reranker(dir, &args).stdin(many));
    assert!(outcome.stderr.starts_with("error: <stdin>:601: "), "{outcome:?}");
    assert!(launch::snapshot(dir) == before, "something was written");
    let one = fs::File::open(dir.join("pairs.jsonl")).unwrap();
    assert_eq!(run(reranker(dir, &args).stdin(one)).code, Some(0));
    assert_eq!(fs::read_to_string(dir.join("scores.jsonl")).unwrap().lines().count(), 1);
}

#[test]
fn scores_that_are_no_numbers_are_an_error() {
    let dir = workplace();
    let weights = dir.path().join("model/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let bias = tensors["classifier.bias"]["data_offsets"][0].as_u64().unwrap() as usize + header;
    bytes[bias..bias + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    write(
        dir.path(),
        "eval.jsonl",
        r#"{"query": "tea", "hits": [{"content": "water", "label": 1}]}"#,
    );
    for args in [
        &["score", "--input", "pairs.jsonl"][..],
        &["score", "--input", "pairs.jsonl", "--output", "scores.jsonl"],
        &["eval", "--data", "eval.jsonl"],
    ] {
        let outcome = call(dir.path(), &[args, &["--model", "model"]].concat());
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""), "{args:?}");
        // Several models may be evaluated.
        let whose = if args[0] == "eval" { "model: " } else { "" };
        let expected = format!("error: {whose}the model's score is NaN for ");
        assert!(outcome.stderr.starts_with(&expected), "{outcome:?}");
    }
    assert!(!dir.path().join("scores.jsonl").exists());
}

#[test]
fn names_of_files_need_not_be_utf8() {
    let dir = workplace();
    let dir = dir.path();
    let args = ["score", "--model", "model", "--input"];
    let expected = call(dir, &[&args[..], &["pairs.jsonl"]].concat()).stdout;
    assert_eq!(expected.lines().count(), 1);
    let (input, output) = (OsStr::from_bytes(b"in\xff"), OsStr::from_bytes(b"out\xff"));
    fs::rename(dir.join("pairs.jsonl"), dir.join(input)).unwrap();
    let outcome = run(reranker(dir, &args).arg(input).arg("--output").arg(output));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(fs::read_to_string(dir.join(output)).unwrap(), expected);
    fs::rename(dir.join("model"), dir.join(OsStr::from_bytes(b"m\xff"))).unwrap();
    let outcome = run(reranker(dir, &["score", "--model"]).arg(OsStr::from_bytes(b"m\xff")));
    assert_eq!(outcome.stderr, "error: the model's path m\u{fffd} is not UTF-8, expected UTF-8\n");
}

#[test]
fn an_empty_input_has_no_scores() {
    let dir = workplace();
    write(dir.path(), "empty.jsonl", "\n");
    let outcome = call(dir.path(), &["score", "--model", "model", "--input", "empty.jsonl"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(0), ""));
    assert_eq!(outcome.stderr, "");
}

#[test]
fn inputs_of_eval() {
    let dir = workplace();
    let dir = dir.path();
    write(dir, "none.jsonl", r#"{"query": "q", "hits": [{"content": "c", "label": 0}]}"#);
    let nothing =
        "none.jsonl: no query has a document with a label above 0, so nothing can be measured";
    refused(dir, "eval", &["--data", "none.jsonl"], nothing);
    refused(dir, "eval", &["--data", "none.jsonl", "--bm25"], nothing);
    refused(
        dir,
        "eval",
        &["--data", "no.jsonl"],
        "no.jsonl: cannot open: No such file or directory (os error 2)",
    );
    refused(
        dir,
        "eval",
        &["--data", "pairs.jsonl"],
        "pairs.jsonl:1: no \"label\" (keys found: \"content\", \"query\"), expected a number there \
         or another label key",
    );
    let outcome = call(dir, &["eval", "--model", "no", "--data", "none.jsonl"]);
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.starts_with("error: no directory \"no\" here, "), "{outcome:?}");
}
