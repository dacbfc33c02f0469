//! A Hugging Face model directory that transformers, sentence-transformers and
//! text-embeddings-inference load.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::atomic::{StagedDir, write_synced};
use super::sidecar::Sidecar;
use super::weight_writer::WeightWriter;
use crate::comm::Groups;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::shard::FlatUnit;

/// Files that belong to the tokenizer, copied byte for byte where the base model has them.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "tokenizer.model",
];

/// Weight files are split above this many bytes, as transformers does.
pub const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// What to save.
#[derive(Debug, Clone, Copy)]
pub struct SavedModel<'a> {
    /// The parameters.
    pub units: &'a [FlatUnit],
    /// The model's configuration.
    pub config: &'a ModelConfig,
    /// The directory whose tokenizer the model uses.
    pub base: &'a Path,
    /// What goes into `reranker.json`.
    pub sidecar: &'a Sidecar,
    /// Weight files are split above this many bytes ([`MAX_SHARD_BYTES`]).
    pub max_shard_bytes: usize,
}

/// Writes the model directory `target` on rank 0, whole or not at all, replacing one that is there.
/// Every rank calls it: divided parameters are collected a stage at a time, so that no rank holds
/// the whole model.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] with the file that could not be written; [`Error::Comm`] from
/// the communicator.
pub fn save_model(model: SavedModel<'_>, target: &Path, groups: &Groups) -> Result<()> {
    if groups.world.rank() != 0 {
        let collect = |unit: &FlatUnit| unit.whole_fp32(groups.shard()).map(drop);
        return model.units.iter().try_for_each(collect);
    }
    let staged = StagedDir::new(target)?;
    let dir = staged.path();
    write_weights(model, dir, groups)?;
    let config = serde_json::to_string_pretty(&saved_config(model.config)).unwrap_or_default();
    write_synced(&dir.join("config.json"), (config + "\n").as_bytes())?;
    for name in TOKENIZER_FILES {
        let from = model.base.join(name);
        if from.exists() {
            let bytes = std::fs::read(&from).map_err(|source| Error::Io {
                path: from,
                action: "read",
                source,
            })?;
            write_synced(&dir.join(name), &bytes)?;
        }
    }
    model.sidecar.write(dir)?;
    staged.publish()
}

fn write_weights(model: SavedModel<'_>, dir: &Path, groups: &Groups) -> Result<()> {
    let parts = |unit: &FlatUnit| -> Vec<_> {
        unit.layout().places.iter().flat_map(|place| place.parts.clone()).collect()
    };
    let specs = model.units.iter().flat_map(parts).map(|(spec, _)| spec).collect();
    let mut writer = WeightWriter::new(dir, specs, model.max_shard_bytes)?;
    for unit in model.units {
        let whole = unit.whole_fp32(groups.shard())?;
        for (spec, range) in parts(unit) {
            let values = whole.f_narrow(0, range.start as i64, range.len() as i64)?;
            writer.write(&spec, &values)?;
        }
    }
    Ok(())
}

/// The base model's `config.json` as a one-label sequence classifier in fp32.
fn saved_config(config: &ModelConfig) -> Value {
    let mut raw: Map<String, Value> = config.raw.as_object().cloned().unwrap_or_default();
    // Left over from the base model; wrong for what is saved here.
    for stale in ["_name_or_path", "torch_dtype", "num_labels", "auto_map"] {
        raw.remove(stale);
    }
    raw.insert("architectures".into(), json!([config.architecture()]));
    raw.insert("dtype".into(), json!("float32"));
    raw.insert("id2label".into(), json!({"0": "LABEL_0"}));
    raw.insert("label2id".into(), json!({"LABEL_0": 0}));
    Value::Object(raw)
}
