//! Everything a run reads, loaded and checked before any worker trains.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rr_launch::contract::{WorkerEnv, vars};
use serde_json::Value;

use super::{best, teacher};
use crate::checkpoint::training::Progress;
use crate::comm::Communicator;
use crate::config::{DatasetKind, Plan};
use crate::data::{CacheOptions, Dataset, LoadOptions, LoadReport, Sampler, SamplerOptions};
use crate::error::{Error, Result};
use crate::model::weights::WeightFiles;
use crate::model::{ModelConfig, Pretrained, lora};
use crate::optim::Schedule;
use crate::score::{PairTexts, check_model};
use crate::text::{PairTokenizer, pad_token_id};

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
    /// The padding token, by `config.json` or else by the tokenizer.
    pub padding: Option<u32>,
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
    /// Reads what `plan` names, for a world of `world_size` ranks. `taught` says that the scores of
    /// its teacher are there.
    ///
    /// # Errors
    /// User errors that name the file, the line or the setting.
    pub fn load(plan: &Plan, world_size: usize, taught: bool) -> Result<Self> {
        check_data_files(plan)?;
        let pretrained = pretrained(plan)?;
        let Pretrained { dir: model_dir, revision, mut config, weights, .. } = pretrained;
        let tokenizer = Arc::new(tokenizer(plan, &model_dir, &config)?);
        let initialised = check_model(&model_dir, &config, &weights, &tokenizer)?;
        if let Some(lora) = &plan.training.lora {
            let lora = lora::resolve(lora, &config);
            config.lora = Some(lora.map_err(|bad| plan.error(bad.key, bad.message))?);
        }

        let padding = match config.raw.get("pad_token_id").and_then(Value::as_u64) {
            Some(id) => u32::try_from(id).ok(),
            None => pad_token_id(&model_dir, &config.raw)?,
        };
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
        let (train, train_report) = load_train(plan, &tokenizer, taught)?;
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
            padding,
            initialised,
            train,
            train_report,
            validation,
            validation_report,
            sampler,
            schedule,
        })
    }

    /// The schedule of a run of `epochs` that came so far in its data, perhaps with steps of another
    /// size, or of several: by what is left, whatever took the steps before. It is
    /// [`Inputs::schedule`] itself where nothing has changed.
    pub(super) fn schedule_from(&self, progress: Progress, epochs: usize) -> Schedule {
        let Progress { step, epoch, items } = progress;
        let begun = if epoch < epochs { self.sampler.steps_from(items) } else { 0 };
        let whole = epochs.saturating_sub(epoch + 1) * self.sampler.steps_per_epoch();
        self.schedule.resumed(step, begun + whole)
    }
}

/// Asks the hub for what the run reads beside models that other programs have fetched
/// ([`crate::hub::settle`]), unless the check on this host, which came before, has done so. One process
/// of those that share a cache does.
pub fn settle(plan: &Plan) {
    if std::env::var_os(vars::RR_CHECKED).is_some() {
        return;
    }
    Pretrained::settle_tokenizer(&plan.model.path);
    if let Some(teacher) = &plan.data.teacher {
        Pretrained::settle(&teacher.path);
    }
}

/// [`settle`] by one worker of each host, for which the others wait.
pub(super) fn settle_together(plan: &Plan, env: &WorkerEnv, comm: &dyn Communicator) -> Result<()> {
    if env.local_rank == 0 {
        settle(plan);
    }
    comm.barrier()
}

/// Sees to it that the data files are there, before a model is fetched or read.
fn check_data_files(plan: &Plan) -> Result<()> {
    let data = &plan.data;
    let named = [("train_dataset", Some(&data.train)), ("val_dataset", data.validation.as_ref())];
    for (key, path) in named.into_iter().filter_map(|(key, path)| Some((key, path?))) {
        let found = std::fs::metadata(path);
        if !found.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
            continue;
        }
        // Paths in a file are not relative to that file.
        let here = std::env::current_dir().ok().filter(|_| path.is_relative());
        let here = here.map(|dir| format!(" in {}", dir.display())).unwrap_or_default();
        return Err(plan.error(key, format!("no file \"{}\"{here}", path.display())));
    }
    Ok(())
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
fn tokenizer(plan: &Plan, dir: &Path, config: &ModelConfig) -> Result<PairTokenizer> {
    let tokenizer = PairTexts {
        query_format: &plan.model.query_format,
        document_format: &plan.model.document_format,
        seq: &plan.model.seq,
        special_token: &plan.model.special_token,
    }
    .tokenizer(dir, config)?;
    tokenizer.check_max_len(plan.data.max_len).map_err(|error| plan.error("max_len", error))?;
    Ok(tokenizer)
}

fn load_train(
    plan: &Plan,
    tokenizer: &Arc<PairTokenizer>,
    taught: bool,
) -> Result<(Dataset, LoadReport)> {
    let data = &plan.data;
    let options = match &data.teacher {
        Some(teacher) => teacher::load_options(plan, teacher, taught)?,
        None => LoadOptions {
            kind: data.train_kind,
            pos_neg: if plan.loss.needs_groups() {
                DatasetKind::Grouped
            } else {
                DatasetKind::Pointwise
            },
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
