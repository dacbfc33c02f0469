//! What `reranker check` predicts and points out.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/launch.rs"]
mod launch;

use std::fs;

use launch::{copy_model, output_of, reranker};
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
    assert_eq!(line(&text, "this does not fit"), None);

    let huge = ["--nproc", "2", "--device", "cpu", "--set", "batch_size=1000000000"];
    let text = check(&dir, &huge);
    let message = line(&text, "this does not fit: this machine has to hold ").unwrap();
    let end = "lower batch_size or max_len, set gradient_checkpointing: true, or divide more";
    assert!(message.ends_with(end), "{message}");
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
