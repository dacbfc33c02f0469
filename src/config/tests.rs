//! From files and flags to plans and error lines, end to end.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Device, LabelRange, LossKind, Plan, Sources, Strategy, ZeroStage};
use crate::error::Result;

mod bad_input;
mod deepspeed_file;
mod precedence;

/// The repository's own configuration files.
fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

/// A training YAML and perhaps a parallel one, in a directory of their own.
struct Case {
    directory: tempfile::TempDir,
    sources: Sources,
}

/// The least that a training YAML must hold, on three lines.
const LEAST: &str = "model_name_or_path: m\nmodel_type: bert_encoder\ntrain_dataset: t.jsonl\n";

impl Case {
    /// `yaml` as the whole training YAML.
    fn whole(yaml: impl AsRef<[u8]>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let training = directory.path().join("training.yaml");
        std::fs::write(&training, yaml).unwrap();
        Self { directory, sources: Sources { training, ..Sources::default() } }
    }

    /// `yaml` after the least, so that it starts on line 4.
    fn new(yaml: &str) -> Self {
        Self::whole(format!("{LEAST}{yaml}"))
    }

    fn parallel(mut self, yaml: &str) -> Self {
        let path = self.directory.path().join("parallel.yaml");
        std::fs::write(&path, yaml).unwrap();
        self.sources.parallel = Some(path);
        self
    }

    fn set(mut self, argument: &str) -> Self {
        self.sources.overrides.push(argument.into());
        self
    }

    /// Paths as the user would have typed them in the directory of the files.
    fn relative(&self, text: &str) -> String {
        text.replace(&format!("{}/", self.directory.path().display()), "")
    }

    fn resolve(&self) -> Result<Plan, String> {
        Plan::resolve(&self.sources).map_err(|error| self.relative(&error.to_string()))
    }

    fn load(&self) -> Result<Plan, String> {
        Plan::load(&self.sources).map_err(|error| self.relative(&error.to_string()))
    }

    fn notices(&self) -> Vec<String> {
        self.resolve().unwrap().notices.iter().map(|notice| self.relative(notice)).collect()
    }
}

#[test]
fn defaults_are_those_of_the_specification() {
    let plan = Case::new("").load().unwrap();
    let expected = json!({
        "model": {
            "model_name_or_path": "m", "model_type": "bert_encoder", "num_labels": 1,
            "query_format": "{}", "document_format": "{}", "seq": "", "special_token": "",
        },
        "data": {
            "train_dataset": "t.jsonl", "val_dataset": null,
            "train_dataset_type": null, "val_dataset_type": null,
            "train_label_key": "label", "val_label_key": "label", "train_group_size": 8,
            "min_label": 0.0, "max_label": 1.0, "max_len": 512, "shuffle_rate": 0.0,
            "cache_dir": null,
            "skip_bad_records": false,
        },
        "loss_type": "pointwise_bce",
        "training": {
            "epochs": 2, "lr": 5e-5, "batch_size": 8, "seed": 666, "warmup_proportion": 0.1,
            "stable_proportion": 0.0, "gradient_accumulation_steps": 1, "mixed_precision": "no",
            "max_grad_norm": null, "weight_decay": 0.01, "special_lr_groups": [],
            "gradient_checkpointing": false, "reduce_in_fp32": false, "deterministic": true,
        },
        "validation": {
            "eval_steps": null, "metric_for_best": null, "early_stopping_patience": null,
        },
        "saving": {
            "output_dir": "./output", "save_on_epoch_end": false, "num_max_checkpoints": 5,
            "save_steps": null, "async_save": true, "resume": "auto",
            "save_failure": "stop", "overwrite": false,
        },
        "logging": { "log_interval": 10, "log_with": [] },
        "parallel": {
            "strategy": "ddp", "num_processes": null, "num_machines": 1, "device": null,
            "gpu_ids": null, "offload_optimizer": false, "offload_parameters": false,
            "activation_checkpointing": false, "layer_classes": [], "deepspeed_config_file": null,
        },
    });
    assert_eq!(plan.to_json(), expected);
    assert_eq!(plan.notices, [""; 0]);
    assert!(plan.origins.keys().eq(["model_name_or_path", "model_type", "train_dataset"]));
}

