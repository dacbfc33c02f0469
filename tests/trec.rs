//! `reranker eval` against `trec_eval`'s own figures, and TREC's files.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/launch.rs"]
mod launch;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use launch::{copy_model, launcher, output_of, reranker, run, snapshot};
use serde_json::{Value, json};
use tempfile::TempDir;

const CUTOFFS: [usize; 3] = [1, 3, 10];

/// The golden run and its judgements as files, and `trec_eval`'s figures by query.
fn golden() -> (TempDir, BTreeMap<String, Value>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/trec.json");
    let golden: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for name in ["run", "qrels"] {
        fs::write(dir.path().join(name), golden[name].as_str().unwrap()).unwrap();
    }
    (dir, serde_json::from_value(golden["queries"].clone()).unwrap())
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn close(found: &Value, expected: f64, what: &str) {
    let found = found.as_f64().unwrap_or_else(|| panic!("{what}: {found}"));
    assert!((found - expected).abs() <= 1e-6, "{what}: {found} is not {expected}");
}

/// The figures that `eval` prints and `trec_eval`'s names for them, under a gain.
fn names(gain: &str) -> Vec<(String, String)> {
    let of = |k: usize| {
        let theirs = if gain == "linear" { "ndcg" } else { "ndcg_exponential" };
        [("ndcg", theirs), ("mrr", "mrr"), ("recall", "recall")]
            .map(|(ours, theirs)| (format!("{ours}@{k}"), format!("{theirs}@{k}")))
    };
    let map = [("map".to_owned(), "map".to_owned())];
    CUTOFFS.into_iter().flat_map(of).chain(map).collect()
}

#[test]
fn every_figure_of_every_query_is_that_of_trec_eval() {
    let (dir, expected) = golden();
    let dir = dir.path();
    for gain in ["linear", "exponential"] {
        let args = ["eval", "--run", "run", "--qrels", "qrels", "--k", "1,3,10", "--json"];
        let args = [&args[..], &["--per-query", "queries.jsonl", "--gain", gain]].concat();
        let means = &json_lines(&output_of(&mut reranker(dir, &args)))[0]["run"];
        assert_eq!(means["queries"], expected.len());
        for (ours, theirs) in names(gain) {
            let sum: f64 = expected.values().map(|row| row[&theirs].as_f64().unwrap()).sum();
            close(&means[&ours], sum / expected.len() as f64, &format!("mean {ours}, {gain}"));
        }
        let queries = json_lines(&fs::read_to_string(dir.join("queries.jsonl")).unwrap());
        assert_eq!(queries.len(), expected.len());
        for line in queries {
            let query = line["query"].as_str().unwrap();
            for (ours, theirs) in names(gain) {
                let expected = expected[query][&theirs].as_f64().unwrap();
                close(&line[&ours], expected, &format!("{query} {ours}, {gain}"));
            }
        }
    }
}

#[test]
fn no_output_takes_the_place_of_an_input_or_of_another() {
    let (dir, _) = golden();
    let dir = dir.path();
    fs::write(dir.join("records.jsonl"), r#"{"query": "a", "pos": ["b"], "neg": ["c"]}"#).unwrap();
    std::os::unix::fs::symlink("run", dir.join("link")).unwrap();
    let before = snapshot(dir);
    for (words, what) in [
        (
            "--run run --qrels qrels --per-query ./qrels",
            "--per-query ./qrels is the file of --qrels",
        ),
        ("--run run --qrels qrels --per-query link", "--per-query link is the file of --run"),
        (
            "--bm25 --data records.jsonl --write-run records.jsonl",
            "--write-run records.jsonl is the file of --data",
        ),
        (
            "--bm25 --data records.jsonl --write-qrels ./new --per-query new",
            "--write-qrels ./new is the file of --per-query",
        ),
    ] {
        let args: Vec<_> = ["eval"].into_iter().chain(words.split(' ')).collect();
        let outcome = run(&mut reranker(dir, &args));
        let message = format!("error: {what} too, which it would replace; name another file\n");
        assert_eq!((outcome.code, outcome.stderr), (Some(2), message));
        assert!(snapshot(dir) == before, "something was written");
    }
    let words = "eval --run run --qrels qrels --per-query /dev/null";
    output_of(&mut reranker(dir, &words.split(' ').collect::<Vec<_>>()));
}

#[test]
fn runs_stand_side_by_side_and_missing_queries_are_told_or_counted() {
    let (dir, expected) = golden();
    let dir = dir.path();
    let text = fs::read_to_string(dir.join("run")).unwrap();
    let first = text.split_inclusive('\n').filter(|line| line.starts_with("q0 "));
    fs::write(dir.join("short"), first.collect::<String>()).unwrap();
    let args = ["eval", "--run", "run", "--run", "short", "--qrels", "qrels"];
    let table = output_of(&mut reranker(dir, &args));
    for part in [
        "nDCG@10",
        "Recall@10",
        "1 judged queries are not in run and left out (--complete)",
        "1 queries of run are not judged and left out",
        "22 judged queries are not in short and left out (--complete)",
        "nDCG with the label as gain, as trec_eval",
        "short: over 1 queries",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let complete = [&args[..], &["--complete", "--json"]].concat();
    let all = &json_lines(&output_of(&mut reranker(dir, &complete)))[0];
    assert_eq!(all["short"]["queries"], expected.len() + 1);
    let q0 = expected["q0"]["map"].as_f64().unwrap();
    close(&all["short"]["map"], q0 / (expected.len() + 1) as f64, "short");
}

#[test]
fn columns_stay_apart_and_names_are_one_s_own() {
    let (dir, _) = golden();
    let dir = dir.path();
    let args = ["eval", "--run", "run", "--qrels", "qrels"];
    let table = output_of(&mut reranker(dir, &[&args[..], &["--k", "1,1000"]].concat()));
    let heading: Vec<&str> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(heading[6..], ["Recall@1", "Recall@1000"], "{table}");
    let outcome = run(&mut reranker(dir, &[&args[..], &["--run", "run", "--json"]].concat()));
    let message = "two rankings would be called run, expected a name of its own for each";
    assert_eq!((outcome.code, outcome.stderr), (Some(2), format!("error: {message}\n")));
}

#[test]
fn zeros_of_either_sign_are_equal_scores() {
    let (dir, _) = golden();
    let dir = dir.path();
    fs::write(dir.join("zeros"), "q Q0 a 1 0.0 t\nq Q0 b 2 -0.0 t\n").unwrap();
    fs::write(dir.join("labels"), "q 0 b 1\n").unwrap();
    let args = ["eval", "--run", "zeros", "--qrels", "labels", "--json"];
    let figures: Value = serde_json::from_str(&output_of(&mut reranker(dir, &args))).unwrap();
    // As in trec_eval, of equal scores the greater name is first.
    close(&figures["zeros"]["mrr@10"], 1.0, "zeros");
}

#[test]
fn bad_lines_of_trec_files_are_named() {
    let (dir, _) = golden();
    let dir = dir.path();
    for (file, text, message) in [
        ("run", "q Q0 d 1 2.0\n", "run:1: 5 columns, expected 6: query Q0 document rank score tag"),
        ("run", "\nq Q0 d 1 x t\n", "run:2: the score is \"x\", expected a number"),
        ("run", "q Q0 d 1 nan t\n", "run:1: the score is \"nan\", expected a number"),
        (
            "run",
            "q Q0 d 1 2 t\nq Q0 d 2 1 t\n",
            "run:2: document \"d\" stands twice under query \"q\", expected it once",
        ),
        (
            "run",
            "q Q0 d 1 2 t\n",
            "run and the judgements have no query in common that has a relevant document",
        ),
        ("qrels", "q 0 d\n", "qrels:1: 3 columns, expected 4: query iteration document label"),
    ] {
        let (run_file, qrels) = if file == "run" { ("bad", "qrels") } else { ("run", "bad") };
        fs::write(dir.join("bad"), text).unwrap();
        let outcome = run(&mut reranker(dir, &["eval", "--run", run_file, "--qrels", qrels]));
        let message = message.replacen(file, "bad", 1);
        assert_eq!(outcome.stderr, format!("error: {message}\n"));
        assert_eq!(outcome.code, Some(2));
    }
}

/// Grouped data with two models side by side: any number of ranks prints the same, and what is
/// written in TREC's form measures the same.
#[test]
fn models_stand_side_by_side_over_any_number_of_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    copy_model("bert_tiny", &dir.join("base"));
    copy_model("bert_odd", &dir.join("tuned"));
    let texts = ["boil water", "the river bank", "a loan", "火车票", "seeds in the garden", "tea"];
    let records: Vec<String> = (0..150)
        .map(|query| {
            let hit = |i: usize| {
                let words = format!("{} {} {i}", texts[(query + i) % 6], texts[query * i % 5]);
                json!({"content": words, "label": (query * 7 + i * 3) % 4})
            };
            let hits: Vec<Value> = (0..3 + query % 5).map(hit).collect();
            json!({"query": format!("{} {query}", texts[query % 6]), "hits": hits}).to_string()
        })
        .collect();
    fs::write(dir.join("eval.jsonl"), records.join("\n")).unwrap();
    let args = ["eval", "--device", "cpu", "--data", "eval.jsonl", "--bm25", "--json"];
    let args = [&args[..], &["--model", "base", "--model", "tuned", "--k", "1,3"]].concat();
    let alone = output_of(&mut reranker(dir, &args));
    let figures = &json_lines(&alone)[0];
    assert_eq!(figures.as_object().unwrap().len(), 3, "{figures}");
    assert_ne!(figures["base"]["ndcg@3"], figures["tuned"]["ndcg@3"]);
    let launch = ["--cpu", "--nproc", "2", "--", env!("CARGO_BIN_EXE_reranker")];
    let ranks = output_of(&mut launcher(dir, &[&launch[..], &args].concat()));
    assert_eq!(ranks.trim_start_matches("[0] "), alone, "two ranks");

    let write = ["eval", "--device", "cpu", "--model", "base", "--data", "eval.jsonl"];
    let write = [&write[..], &["--write-run", "run", "--write-qrels", "qrels"]].concat();
    output_of(&mut reranker(dir, &write));
    let args = ["eval", "--run", "run", "--qrels", "qrels", "--gain", "exponential", "--json"];
    let again = output_of(&mut reranker(dir, &[&args[..], &["--k", "1,3"]].concat()));
    for (name, expected) in figures["base"].as_object().unwrap() {
        close(&json_lines(&again)[0]["run"][name], expected.as_f64().unwrap(), name);
    }
    let two = run(&mut reranker(dir, &[&write[..], &["--bm25"]].concat()));
    assert_eq!(two.code, Some(2));
    assert!(two.stderr.contains("--write-run writes one ranking, but there are 2"), "{two:?}");
}
