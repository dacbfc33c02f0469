//! The validated plan of a run: every setting decided, typed and within its range.
//!
//! It serializes under the YAML's own key names, so that what a run records can be read back by the
//! eye that wrote the YAML.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize, Serializer};

use super::lora::LoraPlan;
use super::reader::Origin;
use super::teacher::TeacherPlan;
use crate::error::Error;

/// What the command line hands to the configuration.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The training YAML (`--config`).
    pub training: PathBuf,
    /// The parallel YAML (`--parallel`), in accelerate's schema.
    pub parallel: Option<PathBuf>,
    /// `--set key=value` arguments, as typed after `--set`.
    pub overrides: Vec<String>,
    /// `--resume auto|never|PATH`; overrides the YAML's `resume`.
    pub resume: Option<String>,
    /// `--overwrite`: a finished run in `output_dir` may be replaced.
    pub overwrite: bool,
    /// `--skip-bad-records`: drop them and report, instead of stopping.
    pub skip_bad_records: bool,
    /// The world size, when the environment already fixed it.
    pub processes: Option<usize>,
    /// The device, when the command line chose it.
    pub device: Option<Device>,
    /// `--resume-anyway`: go on from the checkpoint of a run that differs.
    pub resume_anyway: bool,
    /// `--timeout`: the longest wait for a peer.
    pub timeout: Option<Duration>,
}

/// Everything a run needs to know.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// What is trained.
    pub model: ModelPlan,
    /// On what.
    pub data: DataPlan,
    /// The loss (`loss_type`).
    #[serde(rename = "loss_type")]
    pub loss: LossKind,
    /// How.
    pub training: TrainingPlan,
    /// When it is validated, and what follows from that.
    pub validation: ValidationPlan,
    /// What is kept.
    pub saving: SavingPlan,
    /// What is shown.
    pub logging: LoggingPlan,
    /// Over which workers.
    pub parallel: ParallelPlan,
    /// Lines worth telling the user once: overridden values, ignored keys, settings without effect.
    #[serde(skip)]
    pub notices: Vec<String>,
    /// Where the plan came from.
    #[serde(skip)]
    pub sources: Sources,
    /// Where each setting was given, by the name it serializes under; defaults are not in it.
    #[serde(skip)]
    pub origins: BTreeMap<String, Origin>,
}

impl Plan {
    /// A line about the setting `key` that is no error, with the place where it was given.
    #[must_use]
    pub fn warning(&self, key: &str, message: impl fmt::Display) -> String {
        match self.origins.get(key) {
            Some(Origin { key, place }) => format!("{place}: {key}: {message}"),
            None => format!("{key}: {message}"),
        }
    }

    /// An error about the setting `key` (a serialized name, such as `train_dataset`) at the place
    /// where it was given, or about the training YAML as a whole where it is a default.
    #[must_use]
    pub fn error(&self, key: &str, message: impl fmt::Display) -> Error {
        match self.origins.get(key) {
            Some(origin) => origin.error(message),
            None => Error::File {
                path: self.sources.training.clone(),
                message: format!("{key}: {message}"),
            },
        }
    }
}

/// The model and how a pair becomes its input.
#[derive(Clone, Debug, Serialize)]
pub struct ModelPlan {
    /// A local directory or a hub id, as written (`model_name_or_path`).
    #[serde(rename = "model_name_or_path")]
    pub path: String,
    /// The family of models (`model_type`).
    #[serde(rename = "model_type")]
    pub kind: ModelKind,
    /// Outputs of the classification head.
    pub num_labels: usize,
    /// The query goes where `{}` stands.
    pub query_format: String,
    /// The document goes where `{}` stands.
    pub document_format: String,
    /// Between query and document; decoders only.
    pub seq: String,
    /// After the document; decoders only.
    pub special_token: String,
}

/// The families of models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelKind {
    /// BERT and its relatives: the pair template of the tokenizer, a head on the first token.
    BertEncoder,
    /// A causal language model: concatenated parts, a head on the last token.
    LlmDecoder,
}

