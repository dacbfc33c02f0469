//! What a run will do, told before it does it: by `reranker check`, in the log of rank 0 and on the
//! report page.

use std::fmt;

use serde::Serialize;

use super::inputs::Inputs;
use super::launch::Attempt;
use super::validate::loss_applies;
use super::{checkpoints, engine_options, parameter_groups};
use crate::config::{self, DatasetKind, ModelKind, Plan, Strategy};
use crate::data::{Dataset, LabelHistogram, LoadReport, SamplerReport, grouped};
use crate::engine::MemoryForecast;
use crate::error::Result;
use crate::model::foreign_layer_classes;
use crate::text::LengthReport;
use crate::torch_ext::{NEED_LESS, runtime};

/// Pairs whose token lengths are measured where the data holds texts.
const LENGTH_SAMPLE: usize = 512;

/// The width of the longest bar of a histogram, in characters.
const BAR: usize = 40;

/// Everything that is known of a run before its first step. Serializes for `check --json` and the
/// report page.
#[derive(Debug, Clone, Serialize)]
pub struct Preflight {
    /// The training data.
    pub train: DataSummary,
    /// How its epochs are cut into steps.
    pub epoch: SamplerReport,
    /// The validation data.
    pub validation: Option<DataSummary>,
    /// The steps of the run.
    pub steps: Steps,
    /// The model.
    pub model: ModelSummary,
    /// What a worker will hold.
    pub memory: MemoryForecast,
    /// Good to know.
    pub notes: Vec<String>,
    /// Probably not what was meant; the run would start all the same.
    pub warnings: Vec<String>,
}

/// A data set: what loading it saw, and how long its pairs are.
#[derive(Debug, Clone, Serialize)]
pub struct DataSummary {
    /// Records, labels, what was dropped.
    pub load: LoadReport,
    /// Tokens of its pairs.
    pub lengths: LengthReport,
}

/// The optimizer steps of a run.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Steps {
    /// All of them.
    pub total: usize,
    /// In an epoch.
    pub per_epoch: usize,
    /// Passes over the data.
    pub epochs: usize,
    /// Pairs or groups in a step, over all workers and micro-batches: the effective batch.
    pub items: usize,
    /// What these are: `pairs` or `groups`.
    pub unit: &'static str,
    /// Workers.
    pub workers: usize,
    /// What they compute on.
    pub device: config::Device,
}

/// The model that is trained.
#[derive(Debug, Clone, Serialize)]
pub struct ModelSummary {
    /// `model_type` in its `config.json`.
    pub family: String,
    /// Elements of its parameters, adapters included.
    pub parameters: usize,
    /// The longest input it has positions for, in tokens.
    pub positions: usize,
    /// The most tokens of a pair in this run.
    pub max_len: usize,
    /// The hub's commit that it is a snapshot of.
    pub revision: Option<String>,
    /// Parameters that its weights lack.
    pub initialised: Vec<String>,
}

impl Preflight {
    /// Looks ahead at a run of `plan` over `world_size` workers, `local` of them on this machine.
    ///
    /// # Errors
    /// When the tokenizer refuses a text, or the checkpoints cannot be listed.
    pub fn new(inputs: &Inputs, plan: &Plan, world_size: usize, local: usize) -> Result<Self> {
        Self::of(inputs, &Attempt::alone(plan, world_size, local))
    }