#[test]
fn every_training_key_arrives() {
    let yaml = r#"
num_labels: 1
query_format: "query: {}"
document_format: 'document: {}'
seq: "\n"
special_token: </s>
val_dataset: v.jsonl
train_dataset_type: grouped
val_dataset_type: pointwise
train_label_key: score
val_label_key: gold
train_group_size: 4
max_label: 3
min_label: -1
max_len: 256
shuffle_rate: .5
cache_dir: caches
loss_type: listwise_ce
output_dir: out
epoch: 3
lr: 2e-5
batch_size: 16
seed: 1
warmup_proportion: 0.25
stable_proportion: 0.5
gradient_accumulation_steps: 2
mixed_precision: bf16
max_grad_norm: 1
weight_decay: 0
special_lr_groups:
- keywords: [score.weight, head]
  lr: 1e-4
- {keywords: bias, lr: 1e-3}
gradient_checkpointing: yes
reduce_in_fp32: true
deterministic: false
eval_steps: 50
metric_for_best_model: eval_nDCG@10
early_stopping_patience: 3
save_on_epoch_end: 1
num_max_checkpoints: 2
save_steps: 100
async_save: false
save_failure: continue
resume: out/checkpoints/step-3
log_interval: 5
log_with: [wandb, TensorBoard]
"#;
    let least = LEAST.replace("bert_encoder", "llm_decoder");
    let plan = Case::whole(format!("{least}{yaml}")).resolve().unwrap();
    let json = plan.to_json();
    assert_eq!(json["model"]["seq"], "\n");
    assert_eq!(json["model"]["special_token"], "</s>");
    assert_eq!(json["data"]["max_label"], 3.0);
    assert_eq!(json["data"]["min_label"], -1.0);
    assert_eq!(json["data"]["train_dataset_type"], "grouped");
    assert_eq!(json["loss_type"], "listwise_ce");
    assert_eq!(
        json["training"],
        json!({
            "epochs": 3, "lr": 2e-5, "batch_size": 16, "seed": 1, "warmup_proportion": 0.25,
            "stable_proportion": 0.5, "gradient_accumulation_steps": 2, "mixed_precision": "bf16",
            "max_grad_norm": 1.0, "weight_decay": 0.0, "gradient_checkpointing": true,
            "reduce_in_fp32": true, "deterministic": false,
            "special_lr_groups": [
                {"keywords": ["score.weight", "head"], "lr": 1e-4},
                {"keywords": ["bias"], "lr": 1e-3},
            ],
        })
    );
    assert_eq!(
        json["validation"],
        json!({"eval_steps": 50, "metric_for_best": "ndcg@10", "early_stopping_patience": 3})
    );
    assert_eq!(
        json["saving"],
        json!({
            "output_dir": "out", "save_on_epoch_end": true, "num_max_checkpoints": 2,
            "save_steps": 100, "async_save": false, "resume": "out/checkpoints/step-3",
            "save_failure": "continue", "overwrite": false,
        })
    );
    assert_eq!(json["logging"], json!({"log_interval": 5, "log_with": ["wandb", "tensorboard"]}));
    // Every key but the two flags of the command line was given, so each has an origin.
    for section in ["model", "data", "training", "validation", "saving", "logging"] {
        for key in json[section].as_object().unwrap().keys() {
            let flag = ["overwrite", "skip_bad_records"].contains(&key.as_str());
            assert_eq!(plan.origins.contains_key(key), !flag, "{key}");
        }
    }
}

