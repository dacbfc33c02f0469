//! The training YAML as written: every legal key once, nothing decided yet.
//!
//! The keys are those of RAG-Retrieval's reranker training, whose files load unchanged.

use super::lora::RawLora;
use super::plan::{
    DatasetKind, LossKind, LrGroup, Metric, ModelKind, Precision, SaveFailure, Tracker,
};
use super::reader::{Fields, Setting};
use super::teacher::RawTeacher;
use super::tree::Place;
use crate::error::Result;

/// What the training YAML and the command line say; `None` where they are silent. Each field is the
/// key of its name, and the plan's field of that name says what it means.
#[derive(Debug)]
pub struct RawTraining {
    pub model_name_or_path: Option<Setting<String>>,
    pub model_type: Option<Setting<ModelKind>>,
    pub num_labels: Option<Setting<i64>>,
    pub query_format: Option<Setting<String>>,
    pub document_format: Option<Setting<String>>,
    pub seq: Option<Setting<String>>,
    pub special_token: Option<Setting<String>>,

    pub train_dataset: Option<Setting<String>>,
    pub val_dataset: Option<Setting<String>>,
    pub train_dataset_type: Option<Setting<DatasetKind>>,
    pub val_dataset_type: Option<Setting<DatasetKind>>,
    pub train_label_key: Option<Setting<String>>,
    pub val_label_key: Option<Setting<String>>,
    pub train_group_size: Option<Setting<i64>>,
    pub max_label: Option<Setting<f64>>,
    pub min_label: Option<Setting<f64>>,
    pub max_len: Option<Setting<i64>>,
    pub shuffle_rate: Option<Setting<f64>>,
    pub cache_dir: Option<Setting<String>>,
    /// The section, where it is given.
    pub teacher: Option<RawTeacher>,

    pub loss_type: Option<Setting<LossKind>>,

    pub output_dir: Option<Setting<String>>,
    pub epochs: Option<Setting<i64>>,
    pub lr: Option<Setting<f64>>,
    pub batch_size: Option<Setting<i64>>,
    pub seed: Option<Setting<i64>>,
    pub warmup_proportion: Option<Setting<f64>>,
    pub stable_proportion: Option<Setting<f64>>,
    pub gradient_accumulation_steps: Option<Setting<i64>>,
    pub mixed_precision: Option<Setting<Precision>>,
    pub max_grad_norm: Option<Setting<f64>>,
    pub weight_decay: Option<Setting<f64>>,
    pub special_lr_groups: Option<Setting<Vec<RawLrGroup>>>,
    pub gradient_checkpointing: Option<Setting<bool>>,
    pub reduce_in_fp32: Option<Setting<bool>>,
    pub deterministic: Option<Setting<bool>>,
    /// The section, where it is given.
    pub lora: Option<RawLora>,

    pub eval_steps: Option<Setting<i64>>,
    pub metric_for_best: Option<Setting<Metric>>,
    pub early_stopping_patience: Option<Setting<i64>>,

    pub save_on_epoch_end: Option<Setting<bool>>,
    pub num_max_checkpoints: Option<Setting<i64>>,
    pub save_steps: Option<Setting<i64>>,
    pub async_save: Option<Setting<bool>>,
    pub save_failure: Option<Setting<SaveFailure>>,
    pub resume: Option<Setting<String>>,

    pub log_interval: Option<Setting<i64>>,
    pub log_with: Option<Setting<Vec<String>>>,
}

/// One entry of `special_lr_groups`.
#[derive(Debug)]
pub struct RawLrGroup {
    /// Substrings of parameter names.
    pub keywords: Option<Setting<Vec<String>>>,
    /// Their learning rate.
    pub lr: Option<Setting<f64>>,
    /// Where the entry starts.
    pub place: Place,
}

/// The names of `mixed_precision`.
pub const PRECISIONS: &[(&str, Precision)] =
    &[("no", Precision::Fp32), ("fp16", Precision::Fp16), ("bf16", Precision::Bf16)];

/// The names of `save_failure`.
const SAVE_FAILURES: &[(&str, SaveFailure)] =
    &[("stop", SaveFailure::Stop), ("continue", SaveFailure::Continue)];

/// The names of `loss_type`, RAG-Retrieval's older ones included.
const LOSSES: &[(&str, LossKind)] = &[
    ("pointwise_bce", LossKind::PointwiseBce),
    ("pointwise_ce", LossKind::PointwiseBce),
    ("point_ce", LossKind::PointwiseBce),
    ("pointwise_mse", LossKind::PointwiseMse),
    ("point_mse", LossKind::PointwiseMse),
    ("pairwise_ranknet", LossKind::PairwiseRanknet),
    ("listwise_ce", LossKind::ListwiseCe),
];

const DATASETS: &[(&str, DatasetKind)] =
    &[("pointwise", DatasetKind::Pointwise), ("grouped", DatasetKind::Grouped)];

const MODELS: &[(&str, ModelKind)] =
    &[("bert_encoder", ModelKind::BertEncoder), ("llm_decoder", ModelKind::LlmDecoder)];

