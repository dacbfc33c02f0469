//! Moving over from RAG-Retrieval: training and parallel files with its keys, its values and its
//! relative paths load as they are and train with two workers on the CPU; its launch lines as scripts.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "common/launch.rs"]
mod launch;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use launch::{launcher, output_of, reranker, run};
use reranker::config::{Plan, Sources};
use serde_json::{Value, json};
use tch::Tensor;
use tempfile::TempDir;

/// What both of its training files hold, in either form of data.
const SHARED: &str = r#"
num_labels: 1
query_format: "{}"
document_format: "{}"
output_dir: "./output/run"
save_on_epoch_end: 1
num_max_checkpoints: 5
epochs: 2
lr: 5e-5
batch_size: 8
seed: 42
warmup_proportion: 0.1
gradient_accumulation_steps: 2
log_interval: 10
log_with: "wandb" # "wandb" or "tensorboard"
"#;

const GROUPED: &str = r#"
train_dataset: "../../../example_data/grouped.jsonl"
train_dataset_type: "grouped"
train_label_key: "label"
train_group_size: 10
shuffle_rate: 0.0
max_len: 512
val_dataset: "../../../example_data/grouped.jsonl"
val_dataset_type: "grouped"
val_label_key: "label"
stable_proportion: 0.5
loss_type: "pairwise_ranknet"  # or "listwise_ce"
"#;

const POINTWISE: &str = r#"
train_dataset: "../../../example_data/pointwise.jsonl"
train_dataset_type: "pointwise"
max_label: 2
min_label: 0
max_len: 512
shuffle_rate: 0.5
train_label_key: "label"
val_dataset: "../../../example_data/pointwise.jsonl"
val_dataset_type: "pointwise"
val_label_key: "label"
loss_type: "pointwise_bce"  # or "pointwise_mse"
"#;

/// Its first files: records of positives and negatives, no type, the older name of the loss.
const OLDER: &str = r#"
train_dataset: "../../../example_data/pos_neg.jsonl"
val_dataset: "../../../example_data/pos_neg.jsonl"
max_label: 1
min_label: 0
max_len: 512
loss_type: "point_ce"  # or "point_mse"
"#;

const BERT: &str = "model_name_or_path: \"BAAI/bge-reranker-v2-m3\"\nmodel_type: \"bert_encoder\"\nmixed_precision: fp16\n";
const LLM: &str = "model_name_or_path: \"Qwen/Qwen2.5-1.5B\"\nmodel_type: \"llm_decoder\"\n\
                   seq: \"\\n\"\nspecial_token: \"\\nrelevance\"\nmixed_precision: bf16\n";

/// What stands in for the client of wandb.
const CLIENT: &str = "
import os
log_file = open(os.path.join(os.path.dirname(__file__), 'logged'), 'w', buffering=1)
class Settings:
    def __init__(self, **_): pass
class Run:
    id = 'run'
    def define_metric(self, *_, **__): pass
    def log(self, figures, step=None): print(step, figures, file=log_file)
    def finish(self, *_, **__): print('finished', file=log_file)
def init(**_): return Run()
";

/// The parallel files that its scripts name.
fn parallel_files() -> Vec<(&'static str, String)> {
    let rest = "compute_environment: LOCAL_MACHINE\nmachine_rank: 0\nmain_training_function: main\n\
                num_machines: 1\nnum_processes: 2\nuse_cpu: false\n";
    let fsdp = "distributed_type: FSDP\ndowncast_bf16: 'no'\nfsdp_config:\n  \
                fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n  \
                fsdp_backward_prefetch_policy: NO_PREFETCH\n  fsdp_offload_params: false\n  \
                fsdp_sharding_strategy: 3\n  fsdp_state_dict_type: FULL_STATE_DICT\n  \
                fsdp_transformer_layer_cls_to_wrap: XLMRobertaLayer\nmixed_precision: 'no'\n\
                rdzv_backend: static\nsame_network: true\ntpu_env: []\ntpu_use_cluster: false\n\
                tpu_use_sudo: false\n";
    let deepspeed = |stage: usize| {
        format!(
            "deepspeed_config:\n gradient_clipping: \"auto\"\n offload_optimizer_device: none\n \
             offload_param_device: none\n zero3_init_flag: true\n zero_stage: {stage}\n \
             train_micro_batch_size_per_gpu: \"auto\"\n zero3_save_16bit_model: true\n\
             distributed_type: DEEPSPEED\nfsdp_config: {{}}\nmain_process_ip: null\n\
             main_process_port: null\n{rest}"
        )
    };
    vec![
        ("fsdp.yaml", format!("{fsdp}{rest}")),
        ("zero1.yaml", deepspeed(1)),
        ("zero3.yaml", deepspeed(3)),
    ]
}

