//! Properties of the plan of an epoch.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::super::testing;
use super::*;

/// Texts of very uneven length; labels cycle through 0, 1, 2.
fn dataset(kind: DatasetKind, sizes: &[usize]) -> Arc<Dataset> {
    let pair = |i: usize| ("query", "word ".repeat(1 + i * i % 97), (i % 3) as f32);
    let groups = if kind == DatasetKind::Grouped { sizes } else { &[] };
    Arc::new(testing::dataset(kind, (0..sizes.iter().sum()).map(pair), groups))
}

fn options(world_size: usize, batch_size: usize, accumulation: usize) -> SamplerOptions {
    SamplerOptions { world_size, batch_size, accumulation, group_size: 4, max_len: 64, seed: 666 }
}

fn epoch(dataset: &Arc<Dataset>, options: SamplerOptions, epoch: usize) -> Vec<StepPlan> {
    Sampler::new(Arc::clone(dataset), options).unwrap().epoch(epoch).collect()
}

/// The pairs of each global micro-batch, in no order.
fn global_sets(steps: &[StepPlan]) -> Vec<Vec<u32>> {
    let micro_batches = steps.iter().flat_map(|step| &step.micro_batches);
    let set = |micro_batch: &MicroBatchPlan| {
        let mut set = micro_batch.per_rank.concat();
        set.sort_unstable();
        set
    };
    micro_batches.map(set).collect()
}

#[test]
fn every_pair_comes_once_an_epoch_in_the_right_number_of_steps() {
    for count in [1, 2, 5, 6, 7, 47, 48, 49] {
        let dataset = dataset(DatasetKind::Pointwise, &[count]);
        for (world_size, batch_size, accumulation) in [(1, 1, 1), (1, 6, 2), (2, 3, 1), (3, 4, 3)] {
            let options = options(world_size, batch_size, accumulation);
            let sampler = Sampler::new(Arc::clone(&dataset), options).unwrap();
            let steps: Vec<_> = sampler.epoch(3).collect();
            let expected = count.div_ceil(batch_size * world_size).div_ceil(accumulation);
            assert_eq!((steps.len(), sampler.steps_per_epoch()), (expected, expected));
            let mut all = global_sets(&steps).concat();
            all.sort_unstable();
            assert_eq!(all, (0..count as u32).collect::<Vec<_>>());
            assert_eq!(steps.iter().map(StepPlan::pairs).sum::<usize>(), count);
            for step in &steps {
                assert!((1..=accumulation).contains(&step.micro_batches.len()));
                assert!(step.micro_batches.iter().all(|m| m.per_rank.len() == world_size));
                assert_eq!(step.groups(), 0);
            }
        }
    }
}

#[test]
fn every_rank_has_work_while_there_is_enough_and_loads_are_even() {
    let dataset = dataset(DatasetKind::Pointwise, &[97]);
    let options = options(3, 8, 1);
    let sampler = Sampler::new(Arc::clone(&dataset), options).unwrap();
    for step in sampler.epoch(0) {
        let per_rank = &step.micro_batches[0].per_rank;
        let load =
            |pairs: &Vec<u32>| pairs.iter().map(|&p| dataset.cost(p, options.max_len)).sum::<u32>();
        let loads: Vec<_> = per_rank.iter().map(load).collect();
        let enough = step.pairs() >= 3;
        assert!(per_rank.iter().all(|pairs| !enough || !pairs.is_empty()));
        let spread = loads.iter().max().unwrap() - loads.iter().min().unwrap();
        assert!(!enough || spread <= options.max_len as u32, "{loads:?}");
    }
    // 97 = 4 · 24 + 1: the last micro-batch has one pair for three ranks.
    assert_eq!(sampler.epoch(0).last().unwrap().micro_batches[0].pairs(), 1);
}

