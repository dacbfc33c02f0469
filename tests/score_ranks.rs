//! Scoring a file over any number of ranks: the same lines in the same order, through kills too.
//!
//! `SCORE_PAIRS=100000` scores so many pairs, `SCORE_KILLS` kills so often.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/fault_disk.rs"]
mod fault_disk;
#[path = "common/launch.rs"]
mod launch;

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use launch::{Outcome, copy_model, launcher, reranker, run};
use reranker::Error;
use reranker::comm::Solo;
use reranker::data::InputFormat;
use reranker::score::{CrossEncoder, Earlier, FileJob, ScoreOptions, ScoreStore, score_pairs};
use serde_json::{Value, json};
use tempfile::TempDir;

const WORDS: [&str; 12] = [
    "boil",
    "water",
    "tea",
    "river",
    "bank",
    "loan",
    "rate",
    "train",
    "ticket",
    "garden",
    "茶",
    "火车票",
];

/// A workplace with a tiny model and a file of so many pairs, of lengths that differ.
fn workplace(pairs: usize) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_model("bert_tiny", &dir.path().join("model"));
    write_pairs(&dir.path().join("pairs.jsonl"), pairs);
    dir
}

fn write_pairs(path: &Path, pairs: usize) {
    // A multiplicative generator is random enough for texts.
    let mut state = 666_u64;
    let mut below = |n: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    let mut text = |most: u64| {
        let words = 1 + below(most);
        (0..words).map(|_| WORDS[below(12) as usize]).collect::<Vec<_>>().join(" ")
    };
    let lines: Vec<String> =
        (0..pairs).map(|_| json!({"query": text(5), "content": text(30)}).to_string()).collect();
    fs::write(path, lines.join("\n")).unwrap();
}

/// `reranker score ARGS` by so many ranks.
fn score(dir: &Path, ranks: usize, args: &[&str]) -> Command {
    let args = [&["score", "--device", "cpu", "--model", "model"][..], args].concat();
    if ranks == 1 {
        return reranker(dir, &args);
    }
    let ranks = ranks.to_string();
    let launch = ["--cpu", "--nproc", &ranks, "--", env!("CARGO_BIN_EXE_reranker")];
    launcher(dir, &[&launch[..], &args].concat())
}

fn score_to(dir: &Path, ranks: usize, output: &str) -> Command {
    score(dir, ranks, &["--input", "pairs.jsonl", "--output", output])
}

fn done(outcome: &Outcome) {
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
}

