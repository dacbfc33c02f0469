//! What `reranker check` predicts and points out.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/launch.rs"]
mod launch;

use std::fs;

use launch::{copy_model, launcher, output_of, reranker, run};
use serde_json::Value;
use tempfile::TempDir;

const TRAINING: &str = "model_name_or_path: model
model_type: bert_encoder
train_dataset: train.jsonl
max_len: 32
batch_size: 4
";

const RECORD: &str = r#"{"query": "how to boil water", "content": "heat the water", "label": 1}"#;

fn case(parallel: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy_model("bert_tiny", &dir.path().join("model"));
    fs::write(dir.path().join("training.yaml"), TRAINING).unwrap();
    fs::write(dir.path().join("train.jsonl"), format!("{RECORD}\n{RECORD}\n")).unwrap();
    fs::write(dir.path().join("p.yaml"), parallel).unwrap();
    dir
}

/// What `check` prints.
fn check(dir: &TempDir, args: &[&str]) -> String {
    let fixed = ["check", "--config", "training.yaml", "--parallel", "p.yaml"];
    output_of(&mut reranker(dir.path(), &[&fixed, args].concat()))
}

fn line<'t>(text: &'t str, start: &str) -> Option<&'t str> {
    text.lines().find(|line| line.starts_with(start))
}

const ZERO3: &str = "distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 3}\n";

#[test]
fn memory_is_predicted_and_what_cannot_fit_is_told() {
    let dir = case(ZERO3);
    let text = check(&dir, &["--nproc", "2", "--device", "cpu"]);
    assert!(line(&text, "memory per worker: parameters 0 MB").is_some(), "{text}");
    assert!(!text.contains("this does not fit"), "{text}");

    let huge = ["--nproc", "2", "--device", "cpu", "--set", "batch_size=1000000"];
    let text = check(&dir, &huge);
    let message = line(&text, "warning: this does not fit: this machine has to hold ").unwrap();
    let end = "lower batch_size or max_len, set gradient_checkpointing: true, or divide more";
    assert!(message.ends_with(end), "{message}");
}

#[test]
fn a_machine_holds_its_own_workers_and_no_others() {
    let dir = case("distributed_type: MULTI_CPU\n");
    let needed = |world: &str, local: &str| {
        let mut check = reranker(dir.path(), &["check", "--config", "training.yaml"]);
        check.args(["--parallel", "p.yaml", "--device", "cpu", "--set", "batch_size=1000000"]);
        check.envs([("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", world)]);
        check.envs([("LOCAL_WORLD_SIZE", local), ("MASTER_ADDR", "127.0.0.1")]);
        let text = output_of(check.env("MASTER_PORT", "29500"));
        let start = "warning: this does not fit: this machine has to hold ";
        let rest = line(&text, start).unwrap().strip_prefix(start).unwrap().to_owned();
        rest.split_once(" GB ").unwrap().0.parse::<f64>().unwrap()
    };
    let (one, two) = (needed("4", "2"), needed("4", "4"));
    assert_eq!(one, needed("2", "2"));
    assert!((two / one - 2.0).abs() < 0.01, "{one} and {two}");
}

#[test]
fn under_a_launcher_one_rank_prints_the_plan_for_all() {
    let dir = case(ZERO3);
    let check = [env!("CARGO_BIN_EXE_reranker"), "check", "--config", "training.yaml"];
    let launch = [&["--cpu", "--nproc", "2", "--"][..], &check].concat();
    let text = output_of(&mut launcher(dir.path(), &launch));
    assert_eq!(text.matches("pairs a step over 2 worker(s) on the CPU").count(), 1, "{text}");
}

#[test]
fn a_plan_for_gpus_needs_none() {
    let dir = case("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 2}\n");
    let text = check(&dir, &["--gpus", "8"]);
    assert!(line(&text, "  device").unwrap().contains("cuda"), "{text}");
    assert!(text.contains("32 pairs a step over 8 worker(s)"), "{text}");
    assert!(line(&text, "memory per worker: ").is_some(), "{text}");
}

