//! From what was written to what will be done: precedence, defaults, ranges, consistency.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use super::lora::LoraPlan;
use super::overrides::Overrides;
use super::parallel::{DistributedType, RawParallel};
use super::plan::{
    DataPlan, DatasetKind, LabelRange, LoggingPlan, LossKind, LrGroup, ModelKind, ModelPlan, Plan,
    Precision, Resume, SaveFailure, SavingPlan, Sources, Tracker, TrainingPlan, ValidationPlan,
};
use super::reader::{Auto, Fields, Log, Origin, Setting, unknown_override};
use super::support;
use super::teacher::TeacherPlan;
use super::text_format::{FormatFault, TextFormat};
use super::training::{RawTraining, TRACKERS};
use super::tree::{Mapping, Place, read};
use crate::error::{Error, Result};

impl Plan {
    /// Reads the files and flags of `sources` and validates them.
    ///
    /// # Errors
    /// The first thing that is wrong, as one line with its position: a file that cannot be read or
    /// is not YAML, an unknown or repeated key, a wrong type, a value out of range, settings that
    /// contradict each other, or something the engine cannot do yet.
    pub fn load(sources: &Sources) -> Result<Self> {
        let plan = Self::resolve(sources)?;
        support::check(&plan)?;
        Ok(plan)
    }

    /// As [`Plan::load`], without asking whether the engine can carry the plan out.
    ///
    /// # Errors
    /// As [`Plan::load`].
    pub fn resolve(sources: &Sources) -> Result<Self> {
        let (raw_training, raw_parallel, log) = read_sources(sources)?;
        let mut resolver =
            Resolver { file: &sources.training, notices: log.notices, origins: log.origins };
        let (parallel, shared) = resolver.parallel(&raw_parallel, sources)?;
        resolver.note_flags(sources);
        let model = resolver.model(&raw_training)?;
        let plan = Self {
            data: resolver.data(&raw_training, sources)?,
            loss: raw_training
                .loss_type
                .as_ref()
                .map_or(LossKind::PointwiseBce, |setting| setting.value),
            training: resolver.training(&raw_training, &shared, model.kind)?,
            validation: validation(&raw_training)?,
            model,
            saving: saving(&raw_training, sources)?,
            logging: logging(&raw_training)?,
            parallel,
            notices: resolver.notices,
            sources: sources.clone(),
            origins: resolver.origins,
        };
        check_groups(&plan)?;
        check_train_batch_size(&plan, value_of(raw_parallel.deepspeed.train_batch_size.as_ref()))?;
        Ok(plan)
    }
}

/// Reads both files under the command line's overrides.
fn read_sources(sources: &Sources) -> Result<(RawTraining, RawParallel, Log)> {
    let mut overrides = Overrides::parse(&sources.overrides)?;
    if let Some(resume) = &sources.resume {
        overrides.set("--resume", "resume", resume, 1)?;
    }
    let training_file = read(&sources.training)?;
    let parallel_file = match &sources.parallel {
        Some(path) => read(path)?,
        None => Mapping::new(),
    };
    let mut fields = Fields::new(vec![&overrides.mapping, &training_file]);
    let training = RawTraining::read(&mut fields)?;
    let mut log = fields.finish()?;
    let mut fields = Fields::new(vec![&overrides.mapping, &parallel_file]);
    let mut parallel = RawParallel::read(&mut fields)?;
    let parallel_log = fields.finish()?;

    log.known.extend(parallel_log.known);
    unknown_override(&overrides.mapping, "", &log.known)?;
    for (key, origin) in parallel_log.origins {
        log.origins.entry(key).or_insert(origin);
    }
    let mut notices = overrides.notices;
    notices.append(&mut log.notices);
    notices.extend(parallel_log.notices);
    if !parallel_log.ignored.is_empty() {
        let file = sources.parallel.as_deref().unwrap_or(Path::new("--set")).display();
        let keys = parallel_log.ignored.join(", ");
        notices.push(format!("{file}: without meaning here, ignored: {keys}"));
    }
    notices.extend(parallel.adopt_deepspeed_file()?);
    log.notices = notices;
    Ok((training, parallel, log))
}

/// Settings that both files may give, as the parallel YAML has them.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) precision: Option<Setting<Precision>>,
    pub(super) accumulation: Option<Setting<Auto<i64>>>,
    pub(super) batch_size: Option<Setting<Auto<i64>>>,
    pub(super) clipping: Option<Setting<Auto<f64>>>,
    /// What gradients are added up in: over workers, over micro-batches.
    pub(super) reductions: [Option<Setting<Precision>>; 2],
}

