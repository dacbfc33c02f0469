//! A run through a data cache is the run without one, and the cache is built once for all of it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/fault_disk.rs"]
mod fault_disk;
#[path = "common/launch.rs"]
mod launch;

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use launch::{copy_model, launcher, reranker, run};
use tempfile::TempDir;

const WORDS: [&str; 6] = ["water ", "boil ", "egg ", "学习 ", "a hen and ", "seven minutes "];

fn text(seed: usize, words: usize) -> String {
    (0..words).map(|i| WORDS[(seed + i * i) % WORDS.len()]).collect()
}

/// 24 queries with 1 to 5 documents, of which some are over 100 characters.
fn write_data(dir: &Path) {
    let query = |i: usize| text(i, 1 + i % 5) + &i.to_string();
    let (mut pointwise, mut grouped) = (String::new(), String::new());
    for i in 0..24 {
        let hits: Vec<_> = (0..=i % 5)
            .map(|j| {
                let (content, label) = (text(i + j, 3 + 7 * j), (i + j) % 2);
                format!("\"content\": \"{content}\", \"label\": {label}")
            })
            .collect();
        for hit in &hits {
            writeln!(pointwise, "{{\"query\": \"{}\", {hit}}}", query(i)).unwrap();
        }
        let hits: Vec<_> = hits.iter().map(|hit| format!("{{{hit}}}")).collect();
        let hits = hits.join(", ");
        writeln!(grouped, "{{\"query\": \"{}\", \"hits\": [{hits}]}}", query(i)).unwrap();
    }
    fs::write(dir.join("pointwise.jsonl"), pointwise).unwrap();
    fs::write(dir.join("grouped.jsonl"), grouped).unwrap();
}

fn case(settings: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_model("bert_tiny", &dir.path().join("model"));
    write_data(dir.path());
    let yaml = format!(
        "model_name_or_path: model\nmodel_type: bert_encoder\nval_dataset: grouped.jsonl\n\
         max_len: 48\nbatch_size: 4\nepochs: 2\nlr: 1e-3\n{settings}"
    );
    fs::write(dir.path().join("training.yaml"), yaml).unwrap();
    dir
}

/// Trains with two workers and returns the model's weights.
fn train(dir: &Path, output: &str, more: &[&str]) -> Vec<u8> {
    let output_dir = format!("output_dir={output}");
    let flags = ["--cpu", "--nproc", "2", "--config", "training.yaml", "--set", &output_dir];
    let outcome = run(&mut launcher(dir, &[&flags, more].concat()));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    fs::read(dir.join(output).join("model/model.safetensors")).unwrap()
}

/// The caches below `dir` with what tells one from another that replaced it.
fn caches(dir: &Path) -> Vec<(PathBuf, u64)> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut caches: Vec<_> = entries
        .filter(|path| path.is_dir())
        .map(|path| (path.clone(), path.metadata().unwrap().ino()))
        .collect();
    caches.sort();
    caches
}

#[test]
fn training_through_a_cache_gives_the_same_model() {
    for (caches_made, settings) in [
        (2, "train_dataset: pointwise.jsonl\n"),
        // Training and validation data are one file, and have one cache.
        (1, "train_dataset: grouped.jsonl\nloss_type: listwise_ce\ntrain_group_size: 3\n"),
        (
            2,
            "train_dataset: pointwise.jsonl\ntrain_dataset_type: grouped\n\
             loss_type: pairwise_ranknet\nshuffle_rate: 0.7\n",
        ),
    ] {
        let dir = case(settings);
        let plain = train(dir.path(), "plain", &[]);
        let cached = train(dir.path(), "cached", &["--set", "cache_dir=cache"]);
        assert!(plain == cached, "{settings}");
        let built = caches(&dir.path().join("cache"));
        assert_eq!(built.len(), caches_made, "{built:?}");
        assert!(train(dir.path(), "again", &["--set", "cache_dir=cache"]) == plain);
        assert_eq!(caches(&dir.path().join("cache")), built, "found again, not built");
    }
}

/// As on Lustre mounted with `noflock`.
#[test]
fn a_cache_is_built_on_a_file_system_without_locks() {
    let dir = case("train_dataset: grouped.jsonl\nloss_type: listwise_ce\ntrain_group_size: 3\n");
    let plain = train(dir.path(), "plain", &[]);
    let settings = ["--config", "training.yaml", "--set", "cache_dir=cache", "--set"];
    let program = ["--", env!("CARGO_BIN_EXE_reranker"), "train"];
    // After a check that builds it, and by workers that meet there with nothing done before.
    for (output, program) in [("launched", &[][..]), ("met", &program)] {
        let output_dir = format!("output_dir={output}");
        let args = [&["--cpu", "--nproc", "2"], program, &settings, &[&output_dir]].concat();
        let mut command = launcher(dir.path(), &args);
        command.env("LD_PRELOAD", fault_disk::library()).env("FAULT_CALL", "flock");
        let outcome = run(command.env("FAULT_PATH", "/cache/").env("FAULT_ERRNO", "38"));
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        assert!(outcome.stderr.contains("has no locks"), "{}", outcome.stderr);
        let model = fs::read(dir.path().join(output).join("model/model.safetensors")).unwrap();
        assert!(model == plain, "{output}");
        fs::remove_dir_all(dir.path().join("cache")).unwrap();
    }
}

#[test]
fn check_builds_the_cache_says_so_and_measures_every_pair() {
    let dir = case("train_dataset: pointwise.jsonl\ncache_dir: cache\n");
    let check = || run(&mut reranker(dir.path(), &["check", "--config", "training.yaml"]));
    let first = check();
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    let wrote = first.stderr.lines().filter(|line| line.contains("it may be removed at any time"));
    assert_eq!(wrote.count(), 2, "{}", first.stderr);
    assert!(!first.stdout.contains("pairs measured"), "{}", first.stdout);
    let built = caches(&dir.path().join("cache"));
    let second = check();
    assert_eq!((second.stdout, second.stderr.as_str()), (first.stdout, ""));
    assert_eq!(caches(&dir.path().join("cache")), built);
    // Damage is one line, and mended.
    fs::write(built[0].0.join("header.json"), "{}").unwrap();
    let third = check();
    let lines: Vec<_> = third.stderr.lines().collect();
    assert_eq!((third.code, lines.len()), (Some(0), 2), "{}", third.stderr);
    assert!(lines[0].contains("damaged: header.json is not what was written; it is built anew"));
}
