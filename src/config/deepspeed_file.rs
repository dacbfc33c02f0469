//! A `DeepSpeed` JSON file, which `deepspeed_config_file` names.
//!
//! As in accelerate, it takes the place of the `deepspeed_config` section and of the parallel
//! YAML's `mixed_precision`, and the same settings beside it are an error. "auto" takes the value
//! from the training YAML.

use std::path::Path;

use super::parallel::{DistributedType, OFFLOAD, OffloadDevice, RawDeepSpeed, RawParallel};
use super::plan::Precision;
use super::reader::{Auto, Fields, Setting};
use super::tree::{Place, read_json};
use crate::error::{Error, Result};

/// Keys that tune `DeepSpeed`'s own machinery, or say what it logs.
const IGNORED: &[&str] = &[
    "activation_checkpointing",
    "aio",
    "autotuning",
    "checkpoint",
    "comms_logger",
    "csv_monitor",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "sparse_gradients",
    "steps_per_print",
    "tensorboard",
    "wandb",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
];

const NOT_DONE: &str = "not done here; remove the section";

/// Sections that must ask for nothing, and what to do about one that does.
const REFUSED: &[(&str, &str)] = &[
    (
        "optimizer",
        "it is AdamW, as the training YAML sets it (lr, weight_decay); remove the section",
    ),
    (
        "scheduler",
        "it is the training YAML's (warmup_proportion, stable_proportion); remove the section",
    ),
    ("amp", "not done here; use bf16 or fp16"),
    ("compression_training", NOT_DONE),
    ("curriculum_learning", NOT_DONE),
    ("data_efficiency", NOT_DONE),
    ("elasticity", NOT_DONE),
    ("pipeline", NOT_DONE),
    ("progressive_layer_drop", NOT_DONE),
    ("quantize_training", NOT_DONE),
    ("sparse_attention", NOT_DONE),
    ("tensor_parallel", NOT_DONE),
    ("torch_autocast", "not done here; use bf16 or fp16"),
];

const DATA_TYPES: &[(&str, Precision)] =
    &[("fp32", Precision::Fp32), ("fp16", Precision::Fp16), ("bf16", Precision::Bf16)];

const ZERO_IGNORED: &[&str] = &[
    "allgather_bucket_size",
    "allgather_partitions",
    "contiguous_gradients",
    "elastic_checkpoint",
    "ignore_unused_parameters",
    "load_from_fp32_weights",
    "memory_efficient_linear",
    "overlap_comm",
    "reduce_bucket_size",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "use_multi_rank_bucket_allreduce",
];

/// Keys of `zero_optimization` with the one value that asks for nothing, and what to use instead.
const ZERO_REFUSED: &[(&str, &str, &str)] = &[
    ("cpu_offload", "false", "an old name; write \"offload_optimizer\": {\"device\": \"cpu\"}"),
    ("cpu_offload_params", "false", "an old name; write \"offload_param\": {\"device\": \"cpu\"}"),
    ("mics_shard_size", "-1", "not done here; fsdp_sharding_strategy: HYBRID_SHARD does the like"),
    (
        "zero_hpz_partition_size",
        "1",
        "not done here; fsdp_sharding_strategy: HYBRID_SHARD does the like",
    ),
    ("zero_quantized_gradients", "false", "not done here; remove it"),
    ("zero_quantized_weights", "false", "not done here; remove it"),
];

const OFFLOAD_IGNORED: &[&str] = &[
    "buffer_count",
    "buffer_size",
    "fast_init",
    "max_in_cpu",
    "nvme_path",
    "pin_memory",
    "pipeline",
    "pipeline_read",
    "pipeline_write",
];

const FP16_IGNORED: &[&str] = &[
    "auto_cast",
    "consecutive_hysteresis",
    "hysteresis",
    "initial_scale_power",
    "loss_scale_window",
    "min_loss_scale",
];

impl RawParallel {
    /// Puts what the file of `deepspeed_config_file` says, if there is one, in the place of the
    /// `deepspeed_config` section. Returns a line about what in it means nothing here.
    ///
    /// # Errors
    /// The file cannot be read, is not JSON, holds an unknown key, a wrong type or something that
    /// is not done here; or a setting stands beside it that belongs into it.
    pub(super) fn adopt_deepspeed_file(&mut self) -> Result<Option<String>> {
        let used = self.distributed_type.as_ref().map(|setting| setting.value);
        let Some(path) = self.deepspeed.deepspeed_config_file.clone() else { return Ok(None) };
        if used != Some(DistributedType::DeepSpeed) {
            return Ok(None);
        }
        self.refuse_settings_beside(&path)?;
        let mapping = read_json(Path::new(&path.value)).map_err(|error| match error {
            Error::Io { source, .. } => path.error(format!("cannot read {}: {source}", path.value)),
            other => other,
        })?;
        let mut fields = Fields::new(vec![&mapping]);
        let (precision, section) = read(&mut fields, &path)?;
        let ignored = fields.finish()?.ignored.join(", ");
        let file = path.value.clone();
        self.mixed_precision = precision;
        self.deepspeed = RawDeepSpeed { deepspeed_config_file: Some(path), ..section };
        Ok((!ignored.is_empty())
            .then(|| format!("{file}: without meaning here, ignored: {ignored}")))
    }