impl fmt::Display for ModelKind {
    /// The value of `model_type`.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::BertEncoder => "bert_encoder",
            Self::LlmDecoder => "llm_decoder",
        })
    }
}

/// The data sets and how labels are read.
#[derive(Clone, Debug, Serialize)]
pub struct DataPlan {
    /// Training records (`train_dataset`), relative to the working directory.
    #[serde(rename = "train_dataset")]
    pub train: PathBuf,
    /// Validation records (`val_dataset`).
    #[serde(rename = "val_dataset")]
    pub validation: Option<PathBuf>,
    /// The form of the training records; detected from the first record when absent.
    #[serde(rename = "train_dataset_type")]
    pub train_kind: Option<DatasetKind>,
    /// The form of the validation records; detected from the first record when absent.
    #[serde(rename = "val_dataset_type")]
    pub validation_kind: Option<DatasetKind>,
    /// The JSON key of a training label.
    pub train_label_key: String,
    /// The JSON key of a validation label.
    #[serde(rename = "val_label_key")]
    pub validation_label_key: String,
    /// Hits per training group (`train_group_size`).
    #[serde(rename = "train_group_size")]
    pub group_size: usize,
    /// The range that pointwise labels are mapped from.
    #[serde(flatten)]
    pub labels: LabelRange,
    /// The most tokens of a pair, special tokens included.
    pub max_len: usize,
    /// The probability that a long training text has its parts shuffled.
    pub shuffle_rate: f64,
    /// Where tokenized data is kept between runs; large files only, below the user's cache
    /// directory, when absent.
    pub cache_dir: Option<PathBuf>,
    /// Drop bad records and report them, instead of stopping.
    pub skip_bad_records: bool,
    /// Whose scores are the training labels, in place of those in the records.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub teacher: Option<TeacherPlan>,
}

/// The forms of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetKind {
    /// One query, one document, one label per record.
    Pointwise,
    /// One query with all its hits per record.
    Grouped,
}

/// Pointwise labels are mapped to `(label - min) / (max - min)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LabelRange {
    /// `min_label`, mapped to 0.
    #[serde(rename = "min_label")]
    pub min: f64,
    /// `max_label`, mapped to 1.
    #[serde(rename = "max_label")]
    pub max: f64,
}

impl LabelRange {
    /// Whether `label`, which data hold in fp32, is none of those outside the two.
    #[must_use]
    pub fn contains(&self, label: f32) -> bool {
        (self.min as f32..=self.max as f32).contains(&label)
    }

    /// What a label of the range is mapped to, from 0 to 1.
    #[must_use]
    pub fn map(&self, label: f32) -> f32 {
        ((f64::from(label) - self.min) / (self.max - self.min)).clamp(0.0, 1.0) as f32
    }
}

/// The losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// Binary cross entropy with logits.
    PointwiseBce,
    /// Squared error of the sigmoid.
    PointwiseMse,
    /// `RankNet` over the pairs of a group, weighted by label difference.
    PairwiseRanknet,
    /// Cross entropy of the softmax over a group.
    ListwiseCe,
}

impl LossKind {
    /// Whether the loss compares the hits of one query, and so needs grouped data.
    #[must_use]
    pub fn needs_groups(self) -> bool {
        matches!(self, Self::PairwiseRanknet | Self::ListwiseCe)
    }
}

