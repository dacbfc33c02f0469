//! `reranker convert`: every form into every other and back, nothing lost without a word.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/launch.rs"]
mod launch;

use std::fs::{self, File};
use std::path::Path;

use launch::{Outcome, launcher, reranker, run};
use serde_json::{Value, json};
use tempfile::TempDir;

const POINTWISE: &str = r#"{"query":"a","content":"x \" é\n学","label":1}
{"query":"a","content":"y","label":0}
{"query":"a","content":"z","label":0.30000000000000004}
{"query":"b","content":"","label":-2.5}
"#;

fn dir_with(name: &str, bytes: impl AsRef<[u8]>) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(name), bytes).unwrap();
    dir
}

/// `reranker convert ARGS`, with words split at spaces.
fn convert(dir: &Path, args: &str) -> Outcome {
    let args: Vec<_> = ["convert"].into_iter().chain(args.split_whitespace()).collect();
    run(&mut reranker(dir, &args))
}

/// Converts to standard output, which must succeed.
fn converted(dir: &Path, args: &str) -> String {
    let outcome = convert(dir, args);
    assert_eq!(outcome.code, Some(0), "{args}: {}", outcome.stderr);
    outcome.stdout
}

/// Asserts that a conversion is refused with one line and leaves the directory as it was.
fn refused(data: &str, args: &str, message: &str) {
    let dir = dir_with("in.jsonl", data);
    let before = launch::snapshot(dir.path());
    let outcome = convert(dir.path(), &format!("--input in.jsonl --output out.jsonl {args}"));
    assert_eq!(outcome.stderr, format!("error: {message}\n"));
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""));
    assert!(launch::snapshot(dir.path()) == before, "something was written");
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn one_rank_of_several_converts() {
    let dir = dir_with("in.jsonl", POINTWISE);
    let convert =
        [env!("CARGO_BIN_EXE_reranker"), "convert", "--input", "in.jsonl", "--to", "grouped"];
    let launch = [&["--cpu", "--nproc", "2", "--prefix", "", "--"][..], &convert].concat();
    let outcome = run(&mut launcher(dir.path(), &launch));
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(outcome.stdout, converted(dir.path(), "--input in.jsonl --to grouped"));
}

#[test]
fn every_form_becomes_every_other() {
    let dir = dir_with("in.jsonl", POINTWISE);
    let grouped = converted(dir.path(), "--input in.jsonl --to grouped");
    assert_eq!(
        lines(&grouped),
        [
            json!({"query": "a", "hits": [
                {"content": "x \" é\n学", "label": 1}, {"content": "y", "label": 0},
                {"content": "z", "label": 0.300_000_000_000_000_04},
            ]}),
            json!({"query": "b", "hits": [{"content": "", "label": -2.5}]}),
        ]
    );
    let lists = converted(dir.path(), "--input in.jsonl --to posneg --positive-from 0.3");
    assert_eq!(
        lines(&lists),
        [
            json!({"query": "a", "pos": ["x \" é\n学", "z"], "neg": ["y"],
                   "pos_scores": [1, 0.300_000_000_000_000_04]}),
            json!({"query": "b", "pos": [], "neg": [""], "neg_scores": [-2.5]}),
        ]
    );
    fs::write(dir.path().join("grouped"), &grouped).unwrap();
    fs::write(dir.path().join("lists"), &lists).unwrap();
    assert_eq!(converted(dir.path(), "--input grouped --to pointwise"), POINTWISE);
    assert_eq!(converted(dir.path(), "--input grouped --to posneg --positive-from 0.3"), lists);
    for (same, to) in [("in.jsonl", "pointwise"), ("grouped", "grouped"), ("lists", "posneg")] {
        let expected = fs::read_to_string(dir.path().join(same)).unwrap();
        assert_eq!(converted(dir.path(), &format!("--input {same} --to {to}")), expected);
    }
    // Positives come first in lists; the labels are the same.
    let sorted = |text: &str| {
        let mut rows: Vec<_> = text.lines().map(str::to_owned).collect();
        rows.sort();
        rows
    };
    let back = converted(dir.path(), "--input lists --to pointwise");
    assert_eq!(sorted(&back), sorted(POINTWISE));
}

