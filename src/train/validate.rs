//! Validation over all ranks: the loss, and ranking metrics where the data has groups.

use std::fmt;
use std::sync::Arc;

use rr_launch::contract::heartbeat;
use serde_json::{Value, json};
use tch::Tensor;

use super::worst::QueryReport;
use crate::comm::{Communicator, Groups, Reduction, reduce_values};
use crate::config::{DatasetKind, Metric, Plan};
use crate::data::{Dataset, SamplerOptions, sampler};
use crate::engine::Engine;
use crate::error::Result;
use crate::loss;
use crate::metrics::{RankingMetrics, RankingSums};
use crate::score::score_tokens;
use crate::text::{PairTokenizer, PipelineOptions, TokenBatch, WorkItem, token_batches};

/// Groups (or pairs of pointwise data, times eight) per forward pass and rank.
const GROUPS_PER_BATCH: usize = 4;

/// What a validation found, the same on every rank.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Validation {
    /// Mean loss; `None` where the loss does not apply to the data.
    pub loss: Option<f64>,
    /// Ranking metrics; `None` for data without groups.
    pub ranking: Option<RankingMetrics>,
}

impl Validation {
    /// The figure that `metric` names; `None` where the data does not give it.
    #[must_use]
    pub fn figure(&self, metric: Metric) -> Option<f64> {
        match metric {
            Metric::Loss => self.loss,
            Metric::NdcgAt10 => self.ranking.map(|ranking| ranking.ndcg_at_10),
            Metric::MrrAt10 => self.ranking.map(|ranking| ranking.mrr_at_10),
            Metric::Map => self.ranking.map(|ranking| ranking.map),
        }
    }

    /// The figures by name, for `metrics.jsonl` and `reranker.json`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut value = self.ranking.map_or_else(|| json!({}), |ranking| ranking.to_json());
        value["loss"] = json!(self.loss);
        value
    }
}

impl fmt::Display for Validation {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(loss) = self.loss {
            write!(out, "loss {loss:.4}  ")?;
        }
        match &self.ranking {
            Some(r) => write!(
                out,
                "nDCG@10 {:.4}  MRR@10 {:.4}  MAP {:.4}  over {} queries",
                r.ndcg_at_10, r.mrr_at_10, r.map, r.queries
            ),
            None => write!(out, "no groups to rank"),
        }
    }
}

/// Scores `dataset`, every rank its share, and adds the results up; also tells how its queries were
/// ranked. Dropout is off.
pub(super) fn validate(
    engine: &Engine,
    tokenizer: &Arc<PairTokenizer>,
    dataset: &Arc<Dataset>,
    plan: &Plan,
    groups: &Groups,
) -> Result<(Validation, QueryReport)> {
    let mut sums = Sums::default();
    let has_loss = loss_applies(plan, dataset);
    for (batch, tokens) in shares(tokenizer, dataset, plan, groups.world.as_ref())?.enumerate() {
        let tokens = tokens?;
        heartbeat::working(format_args!("validating, batch {}", batch + 1));
        let scores = score_tokens(engine, &tokens, groups)?;
        sums.rank(&tokens, &scores)?;
        if has_loss {
            sums.judge(&tokens, &scores, plan, dataset.kind)?;
        }
    }
    let mut values = [0.0; 8];
    values[..6].copy_from_slice(&sums.ranking.to_array());
    values[6..].copy_from_slice(&[sums.loss, sums.weight]);
    reduce_values(groups.world.as_ref(), &mut values, Reduction::Sum)?;
    let ranking: [f64; 6] = std::array::from_fn(|i| values[i]);
    let validation = Validation {
        loss: (values[7] > 0.0).then(|| values[6] / values[7]),
        ranking: RankingSums::from_array(ranking).metrics(),
    };
    Ok((validation, sums.queries.reduce(groups.world.as_ref())?))
}

