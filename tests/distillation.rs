//! Distillation through the whole program: teachers of every kind, over two ranks, on data without
//! labels; what is made once is not made again; what cannot work is refused before a launch.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "common/fault_disk.rs"]
mod fault_disk;
#[path = "common/launch.rs"]
mod launch;

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::training::Bench;
use launch::run;
use serde_json::{Value, json};

/// Golden models that can judge, as an encoder, a decoder with a head, and language models that are
/// asked for one token or for two.
const TEACHERS: [(&str, Option<&str>); 4] = [
    ("bert_tiny", None),
    ("qwen2_tiny", None),
    ("qwen3_prompt", Some("qwen3-reranker")),
    ("gemma_prompt", Some("bge-reranker-gemma")),
];

/// The bench's records of single pairs and of lists, with their labels left out.
fn write_unlabelled(bench: &Bench) {
    let mut text = String::new();
    for line in fs::read_to_string(bench.root.path().join("pairs.jsonl")).unwrap().lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        let (query, content) = (&record["query"], &record["content"]);
        writeln!(text, "{}", json!({"query": query, "content": content})).unwrap();
    }
    let hits = json!([{"content": "tea water"}, {"content": "the cup"}]);
    writeln!(text, "{}", json!({"query": "how to tea", "hits": hits})).unwrap();
    writeln!(text, "{}", json!({"query": "the bank", "pos": ["loan bank"], "neg": ["leaf"]}))
        .unwrap();
    fs::write(bench.root.path().join("unlabelled.jsonl"), text).unwrap();
}

fn bench() -> Bench {
    let bench = Bench::new(0.0);
    for (teacher, _) in TEACHERS {
        launch::copy_model(teacher, &bench.root.path().join(teacher));
    }
    write_unlabelled(&bench);
    bench
}

/// The command that distils `teacher` with two workers into `name`.
fn command(bench: &Bench, name: &str, teacher: &str, more: &[&str]) -> Command {
    let teacher = format!("teacher.model_name_or_path={teacher}");
    let settings = ["train_dataset=unlabelled.jsonl", "loss_type=pointwise_mse", &teacher];
    let mut command = bench.command(name, 2, &[&settings[..], more].concat());
    command.env("OMP_NUM_THREADS", "1");
    command
}

/// The command that only scores what [`command`] would train on.
fn scores_only(bench: &Bench, name: &str, teacher: &str, more: &[&str]) -> Command {
    let mut only = Command::new(env!("CARGO_BIN_EXE_reranker").replace("reranker", "rr-launch"));
    only.current_dir(bench.root.path()).args(["--cpu", "--nproc", "2", "--"]);
    only.arg(env!("CARGO_BIN_EXE_reranker")).args(["distill", "--scores-only"]);
    let training = command(bench, name, teacher, more);
    only.args(training.get_args().skip_while(|&word| word != "--config"));
    only
}

fn succeed(command: &mut Command) -> String {
    let outcome = run(command);
    assert_eq!(outcome.code, Some(0), "{command:?}: {}", outcome.stderr);
    outcome.stderr
}