#[test]
fn labels_without_scores_are_the_ends_of_the_range() {
    let lists = "{\"query\": \"q\", \"pos\": [\"p\"], \"neg\": [\"n\"], \"neg_scores\": null}\n";
    let dir = dir_with("lists", lists);
    let text = converted(dir.path(), "--input lists --to pointwise --max-label 2 --min-label -1");
    let expected = "{\"query\":\"q\",\"content\":\"p\",\"label\":2}\n\
                    {\"query\":\"q\",\"content\":\"n\",\"label\":-1}\n";
    assert_eq!(text, expected);
    fs::write(dir.path().join("pairs"), expected).unwrap();
    let back = "--input pairs --to posneg --max-label 2 --min-label -1 --output back";
    assert_eq!(
        convert(dir.path(), back).stderr,
        "read 2 records, wrote 1 pos/neg records with 2 documents\n"
    );
    let back = fs::read_to_string(dir.path().join("back")).unwrap();
    assert_eq!(back, "{\"query\":\"q\",\"pos\":[\"p\"],\"neg\":[\"n\"]}\n");
}

#[test]
fn example_data_there_and_back() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("example_data");
    let (pointwise, grouped) = ("train_pointwise.jsonl", "train_grouped.jsonl");
    let dir = tempfile::tempdir().unwrap();
    let to = |name: &str| dir.path().join(name).display().to_string();
    for (first, form, other) in
        [(pointwise, "pointwise", "grouped"), (grouped, "grouped", "pointwise")]
    {
        let (there, back) = (to("there.jsonl.zst"), to("back.jsonl.gz"));
        converted(&root, &format!("--input {first} --to {other} --output {there}"));
        converted(&root, &format!("--input {there} --to {form} --output {back}"));
        let plain = converted(&root, &format!("--input {back} --to {form}"));
        let expected = fs::read_to_string(root.join(first)).unwrap();
        assert_eq!(lines(&plain), lines(&expected), "{first}");
    }
    let bytes = |name: &str| fs::read(dir.path().join(name)).unwrap();
    assert!(bytes("there.jsonl.zst").starts_with(&[0x28, 0xb5, 0x2f, 0xfd]));
    assert!(bytes("back.jsonl.gz").starts_with(&[0x1f, 0x8b]));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no leftovers");
}

#[test]
fn standard_input_may_be_compressed_and_the_reader_may_leave() {
    let dir = dir_with("in", zstd::encode_all(POINTWISE.as_bytes(), 1).unwrap());
    let mut command = reranker(dir.path(), &["convert", "--to", "grouped"]);
    let outcome = run(command.stdin(File::open(dir.path().join("in")).unwrap()));
    assert_eq!((outcome.code, outcome.stdout.lines().count()), (Some(0), 2), "{}", outcome.stderr);
    assert_eq!(outcome.stderr, "read 4 records, wrote 2 grouped records with 4 documents\n");
    fs::write(dir.path().join("long"), POINTWISE.repeat(5000)).unwrap();
    let program = env!("CARGO_BIN_EXE_reranker");
    let script =
        format!("set -o pipefail; '{program}' convert --input long --to pointwise | head -n 1");
    let mut shell = std::process::Command::new("bash");
    let outcome = run(shell.args(["-c", &script]).current_dir(dir.path()));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
}

#[test]
fn pointwise_records_are_gathered_where_they_stand_together_or_in_memory() {
    let apart = "{\"query\":\"a\",\"content\":\"x\",\"label\":1}\n\
                 {\"query\":\"b\",\"content\":\"y\",\"label\":1}\n\
                 {\"query\":\" a \",\"content\":\"z\",\"label\":0}\n";
    refused(
        apart,
        "--to grouped",
        "in.jsonl:3: the query of line 1 comes again after others; sort the records by query, or \
         pass --gather to gather them in memory",
    );
    let dir = dir_with("in", apart);
    let text = converted(dir.path(), "--input in --to posneg --gather");
    let expected = "{\"query\":\"a\",\"pos\":[\"x\"],\"neg\":[\"z\"]}\n\
                    {\"query\":\"b\",\"pos\":[\"y\"],\"neg\":[]}\n";
    assert_eq!(text, expected);
    // A record that is a group already stays one, in its place.
    let mixed = "{\"query\":\"a\",\"hits\":[{\"content\":\"w\",\"label\":0}]}\n".to_owned() + apart;
    fs::write(dir.path().join("in"), mixed).unwrap();
    let text = converted(dir.path(), "--input in --to grouped --gather");
    let sizes: Vec<_> =
        lines(&text).iter().map(|group| group["hits"].as_array().unwrap().len()).collect();
    assert_eq!(sizes, [1, 2, 1]);
}

