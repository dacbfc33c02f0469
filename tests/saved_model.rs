//! What a training run leaves behind, and scoring with it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "common/launch.rs"]
mod launch;

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use common::Golden;
use launch::{copy_model, output_of, reranker, run, snapshot};
use reranker::checkpoint::{SavedModel, Sidecar, save_model};
use reranker::config::Precision;
use reranker::model::ModelConfig;
use reranker::score::{CrossEncoder, LoadOptions, ScoreOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Queries with a document that answers and one that does not.
const TEXTS: [(&str, &str, &str); 6] = [
    ("how to boil water for tea", "boil the water, heat the cup", "the train station is old"),
    ("river bank", "the river grows in the rain", "tickets are not for the dog"),
    ("loan rate of the bank", "a new loan is 5 in winter", "the garden is full of seeds"),
    ("怎么煮茶", "煮茶的水", "火车票的价格"),
    ("火车票价格", "火车票的价格 in the station", "plant the leaf in the cup"),
    ("when do seeds grow", "seeds grow in the soil in the sun", ""),
];

/// A directory with the tiny model, training and validation data, and a trained model in `out`.
struct Trained {
    dir: TempDir,
}

impl Trained {
    fn new(settings: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy_model("bert_tiny", &dir.path().join("base"));
        // As sentence-transformers writes rerankers whose scores are logits.
        let path = dir.path().join("base/config.json");
        let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        let identity = "torch.nn.modules.linear.Identity";
        config["sentence_transformers"] = json!({"activation_fn": identity, "version": "5.1.0"});
        config["sbert_ce_default_activation_function"] = json!(identity);
        fs::write(path, config.to_string()).unwrap();
        let pointwise = TEXTS.iter().flat_map(|(query, good, bad)| {
            [(good, 2), (bad, 0)]
                .map(|(content, label)| json!({"query": query, "content": content, "label": label}))
        });
        write_lines(&dir.path().join("train.jsonl"), pointwise);
        let grouped = TEXTS.iter().map(|(query, good, bad)| {
            let hits = json!([{"content": bad, "label": 0}, {"content": good, "label": 2}]);
            json!({"query": query, "hits": hits})
        });
        write_lines(&dir.path().join("eval.jsonl"), grouped);
        let yaml = format!(
            "model_name_or_path: base\nmodel_type: bert_encoder\ntrain_dataset: train.jsonl\n\
             val_dataset: eval.jsonl\noutput_dir: out\nmax_len: 40\nmax_label: 2\nbatch_size: 2\n\
             lr: 1e-3\n{settings}\n"
        );
        fs::write(dir.path().join("training.yaml"), yaml).unwrap();
        let trained = Self { dir };
        output_of(&mut reranker(trained.path(), &Self::train()));
        trained
    }

    fn train() -> [&'static str; 5] {
        ["train", "--device", "cpu", "--config", "training.yaml"]
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn model(&self) -> PathBuf {
        self.path().join("out/model")
    }

    fn json(&self, file: &str) -> Value {
        serde_json::from_str(&fs::read_to_string(self.path().join(file)).unwrap()).unwrap()
    }

    /// The logits that `reranker score --model out/model ARGS` prints.
    fn score(&self, args: &[&str]) -> Vec<f32> {
        let args = [&["score", "--model", "out/model"][..], args].concat();
        logits(&output_of(&mut reranker(self.path(), &args)))
    }
}

fn write_lines(path: &Path, lines: impl Iterator<Item = Value>) {
    let lines: Vec<String> = lines.map(|line| line.to_string()).collect();
    fs::write(path, lines.join("\n")).unwrap();
}

fn lines_of(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The logits of `score`'s output, whose lines must be numbered from 0.
fn logits(text: &str) -> Vec<f32> {
    let lines = lines_of(text);
    for (i, line) in lines.iter().enumerate() {
        assert_eq!(line["index"], i);
        let (score, logit) = (line["score"].as_f64().unwrap(), line["logit"].as_f64().unwrap());
        assert!((score - 1.0 / (1.0 + (-logit).exp())).abs() <= 1e-6, "{line}");
    }
    lines.iter().map(|line| line["logit"].as_f64().unwrap() as f32).collect()
}

fn names_in(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| name(entry).into_string().unwrap()).collect();
    names.sort();
    names
}

/// The pairs of the training file, in its order.
fn pairs() -> Vec<(&'static str, &'static str)> {
    TEXTS.iter().flat_map(|&(query, good, bad)| [(query, good), (query, bad)]).collect()
}

fn raw(batch_size: usize) -> ScoreOptions {
    ScoreOptions { batch_size, max_len: None, normalize: false }
}

fn assert_close(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    let largest = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest <= 1e-6, "{what}: logits differ by {largest}");
}

#[test]
fn a_run_leaves_a_model_directory_and_metrics() {
    let trained = Trained::new("epochs: 3");
    assert_eq!(names_in(&trained.path().join("out")), ["model", "runs"]);
    let files = names_in(&trained.model());
    assert_eq!(
        files,
        [
            "config.json",
            "model.safetensors",
            "reranker.json",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let read = |dir: &str| fs::read(trained.path().join(dir).join(file)).unwrap();
        assert!(read("out/model") == read("base"), "{file} is copied byte for byte");
    }

    let (base, saved) = (trained.json("base/config.json"), trained.json("out/model/config.json"));
    assert_eq!(saved["architectures"], json!(["BertForSequenceClassification"]));
    assert_eq!(saved["id2label"], json!({"0": "LABEL_0"}));
    assert_eq!(saved["label2id"], json!({"LABEL_0": 0}));
    // sentence-transformers takes its default for one label then: the sigmoid, as `score`.
    for key in ["sentence_transformers", "sbert_ce_default_activation_function"] {
        assert!(!base[key].is_null() && saved[key].is_null(), "{key}");
    }
    for key in ["model_type", "hidden_size", "num_hidden_layers", "vocab_size", "hidden_act"] {
        assert_eq!(saved[key], base[key], "{key}");
    }
    ModelConfig::from_dir(&trained.model()).unwrap();

    let sidecar = Sidecar::from_dir(&trained.model()).unwrap().unwrap();
    assert_eq!(sidecar.model_type, "bert_encoder");
    assert_eq!((sidecar.query_format.as_str(), sidecar.document_format.as_str()), ("{}", "{}"));
    assert_eq!((sidecar.max_len, sidecar.min_label, sidecar.max_label), (40, 0.0, 2.0));
    assert_eq!(sidecar.base_model, "base");
    let ndcg = sidecar.metrics["ndcg@10"].as_f64().unwrap();
    assert!(ndcg > 0.0 && ndcg <= 1.0, "{}", sidecar.metrics);
    check_metrics(&trained, ndcg);
}

/// 12 pairs, 2 a step, 3 epochs: the last step is the 18th.
fn check_metrics(trained: &Trained, last_ndcg: f64) {
    assert_eq!(names_in(&trained.path().join("out/runs")), ["metrics.jsonl", "report.html"]);
    let text = fs::read_to_string(trained.path().join("out/runs/metrics.jsonl")).unwrap();
    let lines = lines_of(&text);
    let of_type = |kind: &str| lines.iter().filter(|line| line["type"] == kind).collect::<Vec<_>>();
    let (train, validation) = (of_type("train"), of_type("validation"));
    let steps: Vec<u64> = train.iter().map(|line| line["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [10, 18]);
    assert_eq!(train[1]["pairs"], 36);
    assert_eq!(train[1]["left_s"], 0.0);
    for key in ["lr", "grad_norm", "pairs_per_s", "tokens_per_s", "memory_bytes"] {
        assert!(train[0][key].as_f64().is_some_and(|figure| figure > 0.0), "{key}: {}", train[0]);
    }
    assert!(train.iter().all(|line| line["loss"].as_f64().unwrap().is_finite()), "{text}");
    let epochs: Vec<u64> = validation.iter().map(|line| line["epoch"].as_u64().unwrap()).collect();
    assert_eq!(epochs, [1, 2, 3]);
    assert_eq!(validation[2]["step"], 18);
    assert_eq!(validation[2]["ndcg@10"], last_ndcg);
    assert_eq!(train.len() + validation.len() + 1, lines.len(), "{text}");
    let memory = lines.last().unwrap();
    assert_eq!(memory["type"], "memory");
    let held = |kind: &str| memory["held"][kind].as_u64().unwrap();
    assert!(held("parameters") > 0 && held("gradients") == held("parameters"), "{memory}");
    assert_eq!(held("states"), 2 * held("parameters"), "two moments");
    assert_eq!(memory["peak_saving"], held("parameters"), "whole parameters are not copied");
    assert!(memory["peak_process"].as_u64().unwrap() > held("states"), "{memory}");
}

#[test]
fn training_separates_answers_from_the_rest() {
    let trained = Trained::new("epochs: 40\nwarmup_proportion: 0");
    let scores = trained.score(&["--input", "train.jsonl"]);
    let apart = scores.chunks(2).filter(|pair| pair[0] > pair[1] + 0.5).count();
    assert_eq!(apart, TEXTS.len(), "logits of answer and other: {scores:?}");
    let args = ["eval", "--model", "out/model", "--data", "eval.jsonl", "--bm25", "--json"];
    let result = &lines_of(&output_of(&mut reranker(trained.path(), &args)))[0];
    assert_eq!(result["model"]["ndcg@10"], 1.0);
    assert_eq!(result["model"]["mrr@10"], 1.0);
    assert_eq!(result["model"]["queries"], TEXTS.len());
    // Without shared words BM25 keeps the order of the file, in which the answer is second.
    assert!(result["bm25"]["ndcg@10"].as_f64().unwrap() < 1.0, "{result}");
    let table = output_of(&mut reranker(trained.path(), &args[..5]));
    assert!(table.contains("nDCG@10") && table.contains("1.0000"), "{table}");
    assert!(table.trim_end().ends_with("over 6 queries"), "{table}");
}

#[test]
fn the_library_and_every_form_of_input_give_the_same_scores() {
    let trained = Trained::new("epochs: 1");
    let expected = trained.score(&["--input", "train.jsonl"]);
    let model = CrossEncoder::from_pretrained(trained.model()).unwrap();
    assert_eq!(model.max_len(), 40, "what the model was trained with");
    assert!(model.initialised().is_empty());
    let library = model.compute_score(&pairs(), &raw(32)).unwrap();
    assert_close(&library, &expected, "library");

    let lines: Vec<String> =
        pairs().iter().map(|(query, text)| format!("{query}\t{text}")).collect();
    let tsv = lines.join("\n");
    fs::write(trained.path().join("pairs.tsv"), &tsv).unwrap();
    assert_eq!(trained.score(&["--input", "pairs.tsv"]), expected, "TSV");
    let gzip = fs::File::create(trained.path().join("pairs.tsv.gz")).unwrap();
    let mut gzip = flate2::write::GzEncoder::new(gzip, flate2::Compression::default());
    gzip.write_all(tsv.as_bytes()).unwrap();
    gzip.finish().unwrap();
    assert_eq!(trained.score(&["--input", "pairs.tsv.gz"]), expected, "TSV, gzip");

    let mut command = reranker(trained.path(), &["score", "--model", "out/model"]);
    let stdin = fs::File::open(trained.path().join("train.jsonl")).unwrap();
    assert_eq!(logits(&output_of(command.stdin(Stdio::from(stdin)))), expected, "stdin");

    let echoed = ["score", "--model", "out/model", "--input", "train.jsonl", "--echo"];
    let args = [&echoed[..], &["--output", "scores.jsonl"]].concat();
    assert_eq!(output_of(&mut reranker(trained.path(), &args)), "");
    let text = fs::read_to_string(trained.path().join("scores.jsonl")).unwrap();
    assert_eq!(logits(&text), expected, "a file");
    for (line, (query, content)) in lines_of(&text).iter().zip(pairs()) {
        assert_eq!(
            (line["query"].as_str(), line["content"].as_str()),
            (Some(query), Some(content))
        );
    }
}

#[test]
fn lower_precision_scores_are_near_those_of_fp32() {
    let trained = Trained::new("epochs: 1");
    let expected = trained.score(&["--input", "train.jsonl"]);
    for (precision, bound) in [("bf16", 1e-1), ("fp16", 1e-2)] {
        let logits = trained.score(&["--input", "train.jsonl", "--precision", precision]);
        let differ = |(a, b): (&f32, &f32)| (a - b).abs() / b.abs().max(1.0);
        let worst = logits.iter().zip(&expected).map(differ).fold(0.0, f32::max);
        assert!(worst > 0.0 && worst <= bound, "{precision}: {worst} off");
    }
    // Only what computes is in memory.
    let dir = common::golden_dir("bert_tiny");
    let options = LoadOptions { precision: Precision::Bf16, ..LoadOptions::default() };
    let model = CrossEncoder::load(dir, options).unwrap();
    let other = model.identity().unwrap()["precision"].clone();
    assert_eq!(other, "bf16");
}

#[test]
fn a_score_depends_on_its_pair_alone() {
    let model = CrossEncoder::from_pretrained(common::golden_dir("bert_tiny")).unwrap();
    let pairs = pairs();
    let expected = model.compute_score(&pairs, &raw(32)).unwrap();
    for batch_size in [1, 2, 5] {
        let scores = model.compute_score(&pairs, &raw(batch_size)).unwrap();
        assert_close(&scores, &expected, &format!("batches of {batch_size}"));
    }
    let reversed: Vec<_> = pairs.iter().rev().copied().collect();
    let mut scores = model.compute_score(&reversed, &raw(3)).unwrap();
    scores.reverse();
    assert_close(&scores, &expected, "reversed");
    let normal = ScoreOptions { normalize: true, ..raw(32) };
    let sigmoid: Vec<f32> = expected.iter().map(|logit| 1.0 / (1.0 + (-logit).exp())).collect();
    assert_close(&model.compute_score(&pairs, &normal).unwrap(), &sigmoid, "normalised");
    assert!(model.compute_score::<&str, &str>(&[], &raw(4)).unwrap().is_empty());
}

/// Saves the golden model `case` as it is into `target`, in shards of at most so many bytes.
fn save_golden(case: &str, target: &Path, max_shard_bytes: usize) {
    let golden = Golden::load(case);
    let config = ModelConfig::from_dir(&golden.dir).unwrap();
    let sidecar = json!({
        "format_version": 1, "model_type": "bert_encoder", "query_format": "{}",
        "document_format": "{}", "seq": "", "special_token": "", "max_len": 40, "min_label": 0.0,
        "max_label": 1.0, "base_model": case, "run": {}, "metrics": null,
    });
    let sidecar: Sidecar = serde_json::from_value(sidecar).unwrap();
    let engine = golden.engine(1e-3);
    let model = SavedModel {
        units: engine.units(),
        config: &config,
        base: &golden.dir,
        sidecar: &sidecar,
        max_shard_bytes,
    };
    save_model(model, target, &common::solo()).unwrap();
}

fn scores_of(dir: &Path) -> Vec<f32> {
    let model = CrossEncoder::from_pretrained(dir).unwrap();
    model.compute_score(&pairs(), &ScoreOptions { max_len: Some(40), ..raw(4) }).unwrap()
}

/// Half precision and files of `torch.save` included.
#[test]
fn every_family_is_saved_as_safetensors_and_scores_the_same() {
    for (case, architecture) in [
        ("bert_odd", "BertForSequenceClassification"),
        ("roberta_tiny", "RobertaForSequenceClassification"),
        ("xlm_roberta_odd", "XLMRobertaForSequenceClassification"),
        ("modernbert_tiny", "ModernBertForSequenceClassification"),
        ("modernbert_odd", "ModernBertForSequenceClassification"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let saved = dir.path().join("model");
        save_golden(case, &saved, 1_000_000);
        let files = ["config.json", "model.safetensors", "reranker.json", "tokenizer.json"];
        assert_eq!(names_in(&saved), [&files[..], &["tokenizer_config.json"]].concat(), "{case}");
        let config = fs::read_to_string(saved.join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["architectures"], json!([architecture]), "{case}");
        assert_eq!(config["dtype"], "float32", "{case}");
        assert_eq!(scores_of(&saved), scores_of(&common::golden_dir(case)), "{case}");
    }
}

#[test]
fn shards_load_to_the_same_scores() {
    let base = common::golden_dir("bert_tiny");
    let dir = tempfile::tempdir().unwrap();
    let saved = dir.path().join("model");
    save_golden("bert_tiny", &saved, 20_000);
    let shards: Vec<String> =
        names_in(&saved).into_iter().filter(|name| name.ends_with(".safetensors")).collect();
    assert!(shards.len() >= 3 && !saved.join("model.safetensors").exists(), "{shards:?}");
    for (i, shard) in shards.iter().enumerate() {
        assert_eq!(*shard, format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len()));
    }
    check_index(&saved, &base, &shards);
    assert_eq!(scores_of(&saved), scores_of(&base));
}

/// The index names every tensor of the base model once, in the shard that holds it, and their
/// size together.
fn check_index(saved: &Path, base: &Path, shards: &[String]) {
    let text = fs::read_to_string(saved.join("model.safetensors.index.json")).unwrap();
    let index: Value = serde_json::from_str(&text).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    let mut bytes = 0;
    for shard in shards {
        let tensors = tch::Tensor::read_safetensors(saved.join(shard)).unwrap();
        for (name, tensor) in &tensors {
            assert_eq!(map[name], shard.as_str(), "{name}");
            bytes += tensor.numel() * 4;
        }
        let size: usize = tensors.iter().map(|(_, tensor)| tensor.numel() * 4).sum();
        assert!(size <= 20_000 || tensors.len() == 1, "{shard} holds {size} bytes");
    }
    assert_eq!(index["metadata"]["total_size"], bytes);
    let mut names: Vec<String> = tch::Tensor::read_safetensors(base.join("model.safetensors"))
        .unwrap()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    names.sort();
    assert_eq!(map.keys().cloned().collect::<Vec<_>>(), names);
}

#[test]
fn names_on_the_command_line_need_not_be_utf8() {
    let trained = Trained::new("epochs: 1");
    let name = OsStr::from_bytes(b"t\xff.yaml");
    fs::rename(trained.path().join("training.yaml"), trained.path().join(name)).unwrap();
    let args = ["train", "--device", "cpu", "--overwrite", "--config"];
    output_of(reranker(trained.path(), &args).arg(name));
    let page = fs::read_to_string(trained.path().join("out/runs/report.html")).unwrap();
    assert!(page.contains("--config t\u{fffd}.yaml"), "the command is not on the page");
}

#[test]
fn a_finished_run_is_replaced_only_when_asked() {
    let trained = Trained::new("epochs: 1");
    let before = snapshot(trained.path());
    let outcome = run(&mut reranker(trained.path(), &Trained::train()));
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.ends_with("choose another directory or pass --overwrite\n"));
    assert!(snapshot(trained.path()) == before, "nothing is touched");

    let weights = || fs::read(trained.model().join("model.safetensors")).unwrap();
    let first = weights();
    let mut args = Trained::train().to_vec();
    args.push("--overwrite");
    output_of(&mut reranker(trained.path(), &args));
    assert!(weights() == first, "the same seed gives the same model");
    args.extend(["--set", "seed=7"]);
    output_of(&mut reranker(trained.path(), &args));
    assert!(weights() != first, "another seed gives another model");
    assert_eq!(names_in(&trained.path().join("out")), ["model", "runs"]);
    assert_eq!(Sidecar::from_dir(&trained.model()).unwrap().unwrap().run["training"]["seed"], 7);
}