/// The golden model with as many positions as the files ask for.
fn write_model(dir: &Path) {
    launch::copy_model("bert_tiny", dir);
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["max_position_embeddings"] = 512.into();
    fs::write(path, config.to_string()).unwrap();
    let path = dir.join("model.safetensors");
    let widen = |(name, tensor): (String, Tensor)| {
        let is_positions = name.ends_with("position_embeddings.weight");
        let tensor = if is_positions { tensor.repeat([8, 1]) } else { tensor };
        (name, tensor)
    };
    let tensors: Vec<_> = Tensor::read_safetensors(&path).unwrap().into_iter().map(widen).collect();
    Tensor::write_safetensors(&tensors, path).unwrap();
}

/// A checkout as that project's: data at the top, and a folder three levels below to train in.
struct Checkout {
    root: TempDir,
}

impl Checkout {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let this = Self { root };
        fs::create_dir_all(this.folder()).unwrap();
        write_model(&this.folder().join("small"));
        let data = this.root.path().join("example_data");
        fs::create_dir(&data).unwrap();
        let long = "boil the water and heat the cup, ".repeat(5);
        let (mut grouped, mut pointwise, mut pos_neg) =
            (String::new(), String::new(), String::new());
        for i in 0..20 {
            let hits: Vec<Value> = (0..12)
                .map(|j| json!({"content": format!("{long} {}", i + j), "label": (i + j) % 3}))
                .collect();
            for hit in &hits[..2] {
                let (content, label) = (&hit["content"], &hit["label"]);
                let record = json!({"query": i.to_string(), "content": content, "label": label});
                writeln!(pointwise, "{record}").unwrap();
            }
            let texts: Vec<&Value> = hits.iter().map(|hit| &hit["content"]).collect();
            let record = json!({"query": i.to_string(), "pos": texts[..2], "neg": texts[2..4]});
            writeln!(pos_neg, "{record}").unwrap();
            let record = json!({"query": i.to_string(), "hits": hits});
            writeln!(grouped, "{record}").unwrap();
        }
        // What a teacher scored is all under the one name.
        pos_neg += "{\"query\": \"20\", \"pos\": [\"yes\", \"no\"], \"pos_scores\": [0.9, 0.25]}\n";
        fs::write(data.join("pos_neg.jsonl"), pos_neg).unwrap();
        fs::write(data.join("grouped.jsonl"), grouped).unwrap();
        fs::write(data.join("pointwise.jsonl"), pointwise).unwrap();
        for (name, text) in parallel_files() {
            fs::write(this.folder().join(name), text).unwrap();
        }
        fs::create_dir(this.client()).unwrap();
        fs::write(this.client().join("wandb.py"), CLIENT).unwrap();
        this
    }

    fn folder(&self) -> PathBuf {
        self.root.path().join("rag_retrieval/train/reranker")
    }

    /// A folder with a module of the client's name, since `log_with` asks for it: it notes its calls.
    fn client(&self) -> PathBuf {
        self.root.path().join("client")
    }

    fn write(&self, model: &str, data: &str) -> PathBuf {
        let path = self.folder().join("training.yaml");
        fs::write(&path, format!("{model}{data}{SHARED}")).unwrap();
        path
    }
}

#[test]
fn every_pair_of_files_loads() {
    let checkout = Checkout::new();
    for model in [BERT, LLM] {
        for data in [GROUPED, POINTWISE, OLDER] {
            for (parallel, _) in parallel_files() {
                let sources = Sources {
                    training: checkout.write(model, data),
                    parallel: Some(checkout.folder().join(parallel)),
                    ..Sources::default()
                };
                let plan = Plan::resolve(&sources).unwrap();
                assert_eq!(plan.parallel.processes, Some(2));
                assert!(plan.saving.save_on_epoch_end && plan.training.lr == 5e-5);
            }
        }
    }
}

