//! What cannot be with adapters is refused in one line that says what to do.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::training::Bench;
use serde_json::Value;

fn reranker(dir: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_reranker"));
    command.current_dir(dir).args(args).env_remove("RUST_LOG").output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The one line of a user error.
fn refusal(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

/// `reranker check` of the bench's configuration with these settings.
fn check(bench: &Bench, settings: &[&str]) -> Output {
    let mut args = vec!["check", "--config", "t.yaml"];
    args.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    reranker(bench.root.path(), &args)
}

#[test]
fn an_empty_section_asks_for_the_defaults() {
    let bench = Bench::new(0.0);
    let path = bench.root.path().join("t.yaml");
    let plain = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{plain}lora: {{}}\n")).unwrap();
    let text = stdout(&check(&bench, &[]));
    let line = "LoRA of rank 8 beside 6 linear layers, and classifier, pooler trained whole: 4161 \
                of 37921 parameters learn (10.97 %)";
    assert!(text.contains(line), "{text}");
    assert!(text.contains("t.yaml:"), "the section's place is shown: {text}");
    std::fs::write(&path, format!("{plain}lora: null\n")).unwrap();
    assert!(!stdout(&check(&bench, &[])).contains("LoRA"));
}

#[test]
fn settings_out_of_range_are_refused() {
    let bench = Bench::new(0.0);
    for (setting, says) in [
        ("lora.r=0", "lora.r: expected an integer of at least 1, found 0"),
        ("lora.alpha=-1", "lora.alpha: expected a number above 0, found -1"),
        ("lora.dropout=1", "lora.dropout: expected a probability below 1, found 1"),
        ("lora.target_modules=[]", "lora.target_modules: expected names of modules, found none"),
        ("lora.rank=4", "lora.rank: unknown key"),
        ("lora=4", "lora: expected a mapping, found the number 4"),
        ("lora.target_modules=[q_proj]", "no module is called \"q_proj\", known are dense, key"),
        ("lora.modules_to_save=[head]", "no module's name ends in \"head\", known are LayerNorm"),
    ] {
        let said = refusal(&check(&bench, &[setting]));
        assert!(said.contains(says), "{setting}: {said}");
        assert!(said.contains("--set"), "{setting}: the place is told: {said}");
    }
}

/// An adapter of the bench's model, trained for an epoch.
fn adapter(bench: &Bench) {
    bench.train("run", 1, &["lora.r=2", "epochs=1", "val_dataset="]);
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let bench = Bench::new(0.0);
    adapter(&bench);
    let root = bench.root.path();
    let merge = |args: &[&str]| refusal(&reranker(root, &[&["convert", "--merge"], args].concat()));
    assert!(merge(&["base", "--output", "new"]).contains("base is no adapter"));
    assert!(merge(&["run/model", "--output", "base"]).contains("base is already there"));
    assert!(merge(&["run/model", "--output", "-"]).contains("--output"));
    let unnamed = reranker(root, &["convert", "--merge", "run/model"]);
    assert_eq!(unnamed.status.code(), Some(2));
    let both = ["convert", "--merge", "run/model", "--output", "new", "--to", "grouped"];
    assert_eq!(reranker(root, &both).status.code(), Some(2));
    assert!(!root.join("new").exists());

    let said = refusal(&check(&bench, &["model_name_or_path=run/model", "lora.r=2"]));
    assert!(said.contains("is an adapter itself; merge it first"), "{said}");
    let text = stdout(&check(&bench, &["model_name_or_path=run/model"]));
    assert!(text.contains("run/model"), "an adapter is trained on from: {text}");
}

#[test]
fn an_adapter_that_does_not_fit_is_refused() {
    let bench = Bench::new(0.0);
    adapter(&bench);
    let root = bench.root.path();
    let score =
        || refusal(&reranker(root, &["score", "--model", "run/model", "--input", "pairs.jsonl"]));
    let config = root.join("run/model/adapter_config.json");
    let good = std::fs::read_to_string(&config).unwrap();
    let with = |key: &str, value: Value| {
        let mut json: Value = serde_json::from_str(&good).unwrap();
        json[key] = value;
        std::fs::write(&config, json.to_string()).unwrap();
    };
    with("base_model_name_or_path", "./gone".into());
    let said = score();
    assert!(said.contains("adapter_config.json: base_model_name_or_path: no directory"), "{said}");
    with("use_dora", true.into());
    assert!(score().contains("use_dora is true, which is not supported"), "{}", score());
    // For a model of other sizes.
    let odd = common::golden_dir("bert_odd");
    with("base_model_name_or_path", odd.to_str().unwrap().into());
    let said = score();
    assert!(said.contains("adapter_model.safetensors: tensor "), "{said}");
    let decoder = common::golden_dir("qwen2_tiny");
    with("base_model_name_or_path", decoder.to_str().unwrap().into());
    let said = score();
    assert!(said.contains("is no adapter of a linear layer of this model"), "{said}");
    std::fs::write(&config, &good).unwrap();
    let weights = root.join("run/model/adapter_model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 4]).unwrap();
    assert!(score().contains("adapter_model.safetensors"), "{}", score());
}
