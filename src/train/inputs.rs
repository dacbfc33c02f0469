//! Everything a run reads, loaded and checked before any worker trains.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::info;

use super::{best, checkpoints, teacher};
use crate::config::{self, DatasetKind, ModelKind, Plan, Strategy};
use crate::data::{CacheOptions, Dataset, LoadOptions, LoadReport, Sampler, SamplerOptions};
use crate::engine::MemoryForecast;
use crate::error::{Error, Result};
use crate::model::weights::WeightFiles;
use crate::model::{ModelConfig, Parameter, Pretrained, foreign_layer_classes, lora};
use crate::optim::Schedule;
use crate::score::{PairTexts, check_model};
use crate::text::{LengthReport, PairTokenizer};
use crate::torch_ext::runtime;

/// Pairs whose token lengths are measured for the report.
const LENGTH_SAMPLE: usize = 256;

/// A model directory, data sets and the schedule they make.
#[derive(Debug)]
pub struct Inputs {
    /// The base model's directory.
    pub model_dir: PathBuf,
    /// The hub's commit that it is a snapshot of.
    pub model_revision: Option<String>,
    /// Its configuration.
    pub config: ModelConfig,
    /// Its weights, on disk.
    pub weights: WeightFiles,
    /// Its tokenizer.
    pub tokenizer: Arc<PairTokenizer>,
    /// Parameters that the weights lack.
    pub initialised: Vec<String>,
    /// The training data.
    pub train: Arc<Dataset>,
    /// What loading it saw.
    pub train_report: LoadReport,
    /// The validation data.
    pub validation: Option<Arc<Dataset>>,
    /// What loading it saw.
    pub validation_report: Option<LoadReport>,
    /// The plan of every epoch.
    pub sampler: Arc<Sampler>,
    /// The learning rate of every step.
    pub schedule: Schedule,
}

impl Inputs {
    /// Reads what `plan` names, for a world of `world_size` ranks.
    ///
    /// # Errors
    /// User errors that name the file, the line or the setting.
    pub fn load(plan: &Plan, world_size: usize) -> Result<Self> {
        let pretrained = pretrained(plan)?;
        let Pretrained { dir: model_dir, revision, mut config, weights, .. } = pretrained;
        let tokenizer = Arc::new(tokenizer(plan, &model_dir)?);
        let initialised = check_model(&model_dir, &config, &weights, &tokenizer)?;
        if let Some(lora) = &plan.training.lora {
            let lora = lora::resolve(lora, &config);
            config.lora = Some(lora.map_err(|bad| plan.error(bad.key, bad.message))?);
        }

        let data = &plan.data;
        // The smaller one first: what is wrong with it is known before a long load.
        let (validation, validation_report) = match &data.validation {
            Some(path) => {
                let (dataset, report) = load_validation(plan, path, &tokenizer)?;
                best::check(plan, &dataset)?;
                (Some(Arc::new(dataset)), Some(report))
            }
            None => (None, None),
        };
        let (train, train_report) = load_train(plan, &tokenizer)?;
        if plan.loss.needs_groups() && train.kind != DatasetKind::Grouped {
            let message = "compares the hits of a query, but train_dataset holds single pairs; \
                           give grouped records, or use pointwise_bce or pointwise_mse";
            return Err(plan.error("loss_type", message));
        }
        if !plan.loss.needs_groups() && train.kind == DatasetKind::Grouped {
            let message = "judges single pairs, but train_dataset is read as grouped; set \
                           train_dataset_type: pointwise, or use pairwise_ranknet or listwise_ce";
            return Err(plan.error("loss_type", message));
        }
        let train = Arc::new(train);
        let training = &plan.training;
        let options = SamplerOptions {
            world_size,
            batch_size: training.batch_size,
            accumulation: training.accumulation,
            group_size: data.group_size,
            max_len: data.max_len,
            seed: training.seed,
        };
        let sampler = Arc::new(Sampler::new(Arc::clone(&train), options)?);
        let total = sampler.steps_per_epoch() * training.epochs;
        let schedule = Schedule::new(total, training.warmup_proportion, training.stable_proportion);
        Ok(Self {
            model_dir,
            model_revision: revision,
            config,
            weights,
            tokenizer,
            initialised,
            train,
            train_report,
            validation,
            validation_report,
            sampler,
            schedule,
        })
    }

