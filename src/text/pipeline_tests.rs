//! Batches against single pairs, and lengths over a data set.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use super::super::tokenizer::tests::bert_dir;
use super::super::{LengthReport, PairTokenizer};
use super::*;
use crate::config::DatasetKind;
use crate::data::testing;

/// Pair number `i` has a query of three tokens or of one, and a document of `i % 5`.
fn dataset() -> Arc<Dataset> {
    let query = |i: usize| if (i / 3).is_multiple_of(2) { "how to bake" } else { "how" };
    let pair = |i: usize| (query(i), "bread ".repeat(i % 5), i as f32);
    Arc::new(testing::dataset(DatasetKind::Pointwise, (0..30).map(pair), &[]))
}

fn tokenizer() -> Arc<PairTokenizer> {
    Arc::new(PairTokenizer::from_dir(bert_dir().path(), &serde_json::Value::Null).unwrap())
}

const OPTIONS: PipelineOptions =
    PipelineOptions { threads: 3, ahead: 4, max_len: 8, augment: None };

#[test]
fn batches_are_packed_pairs_in_order() {
    let (dataset, tokenizer) = (dataset(), tokenizer());
    let shares: Vec<Vec<u32>> = (0..10).map(|i| (3 * i..3 * i + 3).rev().collect()).collect();
    let items = shares.clone().into_iter();
    let items = items.map(|pairs| WorkItem { pairs, cu_groups: vec![0, 1, 3], epoch: 0 });
    let batches = token_batches(Arc::clone(&dataset), Arc::clone(&tokenizer), items, OPTIONS);
    let batches: Vec<_> = batches.unwrap().map(|batch| batch.unwrap()).collect();
    assert_eq!(batches.len(), shares.len());
    for (batch, share) in batches.iter().zip(&shares) {
        assert_eq!((&batch.pairs, batch.len()), (share, 3));
        assert_eq!(batch.cu_groups, [0, 1, 3]);
        assert_eq!(*batch.cu_seqlens.last().unwrap() as usize, batch.input_ids.len());
        for (ends, &number) in batch.cu_seqlens.windows(2).zip(share) {
            let range = ends[0] as usize..ends[1] as usize;
            let (query, document) = dataset.texts(&dataset.pair(number)).unwrap();
            let single = tokenizer.encode_pair(query, document, 8).unwrap();
            let ids: Vec<i64> = single.input_ids.into_iter().map(i64::from).collect();
            let type_ids: Vec<i64> = single.type_ids.into_iter().map(i64::from).collect();
            assert_eq!(batch.input_ids[range.clone()], ids);
            assert_eq!(batch.type_ids[range.clone()], type_ids);
            assert!(batch.position_ids[range.clone()].iter().copied().eq(0..range.len() as i64));
        }
        assert_eq!(batch.labels, share.iter().map(|&i| i as f32).collect::<Vec<_>>());
    }
}

#[test]
fn a_rank_without_work_gets_an_empty_batch() {
    let plan =
        MicroBatchPlan { per_rank: vec![vec![1], vec![]], cu_groups: vec![vec![0, 1], vec![0]] };
    let items = [WorkItem::of_rank(&plan, 1, 0)];
    let mut batches = token_batches(dataset(), tokenizer(), items.into_iter(), OPTIONS).unwrap();
    let batch = batches.next().unwrap().unwrap();
    assert!(batch.is_empty() && batch.input_ids.is_empty());
    assert_eq!((batch.cu_seqlens, batch.cu_groups), (vec![0], vec![0]));
    assert!(batches.next().is_none());
}

#[test]
fn a_panic_while_tokenizing_is_an_error_at_the_consumer() {
    let items = [vec![0], vec![99], vec![1]];
    let items = items.into_iter().map(|pairs| WorkItem { pairs, ..WorkItem::default() });
    let mut batches = token_batches(dataset(), tokenizer(), items, OPTIONS).unwrap();
    assert_eq!(batches.next().unwrap().unwrap().pairs, [0]);
    let error = batches.next().unwrap().unwrap_err().to_string();
    let expected = "a tokenizing thread panicked: range start index 1584 out of range ";
    assert!(error.starts_with(expected), "{error}");
    assert!(batches.next().is_none());
}

#[test]
fn too_small_a_max_len_is_refused_at_once() {
    let options = PipelineOptions { max_len: 4, ..OPTIONS };
    let error = token_batches(dataset(), tokenizer(), std::iter::empty(), options).unwrap_err();
    assert!(error.to_string().starts_with("max_len 4 leaves no room for text"), "{error}");
}

#[test]
fn augmented_documents_change_by_epoch_and_keep_their_tokens() {
    let words = ["how ", "to ", "bake ", "bread ", ", "];
    let long: String = (0..60).map(|i| words[i * i % 5]).collect();
    let pair = ("how", long.as_str(), 0.0);
    let dataset = Arc::new(testing::dataset(DatasetKind::Pointwise, [pair], &[]));
    let augment = Some(Augment { shuffle_rate: 1.0, seed: 1 });
    let options = PipelineOptions { augment, max_len: 128, ..OPTIONS };
    let items = (0..6).map(|epoch| WorkItem { pairs: vec![0], epoch, ..WorkItem::default() });
    let batches = token_batches(Arc::clone(&dataset), tokenizer(), items, options).unwrap();
    let ids: Vec<_> = batches.map(|batch| batch.unwrap().input_ids).collect();
    assert!(ids.iter().any(|other| *other != ids[0]));
}

#[test]
fn the_length_report_counts_truncation_and_long_queries() {
    let (dataset, tokenizer) = (dataset(), tokenizer());
    // Three special tokens, a query of 3 or 1, a document of 0 to 4.
    let report = LengthReport::measure(&dataset, &tokenizer, 8, 1000).unwrap();
    let mut lengths: Vec<usize> =
        (0..30).map(|i| 3 + if i / 3 % 2 == 0 { 3 } else { 1 } + i % 5).collect();
    lengths.sort_unstable();
    assert_eq!((report.measured, report.pairs, report.longest), (30, 30, 10));
    assert_eq!(report.percentiles, [lengths[14], lengths[26], lengths[29]]);
    assert_eq!(report.truncated, lengths.iter().filter(|&&length| length > 8).count());
    assert_eq!(report.long_queries, 0);
    let report = LengthReport::measure(&dataset, &tokenizer, 5, 10).unwrap();
    assert_eq!((report.measured, report.long_queries), (10, 1));
    assert_eq!(report.long_query_lines, [1]);
    let text = report.to_string();
    assert!(text.contains("(10 of 30 pairs measured)"), "{text}");
    assert!(text.ends_with("\n  1 queries alone exceed max_len and are cut (first at line 1)"));
}