/// Optimization.
#[derive(Clone, Debug, Serialize)]
pub struct TrainingPlan {
    /// Passes over the training data.
    pub epochs: usize,
    /// The peak learning rate.
    pub lr: f64,
    /// Pairs (pointwise) or groups (grouped) per rank and micro-batch.
    pub batch_size: usize,
    /// Of everything random.
    pub seed: u64,
    /// The share of optimizer steps with a rising learning rate.
    pub warmup_proportion: f64,
    /// The share of optimizer steps at the peak, after the warm-up.
    pub stable_proportion: f64,
    /// Micro-batches per optimizer step (`gradient_accumulation_steps`).
    #[serde(rename = "gradient_accumulation_steps")]
    pub accumulation: usize,
    /// The precision of the computation (`mixed_precision`).
    #[serde(rename = "mixed_precision")]
    pub precision: Precision,
    /// The gradient's 2-norm is clipped to this; `None` leaves it alone.
    pub max_grad_norm: Option<f64>,
    /// `AdamW`'s decoupled decay of everything but biases and normalisation weights.
    pub weight_decay: f64,
    /// Parameters with a learning rate of their own.
    pub special_lr_groups: Vec<LrGroup>,
    /// Recompute activations in the backward pass instead of keeping them.
    pub gradient_checkpointing: bool,
    /// Reduce bf16 and fp16 gradients in fp32.
    pub reduce_in_fp32: bool,
    /// On a GPU too, the same run gives the same bits.
    pub deterministic: bool,
    /// Low-rank adapters in place of the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraPlan>,
}

/// The precision of the computation; weights and optimizer states stay fp32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Precision {
    /// `no`.
    #[serde(rename = "no")]
    Fp32,
    /// `fp16`, with a dynamic loss scale.
    #[serde(rename = "fp16")]
    Fp16,
    /// `bf16`.
    #[serde(rename = "bf16")]
    Bf16,
}

impl fmt::Display for Precision {
    /// The name of `mixed_precision`.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Fp32 => "no",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
        })
    }
}

/// Parameters whose name contains one of `keywords` learn at `lr`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LrGroup {
    /// Substrings of parameter names.
    pub keywords: Vec<String>,
    /// The peak learning rate.
    pub lr: f64,
}

/// Validation while training.
#[derive(Clone, Debug, Serialize)]
pub struct ValidationPlan {
    /// Validate every so many optimizer steps; `None` is after every epoch (`eval_steps`).
    #[serde(rename = "eval_steps")]
    pub interval: Option<usize>,
    /// The figure by which the best model is kept; `None` keeps none (`metric_for_best`).
    #[serde(rename = "metric_for_best")]
    pub metric: Option<Metric>,
    /// Validations in a row without a better figure that end the training
    /// (`early_stopping_patience`).
    #[serde(rename = "early_stopping_patience")]
    pub patience: Option<usize>,
}

/// Figures of a validation, by which models are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Metric {
    /// The mean loss; less is better.
    #[serde(rename = "loss")]
    Loss,
    /// nDCG at 10.
    #[serde(rename = "ndcg@10")]
    NdcgAt10,
    /// Mean reciprocal rank at 10.
    #[serde(rename = "mrr@10")]
    MrrAt10,
    /// Mean average precision.
    #[serde(rename = "map")]
    Map,
}

impl Metric {
    /// Whether `value` is better than `other`; never so where one is NaN.
    #[must_use]
    pub fn is_better(self, value: f64, other: f64) -> bool {
        match self {
            Self::Loss => value < other,
            Self::NdcgAt10 | Self::MrrAt10 | Self::Map => value > other,
        }
    }
}

impl fmt::Display for Metric {
    /// The name of `metric_for_best`.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Loss => "loss",
            Self::NdcgAt10 => "ndcg@10",
            Self::MrrAt10 => "mrr@10",
            Self::Map => "map",
        })
    }
}

/// What a run keeps.
#[derive(Clone, Debug, Serialize)]
pub struct SavingPlan {
    /// Everything a run writes goes below it.
    pub output_dir: PathBuf,
    /// Save a checkpoint at the end of every epoch.
    pub save_on_epoch_end: bool,
    /// How many of the newest checkpoints stay (`num_max_checkpoints`).
    #[serde(rename = "num_max_checkpoints")]
    pub max_checkpoints: usize,
    /// Save a checkpoint every so many optimizer steps.
    pub save_steps: Option<usize>,
    /// A checkpoint is written while the next steps are taken; otherwise they wait for it.
    pub async_save: bool,
    /// What to do with an unfinished run in `output_dir`.
    pub resume: Resume,
    /// What follows when a checkpoint cannot be saved.
    pub save_failure: SaveFailure,
    /// A finished run in `output_dir` may be replaced.
    pub overwrite: bool,
}