    /// As [`Self::new`], at this start of the run.
    pub(super) fn of(inputs: &Inputs, attempt: &Attempt<'_>) -> Result<Self> {
        let (plan, world_size) = (attempt.plan, attempt.world_size);
        let local = attempt.local_world_size;
        let summary = |dataset: &Dataset, load: &LoadReport| -> Result<DataSummary> {
            let (tokenizer, max_len) = (&inputs.tokenizer, plan.data.max_len);
            let lengths = LengthReport::measure(dataset, tokenizer, max_len, LENGTH_SAMPLE)?;
            Ok(DataSummary { load: load.clone(), lengths })
        };
        let validation = inputs.validation.as_ref().zip(inputs.validation_report.as_ref());
        let (memory, shortfalls) = forecast(inputs, plan, world_size, local);
        Ok(Self {
            train: summary(&inputs.train, &inputs.train_report)?,
            epoch: inputs.sampler.report().clone(),
            validation: validation.map(|(dataset, load)| summary(dataset, load)).transpose()?,
            steps: steps(inputs, plan, world_size),
            model: ModelSummary {
                family: inputs.config.model_type.clone(),
                parameters: parameters(inputs),
                positions: inputs.config.max_positions(),
                max_len: plan.data.max_len,
                revision: inputs.model_revision.clone(),
                initialised: inputs.initialised.clone(),
            },
            memory,
            notes: notes(inputs, attempt)?,
            warnings: [warnings(inputs, plan), shortfalls].concat(),
        })
    }

    /// All of it with histograms as bars, for `reranker check`.
    #[must_use]
    pub fn chart(&self) -> String {
        self.lines(true).join("\n")
    }

    fn lines(&self, charts: bool) -> Vec<String> {
        let mut lines = Vec::new();
        let data = |lines: &mut Vec<String>, summary: &DataSummary| {
            lines.extend([summary.load.to_string(), summary.lengths.to_string()]);
            if charts {
                lines.extend(bars("label", &label_rows(&summary.load.labels)));
                lines.extend(bars("tokens", &length_rows(&summary.lengths)));
            }
        };
        data(&mut lines, &self.train);
        lines.push(self.epoch.to_string());
        if let Some(validation) = &self.validation {
            data(&mut lines, validation);
        }
        lines.extend([self.steps.to_string(), self.model.to_string(), self.memory.to_string()]);
        lines.extend(self.notes.iter().cloned());
        lines.extend(self.warnings.iter().map(|warning| format!("warning: {warning}")));
        lines
    }
}

impl fmt::Display for Preflight {
    /// A line a fact, for the log.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.lines(false).join("\n"))
    }
}

impl fmt::Display for Steps {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { total, per_epoch, epochs, items, unit, workers, device } = self;
        let place = match device {
            config::Device::Cpu => "on the CPU",
            config::Device::Cuda => "with a GPU each",
        };
        write!(
            out,
            "{total} optimizer steps: {per_epoch} an epoch, {epochs} epochs; {items} {unit} a step \
             over {workers} worker(s) {place}"
        )
    }
}

impl fmt::Display for ModelSummary {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, parameters, positions, max_len, .. } = self;
        write!(
            out,
            "model: {family}, {:.1} M parameters; max_len {max_len} of {positions} positions",
            *parameters as f64 / 1e6
        )
    }
}

fn steps(inputs: &Inputs, plan: &Plan, world_size: usize) -> Steps {
    let training = &plan.training;
    let is_grouped = inputs.train.kind == DatasetKind::Grouped;
    Steps {
        total: inputs.schedule.total(),
        per_epoch: inputs.sampler.steps_per_epoch(),
        epochs: training.epochs,
        items: training.batch_size * training.accumulation * world_size,
        unit: if is_grouped { "groups" } else { "pairs" },
        workers: world_size,
        device: runtime::kind_of_device(plan.parallel.device),
    }
}

fn parameters(inputs: &Inputs) -> usize {
    let stages = crate::model::stages(&inputs.config);
    stages.iter().flat_map(|stage| stage.parameters()).map(|spec| spec.elements()).sum()
}

