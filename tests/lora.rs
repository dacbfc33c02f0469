//! Low-rank adapters: against peft, over every way of dividing the work, on disk.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::ranks::{Case, STRATEGIES, ZERO2, ZERO3, assert_close, train};
use common::training::Bench;
use common::{Golden, floats, golden_dir, named, options, relative, solo, worst};
use reranker::config::{LoraPlan, LossKind, TargetModules};
use reranker::engine::{Engine, EngineOptions, StepOptions};
use reranker::model::weights::WeightFiles;
use reranker::model::{ModelConfig, Pretrained, lora};
use reranker::optim::Schedule;
use reranker::score::{CrossEncoder, ScoreOptions};
use reranker::shard::{Offload, ParameterGroups};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Adapters of peft, and the models that they are for.
const ADAPTERS: [(&str, &str); 2] = [("lora_bert", "bert_tiny"), ("lora_qwen2", "qwen2_tiny")];

/// What peft's names begin with.
const PREFIX: &str = "base_model.model.";

fn read_json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn names(names: &[&str]) -> TargetModules {
    TargetModules::Names(names.iter().map(ToString::to_string).collect())
}

fn plan(target_modules: TargetModules, modules_to_save: &[&str]) -> LoraPlan {
    LoraPlan {
        r: 4,
        alpha: 6.0,
        dropout: 0.0,
        target_modules: Some(target_modules),
        modules_to_save: modules_to_save.iter().map(ToString::to_string).collect(),
    }
}

/// The plan that an `adapter_config.json` of peft is from.
fn plan_of(adapter: &Path) -> LoraPlan {
    let config = read_json(&adapter.join("adapter_config.json"));
    let list = |key: &str| -> Vec<String> { serde_json::from_value(config[key].clone()).unwrap() };
    let heads = ["classifier", "score"];
    LoraPlan {
        r: config["r"].as_u64().unwrap() as usize,
        alpha: config["lora_alpha"].as_f64().unwrap(),
        dropout: config["lora_dropout"].as_f64().unwrap(),
        target_modules: Some(TargetModules::Names(list("target_modules"))),
        modules_to_save: list("modules_to_save")
            .into_iter()
            .filter(|name| !heads.contains(&name.as_str()))
            .collect(),
    }
}

fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

/// The base model of an adapter of peft, with the adapter beside it, ready to go on training.
fn engine(adapter: &str, base: &Golden, lr: f64, recompute: bool) -> Engine {
    let adapter = golden_dir(adapter);
    let mut config = ModelConfig::from_dir(&base.dir).unwrap().without_dropout();
    config.lora = Some(lora::resolve(&plan_of(&adapter), &config).unwrap());
    let mut all = tensors(&base.dir.join("model.safetensors"));
    for (name, values) in tensors(&adapter.join("adapter_model.safetensors")) {
        all.insert(name.strip_prefix(PREFIX).unwrap().to_owned(), values);
    }
    let dir = tempfile::tempdir().unwrap();
    let all: Vec<(String, Tensor)> = all.into_iter().collect();
    Tensor::write_safetensors(&all, dir.path().join("model.safetensors")).unwrap();
    let weights = WeightFiles::open(dir.path()).unwrap();
    let groups = ParameterGroups { lr, weight_decay: 0.01, special: vec![] };
    let options = EngineOptions { recompute, ..EngineOptions::whole(Device::Cpu) };
    let mut engine = Engine::load(&config, &weights, 1, &groups, options).unwrap();
    engine.prepare_training().unwrap();
    engine
}

fn logits(engine: &Engine, base: &Golden) -> Vec<f64> {
    let pairs: Vec<usize> = (0..base.pairs()).collect();
    floats(&engine.score(&base.batch(&pairs).packed, &solo()).unwrap())
}

#[test]
fn logits_and_gradients_equal_peft() {
    for (adapter, base) in ADAPTERS {
        let base = Golden::load(base);
        let golden = tensors(&golden_dir(adapter).join("golden.safetensors"));
        for recompute in [false, true] {
            let mut engine = engine(adapter, &base, 1e-3, recompute);
            let difference = worst(&logits(&engine, &base), &floats(&golden["logits"]));
            assert!(difference <= 1e-5, "{adapter}: logits differ by {difference}");
            let pairs: Vec<usize> = (0..base.pairs()).collect();
            let batches = std::iter::once(Ok(base.batch(&pairs)));
            let options = options(LossKind::PointwiseBce, pairs.len() as f64);
            let report = engine.gradients(batches, options, &solo()).unwrap();
            assert!((report.loss - floats(&golden["loss"])[0]).abs() <= 1e-5, "{adapter}");
            let ours = named(&engine, true);
            for (name, gradient) in &ours {
                let theirs = floats(&golden[&format!("grad.{PREFIX}{name}")]);
                let difference = relative(gradient, &theirs);
                assert!(difference <= 1e-5, "{adapter}: gradient of {name}: {difference}");
            }
            let theirs = golden.keys().filter(|name| name.starts_with("grad.")).count();
            assert_eq!(ours.len(), theirs, "{adapter}: what learns");
        }
    }
}

