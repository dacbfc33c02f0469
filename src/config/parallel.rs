//! The parallel YAML as written: accelerate's schema, every legal key once, nothing decided yet.

use super::plan::Precision;
use super::reader::{Auto, Fields, Setting};
use super::training::PRECISIONS;
use super::tree::Place;
use crate::error::Result;

/// `distributed_type`, as far as it can be served here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DistributedType {
    /// One process.
    No,
    /// Data parallelism over GPUs.
    MultiGpu,
    /// Data parallelism over CPU processes.
    MultiCpu,
    /// Sharded as `fsdp_config` says.
    Fsdp,
    /// Sharded as `deepspeed_config` says.
    DeepSpeed,
}

/// FSDP's sharding strategies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsdpSharding {
    /// 1: parameters, gradients and optimizer states (ZeRO-3).
    FullShard,
    /// 2: gradients and optimizer states (ZeRO-2).
    ShardGradOp,
    /// 3: nothing (DDP).
    NoShard,
    /// 4: full shard within a machine, replicas across machines.
    HybridShard,
    /// 5: as 4, sharding gradients and optimizer states only.
    HybridShardZero2,
}

/// Where a state is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OffloadDevice {
    /// With the computation.
    None,
    /// In the host's memory.
    Cpu,
}

/// What the parallel YAML says; `None` where it is silent. Each field is the key of its name.
#[derive(Debug)]
pub struct RawParallel {
    pub distributed_type: Option<Setting<DistributedType>>,
    pub num_processes: Option<Setting<i64>>,
    pub num_machines: Option<Setting<i64>>,
    pub gpu_ids: Option<Setting<Vec<String>>>,
    pub mixed_precision: Option<Setting<Precision>>,
    pub use_cpu: Option<Setting<bool>>,
    pub deepspeed: RawDeepSpeed,
    /// Where `deepspeed_config` is, when it holds anything.
    pub deepspeed_place: Option<Place>,
    pub fsdp: RawFsdp,
    /// Where `fsdp_config` is, when it holds anything.
    pub fsdp_place: Option<Place>,
}

/// `deepspeed_config`; each field is the key of its name.
#[derive(Debug)]
pub struct RawDeepSpeed {
    pub zero_stage: Option<Setting<i64>>,
    pub gradient_accumulation_steps: Option<Setting<Auto<i64>>>,
    pub gradient_clipping: Option<Setting<Auto<f64>>>,
    pub train_micro_batch_size_per_gpu: Option<Setting<Auto<i64>>>,
    /// Of a `DeepSpeed` JSON file only: what batch size, accumulation and world size come to.
    pub train_batch_size: Option<Setting<Auto<i64>>>,
    /// Of a `DeepSpeed` JSON file only: the precision of reductions.
    pub communication_data_type: Option<Setting<Precision>>,
    /// Of a `DeepSpeed` JSON file only: the precision in which micro-batches are added up.
    pub grad_accum_dtype: Option<Setting<Precision>>,
    pub offload_optimizer_device: Option<Setting<OffloadDevice>>,
    pub offload_param_device: Option<Setting<OffloadDevice>>,
    pub deepspeed_config_file: Option<Setting<String>>,
}

/// `fsdp_config`; each field is the key of its name behind `fsdp_`.
#[derive(Debug)]
pub struct RawFsdp {
    pub version: Option<Setting<i64>>,
    pub sharding_strategy: Option<Setting<FsdpSharding>>,
    /// FSDP2's true (full shard) or false (gradients and optimizer states); under FSDP1 accelerate
    /// also accepts a strategy's name here.
    pub reshard_after_forward: Option<Setting<FsdpSharding>>,
    pub offload_params: Option<Setting<bool>>,
    pub activation_checkpointing: Option<Setting<bool>>,
    /// Names of classes; commas may stand inside one text.
    pub transformer_layer_cls_to_wrap: Option<Setting<Vec<String>>>,
}