    /// accelerate refuses them too: it would not know which of the two is meant.
    fn refuse_settings_beside(&self, path: &Setting<String>) -> Result<()> {
        let section = &self.deepspeed;
        let beside = [
            section.zero_stage.as_ref().map(Setting::origin),
            section.gradient_accumulation_steps.as_ref().map(Setting::origin),
            section.gradient_clipping.as_ref().map(Setting::origin),
            section.train_micro_batch_size_per_gpu.as_ref().map(Setting::origin),
            section.offload_optimizer_device.as_ref().map(Setting::origin),
            section.offload_param_device.as_ref().map(Setting::origin),
            self.mixed_precision.as_ref().map(Setting::origin),
        ];
        match beside.into_iter().flatten().next() {
            Some(origin) => Err(origin.error(format!(
                "deepspeed_config_file names {}, which decides this; write it there",
                path.value
            ))),
            None => Ok(()),
        }
    }
}

type Read = (Option<Setting<Precision>>, RawDeepSpeed);

fn read(fields: &mut Fields<'_>, path: &Setting<String>) -> Result<Read> {
    fields.ignored(IGNORED)?;
    for (key, reason) in REFUSED {
        fields.empty(key, reason)?;
    }
    let ((stage, optimizer, parameters), zero_place) =
        fields.section("zero_optimization", |fields| {
            fields.ignored(ZERO_IGNORED)?;
            for (key, harmless, reason) in ZERO_REFUSED {
                fields.only(key, harmless, reason)?;
            }
            let stage = fields.integer(&["stage"])?;
            let (optimizer, _) = fields.section("offload_optimizer", |fields| {
                fields.only("ratio", "1.0", "not done here; remove it")?;
                offload_device(fields)
            })?;
            let (parameters, _) = fields.section("offload_param", offload_device)?;
            Ok((stage, optimizer, parameters))
        })?;
    let Some(zero_place) = zero_place else {
        let message = format!("{} has no zero_optimization; expected one with a stage", path.value);
        return Err(path.error(message));
    };
    let section = RawDeepSpeed {
        // DeepSpeed's own default, not accelerate's.
        zero_stage: Some(stage.unwrap_or_else(|| default_stage(zero_place))),
        gradient_accumulation_steps: fields.integer_or_auto("gradient_accumulation_steps")?,
        gradient_clipping: fields.float_or_auto("gradient_clipping")?,
        train_micro_batch_size_per_gpu: fields.integer_or_auto("train_micro_batch_size_per_gpu")?,
        train_batch_size: fields.integer_or_auto("train_batch_size")?,
        communication_data_type: fields.choice("communication_data_type", DATA_TYPES)?,
        grad_accum_dtype: fields
            .section("data_types", |fields| fields.choice("grad_accum_dtype", DATA_TYPES))?
            .0,
        offload_optimizer_device: optimizer,
        offload_param_device: parameters,
        deepspeed_config_file: None,
    };
    Ok((precision(fields)?, section))
}

fn default_stage(place: Place) -> Setting<i64> {
    Setting { value: 0, key: "zero_optimization".into(), place }
}

fn offload_device(fields: &mut Fields<'_>) -> Result<Option<Setting<OffloadDevice>>> {
    fields.ignored(OFFLOAD_IGNORED)?;
    fields.choice("device", OFFLOAD)
}

/// `fp16.enabled` and `bf16.enabled`; both "auto", or absent, is whatever the training YAML says.
fn precision(fields: &mut Fields<'_>) -> Result<Option<Setting<Precision>>> {
    let (fp16, _) = fields.section("fp16", |fields| {
        fields.ignored(FP16_IGNORED)?;
        fields.only("loss_scale", "0", "the loss scale is dynamic here")?;
        fields.only("fp16_master_weights_and_grads", "false", "not done here; remove it")?;
        fields.boolean_or_auto("enabled")
    })?;
    let (bf16, _) = fields.section("bf16", |fields| {
        fields.ignored(&["check_grad_overflow", "immediate_grad_update"])?;
        fields.only("loss_scale", "1", "bf16 needs none")?;
        fields.boolean_or_auto("enabled")
    })?;
    let says = |setting: &Option<Setting<Auto<bool>>>, what| {
        setting.clone().filter(|setting| setting.value == Auto::Value(what))
    };
    let named = |setting: Setting<Auto<bool>>, value| {
        Some(Setting { value, key: setting.key, place: setting.place })
    };
    Ok(match (says(&fp16, true), says(&bf16, true)) {
        (Some(_), Some(bf16)) => {
            return Err(bf16.error("fp16.enabled is true as well; keep one of them"));
        }
        (Some(fp16), None) => named(fp16, Precision::Fp16),
        (None, Some(bf16)) => named(bf16, Precision::Bf16),
        (None, None) => match (says(&fp16, false), says(&bf16, false)) {
            (Some(_), Some(bf16)) => named(bf16, Precision::Fp32),
            _ => None,
        },
    })
}
