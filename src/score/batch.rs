//! How tokenized pairs are cut into batches.

use std::cmp::Reverse;

use crate::text::{EncodedPair, TokenBatch};

/// The most that a batch may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BatchLimits {
    /// Pairs.
    pub pairs: usize,
    /// Tokens, unless one pair alone has more.
    pub tokens: usize,
}

/// Pairs of like length that are scored together.
#[derive(Debug)]
pub(super) struct Batch {
    /// Their places in the list.
    pub places: Vec<usize>,
    /// Their tokens, in the same order.
    pub tokens: TokenBatch,
}

/// Cuts a list of pairs into batches, longest pairs first: a batch that does not fit into memory fails
/// at once, not after an hour.
pub(super) fn batches(pairs: &[EncodedPair], limits: BatchLimits) -> Vec<Batch> {
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    order.sort_by_key(|&place| (Reverse(pairs[place].input_ids.len()), place));
    let mut batches = Vec::new();
    let mut rest = order.as_slice();
    while !rest.is_empty() {
        let mut total = 0;
        let fits = |place: &&usize| {
            total += pairs[**place].input_ids.len();
            total <= limits.tokens
        };
        let count = rest.iter().take(limits.pairs).take_while(fits).count().max(1);
        let (now, later) = rest.split_at(count);
        let mut tokens = TokenBatch::default();
        for &place in now {
            tokens.push(&pairs[place]);
        }
        batches.push(Batch { places: now.to_vec(), tokens });
        rest = later;
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Truncation;

    fn cut(lengths: &[usize], pairs: usize, tokens: usize) -> Vec<Vec<usize>> {
        let pair = |&length: &usize| EncodedPair {
            input_ids: vec![7; length],
            type_ids: vec![0; length],
            truncated: Truncation::None,
            full_len: length,
        };
        let list: Vec<_> = lengths.iter().map(pair).collect();
        let cut = batches(&list, BatchLimits { pairs, tokens });
        for batch in &cut {
            assert_eq!(batch.tokens.len(), batch.places.len());
        }
        cut.into_iter().map(|batch| batch.places).collect()
    }

    #[test]
    fn pairs_of_like_length_are_together_and_the_longest_come_first() {
        assert_eq!(cut(&[3, 9, 4, 8], 2, 100), [vec![1, 3], vec![2, 0]]);
        assert_eq!(cut(&[5, 5, 5], 512, 10), [vec![0, 1], vec![2]]);
        // One that is too long is alone.
        assert_eq!(cut(&[5, 50, 5], 512, 10), [vec![1], vec![0, 2]]);
        assert!(cut(&[], 4, 10).is_empty());
    }
}