const DISTRIBUTED_TYPES: &[(&str, DistributedType)] = &[
    ("NO", DistributedType::No),
    ("MULTI_GPU", DistributedType::MultiGpu),
    ("MULTI_CPU", DistributedType::MultiCpu),
    ("FSDP", DistributedType::Fsdp),
    ("DEEPSPEED", DistributedType::DeepSpeed),
];

const SHARDING: &[(&str, FsdpSharding)] = &[
    ("FULL_SHARD", FsdpSharding::FullShard),
    ("SHARD_GRAD_OP", FsdpSharding::ShardGradOp),
    ("NO_SHARD", FsdpSharding::NoShard),
    ("HYBRID_SHARD", FsdpSharding::HybridShard),
    ("HYBRID_SHARD_ZERO2", FsdpSharding::HybridShardZero2),
    ("1", FsdpSharding::FullShard),
    ("2", FsdpSharding::ShardGradOp),
    ("3", FsdpSharding::NoShard),
    ("4", FsdpSharding::HybridShard),
    ("5", FsdpSharding::HybridShardZero2),
];

const RESHARDING: &[(&str, FsdpSharding)] = &[
    ("true", FsdpSharding::FullShard),
    ("false", FsdpSharding::ShardGradOp),
    ("FULL_SHARD", FsdpSharding::FullShard),
    ("SHARD_GRAD_OP", FsdpSharding::ShardGradOp),
    ("NO_SHARD", FsdpSharding::NoShard),
    ("HYBRID_SHARD", FsdpSharding::HybridShard),
    ("HYBRID_SHARD_ZERO2", FsdpSharding::HybridShardZero2),
];

pub(super) const OFFLOAD: &[(&str, OffloadDevice)] =
    &[("none", OffloadDevice::None), ("cpu", OffloadDevice::Cpu)];

/// Keys that accelerate writes and that mean nothing here: the launcher and its environment
/// contract settle who meets where, and there is no TPU, no Python function and no compiler.
const IGNORED: &[&str] = &[
    "compute_environment",
    "debug",
    "downcast_bf16",
    "dynamo_backend",
    "dynamo_config",
    "enable_cpu_affinity",
    "ipex_config",
    "machine_rank",
    "main_process_ip",
    "main_process_port",
    "main_training_function",
    "mpirun_config",
    "rdzv_backend",
    "same_network",
    "command_file",
    "commands",
    "tpu_env",
    "tpu_name",
    "tpu_use_cluster",
    "tpu_use_sudo",
    "tpu_vm",
    "tpu_zone",
];

const DEEPSPEED_IGNORED: &[&str] = &[
    "deepspeed_exclusion_filter",
    "deepspeed_hostfile",
    "deepspeed_inclusion_filter",
    "deepspeed_moe_layer_cls_names",
    "deepspeed_multinode_launcher",
    "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
    "zero3_init_flag",
    "zero3_save_16bit_model",
];

const FSDP_IGNORED: &[&str] = &[
    "fsdp_auto_wrap_policy",
    "fsdp_backward_prefetch",
    "fsdp_backward_prefetch_policy",
    "fsdp_cpu_ram_efficient_loading",
    "fsdp_forward_prefetch",
    "fsdp_limit_all_gathers",
    "fsdp_min_num_params",
    "fsdp_state_dict_type",
    "fsdp_sync_module_states",
    "fsdp_use_orig_params",
];

/// What is said of kinds of parallelism that do not exist here.
const OTHER_PARALLELISM: &str = "tensor, pipeline and context parallelism are not done here";

