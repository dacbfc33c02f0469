//! Where results go: files that appear whole, and what cannot.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/launch.rs"]
mod launch;

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{FileTypeExt as _, symlink};
use std::path::Path;
use std::process::Stdio;

use launch::{Outcome, copy_model, reranker, run};
use rustix::fs::{CWD, Mode, OFlags};
use tempfile::TempDir;

const RECORDS: &str = r#"{"query": "tea", "content": "water", "label": 1}
{"query": "tea", "content": "dog", "label": 0}
"#;

/// A command for each way to an output, without the output's name.
const WRITERS: [&str; 5] = [
    "convert --input records.jsonl --to grouped --output",
    "score --model model --input records.jsonl --output",
    "score --model model --output",
    "eval --bm25 --data records.jsonl --write-run",
    "eval --bm25 --data records.jsonl --per-query",
];

fn workplace() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_model("bert_tiny", &dir.path().join("model"));
    fs::write(dir.path().join("records.jsonl"), RECORDS).unwrap();
    dir
}

/// `reranker WORDS OUTPUT`, with the records as standard input.
fn write_to(dir: &Path, words: &str, output: &str) -> Outcome {
    let words: Vec<_> = words.split(' ').chain([output]).collect();
    let outcome =
        run(reranker(dir, &words).stdin(fs::File::open(dir.join("records.jsonl")).unwrap()));
    assert_eq!(outcome.code, Some(0), "{words:?}: {outcome:?}");
    outcome
}

#[test]
fn what_lies_at_an_output_stays_what_it_is() {
    let dir = workplace();
    let dir = dir.path();
    fs::create_dir(dir.join("there")).unwrap();
    symlink("there/file", dir.join("link")).unwrap();
    symlink("/proc/self/fd/1", dir.join("stdout")).unwrap();
    rustix::fs::mkfifoat(CWD, dir.join("pipe"), Mode::RUSR | Mode::WUSR).unwrap();
    // Open for both, so that nobody waits; what is written fits into the pipe.
    let flags = OFlags::RDWR | OFlags::NONBLOCK;
    let pipe = rustix::fs::open(dir.join("pipe"), flags, Mode::empty()).unwrap();
    let mut pipe = fs::File::from(pipe);
    for words in WRITERS {
        write_to(dir, words, "plain");
        let expected = fs::read_to_string(dir.join("plain")).unwrap();
        assert!(!expected.is_empty(), "{words}");
        // The first time the link leads nowhere.
        write_to(dir, words, "link");
        assert!(dir.join("link").is_symlink(), "{words}");
        assert_eq!(fs::read_to_string(dir.join("there/file")).unwrap(), expected, "{words}");
        assert_eq!(fs::read_dir(dir.join("there")).unwrap().count(), 1, "{words}: no leftovers");

        write_to(dir, words, "pipe");
        let mut text = vec![0; 1 << 16];
        let length = pipe.read(&mut text).unwrap();
        assert_eq!(String::from_utf8_lossy(&text[..length]), expected, "{words}");
        assert!(fs::symlink_metadata(dir.join("pipe")).unwrap().file_type().is_fifo(), "{words}");

        // What else goes there comes before or behind, not over it.
        let outcome = write_to(dir, words, "stdout");
        assert!(outcome.stdout.contains(&expected), "{words}: {outcome:?}");
        assert!(dir.join("stdout").is_symlink(), "{words}");
    }
}

#[test]
fn an_output_is_compressed_by_its_name() {
    let dir = workplace();
    let dir = dir.path();
    for words in [WRITERS[1], WRITERS[2], WRITERS[3]] {
        write_to(dir, words, "plain");
        write_to(dir, words, "out.gz");
        let mut text = String::new();
        let file = fs::File::open(dir.join("out.gz")).unwrap();
        flate2::read::MultiGzDecoder::new(file).read_to_string(&mut text).unwrap();
        assert_eq!(text, fs::read_to_string(dir.join("plain")).unwrap(), "{words}");
    }
}

#[test]
fn a_full_stderr_changes_no_result() {
    let dir = workplace();
    let dir = dir.path();
    fs::create_dir(dir.join("there")).unwrap();
    let told = |words: &str| run(&mut reranker(dir, &words.split(' ').collect::<Vec<_>>()));
    for (words, code) in [
        ("convert --input records.jsonl --to grouped --output out", 0),
        ("score --model model --input records.jsonl --output out", 0),
        ("score --model model --input records.jsonl --output there", 2),
        ("convert --input none --to grouped", 2),
    ] {
        assert_eq!(told(words).code, Some(code), "{words}");
        let expected = fs::read(dir.join("out")).unwrap();
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = reranker(dir, &words.split(' ').collect::<Vec<_>>());
        let status = command.stdout(Stdio::null()).stderr(full).status().unwrap();
        assert_eq!(status.code(), Some(code), "{words}");
        assert_eq!(fs::read(dir.join("out")).unwrap(), expected, "{words}");
    }
}

#[test]
fn a_dash_is_never_a_file() {
    let dir = workplace();
    let dir = dir.path();
    fs::write(dir.join("-"), "no record").unwrap();
    let ways = [
        "score --model model",
        "score --model model --input -",
        "eval --bm25 --data records.jsonl --write-run",
    ];
    for words in ways {
        let words =
            if words.starts_with("score") { format!("{words} --output") } else { words.into() };
        let outcome = write_to(dir, &words, "-");
        let expected = if words.starts_with("score") { "{\"index\":0," } else { "q1 Q0 q1-d1 1 " };
        assert!(outcome.stdout.starts_with(expected), "{words}: {outcome:?}");
        assert_eq!(fs::read_to_string(dir.join("-")).unwrap(), "no record", "{words}");
    }
    let outcome = run(&mut reranker(dir, &["eval", "--bm25", "--data", "-"]));
    let message = "error: --data - is standard input, which eval does not read; name a file (./- \
                   where it is called so)\n";
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(2), message));
}

#[test]
fn eval_finds_wrong_paths_before_it_scores_and_loses_no_figures() {
    let dir = workplace();
    let dir = dir.path();
    let eval = "eval --data records.jsonl --model model --write-qrels qrels";
    let missing = "cannot create: No such file or directory (os error 2)";
    for (more, message) in [
        ("--per-query no/figures", format!("no/figures: {missing}")),
        ("--write-run no/run", format!("no/run: {missing}")),
        ("--write-run model", "model: cannot create: Is a directory (os error 21)".to_owned()),
        ("--model no", "no directory \"no\" here, ".to_owned()),
    ] {
        let words = format!("{eval} {more}");
        let outcome = run(&mut reranker(dir, &words.split(' ').collect::<Vec<_>>()));
        assert!(outcome.stderr.starts_with(&format!("error: {message}")), "{outcome:?}");
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{more}");
        assert!(!dir.join("qrels").exists(), "{more}: work began");
    }
    let words = "eval --data records.jsonl --bm25 --per-query /dev/full";
    let outcome = run(&mut reranker(dir, &words.split(' ').collect::<Vec<_>>()));
    assert!(outcome.stdout.contains("nDCG@10"), "{outcome:?}");
    assert!(outcome.stderr.starts_with("error: /dev/full: cannot write: "), "{outcome:?}");
    assert_eq!(outcome.code, Some(2));
}