/// The state of one resolution.
pub(super) struct Resolver<'a> {
    /// The training YAML.
    file: &'a Path,
    pub(super) notices: Vec<String>,
    pub(super) origins: BTreeMap<String, Origin>,
}

impl Resolver<'_> {
    fn missing(&self, key: &str, expected: &str) -> Error {
        Error::File {
            path: self.file.to_path_buf(),
            message: format!("{key} is missing; expected {expected}"),
        }
    }

    fn required(
        &self,
        setting: Option<&Setting<String>>,
        key: &str,
        expected: &str,
    ) -> Result<String> {
        match setting {
            None => Err(self.missing(key, expected)),
            Some(setting) if setting.value.is_empty() => {
                Err(setting.error(format!("expected {expected}, found an empty text")))
            }
            Some(setting) => Ok(setting.value.clone()),
        }
    }

    /// Remembers which settings are flags that were given, as [`Plan::describe`] shows.
    fn note_flags(&mut self, sources: &Sources) {
        let flags = [
            ("overwrite", "--overwrite", sources.overwrite),
            ("skip_bad_records", "--skip-bad-records", sources.skip_bad_records),
            ("num_processes", "the launcher", sources.processes.is_some()),
        ];
        for (key, flag, given) in flags {
            if given {
                let origin = Origin { key: key.into(), place: Place::in_option(flag, flag, 1) };
                self.origins.entry(key.into()).or_insert(origin);
            }
        }
    }

    fn model(&mut self, raw: &RawTraining) -> Result<ModelPlan> {
        let path = self.required(
            raw.model_name_or_path.as_ref(),
            "model_name_or_path",
            "a model directory or a hub id",
        )?;
        let kind = raw
            .model_type
            .as_ref()
            .ok_or_else(|| self.missing("model_type", "bert_encoder or llm_decoder"))?
            .value;
        let plan = ModelPlan {
            path,
            kind,
            num_labels: count(raw.num_labels.as_ref(), 1, 1)?,
            query_format: template(raw.query_format.as_ref())?,
            document_format: template(raw.document_format.as_ref())?,
            seq: text(raw.seq.as_ref(), ""),
            special_token: text(raw.special_token.as_ref(), ""),
        };
        if kind == ModelKind::BertEncoder {
            for setting in [&raw.seq, &raw.special_token].into_iter().flatten() {
                if !setting.value.is_empty() {
                    self.notices.push(format!(
                        "{}: {} has no effect on a bert_encoder, whose tokenizer joins the pair",
                        setting.place, setting.key
                    ));
                }
            }
        }
        Ok(plan)
    }

    fn data(&mut self, raw: &RawTraining, sources: &Sources) -> Result<DataPlan> {
        let train = self.required(raw.train_dataset.as_ref(), "train_dataset", "a JSONL file")?;
        let validation = text(raw.val_dataset.as_ref(), "");
        let cache_dir = text(raw.cache_dir.as_ref(), "");
        let group_size = factor(raw.train_group_size.as_ref(), 8)?;
        let teacher = raw.teacher.as_ref();
        let teacher =
            teacher.map(|section| TeacherPlan::from_raw(section, raw, sources)).transpose()?;
        if let (Some(_), Some(setting)) = (&teacher, &raw.train_label_key) {
            let Setting { place, key, .. } = setting;
            self.notices.push(format!("{place}: {key} has no effect: a teacher gives the labels"));
        }
        Ok(DataPlan {
            train: train.into(),
            validation: (!validation.is_empty()).then(|| PathBuf::from(validation)),
            train_kind: raw.train_dataset_type.as_ref().map(|setting| setting.value),
            validation_kind: raw.val_dataset_type.as_ref().map(|setting| setting.value),
            train_label_key: text(raw.train_label_key.as_ref(), "label"),
            validation_label_key: text(raw.val_label_key.as_ref(), "label"),
            group_size,
            labels: label_range(raw)?,
            max_len: count(raw.max_len.as_ref(), 512, 4)?,
            shuffle_rate: share(raw.shuffle_rate.as_ref(), 0.0)?,
            cache_dir: (!cache_dir.is_empty()).then(|| PathBuf::from(cache_dir)),
            skip_bad_records: sources.skip_bad_records,
            teacher,
        })
    }

    fn training(
        &mut self,
        raw: &RawTraining,
        shared: &Shared,
        kind: ModelKind,
    ) -> Result<TrainingPlan> {
        let accumulation = self.prefer(
            "gradient_accumulation_steps",
            raw.gradient_accumulation_steps.as_ref(),
            value_of(shared.accumulation.as_ref()).as_ref(),
        );
        let batch_size = self.prefer(
            "batch_size",
            raw.batch_size.as_ref(),
            value_of(shared.batch_size.as_ref()).as_ref(),
        );
        let precision = self
            .prefer("mixed_precision", raw.mixed_precision.as_ref(), shared.precision.as_ref())
            .map_or(Precision::Fp32, |setting| setting.value);
        let warmup_proportion = share(raw.warmup_proportion.as_ref(), 0.1)?;
        let stable_proportion = share(raw.stable_proportion.as_ref(), 0.0)?;
        if let Some(setting) = raw.stable_proportion.as_ref().or(raw.warmup_proportion.as_ref())
            && warmup_proportion + stable_proportion > 1.0
        {
            return Err(setting.error(format!(
                "warmup_proportion {warmup_proportion} and stable_proportion {stable_proportion} \
                 add up to more than 1"
            )));
        }
        let special_lr_groups = match &raw.special_lr_groups {
            Some(setting) => setting.value.iter().map(LrGroup::from_raw).collect::<Result<_>>()?,
            // A language model's head is new.
            None if kind == ModelKind::LlmDecoder => {
                vec![LrGroup { keywords: vec!["score.weight".into()], lr: 1e-4 }]
            }
            None => Vec::new(),
        };
        Ok(TrainingPlan {
            epochs: factor(raw.epochs.as_ref(), 2)?,
            lr: above_zero(raw.lr.as_ref(), 5e-5)?,
            batch_size: factor(batch_size.as_ref(), 8)?,
            seed: count(raw.seed.as_ref(), 666, 0)? as u64,
            warmup_proportion,
            stable_proportion,
            accumulation: factor(accumulation.as_ref(), 1)?,
            precision,
            max_grad_norm: self.max_grad_norm(raw, shared)?,
            weight_decay: within(raw.weight_decay.as_ref(), 0.01, |v| v >= 0.0, "0 or more")?,
            special_lr_groups,
            gradient_checkpointing: flag(raw.gradient_checkpointing.as_ref()),
            reduce_in_fp32: self.reduce_in_fp32(raw, shared, precision)?,
            deterministic: raw.deterministic.as_ref().is_none_or(|setting| setting.value),
            lora: raw.lora.as_ref().map(LoraPlan::from_raw).transpose()?,
        })
    }

    /// Clipping as the training YAML says; else as the `DeepSpeed` section says, where 0 turns it
    /// off and "auto" is 1.
    fn max_grad_norm(&mut self, raw: &RawTraining, shared: &Shared) -> Result<Option<f64>> {
        if let Some(setting) = &raw.max_grad_norm
            && setting.value <= 0.0
        {
            return Err(setting.error(format!(
                "expected a number above 0, or null for no clipping, found {}",
                setting.value
            )));
        }
        let clipping = shared.clipping.as_ref();
        if let Some(setting) = value_of(clipping)
            && setting.value < 0.0
        {
            return Err(setting.error(format!("expected 0 or more, found {}", setting.value)));
        }
        let chosen =
            self.prefer("max_grad_norm", raw.max_grad_norm.as_ref(), value_of(clipping).as_ref());
        Ok(match (chosen, clipping) {
            (Some(setting), _) => (setting.value > 0.0).then_some(setting.value),
            (None, Some(_)) => Some(1.0),
            (None, None) => None,
        })
    }

    /// The training YAML's word; else a `DeepSpeed` file's, which may name the gradients' own
    /// precision or fp32, for workers and micro-batches apart: fp32 for one of them is fp32 for both.
    fn reduce_in_fp32(
        &mut self,
        raw: &RawTraining,
        shared: &Shared,
        precision: Precision,
    ) -> Result<bool> {
        let mut stated: Option<Setting<bool>> = None;
        for Setting { value, key, place } in shared.reductions.iter().flatten() {
            if ![Precision::Fp32, precision].contains(value) {
                return Err(place.error(format!(
                    "{key}: expected fp32 or the precision of the gradients, which is {precision}, \
                     found {value}"
                )));
            }
            let value = *value != precision;
            if value || stated.is_none() {
                stated = Some(Setting { value, key: key.clone(), place: place.clone() });
            }
        }
        let chosen = self.prefer("reduce_in_fp32", raw.reduce_in_fp32.as_ref(), stated.as_ref());
        Ok(flag(chosen.as_ref()))
    }

    /// The higher of two sources; a value that loses is noted, and the winner's place is kept
    /// under the plan's name for the setting.
    pub(super) fn prefer<T: Clone + PartialEq + Display>(
        &mut self,
        key: &str,
        high: Option<&Setting<T>>,
        low: Option<&Setting<T>>,
    ) -> Option<Setting<T>> {
        if let (Some(high), Some(low)) = (high, low)
            && high.value != low.value
        {
            self.notices.push(format!(
                "{key}: {} from {} overrides {} from {}",
                high.value, high.place, low.value, low.place
            ));
        }
        let winner = high.or(low)?;
        self.origins.insert(key.to_owned(), winner.origin());
        Some(winner.clone())
    }
}