#[test]
fn a_layer_class_of_another_model_is_a_note() {
    let wrap = |classes: &str| {
        format!(
            "distributed_type: FSDP\nfsdp_config:\n  fsdp_auto_wrap_policy: \
             TRANSFORMER_BASED_WRAP\n  fsdp_transformer_layer_cls_to_wrap: {classes}\n"
        )
    };
    let start = "p.yaml:4: fsdp_config.fsdp_transformer_layer_cls_to_wrap: ";
    let text = check(&case(&wrap("BertLayer")), &[]);
    assert_eq!(line(&text, start), None, "{text}");
    let text = check(&case(&wrap("BertLayer, XLMRobertaLayer")), &[]);
    assert_eq!(
        line(&text, start).unwrap().strip_prefix(start).unwrap(),
        "XLMRobertaLayer is the layer of xlm-roberta models, this is a bert model, whose layer is \
         BertLayer; it makes no difference, since layers are known here"
    );
}

#[test]
fn settings_of_a_deepspeed_file_are_shown_with_their_place() {
    let dir =
        case("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}\n");
    let json = "{\"zero_optimization\": {\"stage\": 1},\n\"bf16\": {\"enabled\": true}}";
    fs::write(dir.path().join("ds.json"), json).unwrap();
    let text = check(&dir, &[]);
    let words = |start| line(&text, start).unwrap().split_whitespace().collect::<Vec<_>>();
    assert_eq!(words("  strategy"), ["strategy", "zero1", "ds.json:1"]);
    assert_eq!(words("  mixed_precision"), ["mixed_precision", "bf16", "ds.json:2"]);
}

/// What `check --json` tells.
fn checked(dir: &TempDir, args: &[&str]) -> Value {
    serde_json::from_str(&check(dir, &[&["--json"], args].concat())).unwrap()
}

#[test]
fn everything_is_told_to_programs_too() {
    let dir = case("distributed_type: NO\n");
    let told = checked(&dir, &["--nproc", "2", "--device", "cpu"]);
    assert_eq!(told["plan"]["data"]["max_len"], 32);
    assert_eq!(told["origins"]["max_len"], "training.yaml:4");
    let preflight = &told["preflight"];
    let steps = &preflight["steps"];
    assert_eq!(
        (&steps["total"], &steps["items"], &steps["unit"]),
        (&2.into(), &8.into(), &"pairs".into())
    );
    assert_eq!(preflight["train"]["load"]["pairs"], 2);
    let bins = preflight["train"]["lengths"]["bins"].as_array().unwrap();
    assert_eq!(bins.iter().map(|count| count.as_u64().unwrap()).sum::<u64>(), 2);
    assert_eq!(preflight["model"]["max_len"], 32);
    assert_eq!(preflight["warnings"].as_array().unwrap().len(), 0, "{preflight}");
}

#[test]
fn histograms_are_bars() {
    let text = check(&case("distributed_type: NO\n"), &[]);
    let bar = "█".repeat(40);
    assert!(text.contains(&format!("\n  label\n      1  2  100.0 %  {bar}\n")), "{text}");
    assert!(line(&text, "model: bert, 0.0 M parameters; max_len 32 of ").is_some(), "{text}");
}

/// A tiny Qwen2 in place of the encoder, its input ending in `ending`.
fn decoder_case(parallel: &str, ending: &str) -> TempDir {
    let dir = case(parallel);
    copy_model("qwen2_tiny", &dir.path().join("decoder"));
    let training = TRAINING
        .replace("path: model", "path: decoder")
        .replace("bert_encoder", &format!("llm_decoder\nseq: \" : \"\n{ending}"));
    fs::write(dir.path().join("training.yaml"), training).unwrap();
    dir
}

