//! Groups for losses that compare documents: drawn afresh each epoch, two labels in each.

use std::cmp::Ordering;

use super::rng::SeededRng;
use super::sampler::GROUP_STREAM;

/// Whether at least two distinct labels occur among the hits of a query.
pub(super) fn has_two_labels(hits: &[f32]) -> bool {
    hits.iter().any(|&hit| differ(hit, hits[0]))
}

/// Labels are never computed with before this, so equal ones are equal to the bit; 0 and −0 are too.
fn differ(a: f32, b: f32) -> bool {
    a.partial_cmp(&b) != Some(Ordering::Equal)
}

/// Draws the groups of one epoch.
///
/// The hits of a query are dealt in a random order into `ceil(hits / size)` groups of `size` (or
/// of all hits where there are fewer); the last is topped up from the others. A group whose labels
/// all came out equal gives its last hit for a random one with another label. A hit that loses its
/// place so in an even epoch leads a group in the odd epoch that follows, so every hit is used at
/// least once in the epochs `2k` and `2k + 1`.
pub(super) struct GroupDrawer {
    size: usize,
    seed: u64,
    epoch: u64,
}

impl GroupDrawer {
    /// A drawer of groups of `size` hits, at least 2.
    pub(super) fn new(size: usize, seed: u64, epoch: usize) -> Self {
        Self { size, seed, epoch: epoch as u64 }
    }

    /// Groups of ascending indices into `hits`, the labels of a query's documents, of which two are
    /// distinct; `number` is the query's own random stream.
    pub(super) fn draw(&self, number: u32, hits: &[f32]) -> Vec<Vec<u32>> {
        if hits.len() <= self.size {
            return vec![(0..hits.len() as u32).collect()];
        }
        let mut waiting = Vec::new();
        if self.epoch % 2 == 1 {
            waiting = self.deal(self.epoch - 1, number, hits, &[]).displaced;
        }
        self.deal(self.epoch, number, hits, &waiting).groups
    }

    fn deal(&self, epoch: u64, number: u32, hits: &[f32], waiting: &[u32]) -> Deal {
        let mut rng = SeededRng::new(self.seed, &[GROUP_STREAM, epoch, u64::from(number)]);
        let mut waits = vec![false; hits.len()];
        for &hit in waiting {
            waits[hit as usize] = true;
        }
        let mut rest: Vec<u32> =
            (0..hits.len() as u32).filter(|&hit| !waits[hit as usize]).collect();
        rng.shuffle(&mut rest);
        let mut groups = seat(waiting, &rest, self.size);
        let full = hits.len() / self.size;
        let mut displaced = Vec::new();
        for group in &mut groups[..full] {
            if let Some(other) = other_label(group, hits, &mut rng) {
                // The first seat is never given up: it may be a waiting hit's.
                displaced.extend(group.pop());
                group.push(other);
            }
        }
        if let Some(last) = groups.get_mut(full) {
            top_up(last, hits, self.size, &mut rng);
        }
        for group in &mut groups {
            group.sort_unstable();
        }
        Deal { groups, displaced }
    }
}

struct Deal {
    groups: Vec<Vec<u32>>,
    /// At most one for each full group.
    displaced: Vec<u32>,
}

/// Deals hits into groups: one waiting hit to the head of each group while there are any.
fn seat(waiting: &[u32], rest: &[u32], size: usize) -> Vec<Vec<u32>> {
    let hits = waiting.len() + rest.len();
    let mut rest = rest.iter().copied();
    (0..hits.div_ceil(size))
        .map(|group| {
            let seats = size.min(hits - group * size);
            let head = waiting.get(group).copied();
            head.into_iter().chain(rest.by_ref()).take(seats).collect()
        })
        .collect()
}

/// For a group with equal labels: a random hit with another label, if there is one.
fn other_label(group: &[u32], hits: &[f32], rng: &mut SeededRng) -> Option<u32> {
    let is_other = |&hit: &u32| differ(hits[hit as usize], hits[group[0] as usize]);
    if group.iter().any(is_other) {
        return None;
    }
    let others: Vec<u32> = (0..hits.len() as u32).filter(is_other).collect();
    (!others.is_empty()).then(|| others[rng.below(others.len())])
}

/// Fills a group that came out short with hits of other groups, two labels first.
fn top_up(group: &mut Vec<u32>, hits: &[f32], size: usize, rng: &mut SeededRng) {
    group.extend(other_label(group, hits, rng));
    let mut others: Vec<u32> = (0..hits.len() as u32).filter(|hit| !group.contains(hit)).collect();
    rng.shuffle(&mut others);
    group.extend(others.into_iter().take(size - group.len()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hits(labels: impl IntoIterator<Item = u8>) -> Vec<f32> {
        labels.into_iter().map(f32::from).collect()
    }

    /// (name, labels): rare positives, graded, half and half, one short of full.
    fn cases() -> Vec<(&'static str, Vec<f32>)> {
        let rare = hits((0..72).map(|i| u8::from(i < 2)));
        let graded = hits((0..23).map(|i| i % 3));
        let half = hits((0..8).map(|i| i % 2));
        let lone = hits((0..15).map(|i| u8::from(i == 7)));
        vec![("rare", rare), ("graded", graded), ("half", half), ("lone", lone)]
    }

    #[test]
    fn groups_are_full_distinct_and_hold_two_labels() {
        for (name, hits) in cases() {
            for size in 2..=11 {
                for epoch in 0..6 {
                    let groups = GroupDrawer::new(size, 666, epoch).draw(3, &hits);
                    assert_eq!(groups.len(), hits.len().div_ceil(size), "{name}");
                    for group in groups {
                        assert_eq!(group.len(), size.min(hits.len()), "{name} {size}");
                        assert!(group.is_sorted_by(|a, b| a < b), "{name} {size}: {group:?}");
                        let hit_at = |hit: u32| hits[hit as usize];
                        assert!(
                            group.iter().any(|&hit| differ(hit_at(hit), hit_at(group[0]))),
                            "{name} {size} {epoch}: {group:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn every_hit_is_used_within_two_epochs() {
        for (name, hits) in cases() {
            for size in 2..=11 {
                for seed in 0..20 {
                    let mut used = vec![false; hits.len()];
                    for epoch in [4, 5] {
                        let groups = GroupDrawer::new(size, seed, epoch).draw(9, &hits);
                        groups.iter().flatten().for_each(|&hit| used[hit as usize] = true);
                    }
                    assert!(used.iter().all(|&used| used), "{name} {size} {seed}");
                }
            }
        }
    }

    #[test]
    fn draws_differ_by_epoch_seed_and_query_and_repeat_otherwise() {
        let (_, hits) = cases().swap_remove(0);
        let draw = |seed, epoch, number| GroupDrawer::new(10, seed, epoch).draw(number, &hits);
        assert_eq!(draw(1, 2, 3), draw(1, 2, 3));
        for other in [draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4)] {
            assert_ne!(draw(1, 2, 3), other);
        }
    }
}