/// This rank's share of the data, tokenized in the background; groups stay whole.
fn shares(
    tokenizer: &Arc<PairTokenizer>,
    dataset: &Arc<Dataset>,
    plan: &Plan,
    comm: &dyn Communicator,
) -> Result<impl Iterator<Item = Result<TokenBatch>> + use<>> {
    let batch_size = match dataset.kind {
        DatasetKind::Grouped => GROUPS_PER_BATCH,
        DatasetKind::Pointwise => GROUPS_PER_BATCH * 8,
    };
    let options = SamplerOptions {
        world_size: comm.world_size(),
        batch_size,
        accumulation: 1,
        group_size: plan.data.group_size,
        max_len: plan.data.max_len,
        seed: plan.training.seed,
    };
    let rank = comm.rank();
    let micro_batches = sampler::in_order(dataset, &options)?;
    let items = micro_batches.map(move |micro| WorkItem::of_rank(&micro, rank, 0));
    let options =
        PipelineOptions { threads: 1, ahead: 2, max_len: plan.data.max_len, augment: None };
    token_batches(Arc::clone(dataset), Arc::clone(tokenizer), items, options)
}

#[derive(Default)]
struct Sums {
    ranking: RankingSums,
    queries: QueryReport,
    loss: f64,
    weight: f64,
}

impl Sums {
    /// Adds what becomes of the batch's queries.
    fn rank(&mut self, tokens: &TokenBatch, scores: &[f32]) -> Result<()> {
        for bounds in tokens.cu_groups.windows(2) {
            let group = bounds[0] as usize..bounds[1] as usize;
            let (scores, labels) = (&scores[group.clone()], &tokens.labels[group.clone()]);
            self.ranking.add(scores, labels)?;
            self.queries.add(&tokens.pairs[group], scores, labels)?;
        }
        Ok(())
    }

    /// Adds the batch's loss.
    fn judge(
        &mut self,
        tokens: &TokenBatch,
        scores: &[f32],
        plan: &Plan,
        kind: DatasetKind,
    ) -> Result<()> {
        let labels = loss_labels(tokens, plan, kind);
        if labels.is_empty() {
            return Ok(());
        }
        let (s, y) = (Tensor::f_from_slice(scores)?, Tensor::f_from_slice(&labels)?);
        self.loss += loss::sum(plan.loss, &s, &y, &tokens.cu_groups)?.f_double_value(&[])?;
        self.weight += loss::weight(plan.loss, &labels, &tokens.cu_groups);
        Ok(())
    }
}

/// Whether the training loss can be computed over all of `dataset`, and so over the shares of however
/// many workers: one that compares the hits of a query has to find a query whose labels differ as it needs
/// them to, and single pairs have none; a pointwise one applies to grouped data only where all their labels
/// are in the range that such data map to `[0, 1]`.
pub(super) fn loss_applies(plan: &Plan, dataset: &Dataset) -> bool {
    match (plan.loss.needs_groups(), dataset.kind) {
        (true, DatasetKind::Pointwise) => false,
        (true, DatasetKind::Grouped) => dataset.groups().any(|group| {
            let labels = dataset.labels(group);
            loss::weight(plan.loss, &labels, &[0, labels.len() as i64]) > 0.0
        }),
        (false, DatasetKind::Pointwise) => true,
        (false, DatasetKind::Grouped) => {
            let mut pairs = 0..dataset.pair_count() as u32;
            pairs.all(|pair| plan.data.labels.contains(dataset.pair(pair).label))
        }
    }
}

/// The labels as the training loss wants them: a pointwise loss over grouped data maps raw labels
/// as pointwise data is mapped.
fn loss_labels(tokens: &TokenBatch, plan: &Plan, kind: DatasetKind) -> Vec<f32> {
    if plan.loss.needs_groups() || kind == DatasetKind::Pointwise {
        return tokens.labels.clone();
    }
    tokens.labels.iter().map(|&label| plan.data.labels.map(label)).collect()
}
