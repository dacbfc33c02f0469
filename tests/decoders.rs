//! Decoders through the whole program: training on several ranks, what is saved, scoring, prompts of
//! language models, and what is refused. `tests/golden_models.rs` holds their mathematics.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::Path;
use std::process::Command;

use common::training::Bench;
use common::{Golden, floats, golden_dir, relative, worst};
use reranker::score::{LlmDecoder, ScoreOptions};
use serde_json::Value;
use tch::{Device, Tensor};

const LOGITS: ScoreOptions = ScoreOptions { batch_size: 4, max_len: None, normalize: false };

/// A folder to train in, with the golden decoder beside the encoder.
fn bench(case: &str) -> Bench {
    let bench = Bench::new(0.0);
    let dir = bench.root.path().join("decoder");
    std::fs::create_dir(&dir).unwrap();
    for entry in std::fs::read_dir(golden_dir(case)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    bench
}

const DECODER: [&str; 5] = [
    "model_name_or_path=decoder",
    "model_type=llm_decoder",
    "query_format=\"q: {}\"",
    "seq=\" : \"",
    "special_token=\"[SEP]\"",
];

fn weights(run: &Path) -> Vec<(String, Tensor)> {
    let mut all = Tensor::read_safetensors(run.join("model/model.safetensors")).unwrap();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

#[test]
fn two_ranks_take_the_steps_of_one() {
    let bench = bench("qwen2_tiny");
    // The learning rate of a new head would hide differences of the trunk.
    let settings = [&DECODER[..], &["special_lr_groups=[]", "epochs=1"]].concat();
    let reference = weights(&bench.train("one", 1, &[&settings[..], &["batch_size=8"]].concat()));
    for strategy in ["ddp", "zero3"] {
        let two = [&settings[..], &["batch_size=4"]].concat();
        let mut command = bench.command(strategy, 2, &two);
        if strategy != "ddp" {
            command.args(["--parallel", &format!("{strategy}.yaml")]);
            command.args(["--set", "mixed_precision=no", "--set", "gradient_accumulation_steps=2"]);
        }
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{strategy}: {stderr}");
        let ours = weights(&bench.root.path().join(strategy));
        assert_eq!(ours.len(), reference.len());
        for ((name, ours), (_, theirs)) in ours.iter().zip(&reference) {
            let difference = relative(&floats(ours), &floats(theirs));
            assert!(difference <= 1e-4, "{strategy}: {name} differs by {difference}");
        }
    }
}

#[test]
fn a_saved_decoder_needs_no_options() {
    let bench = bench("qwen2_nohead");
    let run = bench.train("run", 2, &DECODER);
    let config: Value =
        serde_json::from_slice(&std::fs::read(run.join("model/config.json")).unwrap()).unwrap();
    assert_eq!(config["architectures"], serde_json::json!(["Qwen2ForSequenceClassification"]));
    assert_eq!(config["pad_token_id"], 0);
    let names: Vec<String> = weights(&run).into_iter().map(|(name, _)| name).collect();
    assert!(names.contains(&"score.weight".into()) && !names.contains(&"lm_head.weight".into()));

    let model = LlmDecoder::from_pretrained(run.join("model")).unwrap();
    assert!(model.initialised().is_empty());
    let pairs = [("river bank", "the river"), ("river bank", ""), ("cat", "the dog is old")];
    let together = model.compute_score(&pairs, &LOGITS).unwrap();
    for (pair, score) in pairs.iter().zip(&together) {
        let alone = model.compute_score(&[*pair], &LOGITS).unwrap()[0];
        assert!((alone - score).abs() <= 1e-5, "{pair:?}: {alone} alone, {score} together");
    }
    // Without the texts around the pair the scores are others.
    std::fs::remove_file(run.join("model/reranker.json")).unwrap();
    let bare = LlmDecoder::from_pretrained(run.join("model")).unwrap();
    assert_ne!(bare.compute_score(&pairs[..1], &LOGITS).unwrap()[0], together[0]);
}

#[test]
fn a_model_of_the_other_kind_is_refused() {
    let bench = bench("qwen2_tiny");
    let refused = |settings: &[&str], expected: &str| {
        let output = bench.command("run", 1, settings).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    };
    refused(
        &["model_name_or_path=decoder"],
        "bert_encoder does not fit decoder, whose config.json says qwen2; use llm_decoder",
    );
    refused(
        &["model_type=llm_decoder"],
        "llm_decoder does not fit base, whose config.json says bert; use bert_encoder",
    );
}

#[test]
fn prompts_give_the_logits_of_the_language_model() {
    for (case, name) in [("qwen3_prompt", "qwen3-reranker"), ("gemma_prompt", "bge-reranker-gemma")]
    {
        let golden = Golden::load(case);
        let pairs: Vec<(&str, &str)> = golden.info["pairs"]
            .as_array()
            .unwrap()
            .iter()
            .map(|pair| (pair["query"].as_str().unwrap(), pair["content"].as_str().unwrap()))
            .collect();
        let max_len = golden.info["max_len"].as_u64().map(|tokens| tokens as usize);
        let model = LlmDecoder::from_pretrained(&golden.dir).unwrap();
        assert_eq!(model.assumed_prompt().map(|prompt| prompt.name), Some(name));
        let logits = model.compute_score(&pairs, &ScoreOptions { max_len, ..LOGITS }).unwrap();
        let logits: Vec<f64> = logits.into_iter().map(f64::from).collect();
        let difference = worst(&logits, &golden.floats("logits"));
        assert!(difference <= 1e-5, "{case}: logits differ by {difference}");

        let asked = LlmDecoder::with_prompt(&golden.dir, Device::Cpu, Some(name)).unwrap();
        assert!(asked.assumed_prompt().is_none(), "{case}: it was asked for");
    }
}

#[test]
fn a_prompt_that_the_model_carries_need_not_be_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden_dir("qwen3_prompt")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let sidecar = serde_json::json!({
        "format_version": 1, "model_type": "llm_decoder", "query_format": "{}",
        "document_format": "{}", "seq": "", "special_token": "", "prompt": "qwen3-reranker",
        "max_len": 40, "min_label": 0.0, "max_label": 1.0, "base_model": "", "run": {},
        "metrics": null,
    });
    std::fs::write(dir.path().join("reranker.json"), sidecar.to_string()).unwrap();
    let model = LlmDecoder::from_pretrained(dir.path()).unwrap();
    assert_eq!((model.assumed_prompt(), model.max_len()), (None, 40));
}

#[test]
fn a_language_model_is_not_guessed_at() {
    let refused = |case: &str, prompt: Option<&str>, expected: &str| {
        let error = LlmDecoder::with_prompt(golden_dir(case), Device::Cpu, prompt).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };
    refused("qwen2_nohead", None, "pass --prompt qwen3-reranker or --prompt bge-reranker-gemma");
    refused("qwen2_nohead", Some("yes/no"), "--prompt \"yes/no\" is not known");
    refused("qwen2_nohead", Some("bge-reranker-gemma"), "the vocabulary has no token \"<bos>\"");
    refused("qwen2_tiny", Some("qwen3-reranker"), "is no such model");
}

/// MKL may take a kernel of half the accuracy for the share of one thread, where several threads are
/// the first to call one of its functions (`runtime::settle_vector_functions`). In a process in twenty
/// it did, on two cores of a Xeon.
#[test]
fn every_process_gives_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("pairs.jsonl");
    let pair = |i: usize| {
        let document = "boil the water and heat the cup ".repeat(8);
        serde_json::json!({"query": format!("tea {i}"), "content": document}).to_string() + "\n"
    };
    std::fs::write(&input, (0..64).map(pair).collect::<String>()).unwrap();
    let score = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_reranker"));
        command.args(["score", "--device", "cpu", "--model"]).arg(golden_dir("qwen2_tiny"));
        command.arg("--input").arg(&input).env("OMP_NUM_THREADS", "2");
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        output.stdout
    };
    let first = score();
    assert_eq!(first.split(|&byte| byte == b'\n').count(), 64 + 1, "a line each");
    for start in 1..60 {
        assert!(score() == first, "start {start} gives other scores");
    }
}