#[test]
fn twenty_steps_follow_peft() {
    for (adapter, base) in ADAPTERS {
        let base = Golden::load(base);
        let golden = tensors(&golden_dir(adapter).join("golden.safetensors"));
        let curve = &base.info["curves"]["curve"];
        let batches: Vec<Vec<usize>> = serde_json::from_value(curve["batches"].clone()).unwrap();
        let lr = base.info["optimizer"]["lr"].as_f64().unwrap();
        let schedule = Schedule::new(batches.len(), 0.1, 0.0);
        let mut engine = engine(adapter, &base, lr, false);
        let (mut losses, mut norms) = (vec![], vec![]);
        for (step, pairs) in batches.iter().enumerate() {
            let options = StepOptions {
                step,
                lr_factor: schedule.factor(step),
                ..options(LossKind::PointwiseBce, pairs.len() as f64)
            };
            let batch = std::iter::once(Ok(base.batch(pairs)));
            let report = engine.train_step(batch, options, &solo()).unwrap();
            losses.push(report.loss);
            norms.push(report.grad_norm);
        }
        let difference = worst(&losses, &floats(&golden["curve.loss"]));
        assert!(difference <= 1e-4, "{adapter}: losses differ by {difference}");
        let difference = worst(&norms, &floats(&golden["curve.grad_norm"]));
        assert!(difference <= 1e-3, "{adapter}: gradient norms differ by {difference}");
        for (name, values) in named(&engine, false) {
            let difference = relative(&values, &floats(&golden[&format!("final.{PREFIX}{name}")]));
            assert!(difference <= 1e-4, "{adapter}: {name} ends up {difference} away");
        }
    }
}

#[test]
fn an_adapter_of_peft_is_merged_as_it_is_read() {
    for (adapter, base) in ADAPTERS {
        let base = Golden::load(base);
        let golden = tensors(&golden_dir(adapter).join("golden.safetensors"));
        let Pretrained { dir, config, weights, .. } =
            Pretrained::open(golden_dir(adapter).to_str().unwrap()).unwrap();
        // peft keeps no tokenizer: the base model's is taken.
        assert!(dir.ends_with(base.dir.file_name().unwrap()));
        let groups = ParameterGroups { lr: 0.0, weight_decay: 0.0, special: vec![] };
        let options = EngineOptions::whole(Device::Cpu);
        let engine = Engine::load(&config, &weights, 1, &groups, options).unwrap();
        let difference = worst(&logits(&engine, &base), &floats(&golden["logits"]));
        assert!(difference <= 1e-5, "{adapter}: logits differ by {difference}");
    }
}

#[test]
fn every_strategy_takes_the_steps_of_one_rank() {
    for accumulation in [1, 2] {
        let base = Case { lora: true, ..Case::reference(accumulation, Some(0.5)) };
        let reference = &train(base)[0];
        for (_, sharding) in STRATEGIES {
            for ranks in 1..=3 {
                for (recompute, offloaded) in [(false, false), (true, false), (true, true)] {
                    let offload =
                        Offload { states: offloaded, parameters: offloaded && sharding.parameters };
                    let case = Case { sharding, ranks, recompute, offload, ..base };
                    for outcome in &train(case) {
                        assert_close(case, outcome, reference, 1e-5);
                        assert_eq!(outcome.forecast.held, outcome.held, "{case:?}: the forecast");
                    }
                }
            }
        }
    }
}

#[test]
fn hybrid_sharding_takes_the_steps_of_one_rank() {
    let base = Case { lora: true, ..Case::reference(2, Some(0.5)) };
    let reference = &train(base)[0];
    for sharding in [ZERO2, ZERO3] {
        for (ranks, block) in [(2, 1), (4, 2)] {
            let case = Case { sharding, ranks, block: Some(block), recompute: true, ..base };
            for outcome in &train(case) {
                assert_close(case, outcome, reference, 1e-5);
            }
        }
    }
}