fn scores(dir: &Path) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("teacher/train.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What `reranker score` says of the same pairs.
fn scored_alone(bench: &Bench, teacher: &str, prompt: Option<&str>) -> Vec<Value> {
    let output = PathBuf::from(format!("{teacher}.jsonl"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_reranker"));
    command.current_dir(bench.root.path()).args(["score", "--echo", "--model", teacher]);
    command.args(["--input", "unlabelled.jsonl", "--output"]).arg(&output);
    command.args(prompt.map(|name| format!("--prompt={name}")));
    succeed(&mut command);
    let text = fs::read_to_string(bench.root.path().join(output)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn teachers_of_every_kind_hand_over_their_scores() {
    let bench = bench();
    for (teacher, prompt) in TEACHERS {
        let prompt_setting = prompt.map(|name| format!("teacher.prompt={name}"));
        let more: Vec<&str> = prompt_setting.as_deref().into_iter().collect();
        let said = succeed(&mut command(&bench, &format!("by-{teacher}"), teacher, &more));
        assert!(said.contains(&format!("{teacher} scored 57 pairs")), "{said}");
        let dir = bench.root.path().join(format!("by-{teacher}"));
        let labels = scores(&dir);
        assert_eq!(labels, scored_alone(&bench, teacher, prompt), "{teacher}");
        assert_eq!(labels.len(), 57, "53 pairs, and two of each list");
        let card = fs::read_to_string(dir.join("model/reranker.json")).unwrap();
        let card: Value = serde_json::from_str(&card).unwrap();
        assert_eq!(card["run"]["data"]["teacher"]["model_name_or_path"], teacher);
    }
}

/// As on NFS, where a file that a process has open stays in its directory.
#[test]
fn what_cannot_be_removed_while_it_is_open_does_not_end_a_distillation() {
    let bench = bench();
    let mut command = command(&bench, "run", "bert_tiny", &[]);
    succeed(command.env("LD_PRELOAD", fault_disk::library()).env("FAULT_KEEPS_OPEN", "1"));
    assert!(bench.root.path().join("run/model").exists());
    assert!(!bench.root.path().join("run/teacher/train.jsonl.partial").exists());
}

#[test]
fn scores_are_made_once() {
    let bench = bench();
    let settings = ["save_steps=2"];
    let whole = bench.root.path().join("whole");
    succeed(&mut command(&bench, "whole", "bert_tiny", &settings));
    // Scores alone, then a training that is killed, then the rest.
    let said = succeed(&mut scores_only(&bench, "run", "bert_tiny", &settings));
    assert!(said.contains("bert_tiny scored 57 pairs"), "{said}");
    let run_dir = bench.root.path().join("run");
    assert!(!run_dir.join("model").exists());
    let mut killed = command(&bench, "run", "bert_tiny", &settings);
    let outcome = run(killed.env("RR_FAIL_POINT", "before_states:2@0"));
    assert_eq!(outcome.code, Some(137), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("the scores of bert_tiny are in"), "{}", outcome.stderr);
    // The same teacher in another place.
    launch::copy_model("bert_tiny", &bench.root.path().join("moved"));
    let mut moved = command(&bench, "run", "moved", &settings);
    let outcome = run(moved.env("RR_FAIL_POINT", "before_states:1@0"));
    assert_eq!(outcome.code, Some(137), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("going on from run/checkpoints/step-2"), "{}", outcome.stderr);
    let said = succeed(&mut command(&bench, "run", "bert_tiny", &settings));
    assert!(said.contains("going on from run/checkpoints/step-2"), "{said}");
    let model = |dir: &Path| fs::read(dir.join("model/model.safetensors")).unwrap();
    assert!(model(&run_dir) == model(&whole), "other weights");
    // Another teacher is another run, and so is other data.
    let outcome = run(&mut command(&bench, "run", "qwen2_tiny", &["resume=auto"]));
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
}

/// As `cp -p`, `rsync -a` and `tar` leave it.
#[test]
fn other_data_of_the_same_size_and_time_is_scored_anew() {
    let bench = bench();
    let data = bench.root.path().join("unlabelled.jsonl");
    for (content, texts) in [("water", "first"), ("taste", "other")] {
        fs::write(&data, format!("{{\"query\": \"tea\", \"content\": \"{content}\"}}\n")).unwrap();
        let file = fs::File::options().write(true).open(&data).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        let said = succeed(&mut scores_only(&bench, "run", "bert_tiny", &[]));
        assert!(said.contains("bert_tiny scored 1 pairs"), "{texts}: {said}");
        let scored = scores(&bench.root.path().join("run"));
        assert_eq!(scored[0]["content"], content, "{texts}");
    }
}

/// As a job does that takes data and models to a disk of its own at each start.
#[test]
fn files_that_were_copied_anew_are_no_others() {
    let bench = bench();
    let path = |name: &str| bench.root.path().join(name);
    succeed(&mut scores_only(&bench, "run", "bert_tiny", &[]));
    let before = fs::metadata(path("run/teacher/train.jsonl")).unwrap();
    fs::copy(path("unlabelled.jsonl"), path("copy")).unwrap();
    fs::rename(path("copy"), path("unlabelled.jsonl")).unwrap();
    fs::rename(path("bert_tiny"), path("old")).unwrap();
    launch::copy_model("bert_tiny", &path("bert_tiny"));
    let said = succeed(&mut scores_only(&bench, "run", "bert_tiny", &[]));
    assert!(said.contains("the scores of bert_tiny are in"), "{said}");
    assert!(!said.contains("bert_tiny scores"), "{said}");
    let after = fs::metadata(path("run/teacher/train.jsonl")).unwrap();
    assert_eq!(before.ino(), after.ino(), "they were written again");
    // One byte of the teacher's, and it is another.
    let config = fs::read_to_string(path("bert_tiny/config.json")).unwrap();
    fs::write(path("bert_tiny/config.json"), format!("{config}\n")).unwrap();
    let said = succeed(&mut scores_only(&bench, "run", "bert_tiny", &[]));
    assert!(said.contains("bert_tiny scored 57 pairs"), "{said}");
}

/// Bytes of the scores that a teacher at work has in the directory of a run.
fn bytes_scored(run: &Path) -> u64 {
    let Ok(files) = fs::read_dir(run.join("teacher/train.jsonl.partial")) else { return 0 };
    let logs = files
        .filter_map(Result::ok)
        .filter(|file| file.path().extension().is_some_and(|extension| extension == "scores"));
    logs.map(|log| log.metadata().map_or(0, |metadata| metadata.len())).sum()
}

#[test]
fn a_teacher_that_is_killed_goes_on() {
    let bench = bench();
    // Every query with so many documents that there is time to kill.
    let path = bench.root.path().join("unlabelled.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.repeat(60)).unwrap();
    let teacher = ("qwen3_prompt", "teacher.prompt=qwen3-reranker");
    succeed(&mut scores_only(&bench, "whole", teacher.0, &[teacher.1]));
    let mut job = scores_only(&bench, "run", teacher.0, &[teacher.1]);
    let mut job = job.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let run_dir = bench.root.path().join("run");
    let limit = Instant::now() + Duration::from_secs(120);
    while bytes_scored(&run_dir) < 4_000 {
        assert!(job.try_wait().unwrap().is_none(), "it was done before it was killed");
        assert!(Instant::now() < limit, "no scores");
        std::thread::sleep(Duration::from_millis(1));
    }
    job.kill().unwrap();
    job.wait().unwrap();
    assert!(!run_dir.join("teacher/train.jsonl").exists(), "half of the scores");
    let said = succeed(&mut scores_only(&bench, "run", teacher.0, &[teacher.1]));
    assert!(said.contains("qwen3_prompt goes on scoring: "), "{said}");
    assert!(said.contains("qwen3_prompt scored 3420 pairs"), "{said}");
    let [whole, killed] = ["whole", "run"].map(|name| scores(&bench.root.path().join(name)));
    assert_eq!(killed.len(), 57 * 60);
    assert!(whole == killed, "other scores");
}

#[test]
fn an_adapter_with_another_base_is_another_teacher() {
    let bench = bench();
    succeed(&mut bench.command("tuned", 1, &["lora.r=2", "epochs=1"]));
    let teacher = "tuned/model";
    assert!(bench.root.path().join(teacher).join("adapter_config.json").exists());
    let scoring = || succeed(&mut scores_only(&bench, "run", teacher, &[]));
    let is_scored = |said: &str| said.contains(&format!("{teacher} scored 57 pairs"));
    assert!(is_scored(&scoring()));
    let again = scoring();
    assert!(again.contains("the scores of tuned/model are in") && !is_scored(&again), "{again}");
    let base = bench.root.path().join("base/model.safetensors");
    let mut bytes = fs::read(&base).unwrap();
    // The last bit of a weight.
    let weight = bytes.len() - 4;
    bytes[weight] ^= 1;
    fs::write(&base, bytes).unwrap();
    let changed = scoring();
    assert!(is_scored(&changed), "{changed}");
}

#[test]
fn labels_are_neither_read_nor_needed() {
    let bench = bench();
    succeed(&mut command(&bench, "without", "bert_tiny", &["train_dataset=unlabelled.jsonl"]));
    let path = bench.root.path().join("unlabelled.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("{\"content\"", "{\"label\":\"none\",\"content\"")).unwrap();
    succeed(&mut command(&bench, "with", "bert_tiny", &["train_dataset=unlabelled.jsonl"]));
    let [without, with] = ["without", "with"].map(|name| {
        fs::read(bench.root.path().join(name).join("model/model.safetensors")).unwrap()
    });
    assert!(without == with, "labels made a difference");
}

#[test]
fn what_cannot_work_is_refused_before_a_launch() {
    let bench = bench();
    let cases: [(&str, &[&str], &str); 6] = [
        (
            "bert_tiny",
            &["loss_type=listwise_ce"],
            "a teacher scores single pairs; use pointwise_mse",
        ),
        ("bert_tiny", &["train_dataset_type=grouped"], "leave the key out"),
        ("bert_tiny", &["teacher.max_len=100000"], "max_len 100000 is more than the model's"),
        ("bert_tiny", &["teacher.maxlen=8"], "did you mean"),
        ("nowhere/at-all/there", &[], "nowhere/at-all/there"),
        ("qwen3_prompt", &["teacher.prompt=ask-nicely"], "\"ask-nicely\" is not known"),
    ];
    for (number, (teacher, settings, says)) in cases.into_iter().enumerate() {
        let name = format!("refused{number}");
        let outcome = run(&mut command(&bench, &name, teacher, settings));
        assert_eq!(outcome.code, Some(2), "{settings:?}: {}", outcome.stderr);
        assert!(outcome.stderr.contains(says), "{settings:?}: {}", outcome.stderr);
        assert!(!bench.root.path().join(&name).exists(), "{settings:?}");
    }
    let mut without = Command::new(env!("CARGO_BIN_EXE_reranker"));
    without.current_dir(bench.root.path()).args(["distill", "--config", "t.yaml"]);
    let outcome = run(&mut without);
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.contains("t.yaml: no teacher; expected a section teacher"));
}