/// The value of a setting that is not `auto`.
fn value_of<T: Copy>(setting: Option<&Setting<Auto<T>>>) -> Option<Setting<T>> {
    let setting = setting?;
    match setting.value {
        Auto::Auto => None,
        Auto::Value(value) => {
            Some(Setting { value, key: setting.key.clone(), place: setting.place.clone() })
        }
    }
}

/// A value that must satisfy `ok`; `expected` says so in words.
fn within<T: Copy + Display>(
    setting: Option<&Setting<T>>,
    default: T,
    ok: impl FnOnce(T) -> bool,
    expected: &str,
) -> Result<T> {
    match setting {
        None => Ok(default),
        Some(setting) if ok(setting.value) => Ok(setting.value),
        Some(setting) => {
            Err(setting.error(format!("expected {expected}, found {}", setting.value)))
        }
    }
}

/// An integer of at least `least`.
pub(super) fn count(setting: Option<&Setting<i64>>, default: usize, least: i64) -> Result<usize> {
    let expected = format!("an integer of at least {least}");
    within(setting, default as i64, |value| value >= least, &expected).map(|value| value as usize)
}

/// A factor of the number of pairs or steps, at least 1. What no run comes to is a slip of the keyboard, and
/// its products would not fit.
fn factor(setting: Option<&Setting<i64>>, default: usize) -> Result<usize> {
    const MOST: i64 = 1_000_000;
    let expected = format!("an integer of at most {MOST}");
    within(setting, default as i64, |value| value <= MOST, &expected)?;
    count(setting, default, 1)
}