#[test]
fn low_precision_stays_near_fp32() {
    let base = Case { lora: true, ..Case::reference(2, Some(0.5)) };
    let reference = &train(base)[0];
    // bf16 keeps 8 bits, fp16 keeps 11; B, which begins as zeros, is all made of such gradients.
    for (kind, tolerance) in [(Kind::BFloat16, 1e-1), (Kind::Half, 1e-2)] {
        for (_, sharding) in STRATEGIES {
            for reduce_fp32 in [false, true] {
                let case = Case { sharding, ranks: 2, kind, reduce_fp32, ..base };
                for outcome in &train(case) {
                    assert_close(case, outcome, reference, tolerance);
                    assert_eq!(outcome.forecast.held, outcome.held, "{case:?}: the forecast");
                }
            }
        }
    }
}

/// Frozen parameters take the bytes of the computing precision, once or divided, and nothing else;
/// those that learn as ever.
#[test]
fn only_what_learns_has_gradients_and_states() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for (name, sharding) in STRATEGIES {
            for ranks in [1, 2] {
                let base = Case { sharding, ranks, kind, ..Case::reference(1, None) };
                let whole = train(base)[0].elements;
                let case = Case { lora: true, ..base };
                for outcome in &train(case) {
                    let (elements, held) = (outcome.elements, outcome.held);
                    assert_eq!(outcome.forecast.held, held, "{case:?}: the forecast");
                    let part = |divided: bool| if divided { ranks } else { 1 };
                    let width = kind.elt_size_in_bytes();
                    let states = if kind == Kind::Float { 8 } else { 12 };
                    assert_eq!(
                        held.gradients,
                        elements * width / part(sharding.gradients),
                        "{name}"
                    );
                    assert_eq!(held.states, elements * states / part(sharding.states), "{name}");
                    assert!(elements * 4 < whole, "{elements} of {whole} elements learn");
                    // Between the two, no more than what adapters add and padding.
                    let all = (whole + elements) * width / part(sharding.parameters);
                    assert!(held.parameters <= all, "{name}: {held:?}");
                }
            }
        }
    }
}

fn error(case: &str, plan: &LoraPlan) -> (&'static str, String) {
    let config = ModelConfig::from_dir(&golden_dir(case)).unwrap();
    let bad = lora::resolve(plan, &config).unwrap_err();
    (bad.key, bad.message)
}

#[test]
fn names_that_fit_nothing_are_refused_with_those_that_do() {
    let known = "dense, key, query, value";
    for (targets, says) in [
        (
            names(&["query", "q_proj"]),
            format!("no module is called \"q_proj\", known are {known}, and all-linear"),
        ),
        (
            names(&["classifier"]),
            format!("classifier is trained whole (the head always is); known are {known}"),
        ),
        (
            names(&["word_embeddings"]),
            format!(
                "bert.embeddings.word_embeddings is no linear layer; known are {known}; other modules may be trained whole, by modules_to_save"
            ),
        ),
        (
            TargetModules::Text("query".into()),
            format!(
                "no linear layer is called \"query\"; a text by itself is a regular expression over whole names (as in peft), a list has the ends of names: [{known}], or all-linear"
            ),
        ),
        (
            TargetModules::Text("a(".into()),
            "\"a(\" is no regular expression known here: error: unclosed group".into(),
        ),
    ] {
        let found = error("bert_tiny", &plan(targets, &[]));
        assert_eq!(found, ("lora.target_modules", says));
    }
    let saved = |case, name| error(case, &plan(TargetModules::Text("all-linear".into()), &[name]));
    let (key, message) = saved("bert_tiny", "decoder");
    assert_eq!(key, "lora.modules_to_save");
    assert!(
        message.starts_with("no module's name ends in \"decoder\", known are LayerNorm, "),
        "{message}"
    );
    let (_, message) = saved("qwen2_tiny", "k_proj");
    assert_eq!(
        message,
        "model.layers.0.self_attn.k_proj is computed together with model.layers.0.self_attn.q_proj; \
         name both, or give model.layers.0.self_attn.k_proj an adapter by target_modules"
    );
}

