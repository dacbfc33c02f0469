//! Ranking metrics and the BM25 baseline. Free of torch.

mod bm25;
mod ranking;

pub use bm25::Bm25;
pub use ranking::{
    Gain, Ranked, RankingMetrics, RankingSums, average_precision, measure_names, ndcg_at_k, order,
    ranked, recall_at_k, reciprocal_rank_at_k,
};
