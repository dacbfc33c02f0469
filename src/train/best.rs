//! Which validation is the best so far, and when waiting for a better one has to end. It decides
//! only; the job saves and stops.

use serde_json::{Value, json};

use crate::checkpoint::training::file_crc32;
use crate::config::{DatasetKind, Metric, Plan, ValidationPlan};
use crate::data::Dataset;
use crate::error::{Error, Result};

use super::inputs::Inputs;
use super::validate::{Validation, loss_applies};

/// Where a checkpoint keeps, beside the best validation, what it was judged by.
pub(super) const DATA: &str = "data";

/// What follows from a validation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is the best so far: keep the model.
    Best,
    /// It is not; go on.
    Worse,
    /// It is not, and patience has run out: end the training.
    Stop,
}

/// The best validation so far. Every rank judges for itself: the figures are reduced over all of
/// them, so all come to the same verdict.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Best {
    /// What is compared.
    pub(super) metric: Metric,
    /// Its best value, and the optimizer steps taken by then.
    pub(super) found: Option<(f64, usize)>,
    patience: Option<usize>,
    /// Validations since then.
    waited: usize,
}

impl Best {
    /// Nothing yet; `None` where the plan keeps no best model.
    pub(super) fn new(plan: &ValidationPlan) -> Option<Self> {
        let metric = plan.metric?;
        Some(Self { metric, found: None, patience: plan.patience, waited: 0 })
    }

    /// What a checkpoint keeps of it.
    pub(super) fn to_json(self) -> Value {
        json!({"metric": self.metric.to_string(), "found": self.found, "waited": self.waited})
    }

    /// Takes up what a checkpoint kept; nothing where it compared something else.
    pub(super) fn take_up(&mut self, kept: &Value) {
        if kept["metric"] == self.metric.to_string() {
            self.found = serde_json::from_value(kept["found"].clone()).unwrap_or_default();
            self.waited = kept["waited"].as_u64().unwrap_or(0) as usize;
        }
    }

    /// Whether patience has run out.
    pub(super) fn is_over(&self) -> bool {
        self.patience.is_some_and(|patience| self.waited >= patience)
    }

    /// Judges the validation after `step` optimizer steps.
    ///
    /// # Errors
    /// [`Error::Training`] when it lacks the figure.
    pub(super) fn judge(&mut self, step: usize, validation: &Validation) -> Result<Verdict> {
        let metric = self.metric;
        let value = validation.figure(metric).ok_or_else(|| {
            let message = format!("metric_for_best: the validation data gives no {metric}");
            Error::Training(message)
        })?;
        let is_best = match self.found {
            Some((best, _)) => metric.is_better(value, best),
            None => !value.is_nan(),
        };
        if is_best {
            self.found = Some((value, step));
            self.waited = 0;
            return Ok(Verdict::Best);
        }
        self.waited += 1;
        Ok(if self.is_over() { Verdict::Stop } else { Verdict::Worse })
    }
}

/// What models are compared by, where the plan keeps the best: the CRC-32 of the validation data, and how
/// it is read.
///
/// # Errors
/// [`Error::Io`] when it cannot be read.
pub(super) fn data(plan: &Plan, inputs: &Inputs) -> Result<Option<String>> {
    let (Some(path), Some(data), Some(_)) =
        (&plan.data.validation, &inputs.validation, plan.validation.metric)
    else {
        return Ok(None);
    };
    let form = if data.kind == DatasetKind::Grouped { "grouped" } else { "pointwise" };
    Ok(Some(format!("{:08x} {form} {}", file_crc32(path)?, plan.data.validation_label_key)))
}

/// Checks that validating on `data` gives the figure that the plan compares models by.
///
/// # Errors
/// [`Error::Config`] that names the setting and what is missing.
pub(super) fn check(plan: &Plan, data: &Dataset) -> Result<()> {
    let Some(metric) = plan.validation.metric else { return Ok(()) };
    let labels = || (0..data.pair_count() as u32).map(|pair| f64::from(data.pair(pair).label));
    let is_ranking = metric != Metric::Loss;
    let is_grouped = data.kind == DatasetKind::Grouped;
    let missing = if (is_ranking || plan.loss.needs_groups()) && !is_grouped {
        "compares the hits of a query, but val_dataset holds single pairs; give grouped records"
    } else if is_ranking && labels().all(|label| label <= 0.0) {
        "needs a document with a label above 0, and val_dataset has none"
    } else if !is_ranking && !loss_applies(plan, data) && plan.loss.needs_groups() {
        "needs a query with labels to compare, and val_dataset has none"
    } else if !is_ranking && !loss_applies(plan, data) {
        "applies to labels from min_label to max_label, but val_dataset has others; set max_label, \
         or use ndcg@10, mrr@10 or map"
    } else {
        return Ok(());
    };
    Err(plan.error("metric_for_best", format!("{metric} {missing}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    fn verdicts(metric: Metric, patience: Option<usize>, losses: &[f64]) -> Vec<Verdict> {
        let plan = ValidationPlan { interval: None, metric: Some(metric), patience };
        let mut best = Best::new(&plan).unwrap();
        let judge = |(step, &loss): (usize, &f64)| {
            best.judge(step, &Validation { loss: Some(loss), ranking: None }).unwrap()
        };
        losses.iter().enumerate().map(judge).collect()
    }

    #[test]
    fn less_loss_is_better_and_equal_is_not() {
        use Verdict::{Best, Worse};
        let found = verdicts(Metric::Loss, None, &[0.5, 0.6, 0.5, 0.4, f64::NAN, 0.3]);
        assert_eq!(found, [Best, Worse, Worse, Best, Worse, Best]);
        assert_eq!(verdicts(Metric::Loss, None, &[f64::NAN, 1.0]), [Worse, Best]);
        for metric in [Metric::NdcgAt10, Metric::MrrAt10, Metric::Map] {
            assert!(metric.is_better(0.6, 0.5) && !metric.is_better(0.5, 0.5));
            assert!(!metric.is_better(f64::NAN, 0.5));
        }
    }

    #[test]
    fn patience_counts_validations_in_a_row() {
        use Verdict::{Best, Stop, Worse};
        let found = verdicts(Metric::Loss, Some(2), &[0.5, 0.6, 0.4, 0.5, 0.5]);
        assert_eq!(found, [Best, Worse, Best, Worse, Stop]);
        assert_eq!(verdicts(Metric::Loss, Some(1), &[0.5, 0.5]), [Best, Stop]);
    }

    #[test]
    fn a_figure_that_is_not_there_ends_the_run() {
        let plan = ValidationPlan { interval: None, metric: Some(Metric::Map), patience: None };
        let nothing = Validation { loss: Some(1.0), ranking: None };
        let error = Best::new(&plan).unwrap().judge(1, &nothing).unwrap_err().to_string();
        assert_eq!(error, "metric_for_best: the validation data gives no map");
    }
}