/// A number in [0, 1].
fn share(setting: Option<&Setting<f64>>, default: f64) -> Result<f64> {
    within(setting, default, |value| (0.0..=1.0).contains(&value), "a number from 0 to 1")
}

fn above_zero(setting: Option<&Setting<f64>>, default: f64) -> Result<f64> {
    within(setting, default, |value| value > 0.0, "a number above 0")
}

fn text(setting: Option<&Setting<String>>, default: &str) -> String {
    setting.map_or_else(|| default.to_owned(), |setting| setting.value.clone())
}

pub(super) fn flag(setting: Option<&Setting<bool>>) -> bool {
    setting.is_some_and(|setting| setting.value)
}

/// A template with one `{}`: with none the text would be dropped in silence.
fn template(setting: Option<&Setting<String>>) -> Result<String> {
    let Some(setting) = setting else { return Ok(text(None, "{}")) };
    let expected = match TextFormat::read(&setting.value) {
        Ok(_) => return Ok(setting.value.clone()),
        Err(FormatFault::NoGap | FormatFault::Gaps) => "where the query or document goes",
        Err(FormatFault::LoneBrace) => "and each other brace doubled",
    };
    let found = &setting.value;
    Err(setting.error(format!("expected a text with one {{}} {expected}, found {found:?}")))
}

fn label_range(raw: &RawTraining) -> Result<LabelRange> {
    let min = raw.min_label.as_ref().map_or(0.0, |setting| setting.value);
    let max = raw.max_label.as_ref().map_or(1.0, |setting| setting.value);
    match raw.max_label.as_ref().or(raw.min_label.as_ref()) {
        Some(setting) if min >= max => {
            Err(setting.error(format!("expected min_label below max_label, found {min} and {max}")))
        }
        _ => Ok(LabelRange { min, max }),
    }
}

