//! Token ids and segment ids of pairs against those of transformers' tokenizers: `WordPiece` with two
//! segments, byte-level BPE and Unigram with RoBERTa's four special tokens and one segment.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::Path;

use common::{Golden, floats, golden_dir};
use reranker::model::ModelConfig;
use reranker::text::{PairTokenizer, TextFormat, Truncation};
use serde_json::Value;

fn tokenizer_in(dir: &Path) -> PairTokenizer {
    PairTokenizer::from_dir(dir, &ModelConfig::from_dir(dir).unwrap().raw).unwrap()
}

fn ids(tensor: &tch::Tensor) -> Vec<u32> {
    floats(tensor).into_iter().map(|id| id as u32).collect()
}

fn text<'a>(pair: &'a Value, key: &str) -> &'a str {
    pair[key].as_str().unwrap()
}

fn widened(type_ids: &[u8]) -> Vec<u32> {
    type_ids.iter().map(|&id| u32::from(id)).collect()
}

#[test]
fn pairs_become_the_tokens_of_transformers() {
    for case in ["bert_tiny", "bert_odd", "roberta_tiny", "xlm_roberta_odd"] {
        let golden = Golden::load(case);
        let tokenizer = tokenizer_in(&golden.dir);
        let max_len = golden.info["max_len"].as_u64().unwrap() as usize;
        let mut cut = 0;
        for (i, pair) in golden.info["pairs"].as_array().unwrap().iter().enumerate() {
            let ours =
                tokenizer.encode_pair(text(pair, "query"), text(pair, "content"), max_len).unwrap();
            let types = match golden.tensors.get(&format!("token_type_ids.{i}")) {
                Some(types) => ids(types),
                None => vec![0; ours.input_ids.len()],
            };
            assert_eq!(ours.input_ids, ids(golden.tensor(&format!("input_ids.{i}"))), "{case} {i}");
            assert_eq!(widened(&ours.type_ids), types, "{case} {i}");
            assert_eq!(ours.truncated == Truncation::None, ours.full_len <= max_len, "{case} {i}");
            cut += usize::from(ours.truncated != Truncation::None);
        }
        assert!(golden.pairs() >= 10 && cut >= 2, "{case}: {cut} of {} cut", golden.pairs());
    }
}

#[test]
fn truncation_follows_the_rules_at_every_edge() {
    let table = std::fs::read_to_string(golden_dir("truncation.json")).unwrap();
    let table: Value = serde_json::from_str(&table).unwrap();
    for (case, cases) in table["tokenizers"].as_object().unwrap() {
        check_truncation(case, cases.as_array().unwrap());
    }
}

fn check_truncation(name: &str, cases: &[Value]) {
    let tokenizer = tokenizer_in(&golden_dir(name));
    let mut seen = [false; 3];
    for (i, case) in cases.iter().enumerate() {
        let max_len = case["max_len"].as_u64().unwrap() as usize;
        let ours =
            tokenizer.encode_pair(text(case, "query"), text(case, "document"), max_len).unwrap();
        let list = |key: &str| -> Option<Vec<u32>> {
            case.get(key).map(|ids| serde_json::from_value(ids.clone()).unwrap())
        };
        assert_eq!(Some(ours.input_ids), list("input_ids"), "{name} {i}");
        let types = list("token_type_ids").unwrap_or(vec![0; ours.type_ids.len()]);
        assert_eq!(widened(&ours.type_ids), types, "{name} {i}");
        seen[match ours.truncated {
            Truncation::None => 0,
            Truncation::Document => 1,
            Truncation::Query => 2,
        }] = true;
    }
    assert_eq!(seen, [true; 3], "{name}: none, the document and the query are each cut somewhere");
}

/// Query and document are stripped first, so space around them changes nothing.
#[test]
fn space_around_the_texts_is_stripped() {
    let tokenizer = tokenizer_in(&golden_dir("bert_tiny"));
    let plain = tokenizer.encode_pair("river bank", "the soil", 16).unwrap();
    let spaced = tokenizer.encode_pair(" \triver bank\n", "\u{3000}the soil ", 16).unwrap();
    assert_eq!(plain, spaced);
}

#[test]
fn formats_stand_around_every_query_and_document() {
    let dir = golden_dir("bert_tiny");
    let plain = tokenizer_in(&dir);
    let formatted = tokenizer_in(&dir).with_formats(
        TextFormat::parse("how to {}", "query_format").unwrap(),
        TextFormat::parse("{} the bank", "document_format").unwrap(),
    );
    assert_eq!(
        formatted.encode_pair("boil water", "tea", 48).unwrap(),
        plain.encode_pair("how to boil water", "tea the bank", 48).unwrap()
    );
}