fn read(dir: &Path, name: &str) -> Vec<u8> {
    fs::read(dir.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn lines(text: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(text).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Pairs scored by an earlier start, by what the last one says.
fn kept(outcome: &Outcome) -> usize {
    let (_, rest) = outcome.stderr.split_once("pairs scored, ").unwrap_or(("", "0 "));
    rest.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn any_number_of_ranks_writes_the_same_file() {
    let dir = workplace(1600);
    let dir = dir.path();
    let stream = run(&mut score(dir, 1, &["--input", "pairs.jsonl"]));
    done(&stream);
    assert_eq!(lines(stream.stdout.as_bytes()).len(), 1600);
    // Threads that share an operation, and threads that take whole batches.
    for threads in ["1", "2", "8"] {
        let mut alone = score_to(dir, 1, "scores.jsonl");
        done(&run(alone.env("OMP_NUM_THREADS", threads)));
        for (ours, theirs) in
            lines(&read(dir, "scores.jsonl")).iter().zip(lines(stream.stdout.as_bytes()))
        {
            let [ours, theirs] = [ours, &theirs].map(|line| line["logit"].as_f64().unwrap());
            assert!((ours - theirs).abs() <= 2e-6, "{threads} threads: {ours} and {theirs}");
        }
    }
    for ranks in [1, 2, 3, 5] {
        done(&run(&mut score_to(dir, ranks, "scores.jsonl")));
        assert!(read(dir, "scores.jsonl") == stream.stdout.as_bytes(), "{ranks} ranks");
        assert!(!dir.join("scores.jsonl.partial").exists(), "{ranks} ranks");
    }
}

#[test]
fn records_of_every_form_are_scored_with_their_texts() {
    let dir = workplace(0);
    let dir = dir.path();
    let records = [
        json!({"query": "tea", "hits": [{"content": "water", "label": 1}, {"content": "bank"}]}),
        json!({"query": "loan", "pos": ["rate"], "neg": ["river", ""]}),
        json!({"query": "train", "content": "ticket"}),
    ];
    let pairs = [
        ("tea", "water"),
        ("tea", "bank"),
        ("loan", "rate"),
        ("loan", "river"),
        ("loan", ""),
        ("train", "ticket"),
    ];
    // Enough for several chunks.
    let lines_of = |record: &Value| format!("{record}\n");
    let text = records.iter().map(lines_of).collect::<Vec<_>>().concat().repeat(400);
    let file = fs::File::create(dir.join("pairs.jsonl.gz")).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
    gzip.write_all(text.as_bytes()).unwrap();
    gzip.finish().unwrap();
    let args = ["--input", "pairs.jsonl.gz", "--echo", "--output"];
    for ranks in [1, 2] {
        let output = format!("{ranks}.jsonl");
        done(&run(&mut score(dir, ranks, &[&args[..], &[&output]].concat())));
    }
    assert!(read(dir, "1.jsonl") == read(dir, "2.jsonl"));
    let scored = lines(&read(dir, "1.jsonl"));
    assert_eq!(scored.len(), 400 * pairs.len());
    for (index, (line, (query, content))) in scored.iter().zip(pairs.iter().cycle()).enumerate() {
        assert_eq!(line["index"], index);
        assert_eq!((&line["query"], &line["content"]), (&json!(query), &json!(content)));
        let first = scored[index % pairs.len()]["logit"].as_f64().unwrap();
        assert!((line["logit"].as_f64().unwrap() - first).abs() <= 1e-6, "line {index}");
    }
}

/// A scoring job whose logs hold so many bytes more than before.
fn begun(dir: &Path, ranks: usize, more: u64) -> Child {
    let before = log_bytes(dir);
    let mut command = score_to(dir, ranks, "scores.jsonl");
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let limit = Instant::now() + Duration::from_secs(120);
    while log_bytes(dir) < before + more {
        assert!(Instant::now() < limit, "no scores");
        assert!(child.try_wait().unwrap().is_none(), "it was done before it was killed");
        std::thread::sleep(Duration::from_millis(1));
    }
    child
}

/// A scoring job that is killed, with all its workers, when its logs hold so many bytes more.
fn kill_after(dir: &Path, ranks: usize, more: u64, whole: bool) {
    let mut child = begun(dir, ranks, more);
    if whole {
        child.kill().unwrap();
    } else {
        kill_a_worker(&child);
    }
    assert!(!child.wait().unwrap().success());
    assert!(!dir.join("scores.jsonl").exists(), "half an output");
}

/// SIGKILL for one of the launcher's workers.
fn kill_a_worker(launcher: &Child) {
    let id = launcher.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    let is_worker = |pid: &&str| {
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        command.split('\0').nth(1) == Some("score")
    };
    let worker = children.split_whitespace().rfind(is_worker).unwrap();
    send("KILL", worker);
}

fn send(signal: &str, pid: &str) {
    let sent = Command::new("kill").args([&format!("-{signal}"), pid]).status().unwrap();
    assert!(sent.success());
}

fn log_bytes(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir.join("scores.jsonl.partial")) else { return 0 };
    let is_log = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "scores");
    let logs = entries.map(|entry| entry.unwrap().path()).filter(is_log);
    logs.map(|path| path.metadata().map_or(0, |metadata| metadata.len())).sum()
}

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

#[test]
fn a_killed_job_goes_on_and_ends_with_the_same_file() {
    let (pairs, kills) = (setting("SCORE_PAIRS", 12_000), setting("SCORE_KILLS", 3));
    let dir = workplace(pairs);
    let dir = dir.path();
    done(&run(&mut score_to(dir, 1, "one.jsonl")));
    let expected = read(dir, "one.jsonl");
    assert_eq!(lines(&expected).len(), pairs);

    let each = pairs as u64 * 4 / (kills as u64 + 2);
    for kill in 0..kills {
        // The launcher with all workers, or one worker only; on two ranks and on three.
        kill_after(dir, 2 + kill % 2, each, kill % 2 == 0);
    }
    // What a kill in the middle of a write leaves.
    let log = dir.join("scores.jsonl.partial/rank-0.scores");
    let mut torn = fs::OpenOptions::new().append(true).open(&log).unwrap();
    torn.write_all(&[7; 23]).unwrap();
    let outcome = run(&mut score_to(dir, 2, "scores.jsonl"));
    done(&outcome);
    let kept = kept(&outcome);
    println!("{pairs} pairs, {kills} kills, {kept} pairs kept: {}", outcome.stderr.trim());
    assert!(kept >= pairs * kills / (kills + 2) * 9 / 10 && kept < pairs, "{}", outcome.stderr);
    assert!(read(dir, "scores.jsonl") == expected, "the lines differ from those of one rank");
    assert!(!dir.join("scores.jsonl.partial").exists());
}

#[test]
fn a_job_that_makes_room_keeps_its_scores() {
    let dir = workplace(12_000);
    let dir = dir.path();
    for ranks in [2, 1] {
        let job = begun(dir, ranks, 8000);
        send("USR1", &job.id().to_string());
        let ended = job.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(41), "{said}");
        let note = "note: asked to make room; what is scored is kept, start again to go on";
        assert!(said.contains(note), "{said}");
        assert!(!dir.join("scores.jsonl").exists(), "half an output");
    }
    let outcome = run(&mut score_to(dir, 2, "scores.jsonl"));
    done(&outcome);
    assert!(kept(&outcome) >= 4000, "{}", outcome.stderr);
    let stream = run(&mut score(dir, 1, &["--input", "pairs.jsonl"]));
    assert!(read(dir, "scores.jsonl") == stream.stdout.as_bytes());
}

#[test]
fn scores_of_another_job_are_not_taken_and_an_output_stays_until_the_next_is_whole() {
    let dir = workplace(6000);
    let dir = dir.path();
    kill_after(dir, 2, 8000, true);
    fs::write(dir.join("scores.jsonl"), "earlier\n").unwrap();
    write_pairs(&dir.join("pairs.jsonl"), 1200);
    let mut bad = fs::OpenOptions::new().append(true).open(dir.join("pairs.jsonl")).unwrap();
    bad.write_all(b"\n{\"query\": \"tea\"}\n").unwrap();
    let outcome = run(&mut score_to(dir, 1, "scores.jsonl"));
    assert_eq!(outcome.code, Some(2));
    let message = "error: pairs.jsonl:1201: no \"content\" (keys found: \"query\"), expected a string \
                   there\n";
    assert_eq!(outcome.stderr, message);
    assert_eq!(read(dir, "scores.jsonl"), b"earlier\n");

    write_pairs(&dir.join("pairs.jsonl"), 1200);
    let outcome = run(&mut score_to(dir, 2, "scores.jsonl"));
    done(&outcome);
    let note = "note: scores.jsonl.partial held scores of another job (input differs), so all is \
                scored anew";
    assert!(outcome.stderr.contains(note), "{}", outcome.stderr);
    assert_eq!(kept(&outcome), 0);
    assert_eq!(lines(&read(dir, "scores.jsonl")).len(), 1200);
}

/// As on NFS, where a file that a process has open stays in its directory.
#[test]
fn scores_are_published_and_gone_where_open_files_cannot_be_removed() {
    let dir = workplace(1200);
    let dir = dir.path();
    for ranks in [1, 2] {
        let mut command = score_to(dir, ranks, "scores.jsonl");
        command.env("LD_PRELOAD", fault_disk::library()).env("FAULT_KEEPS_OPEN", "1");
        let outcome = run(&mut command);
        done(&outcome);
        assert!(outcome.stderr.contains("1200 pairs scored"), "{}", outcome.stderr);
        assert_eq!(lines(&read(dir, "scores.jsonl")).len(), 1200);
        assert!(!dir.join("scores.jsonl.partial").exists());
    }
}

/// As `cp -p`, `rsync -a` and `tar` leave it.
#[test]
fn another_input_of_the_same_size_and_time_is_another_job() {
    let dir = workplace(0);
    let input = dir.path().join("pairs.jsonl");
    let job = FileJob {
        input: input.clone(),
        format: InputFormat::Tsv,
        output: dir.path().join("scores.jsonl"),
        echo: false,
    };
    let model = CrossEncoder::from_pretrained(dir.path().join("model")).unwrap();
    let time = std::time::SystemTime::UNIX_EPOCH;
    let earlier = |text: &str| {
        fs::write(&input, text).unwrap();
        fs::File::options().write(true).open(&input).unwrap().set_modified(time).unwrap();
        let checked = job.check(&Solo).unwrap();
        let options = ScoreOptions::default();
        let (mut store, earlier) = job.open(&model, checked, &options, &Solo).unwrap();
        store.put(0, &[0.5]).unwrap();
        earlier
    };
    assert_eq!(earlier("tea\twater\n"), Earlier::Nothing);
    assert_eq!(earlier("tea\twater\n"), Earlier::Scores(1));
    assert_eq!(earlier("tea\ttaste\n"), Earlier::OtherJob(vec!["input".to_owned()]));
}

#[test]
fn what_several_workers_cannot_share_is_refused() {
    let dir = workplace(3);
    let dir = dir.path();
    for args in [&["--input", "pairs.jsonl"][..], &["--output", "scores.jsonl"]] {
        let outcome = run(&mut score(dir, 2, args));
        assert_eq!(outcome.code, Some(2));
        let message = "error: 2 workers share a file of pairs and write one file of scores: give \
                       both --input FILE and --output FILE";
        assert!(outcome.stderr.contains(message), "{}", outcome.stderr);
    }
    let bad = r#"{"query": "tea", "content": 3}"#;
    fs::write(dir.join("pairs.jsonl"), format!("\n{bad}\n")).unwrap();
    let outcome = run(&mut score_to(dir, 2, "scores.jsonl"));
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(
        outcome.stderr.contains("error: pairs.jsonl:2: \"content\" is a number"),
        "{outcome:?}"
    );
    assert!(!dir.join("scores.jsonl").exists());
}

/// The library's own way, as distillation uses it: pairs of any iterator, in memory or not.
#[test]
fn pairs_of_an_iterator_are_scored_once_and_come_back_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let model = CrossEncoder::from_pretrained(
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bert_tiny"),
    )
    .unwrap();
    let pairs: Vec<(String, String)> = (0..1300)
        .map(|i| (WORDS[i % 12].to_owned(), WORDS[i * 7 % 11].repeat(1 + i % 3)))
        .collect();
    let options = ScoreOptions { normalize: false, ..ScoreOptions::default() };
    let expected = model.compute_score(&pairs, &options).unwrap();
    let identity = json!({"model": model.identity().unwrap()});
    let score = |pairs: Vec<Result<(String, String), Error>>| {
        let (mut store, earlier) = ScoreStore::open(dir.path(), &identity, &Solo).unwrap();
        let mut new = 0;
        let chunks =
            score_pairs(&model, &mut store, pairs.into_iter(), &options, |pairs| new += pairs);
        chunks.map(|chunks| {
            store.wait(chunks).unwrap();
            let scores: Vec<_> = store.scores(chunks).map(|scores| scores.unwrap()).collect();
            (earlier, new, scores.concat())
        })
    };
    let good = |pairs: &[(String, String)]| pairs.iter().cloned().map(Ok).collect::<Vec<_>>();
    let mut broken = good(&pairs[..1030]);
    broken.push(Err(Error::Usage("line 1031".into())));
    assert_eq!(score(broken).unwrap_err().to_string(), "line 1031");
    let (earlier, new, scores) = score(good(&pairs)).unwrap();
    assert_eq!((earlier, new), (Earlier::Scores(1024), 1300 - 1024));
    assert_eq!(scores.len(), expected.len());
    for (score, expected) in scores.iter().zip(&expected) {
        assert!((score - expected).abs() <= 1e-6, "{score} is not {expected}");
    }
}
