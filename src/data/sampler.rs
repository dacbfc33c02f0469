//! The plan of an epoch: which pairs go into which micro-batch, on which rank.
//!
//! Every rank computes the same plan from the data set, the seed and the epoch, so nothing has to
//! be sent. A *global micro-batch* is `batch_size · world_size` consecutive items of the shuffled
//! epoch; which items it holds depends on that product only, so one rank with batches of six, two
//! with three and three with two take the same steps. Within it, items are spread over the ranks
//! by estimated tokens. The last global micro-batch of an epoch may be smaller: nothing is dropped
//! and nothing repeated.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use super::groups::{GroupDrawer, has_two_labels};
use super::report::grouped;
use super::rng::SeededRng;
use super::{Dataset, DatasetKind};
use crate::error::{Error, Result};

/// Streams of random numbers that must not meet; each is the first word of a generator's path.
pub(super) const SHUFFLE_STREAM: u64 = 1;
pub(super) const GROUP_STREAM: u64 = 2;
pub(super) const AUGMENT_STREAM: u64 = 3;

/// What the plan depends on besides the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplerOptions {
    /// Ranks that share a global micro-batch.
    pub world_size: usize,
    /// Pairs (pointwise data) or groups (grouped data) per rank and micro-batch.
    pub batch_size: usize,
    /// Micro-batches per optimizer step.
    pub accumulation: usize,
    /// Hits drawn into a group; grouped data only.
    pub group_size: usize,
    /// The cap on a pair's estimated tokens.
    pub max_len: usize,
    /// Fixes every shuffle.
    pub seed: u64,
}

impl SamplerOptions {
    /// Optimizer steps that use up `items`.
    fn steps(&self, items: usize) -> usize {
        items.div_ceil(self.batch_size * self.world_size).div_ceil(self.accumulation)
    }
}

/// One global micro-batch, spread over the ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatchPlan {
    /// For each rank, numbers of pairs in the order of the global micro-batch. A
    /// rank is empty only where there are fewer items than ranks.
    pub per_rank: Vec<Vec<u32>>,
    /// For each rank, where its groups begin and end in `per_rank`: `[groups + 1]` offsets that
    /// start with 0. `[0]` for a rank without groups; empty for pointwise data.
    pub cu_groups: Vec<Vec<u32>>,
}

impl MicroBatchPlan {
    /// Pairs over all ranks.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.per_rank.iter().map(Vec::len).sum()
    }

    /// Groups over all ranks; 0 for pointwise data.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.cu_groups.iter().map(|offsets| offsets.len().saturating_sub(1)).sum()
    }
}

/// One optimizer step: up to `accumulation` global micro-batches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepPlan {
    /// In order; never empty.
    pub micro_batches: Vec<MicroBatchPlan>,
}

impl StepPlan {
    /// Pairs over all ranks and micro-batches: what a pointwise mean divides by.
    #[must_use]
    pub fn pairs(&self) -> usize {
        self.micro_batches.iter().map(MicroBatchPlan::pairs).sum()
    }

    /// Groups over all ranks and micro-batches; 0 for pointwise data.
    #[must_use]
    pub fn groups(&self) -> usize {
        self.micro_batches.iter().map(MicroBatchPlan::groups).sum()
    }

    /// Items over all ranks and micro-batches: groups, or pairs of pointwise data.
    #[must_use]
    pub fn items(&self) -> usize {
        if self.groups() > 0 { self.groups() } else { self.pairs() }
    }
}

/// What a sampler makes of a data set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SamplerReport {
    /// Pairs (pointwise) or groups (grouped) per epoch.
    pub items: usize,
    /// Pairs per epoch; of grouped data, those in the groups, some of them more than once.
    pub pairs: usize,
    /// Optimizer steps per epoch.
    pub steps: usize,
    /// Groups of the data set kept out because all their labels are equal.
    pub single_label_groups: usize,
    /// The file lines of the first few of these.
    pub single_label_lines: Vec<u32>,
}

impl fmt::Display for SamplerReport {
    /// A line or two to follow a [`super::LoadReport`], without a line end after the last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [pairs, steps] = [self.pairs, self.steps].map(grouped);
        let per_step = grouped(self.pairs.div_ceil(self.steps.max(1)));
        write!(f, "  an epoch: {pairs} pairs in {steps} steps of about {per_step} pairs")?;
        if let Some(line) = self.single_label_lines.first() {
            let count = grouped(self.single_label_groups);
            write!(f, "\n  groups left out because their labels are equal: {count}")?;
            write!(f, " (first at line {line})")?;
        }
        Ok(())
    }
}

/// Plans epochs.
#[derive(Debug)]
pub struct Sampler {
    dataset: Arc<Dataset>,
    options: SamplerOptions,
    /// Groups with at least two distinct labels.
    usable_groups: Vec<u32>,
    report: SamplerReport,
}