#[test]
fn the_global_micro_batches_do_not_depend_on_the_number_of_ranks() {
    for (kind, sizes) in
        [(DatasetKind::Pointwise, &[100][..]), (DatasetKind::Grouped, &[5, 9, 2, 30, 12, 7, 8][..])]
    {
        let dataset = dataset(kind, sizes);
        let one = epoch(&dataset, options(1, 6, 2), 1);
        for (world_size, batch_size) in [(2, 3), (3, 2), (6, 1)] {
            let many = epoch(&dataset, options(world_size, batch_size, 2), 1);
            assert_eq!(global_sets(&many), global_sets(&one));
            assert_eq!(many.len(), one.len());
            for (many, one) in many.iter().zip(&one) {
                assert_eq!((many.pairs(), many.groups()), (one.pairs(), one.groups()));
            }
        }
        // One rank's order is the global order; a rank of several has a part of it in order.
        for (many, one) in epoch(&dataset, options(2, 3, 2), 1).iter().zip(&one) {
            for (many, one) in many.micro_batches.iter().zip(&one.micro_batches) {
                let place = |pair: &u32| one.per_rank[0].iter().position(|p| p == pair);
                for pairs in many.per_rank.iter().filter(|_| kind == DatasetKind::Pointwise) {
                    assert!(pairs.is_sorted_by_key(place));
                }
            }
        }
    }
}

#[test]
fn plans_repeat_and_differ_by_epoch_and_seed() {
    let dataset = dataset(DatasetKind::Pointwise, &[50]);
    let base = options(2, 4, 1);
    assert_eq!(epoch(&dataset, base, 2), epoch(&dataset, base, 2));
    assert_ne!(epoch(&dataset, base, 2), epoch(&dataset, base, 3));
    assert_ne!(epoch(&dataset, base, 2), epoch(&dataset, SamplerOptions { seed: 1, ..base }, 2));
}

#[test]
fn groups_stay_whole_hold_two_labels_and_are_as_many_each_epoch() {
    let sizes = [5, 9, 2, 30, 1, 12];
    let dataset = dataset(DatasetKind::Grouped, &sizes);
    let sampler = Sampler::new(Arc::clone(&dataset), options(3, 2, 1)).unwrap();
    let report = sampler.report();
    // ceil(5/4) + ceil(9/4) + 1 + ceil(30/4) + ceil(12/4), the lone hit kept out.
    assert_eq!((report.items, report.steps), (2 + 3 + 1 + 8 + 3, 3));
    assert_eq!(report.pairs, 4 * (2 + 3 + 8 + 3) + 2);
    let lines = "  an epoch: 66 pairs in 3 steps of about 22 pairs\n  \
                 groups left out because their labels are equal: 1 (first at line 47)";
    assert_eq!(report.to_string(), lines);
    assert_eq!((report.single_label_groups, report.single_label_lines.as_slice()), (1, &[47][..]));
    for number in 0..6 {
        let steps: Vec<_> = sampler.epoch(number).collect();
        assert_eq!(steps.iter().map(StepPlan::groups).sum::<usize>(), report.items);
        assert_eq!(steps.iter().map(StepPlan::pairs).sum::<usize>(), report.pairs);
        for micro_batch in steps.iter().flat_map(|step| &step.micro_batches) {
            for (pairs, offsets) in micro_batch.per_rank.iter().zip(&micro_batch.cu_groups) {
                assert_eq!((offsets[0], *offsets.last().unwrap()), (0, pairs.len() as u32));
                for ends in offsets.windows(2) {
                    let group = &pairs[ends[0] as usize..ends[1] as usize];
                    let home = |pair: u32| dataset.groups().position(|g| g.contains(&pair));
                    assert!(group.iter().all(|&pair| home(pair) == home(group[0])));
                    let labels: Vec<f32> =
                        group.iter().map(|&pair| dataset.pair(pair).label).collect();
                    assert!(has_two_labels(&labels));
                }
            }
        }
    }
}

#[test]
fn every_hit_of_a_usable_group_is_reached_in_two_epochs() {
    let dataset = dataset(DatasetKind::Grouped, &[5, 9, 2, 30, 13, 12]);
    let sampler = Sampler::new(Arc::clone(&dataset), options(2, 2, 2)).unwrap();
    let mut seen =
        [0, 1].map(|n| global_sets(&sampler.epoch(n).collect::<Vec<_>>()).concat()).concat();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), dataset.pair_count());
}