/// The sizes of accelerate's `parallelism_config`: over how many workers FSDP divides is known without.
fn read_sizes(fields: &mut Fields<'_>) -> Result<()> {
    fields.ignored(&[
        "parallelism_config_cp_backend",
        "parallelism_config_cp_comm_strategy",
        "parallelism_config_dp_shard_size",
        "parallelism_config_sp_attn_implementation",
        "parallelism_config_sp_backend",
        "parallelism_config_sp_seq_length",
        "parallelism_config_sp_seq_length_is_variable",
    ])?;
    for key in
        ["parallelism_config_cp_size", "parallelism_config_sp_size", "parallelism_config_tp_size"]
    {
        fields.only(key, "1", OTHER_PARALLELISM)?;
    }
    // accelerate has these sizes for FSDP2 only.
    let hybrid = "parameters are repeated over machines by fsdp_reshard_after_forward: HYBRID_SHARD, or \
                  by fsdp_sharding_strategy: HYBRID_SHARD under fsdp_version 1";
    fields.only("parallelism_config_dp_replicate_size", "1", hybrid)
}

impl RawParallel {
    /// Asks `fields` for every legal key.
    ///
    /// # Errors
    /// A value of the wrong type, or a form of parallelism that does not exist here.
    pub fn read(fields: &mut Fields<'_>) -> Result<Self> {
        let (deepspeed, deepspeed_place) =
            fields.section("deepspeed_config", RawDeepSpeed::read)?;
        let (fsdp, fsdp_place) = fields.section("fsdp_config", RawFsdp::read)?;
        fields.ignored(IGNORED)?;
        for key in ["megatron_lm_config", "tp_config"] {
            fields.empty(key, OTHER_PARALLELISM)?;
        }
        fields.section("parallelism_config", read_sizes)?;
        fields.empty("fp8_config", "fp8 is not done here; use mixed_precision: bf16")?;
        Ok(Self {
            distributed_type: fields.choice("distributed_type", DISTRIBUTED_TYPES)?,
            num_processes: fields.integer(&["num_processes"])?,
            num_machines: fields.integer(&["num_machines"])?,
            gpu_ids: fields.strings("gpu_ids")?,
            mixed_precision: fields.choice("mixed_precision", PRECISIONS)?,
            use_cpu: fields.boolean("use_cpu")?,
            deepspeed,
            deepspeed_place,
            fsdp,
            fsdp_place,
        })
    }
}

impl RawDeepSpeed {
    fn read(fields: &mut Fields<'_>) -> Result<Self> {
        fields.ignored(DEEPSPEED_IGNORED)?;
        Ok(Self {
            zero_stage: fields.integer(&["zero_stage"])?,
            gradient_accumulation_steps: fields.integer_or_auto("gradient_accumulation_steps")?,
            gradient_clipping: fields.float_or_auto("gradient_clipping")?,
            train_micro_batch_size_per_gpu: fields
                .integer_or_auto("train_micro_batch_size_per_gpu")?,
            train_batch_size: None,
            communication_data_type: None,
            grad_accum_dtype: None,
            offload_optimizer_device: fields.choice("offload_optimizer_device", OFFLOAD)?,
            offload_param_device: fields.choice("offload_param_device", OFFLOAD)?,
            deepspeed_config_file: fields.string("deepspeed_config_file")?,
        })
    }
}

impl RawFsdp {
    fn read(fields: &mut Fields<'_>) -> Result<Self> {
        fields.ignored(FSDP_IGNORED)?;
        let reason = "not done here; remove it";
        fields.only("fsdp_activation_checkpointing_offload", "false", reason)?;
        Ok(Self {
            version: fields.integer(&["fsdp_version"])?,
            sharding_strategy: fields.choice("fsdp_sharding_strategy", SHARDING)?,
            reshard_after_forward: fields.choice("fsdp_reshard_after_forward", RESHARDING)?,
            offload_params: fields.boolean("fsdp_offload_params")?,
            activation_checkpointing: fields.boolean("fsdp_activation_checkpointing")?,
            transformer_layer_cls_to_wrap: fields.strings("fsdp_transformer_layer_cls_to_wrap")?,
        })
    }
}