/// The items of an epoch: runs of pair numbers that stay together.
#[derive(Debug)]
enum Items {
    /// Every pair by itself.
    Singles { count: u32 },
    /// Groups one after another.
    Groups {
        pairs: Vec<u32>,
        /// Where items begin and end in `pairs`: `[items + 1]`, starting with 0.
        offsets: Vec<u32>,
    },
}

impl Items {
    fn groups<G: IntoIterator<Item = u32>>(groups: impl IntoIterator<Item = G>) -> Self {
        let (mut pairs, mut offsets) = (Vec::new(), vec![0]);
        for group in groups {
            pairs.extend(group);
            offsets.push(pairs.len() as u32);
        }
        Self::Groups { pairs, offsets }
    }

    /// The numbers of all items, in order.
    fn numbers(&self) -> Vec<u32> {
        let count = match self {
            Self::Singles { count } => *count,
            Self::Groups { offsets, .. } => offsets.len() as u32 - 1,
        };
        (0..count).collect()
    }

    fn pairs_of<'a>(&'a self, item: &'a u32) -> &'a [u32] {
        match self {
            Self::Singles { .. } => std::slice::from_ref(item),
            Self::Groups { pairs, offsets } => {
                let item = *item as usize;
                &pairs[offsets[item] as usize..offsets[item + 1] as usize]
            }
        }
    }
}

impl Sampler {
    /// A sampler over a data set.
    ///
    /// # Errors
    /// [`Error::Usage`] when a size is 0 or groups cannot hold two labels; [`Error::File`] when no
    /// group has two distinct labels.
    pub fn new(dataset: Arc<Dataset>, options: SamplerOptions) -> Result<Self> {
        check(&options, dataset.kind)?;
        let numbers = 0..dataset.group_count() as u32;
        let (usable_groups, single): (Vec<u32>, Vec<u32>) =
            numbers.partition(|&group| has_two_labels(&dataset.labels(dataset.group(group))));
        if dataset.kind == DatasetKind::Grouped && usable_groups.is_empty() {
            return Err(Error::File {
                path: dataset.path.clone(),
                message: "no group has two distinct labels, so none can be learned from".into(),
            });
        }
        let (items, pairs) = match dataset.kind {
            DatasetKind::Pointwise => (dataset.pair_count(), dataset.pair_count()),
            DatasetKind::Grouped => usable_groups
                .iter()
                .map(|&group| dataset.group(group).len())
                .map(|hits| (hits.div_ceil(options.group_size), hits.min(options.group_size)))
                .fold((0, 0), |(items, pairs), (n, size)| (items + n, pairs + n * size)),
        };
        let line = |&group: &u32| dataset.pair(dataset.group(group).start).line;
        let report = SamplerReport {
            items,
            pairs,
            steps: options.steps(items),
            single_label_groups: single.len(),
            single_label_lines: single.iter().take(5).map(line).collect(),
        };
        Ok(Self { dataset, options, usable_groups, report })
    }

    /// Steps per epoch and what was kept out.
    #[must_use]
    pub fn report(&self) -> &SamplerReport {
        &self.report
    }

    /// Optimizer steps per epoch: `ceil(ceil(items / (batch_size · world_size)) / accumulation)`.
    #[must_use]
    pub fn steps_per_epoch(&self) -> usize {
        self.report.steps
    }

    /// Optimizer steps of what is left of any epoch after its first `used` items.
    #[must_use]
    pub fn steps_from(&self, used: usize) -> usize {
        self.options.steps(self.report.items.saturating_sub(used))
    }

    /// The plan of an epoch (counted from 0); the same on every rank and every machine.
    #[must_use]
    pub fn epoch(&self, epoch: usize) -> Epoch {
        self.epoch_from(epoch, 0)
    }

    /// The plan of what is left of an epoch after its first `used` items. How these were cut into
    /// steps, over how many ranks, makes no difference.
    #[must_use]
    pub fn epoch_from(&self, epoch: usize, used: usize) -> Epoch {
        let items = self.items(epoch);
        let mut order = items.numbers();
        SeededRng::new(self.options.seed, &[SHUFFLE_STREAM, epoch as u64]).shuffle(&mut order);
        let mut batches = MicroBatches::new(&self.dataset, items, order, self.options);
        batches.next = used.min(batches.order.len());
        Epoch(batches)
    }

    fn items(&self, epoch: usize) -> Items {
        if self.dataset.kind == DatasetKind::Pointwise {
            return Items::Singles { count: self.dataset.pair_count() as u32 };
        }
        let drawer = GroupDrawer::new(self.options.group_size, self.options.seed, epoch);
        let draw = |&group: &u32| {
            let range = self.dataset.group(group);
            let groups = drawer.draw(group, &self.dataset.labels(range.clone()));
            groups.into_iter().map(move |hits| hits.into_iter().map(move |hit| range.start + hit))
        };
        Items::groups(self.usable_groups.iter().flat_map(draw))
    }
}