#[test]
fn evaluation_keeps_file_order_and_whole_groups() {
    let grouped = dataset(DatasetKind::Grouped, &[5, 9, 1]);
    let micro_batches = in_order(&grouped, &options(1, 2, 1)).unwrap().collect::<Vec<_>>();
    assert_eq!(micro_batches[0].per_rank, [(0..14).collect::<Vec<u32>>()]);
    assert_eq!(micro_batches[0].cu_groups, [[0, 5, 14]]);
    assert_eq!(micro_batches[1].per_rank, [[14]]);
    let spread = in_order(&grouped, &options(4, 1, 1)).unwrap().collect::<Vec<_>>();
    assert_eq!((spread.len(), spread[0].pairs(), spread[0].groups()), (1, 15, 3));
    assert_eq!(spread[0].cu_groups[3], [0]);
    let pointwise = dataset(DatasetKind::Pointwise, &[7]);
    let micro_batches = in_order(&pointwise, &options(1, 4, 1)).unwrap().collect::<Vec<_>>();
    assert_eq!(micro_batches[1].per_rank, [[4, 5, 6]]);
    assert!(micro_batches[1].cu_groups.is_empty());
}

#[test]
fn sizes_that_cannot_work_are_refused() {
    let grouped = dataset(DatasetKind::Grouped, &[4]);
    let base = options(1, 1, 1);
    for (options, expected) in [
        (
            SamplerOptions { world_size: 0, ..base },
            "the number of workers is 0, expected at least 1",
        ),
        (SamplerOptions { batch_size: 0, ..base }, "batch_size is 0, expected at least 1"),
        (
            SamplerOptions { accumulation: 0, ..base },
            "gradient_accumulation_steps is 0, expected at least 1",
        ),
        (SamplerOptions { group_size: 1, ..base }, "train_group_size is 1, expected at least 2"),
    ] {
        let error = Sampler::new(Arc::clone(&grouped), options).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
    let lone = dataset(DatasetKind::Grouped, &[1, 1]);
    let error = Sampler::new(lone, base).unwrap_err().to_string();
    assert_eq!(error, "d: no group has two distinct labels, so none can be learned from");
}

#[test]
fn an_epoch_goes_on_behind_the_items_that_were_used() {
    for (kind, sizes) in [(DatasetKind::Pointwise, vec![47]), (DatasetKind::Grouped, vec![5; 9])] {
        let dataset = dataset(kind, &sizes);
        let whole = epoch(&dataset, options(2, 3, 2), 1);
        // The same items a step, over one rank, two and three.
        for (world_size, batch_size) in [(1, 6), (2, 3), (3, 2)] {
            let sampler = Sampler::new(Arc::clone(&dataset), options(world_size, batch_size, 2));
            let sampler = sampler.unwrap();
            let mut used = 0;
            for done in 0..=whole.len() {
                let rest: Vec<_> = sampler.epoch_from(1, used).collect();
                assert_eq!(global_sets(&rest), global_sets(&whole[done..]), "{kind:?} {done}");
                assert_eq!(sampler.steps_from(used), whole.len() - done, "{kind:?} {done}");
                used += whole.get(done).map_or(0, StepPlan::items);
            }
            // Another number of items a step: none is used twice, none is left out.
            let other = epoch(&dataset, options(2, 3, 2), 1);
            let odd = Sampler::new(Arc::clone(&dataset), options(1, 5, 1)).unwrap();
            let rest: Vec<_> = odd.epoch_from(1, other[0].items()).collect();
            assert_eq!(odd.steps_from(other[0].items()), rest.len(), "{kind:?}");
            let mut all = global_sets(&rest).concat();
            all.extend(global_sets(&other[..1]).concat());
            all.sort_unstable();
            let mut expected = global_sets(&other).concat();
            expected.sort_unstable();
            assert_eq!(all, expected, "{kind:?}");
        }
    }
}