#[test]
fn modules_are_found_as_peft_finds_them() {
    let resolved = |case: &str, plan: &LoraPlan| {
        lora::resolve(plan, &ModelConfig::from_dir(&golden_dir(case)).unwrap()).unwrap()
    };
    let unsaid = LoraPlan { target_modules: None, ..plan(names(&[]), &[]) };
    for (case, targets, heads) in [
        ("bert_tiny", vec!["query", "value"], vec!["classifier", "pooler"]),
        ("roberta_tiny", vec!["query", "value"], vec!["classifier"]),
        ("modernbert_tiny", vec!["Wqkv"], vec!["classifier", "head"]),
        ("gemma_tiny", vec!["q_proj", "v_proj"], vec!["score"]),
    ] {
        let lora = resolved(case, &unsaid);
        assert_eq!(lora.target_names, names(&targets), "{case}");
        assert_eq!(
            lora.saved_names.iter().map(String::as_str).collect::<Vec<_>>(),
            heads,
            "{case}"
        );
        assert!(lora.targets.iter().all(|name| targets.iter().any(|end| name.ends_with(end))));
    }
    let all = resolved("qwen2_tiny", &plan(TargetModules::Text("all-linear".into()), &[]));
    // Seven products in each of three layers.
    assert_eq!(all.targets.len(), 21);
    let some = resolved("qwen2_tiny", &plan(TargetModules::Text(r".*\.[02]\..*_proj".into()), &[]));
    assert_eq!(some.targets.len(), 14);
}