/// A plan for evaluation: file order, every pair once, no group dropped or split.
///
/// `options.batch_size` counts pairs or whole groups; the seed, the accumulation and the group
/// size do not matter.
///
/// # Errors
/// [`Error::Usage`] when a size is 0.
pub fn in_order(
    dataset: &Arc<Dataset>,
    options: &SamplerOptions,
) -> Result<impl Iterator<Item = MicroBatchPlan> + use<>> {
    check(&SamplerOptions { accumulation: 1, group_size: 2, ..*options }, dataset.kind)?;
    let items = match dataset.kind {
        DatasetKind::Pointwise => Items::Singles { count: dataset.pair_count() as u32 },
        DatasetKind::Grouped => Items::groups(dataset.groups()),
    };
    let order = items.numbers();
    Ok(MicroBatches::new(dataset, items, order, *options))
}

/// The steps of an epoch, each planned when it is asked for: four bytes a pair are kept, and for
/// grouped data four more.
#[derive(Debug)]
pub struct Epoch(MicroBatches);

impl Iterator for Epoch {
    type Item = StepPlan;

    fn next(&mut self) -> Option<StepPlan> {
        let accumulation = self.0.options.accumulation;
        let micro_batches: Vec<_> = self.0.by_ref().take(accumulation).collect();
        (!micro_batches.is_empty()).then_some(StepPlan { micro_batches })
    }
}

/// The items in `order`, cut into global micro-batches, each spread over the ranks.
#[derive(Debug)]
struct MicroBatches {
    dataset: Arc<Dataset>,
    items: Items,
    order: Vec<u32>,
    options: SamplerOptions,
    /// The place in `order` of the next micro-batch.
    next: usize,
}

impl MicroBatches {
    fn new(dataset: &Arc<Dataset>, items: Items, order: Vec<u32>, options: SamplerOptions) -> Self {
        Self { dataset: Arc::clone(dataset), items, order, options, next: 0 }
    }

    fn spread(&self, batch: &[u32]) -> MicroBatchPlan {
        let cost = |&pair: &u32| u64::from(self.dataset.cost(pair, self.options.max_len));
        let item_costs: Vec<u64> =
            batch.iter().map(|item| self.items.pairs_of(item).iter().map(cost).sum()).collect();
        let mut micro_batch = MicroBatchPlan { per_rank: Vec::new(), cu_groups: Vec::new() };
        for share in balance(&item_costs, self.options.world_size) {
            let mut pairs = Vec::new();
            let mut offsets = vec![0];
            for place in share {
                pairs.extend_from_slice(self.items.pairs_of(&batch[place]));
                offsets.push(pairs.len() as u32);
            }
            micro_batch.per_rank.push(pairs);
            if self.dataset.kind == DatasetKind::Grouped {
                micro_batch.cu_groups.push(offsets);
            }
        }
        micro_batch
    }
}

impl Iterator for MicroBatches {
    type Item = MicroBatchPlan;

    fn next(&mut self) -> Option<MicroBatchPlan> {
        let items = self.options.batch_size * self.options.world_size;
        let end = self.order.len().min(self.next + items);
        let batch = &self.order[std::mem::replace(&mut self.next, end)..end];
        (!batch.is_empty()).then(|| self.spread(batch))
    }
}

fn check(options: &SamplerOptions, kind: DatasetKind) -> Result<()> {
    let SamplerOptions { world_size, batch_size, accumulation, group_size, .. } = *options;
    for (name, value) in [
        ("the number of workers", world_size),
        ("batch_size", batch_size),
        ("gradient_accumulation_steps", accumulation),
    ] {
        if value == 0 {
            return Err(Error::Usage(format!("{name} is 0, expected at least 1")));
        }
    }
    if kind == DatasetKind::Grouped && group_size < 2 {
        let message = format!("train_group_size is {group_size}, expected at least 2");
        return Err(Error::Usage(message));
    }
    Ok(())
}

/// Longest processing time first (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969):
/// each item, dearest first, goes to the rank with the least so far. Costs are at least 1, so no
/// rank stays empty while there are enough items. Returns ascending item numbers for each rank.
fn balance(costs: &[u64], world_size: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by_key(|&item| (std::cmp::Reverse(costs[item]), item));
    let mut loads = vec![0; world_size];
    let mut shares = vec![Vec::new(); world_size];
    for item in order {
        let lightest = (0..world_size).min_by_key(|&rank| (loads[rank], rank)).unwrap_or(0);
        loads[lightest] += costs[item];
        shares[lightest].push(item);
    }
    for share in &mut shares {
        share.sort_unstable();
    }
    shares
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