#[test]
fn the_new_head_of_a_decoder_learns_faster() {
    let rates = |yaml: &str| {
        let least = LEAST.replace("bert_encoder", "llm_decoder");
        let plan = Case::whole(format!("{least}{yaml}")).load().unwrap();
        plan.to_json()["training"]["special_lr_groups"].clone()
    };
    assert_eq!(rates(""), json!([{"keywords": ["score.weight"], "lr": 1e-4}]));
    assert_eq!(rates("special_lr_groups: []\n"), json!([]));
}

#[test]
fn losses_have_their_older_names_too() {
    for (name, loss) in [
        ("point_ce", LossKind::PointwiseBce),
        ("pointwise_ce", LossKind::PointwiseBce),
        ("point_mse", LossKind::PointwiseMse),
        ("\"pairwise_ranknet\"", LossKind::PairwiseRanknet),
    ] {
        assert_eq!(Case::new(&format!("loss_type: {name}")).resolve().unwrap().loss, loss);
    }
}

#[test]
fn yaml_scalars_mean_what_their_setting_wants() {
    let plan = Case::new(
        "mixed_precision: no\nlr: 1_0.0e-5\nval_dataset: ~\nseed:\nsave_on_epoch_end: off\n\
         train_label_key: 5\nepochs: 3.0 # a comment\nresume: 'never'\n",
    );
    let json = plan.load().unwrap().to_json();
    assert_eq!(json["training"]["mixed_precision"], "no");
    assert_eq!(json["training"]["lr"], 1e-4);
    assert_eq!(json["training"]["seed"], 666);
    assert_eq!(json["training"]["epochs"], 3);
    assert_eq!(json["data"]["val_dataset"], json!(null));
    assert_eq!(json["data"]["train_label_key"], "5");
    assert_eq!(json["saving"]["save_on_epoch_end"], false);
    assert_eq!(json["saving"]["resume"], "never");
}

#[test]
fn anchors_windows_line_ends_and_a_byte_order_mark_are_read() {
    let yaml = format!("\u{feff}{LEAST}train_label_key: &key gold\nval_label_key: *key\n");
    let plan = Case::whole(yaml.replace('\n', "\r\n")).load().unwrap();
    assert_eq!(plan.data.validation_label_key, "gold");
}

#[test]
fn flags_of_the_command_line_arrive() {
    let mut case = Case::new("");
    case.sources.overwrite = true;
    case.sources.skip_bad_records = true;
    case.sources.processes = Some(2);
    case.sources.device = Some(Device::Cpu);
    let plan = case.load().unwrap();
    assert!(plan.saving.overwrite && plan.data.skip_bad_records);
    let origin = |key: &str| plan.origins[key].place.to_string();
    assert_eq!(origin("overwrite"), "--overwrite");
    assert_eq!(origin("skip_bad_records"), "--skip-bad-records");
    assert_eq!(origin("num_processes"), "the launcher");
    assert_eq!(origin("device"), "the command line");
    assert_eq!((plan.parallel.processes, plan.parallel.device), (Some(2), Some(Device::Cpu)));
}

#[test]
fn the_plan_describes_itself_with_origins() {
    let case = Case::new("lr: 1e-4\n").set("seed=7");
    let text = case.relative(&case.load().unwrap().describe());
    let line = |key: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(key)).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(line("lr "), "lr 0.0001 training.yaml:4");
    assert_eq!(line("seed "), "seed 7 --set");
    assert_eq!(line("epochs "), "epochs 2 default");
    assert_eq!(line("loss_type "), "loss_type pointwise_bce default");
    assert_eq!(line("val_dataset "), "val_dataset none default");
    let values = text.lines().filter(|line| line.starts_with("  "));
    let mut columns: Vec<_> = values.map(|line| line[2..].find("  ").is_some()).collect();
    columns.dedup();
    assert_eq!(columns, [true]);
}