/// The names of `metric_for_best`, with transformers' prefix too.
const METRICS: &[(&str, Metric)] = &[
    ("loss", Metric::Loss),
    ("ndcg@10", Metric::NdcgAt10),
    ("mrr@10", Metric::MrrAt10),
    ("map", Metric::Map),
    ("eval_loss", Metric::Loss),
    ("eval_ndcg@10", Metric::NdcgAt10),
    ("eval_mrr@10", Metric::MrrAt10),
    ("eval_map", Metric::Map),
];

/// The names of `log_with`.
pub const TRACKERS: &[(&str, Tracker)] =
    &[("wandb", Tracker::Wandb), ("tensorboard", Tracker::Tensorboard)];

impl RawTraining {
    /// Asks `fields` for every legal key.
    ///
    /// # Errors
    /// A value of the wrong type.
    pub fn read(fields: &mut Fields<'_>) -> Result<Self> {
        Ok(Self {
            model_name_or_path: fields.string("model_name_or_path")?,
            model_type: fields.choice("model_type", MODELS)?,
            num_labels: fields.integer(&["num_labels"])?,
            query_format: fields.string("query_format")?,
            document_format: fields.string("document_format")?,
            seq: fields.string("seq")?,
            special_token: fields.string("special_token")?,
            train_dataset: fields.string("train_dataset")?,
            val_dataset: fields.string("val_dataset")?,
            train_dataset_type: fields.choice("train_dataset_type", DATASETS)?,
            val_dataset_type: fields.choice("val_dataset_type", DATASETS)?,
            train_label_key: fields.string("train_label_key")?,
            val_label_key: fields.string("val_label_key")?,
            train_group_size: fields.integer(&["train_group_size"])?,
            max_label: fields.float("max_label")?,
            min_label: fields.float("min_label")?,
            max_len: fields.integer(&["max_len"])?,
            shuffle_rate: fields.float("shuffle_rate")?,
            cache_dir: fields.string("cache_dir")?,
            teacher: fields.optional_section("teacher", RawTeacher::read)?,
            loss_type: fields.choice("loss_type", LOSSES)?,
            output_dir: fields.string("output_dir")?,
            epochs: fields.integer(&["epochs", "epoch"])?,
            lr: fields.float("lr")?,
            batch_size: fields.integer(&["batch_size"])?,
            seed: fields.integer(&["seed"])?,
            warmup_proportion: fields.float("warmup_proportion")?,
            stable_proportion: fields.float("stable_proportion")?,
            gradient_accumulation_steps: fields.integer(&["gradient_accumulation_steps"])?,
            mixed_precision: fields.choice("mixed_precision", PRECISIONS)?,
            max_grad_norm: fields.float("max_grad_norm")?,
            weight_decay: fields.float("weight_decay")?,
            special_lr_groups: fields.sections("special_lr_groups", RawLrGroup::read)?,
            gradient_checkpointing: fields.boolean("gradient_checkpointing")?,
            reduce_in_fp32: fields.boolean("reduce_in_fp32")?,
            deterministic: fields.boolean("deterministic")?,
            lora: fields.optional_section("lora", RawLora::read)?,
            eval_steps: fields.integer(&["eval_steps"])?,
            metric_for_best: fields
                .choice_of(&["metric_for_best", "metric_for_best_model"], METRICS)?,
            early_stopping_patience: fields.integer(&["early_stopping_patience"])?,
            save_on_epoch_end: fields.switch("save_on_epoch_end")?,
            num_max_checkpoints: fields.integer(&["num_max_checkpoints"])?,
            save_steps: fields.integer(&["save_steps"])?,
            async_save: fields.boolean("async_save")?,
            save_failure: fields.choice("save_failure", SAVE_FAILURES)?,
            resume: fields.string("resume")?,
            log_interval: fields.integer(&["log_interval"])?,
            log_with: fields.strings("log_with")?,
        })
    }
}

impl RawLrGroup {
    fn read(fields: &mut Fields<'_>, place: &Place) -> Result<Self> {
        Ok(Self {
            keywords: fields.strings("keywords")?,
            lr: fields.float("lr")?,
            place: place.clone(),
        })
    }
}

impl LrGroup {
    /// A complete group: at least one keyword and a learning rate above 0.
    ///
    /// # Errors
    /// Something is missing or out of range.
    pub fn from_raw(raw: &RawLrGroup) -> Result<Self> {
        let missing = |key: &str| raw.place.error(format!("special_lr_groups: {key} is missing"));
        let keywords = raw.keywords.as_ref().ok_or_else(|| missing("keywords"))?;
        let lr = raw.lr.as_ref().ok_or_else(|| missing("lr"))?;
        if keywords.value.is_empty() || keywords.value.iter().any(String::is_empty) {
            return Err(keywords.error("expected parts of parameter names, as in [score.weight]"));
        }
        if lr.value <= 0.0 {
            return Err(lr.error(format!("expected a number above 0, found {}", lr.value)));
        }
        Ok(Self { keywords: keywords.value.clone(), lr: lr.value })
    }
}