/// Runs `reranker` with these arguments; returns its standard output.
fn reranker(dir: &Path, args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_reranker"));
    let output = command.current_dir(dir).args(args).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn file_names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut all: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

const SETTINGS: [&str; 4] =
    ["lora.r=4", "lora.dropout=0.1", "lora.target_modules=[query, value, dense]", "lr=1e-2"];

fn trained(bench: &Bench, name: &str, ranks: usize, more: &[&str]) -> PathBuf {
    let settings: Vec<&str> = SETTINGS.iter().chain(more).copied().collect();
    bench.train(name, ranks, &settings)
}

/// The logits that `reranker score` gives.
fn scores(root: &Path, model: &str, input: &str) -> Vec<f64> {
    let text = reranker(root, &["score", "--model", model, "--input", input]);
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.map(|line| line["logit"].as_f64().unwrap()).collect()
}

/// Only the base model's type tells that BERT's class reads its tokenizer, which lowers cases whatever the file
/// says.
#[test]
fn an_adapter_is_scored_with_the_tokenizer_it_was_trained_with() {
    let bench = Bench::new(0.0);
    let root = bench.root.path();
    let mut tokenizer = read_json(&root.join("base/tokenizer.json"));
    tokenizer["normalizer"]["lowercase"] = false.into();
    std::fs::write(root.join("base/tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(root.join("base/tokenizer_config.json"), "{}").unwrap();
    let texts = r#"{"query": "How To", "content": "Bake Bread AT home"}"#;
    std::fs::write(root.join("cased.jsonl"), texts).unwrap();
    let model = trained(&bench, "run", 1, &[]).join("model");
    let settings = model.join("tokenizer_config.json");
    assert_eq!(read_json(&settings), serde_json::json!({"tokenizer_class": "BertTokenizer"}));
    reranker(root, &["convert", "--merge", "run/model", "--output", "merged"]);
    let score = |model: &str| scores(root, model, "cased.jsonl");
    let merged = score("merged");
    assert!(worst(&score("run/model"), &merged) <= 1e-5);
    // As it was saved before.
    std::fs::write(&settings, "{}").unwrap();
    assert!(worst(&score("run/model"), &merged) <= 1e-5);
    std::fs::write(&settings, r#"{"tokenizer_class": "TokenizersBackend"}"#).unwrap();
    assert!(worst(&score("run/model"), &merged) > 1e-3, "the class makes no difference");
}

#[test]
fn a_trained_adapter_is_scored_with_and_merged() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    let model = trained(&bench, "run", 2, &[]).join("model");
    let expected = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "reranker.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(file_names(&model), expected);
    let config = read_json(&model.join("adapter_config.json"));
    assert_eq!(config["base_model_name_or_path"], root.join("base").to_str().unwrap());
    assert_eq!(config["target_modules"], serde_json::json!(["query", "value", "dense"]));
    assert_eq!(config["modules_to_save"], serde_json::json!(["classifier", "pooler"]));
    let saved = tensors(&model.join("adapter_model.safetensors"));
    let base = tensors(&root.join("base/model.safetensors"));
    let key = format!("{PREFIX}classifier.weight");
    assert!(worst(&floats(&saved[&key]), &floats(&base["classifier.weight"])) > 1e-3);
    assert!(saved.keys().all(|name| !name.contains("LayerNorm")), "{:?}", saved.keys());

    reranker(root, &["convert", "--merge", "run/model", "--output", "merged"]);
    let whole = tensors(&root.join("merged/model.safetensors"));
    assert_eq!(whole.keys().collect::<Vec<_>>(), base.keys().collect::<Vec<_>>());
    let score = |model: &str| scores(root, model, "pairs.jsonl");
    let (adapter, merged, before) = (score("run/model"), score("merged"), score("base"));
    assert!(worst(&adapter, &merged) <= 1e-5);
    assert!(worst(&adapter, &before) > 1e-2, "training changed nothing");

    // The scores of the model as it was trained, adapters beside frozen weights.
    let mut config = ModelConfig::from_dir(&root.join("base")).unwrap().without_dropout();
    let plan = plan(names(&["query", "value", "dense"]), &[]);
    config.lora = Some(lora::resolve(&LoraPlan { alpha: 8.0, ..plan }, &config).unwrap());
    let mut all = base;
    all.extend(saved.into_iter().map(|(name, v)| (name[PREFIX.len()..].to_owned(), v)));
    let beside = tempfile::tempdir().unwrap();
    let all: Vec<(String, Tensor)> = all.into_iter().collect();
    Tensor::write_safetensors(&all, beside.path().join("model.safetensors")).unwrap();
    let weights = WeightFiles::open(beside.path()).unwrap();
    let groups = ParameterGroups { lr: 0.0, weight_decay: 0.0, special: vec![] };
    let options = EngineOptions::whole(Device::Cpu);
    let engine = Engine::load(&config, &weights, 1, &groups, options).unwrap();
    let golden = Golden::load("bert_tiny");
    let merged = CrossEncoder::from_pretrained(root.join("merged")).unwrap();
    let pairs: Vec<(String, String)> = golden.info["pairs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| {
            let text = |key: &str| pair[key].as_str().unwrap().to_owned();
            (text("query"), text("content"))
        })
        .collect();
    let max_len = golden.info["max_len"].as_u64().map(|length| length as usize);
    let score = ScoreOptions { normalize: false, max_len, ..ScoreOptions::default() };
    let merged = merged.compute_score(&pairs, &score).unwrap();
    let merged: Vec<f64> = merged.into_iter().map(f64::from).collect();
    let difference = worst(&logits(&engine, &golden), &merged);
    assert!(difference <= 1e-5, "merged and beside differ by {difference}");
}

#[test]
fn a_resumed_run_ends_with_the_same_adapter() {
    let bench = Bench::new(0.1);
    for strategy in ["zero1", "zero3"] {
        let more = ["batch_size=2", "save_steps=2", "gradient_checkpointing=true"];
        let settings: Vec<&str> = SETTINGS.iter().chain(&more).copied().collect();
        let parallel = format!("{strategy}.yaml");
        let command_of = |name: &str, ranks: usize| {
            let mut command = bench.command(name, ranks, &settings);
            command.args(["--parallel", &parallel]).env("OMP_NUM_THREADS", "1");
            command
        };
        let command = |name: &str| command_of(name, 2);
        let (whole, cut) = (format!("{strategy}_whole"), format!("{strategy}_cut"));
        assert!(command(&whole).output().unwrap().status.success(), "{strategy}");
        let killed = command(&cut).env("RR_FAIL_POINT", "before_states:3@0").output().unwrap();
        assert_eq!(killed.status.code(), Some(137), "{strategy}");
        let root = bench.root.path();
        // Four steps were saved; the model of each is an adapter too.
        let step = root.join(&cut).join("checkpoints/step-4");
        assert!(step.join("model/adapter_model.safetensors").exists(), "{strategy}");
        assert!(!step.join("model/model.safetensors").exists(), "{strategy}");
        let states = std::fs::metadata(step.join("rank-00000-of-00002.safetensors")).unwrap().len();
        let base = std::fs::metadata(root.join("base/model.safetensors")).unwrap().len();
        assert!(states < base, "{strategy}: states of {states} bytes, a base of {base}");
        // What is frozen belongs to the run all the same.
        let weights = root.join("base/model.safetensors");
        let good = std::fs::read(&weights).unwrap();
        let mut other = good.clone();
        // In the embeddings, which come first by name and do not learn.
        let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
        other[header + 3000] ^= 0x10;
        std::fs::write(&weights, other).unwrap();
        let refused = command_of(&cut, 1).output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(said.contains("base weights (sum of bits)"), "{strategy}: {said}");
        std::fs::write(&weights, good).unwrap();
        let resumed = command(&cut).output().unwrap();
        let said = String::from_utf8_lossy(&resumed.stderr);
        assert!(resumed.status.success() && said.contains("going on from"), "{strategy}: {said}");
        let read = |run: &str| {
            std::fs::read(root.join(run).join("model/adapter_model.safetensors")).unwrap()
        };
        assert!(read(&whole) == read(&cut), "{strategy}: other weights");
    }
}
