//! Trains text rerankers on one or many GPUs, and scores with them.
//!
//! The modules stand on floors, and import only downward; `docs/architecture.md` draws them.

pub mod atomic;
pub mod checkpoint;
pub mod cli;
pub mod comm;
pub mod config;
pub mod convert;
pub mod data;
pub mod engine;
pub mod error;
pub mod eval;
pub mod hub;
pub mod loss;
pub mod mapped;
pub mod metrics;
pub mod model;
pub mod optim;
pub mod ordered;
pub mod score;
pub mod seed;
pub mod shard;
pub mod text;
pub mod torch_ext;
pub mod train;

pub use error::{Error, Result};