#[test]
fn a_template_that_ends_in_padding_is_pointed_out() {
    let config = |dir: &TempDir| -> Value {
        let text = fs::read_to_string(dir.path().join("decoder/config.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    };
    let dir = decoder_case("distributed_type: NO\n", "special_token: \"[SEP]\"");
    assert!(!check(&dir, &[]).contains("padding token"), "another token ends it");
    let dir = decoder_case("distributed_type: NO\n", "special_token: \"[PAD]\"");
    let mut config = config(&dir);
    // [PAD] is the first of the golden vocabulary.
    config["pad_token_id"] = 0.into();
    fs::write(dir.path().join("decoder/config.json"), config.to_string()).unwrap();
    let text = check(&dir, &[]);
    let start = "warning: training.yaml:4: special_token: ends in \"[PAD]\", the padding token: the \
                 score is read there, but transformers reads ";
    assert!(line(&text, start).is_some(), "{text}");
    assert_eq!(
        check(&dir, &["--set", "special_token='[SEP]'"]).matches("padding token").count(),
        0
    );
}

#[test]
fn a_decoder_without_a_padding_token_is_pointed_out() {
    let dir = decoder_case("distributed_type: NO\n", "special_token: \"[SEP]\"");
    let edit = |file: &str, key: &str, value: Value| {
        let path = dir.path().join("decoder").join(file);
        let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        json[key] = value;
        fs::write(path, json.to_string()).unwrap();
    };
    edit("config.json", "pad_token_id", (-1).into());
    assert!(!check(&dir, &[]).contains("padding token"), "the tokenizer names one");
    edit("tokenizer_config.json", "pad_token", Value::Null);
    let start =
        "warning: training.yaml:1: model_name_or_path: the tokenizer has no padding token: ";
    let text = check(&dir, &[]);
    assert!(line(&text, start).is_some(), "{text}");
}

/// The forecast is what the workers count, to the byte, for an encoder and a decoder.
#[test]
fn the_memory_forecast_is_what_a_run_holds() {
    for stage in [0, 2, 3] {
        let parallel =
            format!("distributed_type: DEEPSPEED\ndeepspeed_config: {{zero_stage: {stage}}}\n");
        for (kind, precision) in [("encoder", "no"), ("decoder", "no"), ("decoder", "bf16")] {
            let dir = match kind {
                "encoder" => case(&parallel),
                _ => decoder_case(&parallel, "special_token: \"[SEP]\""),
            };
            let precision = format!("mixed_precision={precision}");
            let set = ["--set", "output_dir=out", "--set", &precision, "--set", "epochs=1"];
            let forecast =
                checked(&dir, &[&["--nproc", "2", "--device", "cpu"][..], &set].concat());
            let fixed =
                ["--cpu", "--nproc", "2", "--config", "training.yaml", "--parallel", "p.yaml"];
            let outcome = run(&mut launcher(dir.path(), &[&fixed[..], &set].concat()));
            assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
            let metrics = fs::read_to_string(dir.path().join("out/runs/metrics.jsonl")).unwrap();
            let last: Value = serde_json::from_str(metrics.lines().next_back().unwrap()).unwrap();
            assert_eq!(
                forecast["preflight"]["memory"]["held"], last["held"],
                "zero_stage {stage}, {kind}, {precision}"
            );
        }
    }
}

#[test]
fn what_would_not_start_is_refused() {
    let dir = case("distributed_type: FSDP\nfsdp_config: {fsdp_sharding_strategy: HYBRID_SHARD}\n");
    let args = ["check", "--config", "training.yaml", "--parallel", "p.yaml", "--nproc", "2"];
    let outcome = run(&mut reranker(dir.path(), &args));
    assert_eq!(outcome.code, Some(2), "{}", outcome.stdout);
    assert!(
        outcome.stderr.contains("hybrid sharding divides inside a machine"),
        "{}",
        outcome.stderr
    );
}

#[test]
fn a_directory_that_a_run_holds_is_refused() {
    let dir = case("distributed_type: NO\n");
    let runs = dir.path().join("out/runs");
    fs::create_dir_all(&runs).unwrap();
    fs::write(runs.join(".lock"), "run 7").unwrap();
    let args = ["check", "--config", "training.yaml", "--set", "output_dir=out"];
    assert_eq!(run(&mut reranker(dir.path(), &args)).code, Some(0), "a lock that nobody holds");
    let lock = fs::File::create(runs.join(".lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    let outcome = run(&mut reranker(dir.path(), &args));
    assert_eq!(outcome.code, Some(2), "{}", outcome.stdout);
    assert!(outcome.stderr.contains("is held by "), "{}", outcome.stderr);
}