#[test]
fn settings_without_effect_are_noted() {
    assert_eq!(
        Case::new("seq: ' '\nspecial_token: ''\n").notices(),
        ["training.yaml:4: seq has no effect on a bert_encoder, whose tokenizer joins the pair"]
    );
    let case = Case::new("").parallel(
        "distributed_type: MULTI_CPU\ndebug: false\ntpu_env: []\nmain_process_ip: null\n\
         deepspeed_config:\n  zero_stage: 2\nfsdp_config: {}\n",
    );
    assert_eq!(
        case.notices(),
        [
            "parallel.yaml: without meaning here, ignored: debug, tpu_env",
            "parallel.yaml:5: deepspeed_config has no effect, because distributed_type is \
             MULTI_CPU",
        ]
    );
    assert_eq!(case.load().unwrap().parallel.device, Some(Device::Cpu));
    let case = Case::new("").set("debug=true");
    assert_eq!(case.notices(), ["--set: without meaning here, ignored: debug"]);
}

#[test]
fn strategies_come_from_both_schemas() {
    let zero = |stage| Strategy::Zero { stage };
    let deepspeed =
        |stage: &str| format!("distributed_type: DEEPSPEED\ndeepspeed_config: {{{stage}}}\n");
    let fsdp = |config: &str| format!("distributed_type: FSDP\nfsdp_config: {{{config}}}\n");
    let table = [
        ("distributed_type: NO".into(), Strategy::Ddp),
        ("distributed_type: 'NO'".into(), Strategy::Ddp),
        ("distributed_type: multi_gpu".into(), Strategy::Ddp),
        (deepspeed("zero_stage: 0"), Strategy::Ddp),
        (deepspeed("zero_stage: 1"), zero(ZeroStage::One)),
        (deepspeed(""), zero(ZeroStage::Two)),
        (deepspeed("zero_stage: 3"), zero(ZeroStage::Three)),
        (fsdp(""), zero(ZeroStage::Three)),
        (fsdp("fsdp_sharding_strategy: 1"), zero(ZeroStage::Three)),
        (fsdp("fsdp_sharding_strategy: SHARD_GRAD_OP"), zero(ZeroStage::Two)),
        (fsdp("fsdp_sharding_strategy: '3'"), Strategy::Ddp),
        (fsdp("fsdp_sharding_strategy: 4"), Strategy::Hybrid { stage: ZeroStage::Three }),
        (fsdp("fsdp_sharding_strategy: 5"), Strategy::Hybrid { stage: ZeroStage::Two }),
        (fsdp("fsdp_reshard_after_forward: NO_SHARD"), Strategy::Ddp),
        (fsdp("fsdp_version: 2"), zero(ZeroStage::Three)),
        (fsdp("fsdp_version: 2, fsdp_reshard_after_forward: true"), zero(ZeroStage::Three)),
        (fsdp("fsdp_version: 2, fsdp_reshard_after_forward: false"), zero(ZeroStage::Two)),
        (fsdp("fsdp_version: 2, fsdp_reshard_after_forward: no"), zero(ZeroStage::Two)),
        (
            fsdp("fsdp_version: 2, fsdp_reshard_after_forward: HYBRID_SHARD"),
            Strategy::Hybrid { stage: ZeroStage::Three },
        ),
        (fsdp("fsdp_activation_checkpointing_offload: False"), zero(ZeroStage::Three)),
        (fsdp("fsdp_activation_checkpointing_offload: off"), zero(ZeroStage::Three)),
    ];
    for (yaml, strategy) in table {
        let plan = Case::new("").parallel(&yaml).resolve().unwrap();
        assert_eq!(plan.parallel.strategy, strategy, "{yaml}");
    }
}