/// What follows when a checkpoint cannot be saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SaveFailure {
    /// The run ends; it can go on from the checkpoint before.
    Stop,
    /// The checkpoint is left out, with a warning.
    Continue,
}

/// Where a run begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Continue an unfinished run of the same configuration, else begin anew.
    Auto,
    /// Begin anew.
    Never,
    /// Continue from this checkpoint.
    Path(PathBuf),
}

impl Serialize for Resume {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Never => serializer.serialize_str("never"),
            Self::Path(path) => serializer.serialize_str(&path.to_string_lossy()),
        }
    }
}

/// What a run shows.
#[derive(Clone, Debug, Serialize)]
pub struct LoggingPlan {
    /// Optimizer steps between two lines of metrics.
    pub log_interval: usize,
    /// Beside `metrics.jsonl` (`log_with`).
    #[serde(rename = "log_with")]
    pub trackers: Vec<Tracker>,
}

/// Programs that draw metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tracker {
    /// Weights & Biases.
    Wandb,
    /// `TensorBoard` event files.
    Tensorboard,
}

/// How the work is spread over workers.
#[derive(Clone, Debug, Serialize)]
pub struct ParallelPlan {
    /// What is sharded.
    pub strategy: Strategy,
    /// The world size the run was configured or started with; `None` where nobody said.
    #[serde(rename = "num_processes")]
    pub processes: Option<usize>,
    /// Machines in the run (`num_machines`).
    #[serde(rename = "num_machines")]
    pub machines: usize,
    /// The kind of device; `None` takes what the machine has.
    pub device: Option<Device>,
    /// Device indices or UUIDs; `None` is all of them.
    pub gpu_ids: Option<Vec<String>>,
    /// Keep optimizer states in the host's memory.
    pub offload_optimizer: bool,
    /// Keep parameters in the host's memory.
    pub offload_parameters: bool,
    /// Recompute activations, as the parallel YAML asks (`fsdp_activation_checkpointing`).
    pub activation_checkpointing: bool,
    /// The layer classes that FSDP files name (`fsdp_transformer_layer_cls_to_wrap`); layers are
    /// known here, so they are only compared with the model's.
    pub layer_classes: Vec<String>,
    /// The `DeepSpeed` JSON file that the parallel YAML points to and that was read in its place.
    pub deepspeed_config_file: Option<PathBuf>,
}

/// What data-parallel workers hold in shares instead of copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// Nothing: every worker holds everything.
    Ddp,
    /// The states that `stage` names, over all workers.
    Zero {
        /// How much is sharded.
        stage: ZeroStage,
    },
    /// The states that `stage` names, within a machine; copies across machines.
    Hybrid {
        /// How much is sharded.
        stage: ZeroStage,
    },
}

/// The stages of `ZeRO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ZeroStage {
    /// Optimizer states.
    One,
    /// Optimizer states and gradients.
    Two,
    /// Optimizer states, gradients and parameters.
    Three,
}

impl fmt::Display for Strategy {
    /// `ddp`, `zero2`, `hybrid zero3`.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (prefix, stage) = match self {
            Self::Ddp => return out.write_str("ddp"),
            Self::Zero { stage } => ("", stage),
            Self::Hybrid { stage } => ("hybrid ", stage),
        };
        let number = match stage {
            ZeroStage::One => 1,
            ZeroStage::Two => 2,
            ZeroStage::Three => 3,
        };
        write!(out, "{prefix}zero{number}")
    }
}

impl Serialize for Strategy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The kinds of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Device {
    /// The host's processors.
    Cpu,
    /// NVIDIA GPUs.
    Cuda,
}

impl fmt::Display for Device {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        })
    }
}