fn notes(inputs: &Inputs, attempt: &Attempt<'_>) -> Result<Vec<String>> {
    let plan = attempt.plan;
    let mut notes = Vec::new();
    if let Some(revision) = &inputs.model_revision {
        notes.push(format!("{}: revision {revision} of the hub", plan.model.path));
    }
    notes.extend(adapters(inputs));
    let classes = &plan.parallel.layer_classes;
    for line in foreign_layer_classes(classes, &inputs.config.model_type) {
        notes.push(plan.warning("layer_classes", line));
    }
    notes.extend(checkpoints::outlook(attempt)?);
    if !inputs.initialised.is_empty() {
        notes.push(format!(
            "no weights for {}: initialised from seed {}",
            inputs.initialised.join(", "),
            plan.training.seed
        ));
    }
    Ok(notes)
}

/// What of the model learns, where that is not all of it.
fn adapters(inputs: &Inputs) -> Option<String> {
    let lora = inputs.config.lora.as_ref()?;
    let all = parameters(inputs);
    let stages = crate::model::stages(&inputs.config);
    let each = stages.iter().flat_map(|stage| stage.parameters());
    let trained: usize = each.filter(|one| one.trained).map(|one| one.elements()).sum();
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

fn warnings(inputs: &Inputs, plan: &Plan) -> Vec<String> {
    let mut warnings = Vec::new();
    let stages = crate::model::stages(&inputs.config);
    let all = stages.iter().flat_map(|stage| stage.parameters());
    let parameters: Vec<_> = all.filter(|parameter| parameter.trained).collect();
    for keyword in parameter_groups(plan).unmatched(&parameters) {
        let message = format!("{keyword:?} is in no parameter's name");
        warnings.push(plan.warning("special_lr_groups", message));
    }
    if inputs.tokenizer.fixed_tokens() == 0 && plan.model.kind == ModelKind::BertEncoder {
        warnings.push("the tokenizer has no pair template: texts are joined as they are".into());
    }
    warnings.extend(padding_at_the_end(inputs, plan));
    warnings.extend(no_padding(inputs, plan));
    if let Some(validation) = &inputs.validation
        && validation.kind == DatasetKind::Grouped
        && !loss_applies(plan, validation)
    {
        let why = if plan.loss.needs_groups() {
            "no query with labels to compare"
        } else {
            "labels outside min_label to max_label"
        };
        let message = format!("has {why}, so that validation gives no loss, only ranking metrics");
        warnings.push(plan.warning("val_dataset", message));
    }
    warnings
}

/// transformers finds the last token of each of several texts by the padding token, which the saved
/// model gets from its tokenizer.
fn no_padding(inputs: &Inputs, plan: &Plan) -> Option<String> {
    let is_missing = plan.model.kind == ModelKind::LlmDecoder && inputs.padding.is_none();
    is_missing.then(|| {
        let message = "the tokenizer has no padding token: transformers and sentence-transformers \
                       will score the saved model's pairs one at a time only; name one of its tokens \
                       as pad_token in tokenizer_config.json, another than inputs end in";
        plan.warning("model_name_or_path", message)
    })
}

/// A decoder's score is read at the last token. transformers, and what builds on it, look for the
/// last token that is not padding: a template that ends in that one is read elsewhere there.
fn padding_at_the_end(inputs: &Inputs, plan: &Plan) -> Option<String> {
    if plan.model.kind != ModelKind::LlmDecoder {
        return None;
    }
    let padding = inputs.padding?;
    let ending = inputs.tokenizer.ending()?;
    if ending.id != padding {
        return None;
    }
    let (key, when) = if ending.behind_document {
        ("special_token", "")
    } else {
        ("seq", ", where a document is empty")
    };
    Some(plan.warning(
        key,
        format!(
            "ends in {:?}, the padding token: the score is read there{when}, but transformers reads \
             the saved model's score at the last token that is no padding; end in another token",
            ending.text
        ),
    ))
}

/// What a worker will hold, and where there is not that much. Hybrid runs divide by the workers of a
/// machine, of which there are `local`.
fn forecast(
    inputs: &Inputs,
    plan: &Plan,
    world_size: usize,
    local: usize,
) -> (MemoryForecast, Vec<String>) {
    let dividing = match plan.parallel.strategy {
        Strategy::Hybrid { .. } => local,
        Strategy::Ddp | Strategy::Zero { .. } => world_size,
    };
    let on_gpu = runtime::kind_of_device(plan.parallel.device) == config::Device::Cuda;
    let device = if on_gpu { tch::Device::Cuda(0) } else { tch::Device::Cpu };
    let options = engine_options(plan, device, 0, dividing);
    let group = match inputs.train.kind {
        DatasetKind::Pointwise => 1,
        DatasetKind::Grouped => plan.data.group_size,
    };
    let tokens = plan.training.batch_size * group * plan.data.max_len;
    let forecast = MemoryForecast::new(&inputs.config, &options, tokens);
    let mut lines = Vec::new();
    if on_gpu {
        lines.extend(shortfall("a GPU", forecast.total(), runtime::freest_gpu_memory()));
    }
    let on_host = forecast.held.host + if on_gpu { 0 } else { forecast.total() };
    let needed = on_host * local;
    lines.extend(shortfall("this machine", needed, runtime::available_memory()));
    (forecast, lines)
}

/// What to say where `needed` bytes are more than there are `available`, if that is known.
fn shortfall(place: &str, needed: usize, available: Option<usize>) -> Option<String> {
    let available = available.filter(|&available| needed > available)?;
    let gb = |bytes: usize| bytes as f64 / 1e9;
    Some(format!(
        "this does not fit: {place} has to hold {:.1} GB and has {:.1} GB left; {NEED_LESS}",
        gb(needed),
        gb(available)
    ))
}

fn label_rows(labels: &LabelHistogram) -> Vec<(String, usize)> {
    match labels {
        LabelHistogram::Values(values) => {
            values.iter().map(|&(value, count)| (value.to_string(), count)).collect()
        }
        LabelHistogram::Bins { min, max, counts } => {
            let edge = |bin: usize| min + (max - min) * bin as f32 / counts.len() as f32;
            let row = |(bin, &count): (usize, &usize)| (format!("from {:.3}", edge(bin)), count);
            counts.iter().enumerate().map(row).collect()
        }
    }
}

/// Two bins a row, where there are many.
fn length_rows(lengths: &LengthReport) -> Vec<(String, usize)> {
    let together = if lengths.bins.len() > LengthReport::MAX_BINS / 2 { 2 } else { 1 };
    let width = lengths.bin_width * together;
    let row = |(i, counts): (usize, &[usize])| {
        (format!("{}-{}", i * width + 1, (i + 1) * width), counts.iter().sum())
    };
    lengths.bins.chunks(together).enumerate().map(row).collect()
}

/// A histogram, a line a row: its name, a bar, count and share.
fn bars(title: &str, rows: &[(String, usize)]) -> Vec<String> {
    let most = rows.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    let all = rows.iter().map(|(_, count)| count).sum::<usize>().max(1);
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0).max(title.len());
    let digits = grouped(most).len();
    let line = |(name, count): &(String, usize)| {
        let bar = "█".repeat((count * BAR).div_ceil(most));
        let share = 100.0 * *count as f64 / all as f64;
        format!("  {name:>width$}  {:>digits$}  {share:>5.1} %  {bar}", grouped(*count))
    };
    let head = format!("  {title:>width$}");
    [head].into_iter().chain(rows.iter().map(line)).map(|l| l.trim_end().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn bars_are_in_proportion_and_line_up() {
        let rows = [("0".to_owned(), 1500), ("0.5".to_owned(), 0), ("1".to_owned(), 500)];
        let lines = bars("label", &rows);
        assert_eq!(lines[0], "  label");
        assert_eq!(lines[1], format!("      0  1,500   75.0 %  {}", "█".repeat(40)));
        assert_eq!(lines[2], "    0.5      0    0.0 %");
        assert_eq!(lines[3], format!("      1    500   25.0 %  {}", "█".repeat(14)));
    }
}