/// What depends on validations needs data to validate on.
fn validation(raw: &RawTraining) -> Result<ValidationPlan> {
    let [interval, patience] = [&raw.eval_steps, &raw.early_stopping_patience];
    let metric = raw.metric_for_best.as_ref();
    let given = [interval, patience].into_iter().flatten().map(Setting::origin);
    let given = metric.map(Setting::origin).into_iter().chain(given).next();
    if let Some(origin) = given
        && text(raw.val_dataset.as_ref(), "").is_empty()
    {
        return Err(origin.error("needs a val_dataset to validate on, and there is none"));
    }
    if let (Some(setting), None) = (patience, metric) {
        return Err(setting.error("needs metric_for_best, which says what has to get better"));
    }
    let at_least_one = |setting: &Option<Setting<i64>>| {
        setting.as_ref().map(|setting| count(Some(setting), 1, 1)).transpose()
    };
    Ok(ValidationPlan {
        interval: at_least_one(interval)?,
        metric: metric.map(|setting| setting.value),
        patience: at_least_one(patience)?,
    })
}

fn saving(raw: &RawTraining, sources: &Sources) -> Result<SavingPlan> {
    let output_dir = text(raw.output_dir.as_ref(), "./output");
    if let Some(setting) = &raw.output_dir
        && output_dir.is_empty()
    {
        return Err(setting.error("expected a directory, found an empty text"));
    }
    let save_steps = raw.save_steps.as_ref();
    Ok(SavingPlan {
        output_dir: output_dir.into(),
        save_on_epoch_end: flag(raw.save_on_epoch_end.as_ref()),
        max_checkpoints: count(raw.num_max_checkpoints.as_ref(), 5, 1)?,
        save_steps: save_steps.map(|steps| count(Some(steps), 1, 1)).transpose()?,
        async_save: raw.async_save.as_ref().is_none_or(|setting| setting.value),
        save_failure: raw.save_failure.as_ref().map_or(SaveFailure::Stop, |s| s.value),
        resume: match text(raw.resume.as_ref(), "auto").as_str() {
            "auto" | "" => Resume::Auto,
            "never" => Resume::Never,
            path => Resume::Path(path.into()),
        },
        overwrite: sources.overwrite,
    })
}

fn logging(raw: &RawTraining) -> Result<LoggingPlan> {
    let mut trackers: Vec<Tracker> = Vec::new();
    if let Some(setting) = &raw.log_with {
        for name in &setting.value {
            let known = TRACKERS.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
            let Some((_, tracker)) = known else {
                return Err(setting
                    .error(format!("expected wandb or tensorboard, found the text {name:?}")));
            };
            if !trackers.contains(tracker) {
                trackers.push(*tracker);
            }
        }
    }
    Ok(LoggingPlan { log_interval: count(raw.log_interval.as_ref(), 10, 1)?, trackers })
}

/// A loss that compares the hits of a query needs grouped data and groups of at least two.
fn check_groups(plan: &Plan) -> Result<()> {
    if !plan.loss.needs_groups() {
        return Ok(());
    }
    if plan.data.train_kind == Some(DatasetKind::Pointwise) {
        return Err(plan.error(
            "train_dataset_type",
            "the loss_type compares the hits of one query; expected grouped, found pointwise",
        ));
    }
    if plan.data.group_size < 2 {
        return Err(plan.error(
            "train_group_size",
            "the loss_type compares the hits of one query; expected at least 2, found 1",
        ));
    }
    Ok(())
}

/// What a `DeepSpeed` file says of the whole batch has to be what its parts come to; `DeepSpeed`
/// asserts the same.
fn check_train_batch_size(plan: &Plan, stated: Option<Setting<i64>>) -> Result<()> {
    let (Some(setting), Some(processes)) = (stated, plan.parallel.processes) else {
        return Ok(());
    };
    let TrainingPlan { batch_size, accumulation, .. } = plan.training;
    let whole = (batch_size * accumulation).saturating_mul(processes);
    if usize::try_from(setting.value) == Ok(whole) {
        return Ok(());
    }
    Err(setting.error(format!(
        "{}, but {batch_size} per worker x {accumulation} accumulation step(s) x {processes} \
         worker(s) is {whole}; write {whole} or \"auto\"",
        setting.value
    )))
}

impl DistributedType {
    /// accelerate's name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::No => "NO",
            Self::MultiGpu => "MULTI_GPU",
            Self::MultiCpu => "MULTI_CPU",
            Self::Fsdp => "FSDP",
            Self::DeepSpeed => "DEEPSPEED",
        }
    }
}