/// Its loader pairs the query with every text: 1 for positives, 0 for negatives, the mapped scores where
/// there are any.
#[test]
fn positives_and_negatives_are_pairs_of_a_pointwise_loss() {
    let checkout = Checkout::new();
    checkout.write(BERT, OLDER);
    let args =
        ["check", "--config", "training.yaml", "--json", "--set", "model_name_or_path=small"];
    let mut command = reranker(&checkout.folder(), &args);
    let report = output_of(command.env("PYTHONPATH", checkout.client()));
    let report: Value = serde_json::from_str(&report).unwrap();
    let load = &report["preflight"]["train"]["load"];
    assert_eq!(load["kind"], "pointwise", "{load}");
    let counts: Vec<(f64, usize)> =
        serde_json::from_value(load["labels"]["Values"].clone()).unwrap();
    let counts: Vec<_> = counts.iter().map(|&(label, count)| (label as f32, count)).collect();
    assert_eq!(counts, [(0.0, 40), (0.25, 1), (0.9, 1), (1.0, 40)]);
}

#[test]
fn they_train_with_another_model() {
    let checkout = Checkout::new();
    for (data, parallel) in
        [(GROUPED, "fsdp.yaml"), (POINTWISE, "zero1.yaml"), (OLDER, "zero3.yaml")]
    {
        checkout.write(BERT, data);
        let mut command = launcher(
            &checkout.folder(),
            &["--cpu", "--nproc", "2", "--config_file", parallel, "--config", "training.yaml"],
        );
        command.args(["--set", "model_name_or_path=small"]).env("PYTHONPATH", checkout.client());
        let outcome = run(&mut command);
        assert_eq!(outcome.code, Some(0), "{parallel}: {}", outcome.stderr);
        let saved = checkout.folder().join("output/run/model/reranker.json");
        let saved: Value = serde_json::from_str(&fs::read_to_string(saved).unwrap()).unwrap();
        assert_eq!(saved["run"]["training"]["mixed_precision"], "fp16");
        assert!(saved["metrics"]["loss"].as_f64().is_some_and(f64::is_finite), "{saved}");
        let checkpoints = fs::read_dir(checkout.folder().join("output/run/checkpoints")).unwrap();
        assert!(checkpoints.count() >= 2, "one after every epoch");
        let logged = fs::read_to_string(checkout.client().join("logged")).unwrap();
        assert!(logged.contains("train/loss") && logged.ends_with("finished\n"), "{logged}");
        fs::remove_dir_all(checkout.folder().join("output")).unwrap();
    }
}

#[test]
fn the_launch_lines_are_scripts() {
    let checkout = Checkout::new();
    let folder = checkout.folder();
    launch::copy_model("qwen2_tiny", &folder.join("decoder"));
    for (script, model, max_len) in
        [("train_bert.sh", "small", "512"), ("train_llm.sh", "decoder", "64")]
    {
        let saved = train_by_script(&checkout, script, model, max_len);
        let saved: Value = serde_json::from_str(&fs::read_to_string(saved).unwrap()).unwrap();
        assert!(saved["metrics"]["loss"].as_f64().is_some_and(f64::is_finite), "{saved}");
    }
}

/// Trains by a launch script with all its settings but the model, and returns its `reranker.json`.
fn train_by_script(checkout: &Checkout, script: &str, model: &str, max_len: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let binaries = Path::new(env!("CARGO_BIN_EXE_reranker")).parent().unwrap();
    let path = format!("{}:{}", binaries.display(), std::env::var("PATH").unwrap());
    let data = checkout.root.path().join("example_data");
    let output = checkout.folder().join(script);
    let mut command = Command::new(root.join("scripts").join(script));
    command.env("PATH", path).env("DEVICES", "--cpu --nproc 2").env("OMP_NUM_THREADS", "1");
    for (key, value) in [
        ("model_name_or_path", checkout.folder().join(model)),
        ("train_dataset", data.join("pointwise.jsonl")),
        ("val_dataset", data.join("grouped.jsonl")),
        ("output_dir", output.clone()),
        ("max_len", max_len.into()),
    ] {
        command.args(["--set", &format!("{key}={}", value.display())]);
    }
    let outcome = run(&mut command);
    assert_eq!(outcome.code, Some(0), "{script}: {}", outcome.stderr);
    output.join("model/reranker.json")
}
