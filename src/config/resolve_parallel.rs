//! What the parallel YAML comes to: one sharding strategy, one world size, one kind of device.

use super::parallel::{
    DistributedType, FsdpSharding, OffloadDevice, RawDeepSpeed, RawFsdp, RawParallel,
};
use super::plan::{Device, ParallelPlan, Sources, Strategy, ZeroStage};
use super::reader::Setting;
use super::resolve::{Resolver, Shared, count, flag};
use super::tree::Place;
use crate::error::Result;

impl Resolver<'_> {
    /// The parallel part of the plan, and what the parallel YAML says about settings that belong
    /// to the training YAML.
    pub(super) fn parallel(
        &mut self,
        raw: &RawParallel,
        sources: &Sources,
    ) -> Result<(ParallelPlan, Shared)> {
        let distributed = raw.distributed_type.as_ref();
        let kind = distributed.map_or(DistributedType::No, |setting| setting.value);
        self.note_unused_sections(raw, kind);
        let gpu_ids = gpu_ids(raw.gpu_ids.as_ref())?;
        let mut plan = ParallelPlan {
            strategy: Strategy::Ddp,
            processes: self.processes(raw, sources)?,
            machines: count(raw.num_machines.as_ref(), 1, 1)?,
            device: self.device(raw, kind, sources)?,
            gpu_ids,
            offload_optimizer: false,
            offload_parameters: false,
            activation_checkpointing: false,
            layer_classes: Vec::new(),
            deepspeed_config_file: None,
        };
        let mut shared = Shared { precision: raw.mixed_precision.clone(), ..Shared::default() };
        self.keep_origin("strategy", distributed);
        match kind {
            DistributedType::No | DistributedType::MultiGpu | DistributedType::MultiCpu => {}
            DistributedType::DeepSpeed => {
                self.deepspeed(&raw.deepspeed, &mut plan)?;
                shared = Shared {
                    accumulation: raw.deepspeed.gradient_accumulation_steps.clone(),
                    batch_size: raw.deepspeed.train_micro_batch_size_per_gpu.clone(),
                    clipping: raw.deepspeed.gradient_clipping.clone(),
                    reductions: [
                        raw.deepspeed.communication_data_type.clone(),
                        raw.deepspeed.grad_accum_dtype.clone(),
                    ],
                    ..shared
                };
            }
            DistributedType::Fsdp => self.fsdp(&raw.fsdp, &mut plan)?,
        }
        Ok((plan, shared))
    }

    /// The world size: as many workers as were started, whatever the file says, which only decides
    /// where nobody else does.
    fn processes(&mut self, raw: &RawParallel, sources: &Sources) -> Result<Option<usize>> {
        // accelerate writes -1 for "as many as the cluster starts".
        let configured = raw.num_processes.as_ref().filter(|setting| setting.value != -1);
        let Some(setting) = configured else { return Ok(sources.processes) };
        let configured = count(Some(setting), 1, 1)?;
        let Some(started) = sources.processes.filter(|&started| started != configured) else {
            return Ok(Some(configured));
        };
        let place = &setting.place;
        if place.option.is_some() {
            let message = format!("this run has {started} processes; start {configured}");
            return Err(setting.error(message));
        }
        let key = &setting.key;
        self.notices.push(format!(
            "{key}: {started} from the launcher overrides {configured} from {place}"
        ));
        // The flags are noted where nothing else has decided.
        self.origins.remove(key);
        Ok(Some(started))
    }

    /// accelerate reads only the section that its `distributed_type` names.
    fn note_unused_sections(&mut self, raw: &RawParallel, kind: DistributedType) {
        let sections = [
            ("deepspeed_config", &raw.deepspeed_place, DistributedType::DeepSpeed),
            ("fsdp_config", &raw.fsdp_place, DistributedType::Fsdp),
        ];
        for (name, place, user) in sections {
            if let Some(place) = place
                && kind != user
            {
                let kind = kind.name();
                self.notices.push(format!(
                    "{place}: {name} has no effect, because distributed_type is {kind}"
                ));
            }
        }
    }

    fn device(
        &mut self,
        raw: &RawParallel,
        kind: DistributedType,
        sources: &Sources,
    ) -> Result<Option<Device>> {
        let at =
            |place: &Place, value| Setting { value, key: "device".into(), place: place.clone() };
        let of_kind = raw.distributed_type.as_ref().and_then(|setting| match kind {
            DistributedType::MultiCpu => Some(at(&setting.place, Device::Cpu)),
            DistributedType::MultiGpu => Some(at(&setting.place, Device::Cuda)),
            _ => None,
        });
        let of_switch = raw.use_cpu.as_ref().filter(|setting| setting.value);
        if let Some(setting) = of_switch
            && kind == DistributedType::MultiGpu
        {
            let message = "true, but distributed_type is MULTI_GPU; use MULTI_CPU, or false";
            return Err(setting.error(message));
        }
        let of_file = of_switch.map(|setting| at(&setting.place, Device::Cpu)).or(of_kind);
        let of_flag = sources
            .device
            .map(|device| at(&Place::in_option("the command line", "the command line", 1), device));
        let chosen = self.prefer("device", of_flag.as_ref(), of_file.as_ref());
        Ok(chosen.map(|setting| setting.value))
    }

    fn deepspeed(&mut self, raw: &RawDeepSpeed, plan: &mut ParallelPlan) -> Result<()> {
        // accelerate's own default is stage 2.
        plan.strategy = match raw.zero_stage.as_ref().map_or(2, |setting| setting.value) {
            0 => Strategy::Ddp,
            1 => Strategy::Zero { stage: ZeroStage::One },
            2 => Strategy::Zero { stage: ZeroStage::Two },
            3 => Strategy::Zero { stage: ZeroStage::Three },
            other => {
                let message = format!("expected 0, 1, 2 or 3, found {other}");
                return match &raw.zero_stage {
                    Some(setting) => Err(setting.error(message)),
                    None => Ok(()),
                };
            }
        };
        self.keep_origin("strategy", raw.zero_stage.as_ref());
        if let Some(setting) = offloaded(raw.offload_optimizer_device.as_ref()) {
            if plan.strategy == Strategy::Ddp {
                return Err(setting.error("cpu needs zero_stage 1, 2 or 3, found 0"));
            }
            plan.offload_optimizer = true;
            self.keep_origin("offload_optimizer", Some(setting));
        }
        if let Some(setting) = offloaded(raw.offload_param_device.as_ref()) {
            if plan.strategy != (Strategy::Zero { stage: ZeroStage::Three }) {
                return Err(setting.error("cpu needs zero_stage 3"));
            }
            plan.offload_parameters = true;
            self.keep_origin("offload_parameters", Some(setting));
        }
        if let Some(setting) = &raw.deepspeed_config_file {
            plan.deepspeed_config_file = Some(setting.value.clone().into());
            self.keep_origin("deepspeed_config_file", Some(setting));
        }
        Ok(())
    }

    fn fsdp(&mut self, raw: &RawFsdp, plan: &mut ParallelPlan) -> Result<()> {
        let chosen = self.fsdp_sharding(raw)?;
        plan.strategy = match chosen.map_or(FsdpSharding::FullShard, |setting| setting.value) {
            FsdpSharding::NoShard => Strategy::Ddp,
            FsdpSharding::ShardGradOp => Strategy::Zero { stage: ZeroStage::Two },
            FsdpSharding::FullShard => Strategy::Zero { stage: ZeroStage::Three },
            FsdpSharding::HybridShardZero2 => Strategy::Hybrid { stage: ZeroStage::Two },
            FsdpSharding::HybridShard => Strategy::Hybrid { stage: ZeroStage::Three },
        };
        self.keep_origin("strategy", chosen);
        if let Some(setting) = raw.offload_params.as_ref().filter(|setting| setting.value) {
            (plan.offload_optimizer, plan.offload_parameters) = (true, true);
            self.keep_origin("offload_optimizer", Some(setting));
            self.keep_origin("offload_parameters", Some(setting));
        }
        let checkpointing = raw.activation_checkpointing.as_ref();
        plan.activation_checkpointing = flag(checkpointing);
        self.keep_origin("activation_checkpointing", checkpointing);
        if let Some(setting) = &raw.transformer_layer_cls_to_wrap {
            let names = setting.value.iter().flat_map(|text| text.split(',')).map(str::trim);
            plan.layer_classes = names.filter(|name| !name.is_empty()).map(Into::into).collect();
            self.keep_origin("layer_classes", Some(setting));
        }
        Ok(())
    }

    /// Which of FSDP1's and FSDP2's keys names the sharding; the other one is noted as unused.
    fn fsdp_sharding<'r>(&mut self, raw: &'r RawFsdp) -> Result<Option<&'r Setting<FsdpSharding>>> {
        let second = match &raw.version {
            Some(version) if ![1, 2].contains(&version.value) => {
                return Err(version.error(format!("expected 1 or 2, found {}", version.value)));
            }
            version => version.as_ref().is_some_and(|version| version.value == 2),
        };
        let strategy = raw.sharding_strategy.as_ref();
        let reshard = raw.reshard_after_forward.as_ref();
        let (chosen, unused) = match (second, strategy) {
            (true, _) => (reshard, strategy),
            (false, Some(_)) => (strategy, reshard),
            // FSDP1 files of recent accelerate name the strategy under FSDP2's key.
            (false, None) => (reshard, None),
        };
        if let Some(unused) = unused {
            let (version, other) = if second {
                (2, "fsdp_reshard_after_forward")
            } else {
                (1, "fsdp_sharding_strategy")
            };
            self.notices.push(format!(
                "{}: {} has no effect under fsdp_version {version}, which reads {other}",
                unused.place, unused.key
            ));
        }
        Ok(chosen)
    }

    /// Remembers where a setting came from whose name in the plan is not a key of the YAML.
    fn keep_origin<T>(&mut self, name: &str, setting: Option<&Setting<T>>) {
        if let Some(setting) = setting {
            self.origins.insert(name.to_owned(), setting.origin());
        }
    }
}

fn offloaded(setting: Option<&Setting<OffloadDevice>>) -> Option<&Setting<OffloadDevice>> {
    setting.filter(|setting| setting.value == OffloadDevice::Cpu)
}

/// `all`, `0,1`, `0` or a list; `None` is all.
fn gpu_ids(setting: Option<&Setting<Vec<String>>>) -> Result<Option<Vec<String>>> {
    let Some(setting) = setting else { return Ok(None) };
    let ids: Vec<String> = setting
        .value
        .iter()
        .flat_map(|text| text.split(','))
        .map(|id| id.trim().to_owned())
        .collect();
    if ids == ["all"] {
        return Ok(None);
    }
    for (index, id) in ids.iter().enumerate() {
        if id.is_empty() || id == "all" {
            return Err(setting.error("expected all, or device numbers such as 0,1"));
        }
        if ids[..index].contains(id) {
            return Err(setting.error(format!("device {id} is given twice")));
        }
    }
    if ids.is_empty() {
        return Err(setting.error("expected all, or device numbers such as 0,1, found none"));
    }
    Ok(Some(ids))
}