#[test]
fn a_file_as_accelerate_writes_it_loads() {
    let case = Case::new("max_grad_norm: 2\nbatch_size: 4\n").parallel(
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: FSDP\n\
         downcast_bf16: 'no'\nenable_cpu_affinity: false\nfsdp_config:\n  \
         fsdp_activation_checkpointing: true\n  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP\n  \
         fsdp_backward_prefetch: BACKWARD_PRE\n  fsdp_cpu_ram_efficient_loading: true\n  \
         fsdp_forward_prefetch: false\n  fsdp_offload_params: true\n  \
         fsdp_sharding_strategy: FULL_SHARD\n  fsdp_state_dict_type: SHARDED_STATE_DICT\n  \
         fsdp_sync_module_states: true\n  fsdp_transformer_layer_cls_to_wrap: BertLayer\n  \
         fsdp_use_orig_params: true\ngpu_ids: 0,1\nmachine_rank: 0\n\
         main_training_function: main\nmixed_precision: 'no'\nnum_machines: 1\n\
         num_processes: 2\nrdzv_backend: static\nsame_network: true\ntpu_env: []\n\
         tpu_use_cluster: false\ntpu_use_sudo: false\nuse_cpu: false\n",
    );
    let parallel = case.resolve().unwrap().parallel;
    assert_eq!(parallel.strategy, Strategy::Zero { stage: ZeroStage::Three });
    assert!(parallel.offload_optimizer && parallel.offload_parameters);
    assert!(parallel.activation_checkpointing);
    assert_eq!(parallel.layer_classes, ["BertLayer"]);
    assert_eq!((parallel.processes, parallel.machines), (Some(2), 1));
    assert_eq!(parallel.gpu_ids, Some(vec!["0".into(), "1".into()]));
    assert_eq!(parallel.device, None);
    assert_eq!(case.notices().len(), 1);
}

#[test]
fn the_shipped_files_load() {
    let training = ["quickstart.yaml", "training_bert.yaml", "training_llm.yaml"];
    let parallel = [
        ("deepspeed/zero0.yaml", "ddp"),
        ("deepspeed/zero1.yaml", "zero1"),
        ("deepspeed/zero2.yaml", "zero2"),
        ("deepspeed/zero3.yaml", "zero3"),
        ("fsdp/no_shard.yaml", "ddp"),
        ("fsdp/shard_grad_op.yaml", "zero2"),
        ("fsdp/full_shard.yaml", "zero3"),
        ("fsdp/hybrid.yaml", "hybrid zero3"),
        ("fsdp/full_shard_bert_layer.yaml", "zero3"),
        ("fsdp/full_shard_xlm_roberta_layer.yaml", "zero3"),
        ("fsdp/full_shard_qwen2_layer.yaml", "zero3"),
    ];
    for training in training {
        for (parallel, strategy) in parallel {
            let sources = Sources {
                training: shipped(training),
                parallel: Some(shipped(parallel)),
                ..Sources::default()
            };
            let plan = Plan::resolve(&sources).unwrap();
            assert_eq!(plan.parallel.strategy.to_string(), strategy, "{parallel}");
            assert_eq!(plan.training.max_grad_norm, Some(1.0));
            let named = !plan.parallel.layer_classes.is_empty();
            assert_eq!(named, parallel.ends_with("_layer.yaml"), "{parallel}");
            let ignored = plan.notices.iter().all(|line| line.contains("without meaning here"));
            assert!(ignored && plan.notices.len() == usize::from(named), "{:?}", plan.notices);
            Plan::load(&sources).unwrap();
        }
    }
}

/// Labels of data are fp32, the ends of the range are not.
#[test]
fn a_range_of_labels_holds_its_ends() {
    let range = LabelRange { min: 0.1, max: 0.8 };
    for (label, expected) in [(0.1, 0.0), (0.45, 0.5), (0.8, 1.0)] {
        let mapped = range.map(label);
        assert!(range.contains(label) && (mapped - expected).abs() < 1e-6, "{label}: {mapped}");
        assert!((0.0..=1.0).contains(&mapped), "{label}: {mapped}");
    }
    assert_eq!([0.09, 0.81, f32::NAN].map(|label| range.contains(label)), [false; 3]);
}