    /// What was read, for people: data, lengths, steps.
    ///
    /// # Errors
    /// When the tokenizer refuses a text.
    pub fn describe(&self, plan: &Plan, world_size: usize) -> Result<String> {
        let training = &plan.training;
        let items = training.batch_size * training.accumulation * world_size;
        let unit = if self.train.kind == DatasetKind::Grouped { "groups" } else { "pairs" };
        let lengths = |dataset: &Dataset| {
            LengthReport::measure(dataset, &self.tokenizer, plan.data.max_len, LENGTH_SAMPLE)
        };
        let mut lines = Vec::new();
        lines.extend(
            self.model_revision
                .iter()
                .map(|revision| format!("{}: revision {revision} of the hub", plan.model.path)),
        );
        lines.extend([
            self.train_report.to_string(),
            lengths(&self.train)?.to_string(),
            self.sampler.report().to_string(),
        ]);
        if let (Some(dataset), Some(report)) = (&self.validation, &self.validation_report) {
            lines.extend([report.to_string(), lengths(dataset)?.to_string()]);
        }
        lines.push(format!(
            "{} optimizer steps: {} an epoch, {} epochs; {items} {unit} a step over {world_size} \
             worker(s)",
            self.schedule.total(),
            self.sampler.steps_per_epoch(),
            training.epochs,
        ));
        let parameters: Vec<_> = crate::model::stages(&self.config)
            .iter()
            .flat_map(|stage| stage.parameters())
            .collect();
        lines.extend(self.describe_lora(&parameters));
        let (trained, _): (Vec<_>, Vec<_>) =
            parameters.into_iter().partition(|parameter| parameter.trained);
        for keyword in super::parameter_groups(plan).unmatched(&trained) {
            lines.push(format!("special_lr_groups: {keyword:?} is in no parameter's name"));
        }
        let classes = &plan.parallel.layer_classes;
        for line in foreign_layer_classes(classes, &self.config.model_type) {
            lines.push(plan.warning("layer_classes", line));
        }
        if self.tokenizer.fixed_tokens() == 0 && plan.model.kind == ModelKind::BertEncoder {
            lines.push("the tokenizer has no pair template: texts are joined as they are".into());
        }
        lines.extend(checkpoints::outlook(plan)?);
        lines.push(self.forecast(plan, world_size));
        if !self.initialised.is_empty() {
            lines.push(format!(
                "no weights for {}: initialised from seed {}",
                self.initialised.join(", "),
                training.seed
            ));
        }
        Ok(lines.join("\n"))
    }

    /// What of the model learns, where that is not all of it.
    fn describe_lora(&self, parameters: &[Parameter]) -> Option<String> {
        let lora = self.config.lora.as_ref()?;
        let count = |parameters: &mut dyn Iterator<Item = &Parameter>| -> usize {
            parameters.map(Parameter::elements).sum()
        };
        let trained = count(&mut parameters.iter().filter(|parameter| parameter.trained));
        let all = count(&mut parameters.iter());
        let saved: Vec<&str> = lora.saved_names.iter().map(String::as_str).collect();
        Some(format!(
            "LoRA of rank {} beside {} linear layers, and {} trained whole: {trained} of {all} \
             parameters learn ({:.2} %)",
            lora.r,
            lora.targets.len(),
            saved.join(", "),
            100.0 * trained as f64 / all as f64
        ))
    }

    /// What a worker will hold, and whether there is that much. Hybrid runs divide by the workers
    /// of a machine.
    fn forecast(&self, plan: &Plan, world_size: usize) -> String {
        let on_a_machine = world_size.div_ceil(plan.parallel.machines);
        let dividing = match plan.parallel.strategy {
            Strategy::Hybrid { .. } => on_a_machine,
            Strategy::Ddp | Strategy::Zero { .. } => world_size,
        };
        let options = super::engine_options(plan, tch::Device::Cpu, 0, dividing);
        let group = match self.train.kind {
            DatasetKind::Pointwise => 1,
            DatasetKind::Grouped => plan.data.group_size,
        };
        let tokens = plan.training.batch_size * group * plan.data.max_len;
        let forecast = MemoryForecast::new(&self.config, &options, tokens);
        let on_gpu = match plan.parallel.device {
            Some(device) => device == config::Device::Cuda,
            None => runtime::sees_gpu(),
        };
        let mut lines = vec![forecast.to_string()];
        if on_gpu {
            lines.extend(shortfall("a GPU", forecast.total(), runtime::freest_gpu_memory()));
        }
        let on_host = forecast.held.host + if on_gpu { 0 } else { forecast.total() };
        let needed = on_host * on_a_machine;
        lines.extend(shortfall("this machine", needed, runtime::available_memory()));
        lines.join("\n")
    }

    /// Logs the plan's notices and what was read, a line at a time.
    pub(super) fn log(&self, plan: &Plan, world_size: usize) -> Result<()> {
        for notice in &plan.notices {
            info!("{notice}");
        }
        for line in self.describe(plan, world_size)?.lines() {
            info!("{line}");
        }
        Ok(())
    }
}