#[test]
fn what_the_target_cannot_hold_is_refused_or_counted() {
    let keys =
        "{\"query\":\"a\",\"hits\":[{\"content\":\"x\",\"label\":1,\"id\":7}],\"lang\":\"en\"}\n";
    let message = "in.jsonl:1: \"lang\" has no place in pos/neg records; pass --lossy to leave such \
                   keys out";
    refused(keys, "--to posneg", message);
    let groups = "{\"query\":\"a\",\"hits\":[{\"content\":\"x\",\"label\":1}]}\n".repeat(2);
    refused(
        &groups,
        "--to pointwise",
        "in.jsonl:2: a second group of the query in line 1: pointwise records of the two could not \
         be told apart; pass --lossy to accept that",
    );
    let dir = dir_with("in", keys.to_owned() + &groups);
    let outcome = convert(dir.path(), "--input in --to pointwise --lossy --output out");
    let expected = "read 3 records, wrote 3 pointwise records with 3 documents; left out 2 keys \
                    that they have no place for; 2 groups share a query with an earlier one\n";
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), expected));
    let graded = "{\"query\":\"a\",\"content\":\"x\",\"label\":0.5}\n";
    refused(
        graded,
        "--to posneg",
        "in.jsonl:1: the label 0.5 is neither 1 (--max-label) nor 0 (--min-label); say from which \
         label on a document is positive: --positive-from",
    );
}

#[test]
fn a_table_of_several_forms_is_converted() {
    let dir = dir_with(
        "in.jsonl",
        r#"{"query":"a","content":"x","label":1,"hits":null,"pos":null}
{"query":"b","content":null,"label":null,"hits":[{"content":"y","label":0}],"pos":null}
"#,
    );
    let grouped = converted(dir.path(), "--input in.jsonl --to grouped");
    assert_eq!(
        lines(&grouped),
        [
            json!({"query": "a", "hits": [{"content": "x", "label": 1}]}),
            json!({"query": "b", "hits": [{"content": "y", "label": 0}]}),
        ]
    );
    // A text beside a content is no part of the record, and not lost without a word.
    refused(
        r#"{"query":"a","content":"x","label":1,"neg":["y"]}"#,
        "--to grouped",
        "in.jsonl:1: \"neg\" has no place in grouped records; pass --lossy to leave such keys out",
    );
}

#[test]
fn bad_input_is_named_and_the_old_output_stays() {
    for (data, message) in [
        ("", "in.jsonl: holds no records, expected one JSON object a line"),
        (
            "{\"query\":\"q\",\"content\":\"c\"}",
            "in.jsonl:1: no \"label\" (keys found: \"content\", \"query\"), expected a number there \
             or another label key",
        ),
        (
            "\n{\"query\":\"q\",\"pos\":[\"c\"],\"pos_scores\":[]}",
            "in.jsonl:2: \"pos_scores\" has 0 entries, expected 1 as in \"pos\"",
        ),
        (
            "{\"query\":\"q\",\"hits\":[{\"content\":\"c\",\"label\":\"1\"}]}",
            "in.jsonl:1: \"hits[0].label\" is a string, expected a number",
        ),
        (
            "{\"query\":\"q\",\"content\":\"c\",\"label\":NaN}",
            "in.jsonl:1: NaN at column 36, expected a finite number",
        ),
    ] {
        refused(data, "--to pointwise", message);
        refused(data, "--to grouped", message);
    }
    refused(
        "{}",
        "--to pointwise --max-label 0",
        "--max-label is 0 and --min-label 0, expected --max-label above --min-label",
    );
    let dir = dir_with("in.jsonl", POINTWISE.to_owned() + "{}");
    fs::write(dir.path().join("out"), "old").unwrap();
    let outcome = convert(dir.path(), "--input in.jsonl --to grouped --output out");
    assert_eq!(outcome.code, Some(2));
    assert_eq!(fs::read_to_string(dir.path().join("out")).unwrap(), "old");
    let outcome = convert(dir.path(), "--input none --to grouped");
    assert_eq!(
        outcome.stderr,
        "error: none: cannot open: No such file or directory (os error 2)\n"
    );
    let outcome = convert(dir.path(), "--input in.jsonl --to grouped --output .");
    assert_eq!(outcome.stderr, "error: .: is a directory, expected a file\n");
}