/// What to say where `needed` bytes are more than there are `available`, if that is known.
fn shortfall(place: &str, needed: usize, available: Option<usize>) -> Option<String> {
    let available = available.filter(|&available| needed > available)?;
    let gb = |bytes: usize| bytes as f64 / 1e9;
    Some(format!(
        "this does not fit: {place} has to hold {:.1} GB and has {:.1} GB left; lower batch_size or \
         max_len, set gradient_checkpointing: true, or divide more",
        gb(needed),
        gb(available)
    ))
}

/// The base model, downloaded where it is on the hub; it must be of the kind that the plan names.
fn pretrained(plan: &Plan) -> Result<Pretrained> {
    let pretrained = Pretrained::open(&plan.model.path).map_err(|error| match error {
        Error::Usage(message) => plan.error("model_name_or_path", message),
        other => other,
    })?;
    if pretrained.base.is_some() && plan.training.lora.is_some() {
        let message = "is an adapter itself; merge it first with reranker convert --merge, or train \
                       without lora, which goes on from the merged weights";
        return Err(plan.error("model_name_or_path", format!("{} {message}", plan.model.path)));
    }
    let config = &pretrained.config;
    if config.kind() != plan.model.kind {
        return Err(plan.error(
            "model_type",
            format!(
                "{} does not fit {}, whose config.json says {}; use {}",
                plan.model.kind,
                pretrained.dir.display(),
                config.model_type,
                config.kind()
            ),
        ));
    }
    let positions = config.max_positions();
    if plan.data.max_len > positions {
        return Err(plan.error(
            "max_len",
            format!("{} is more than the model's {positions} positions", plan.data.max_len),
        ));
    }
    Ok(pretrained)
}

/// The base model's tokenizer with the run's texts around query and document.
fn tokenizer(plan: &Plan, dir: &Path) -> Result<PairTokenizer> {
    let tokenizer = PairTexts {
        query_format: &plan.model.query_format,
        document_format: &plan.model.document_format,
        seq: &plan.model.seq,
        special_token: &plan.model.special_token,
    }
    .tokenizer(dir, plan.model.kind)?;
    tokenizer.check_max_len(plan.data.max_len).map_err(|error| plan.error("max_len", error))?;
    Ok(tokenizer)
}

fn load_train(plan: &Plan, tokenizer: &Arc<PairTokenizer>) -> Result<(Dataset, LoadReport)> {
    let data = &plan.data;
    let options = match &data.teacher {
        Some(teacher) => teacher::load_options(plan, teacher)?,
        None => LoadOptions {
            kind: data.train_kind,
            label_key: Some(data.train_label_key.clone()),
            ..load_options(plan, &data.train)
        },
    };
    let document_texts = data.shuffle_rate > 0.0;
    Dataset::open(&options, &CacheOptions { document_texts, ..cache_options(plan, tokenizer) })
}

fn load_validation(
    plan: &Plan,
    path: &Path,
    tokenizer: &Arc<PairTokenizer>,
) -> Result<(Dataset, LoadReport)> {
    let data = &plan.data;
    let options = LoadOptions {
        kind: data.validation_kind,
        label_key: Some(data.validation_label_key.clone()),
        ..load_options(plan, path)
    };
    Dataset::open(&options, &cache_options(plan, tokenizer))
}

fn load_options(plan: &Plan, path: &Path) -> LoadOptions {
    LoadOptions {
        label_min: plan.data.labels.min,
        label_max: plan.data.labels.max,
        skip_bad_records: plan.data.skip_bad_records,
        ..LoadOptions::new(path)
    }
}

fn cache_options(plan: &Plan, tokenizer: &Arc<PairTokenizer>) -> CacheOptions {
    let encoder = Arc::clone(tokenizer) as _;
    CacheOptions { dir: plan.data.cache_dir.clone(), encoder, document_texts: false }
}

#[cfg(test)]
mod tests {
    use super::shortfall;

    #[test]
    fn only_what_is_known_not_to_fit_is_told() {
        assert_eq!(shortfall("a GPU", 80, Some(80)), None);
        assert_eq!(shortfall("a GPU", 80, None), None);
        let line = shortfall("a GPU", 96_000_000_000, Some(79_500_000_000));
        assert_eq!(
            line.as_deref(),
            Some(
                "this does not fit: a GPU has to hold 96.0 GB and has 79.5 GB left; lower \
                 batch_size or max_len, set gradient_checkpointing: true, or divide more"
            )
        );
    }
}
