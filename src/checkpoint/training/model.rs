//! The model of a checkpoint as a Hugging Face directory, made from the files of states: no
//! communication, and no more than a tensor in memory.

use std::path::Path;

use serde_json::Value;

use super::manifest::{FileRecord, UnitRecord};
use super::states::{self, StateFiles};
use crate::checkpoint::model_dir::{ModelFiles, write_model_files};
use crate::checkpoint::weight_writer::WeightWriter;
use crate::error::Result;
use crate::model::stage::TensorSpec;

/// The model inside a checkpoint.
pub(super) const DIRECTORY: &str = "model";

/// Writes `model/`, with the `metrics` of the last validation, into the checkpoint under construction
/// `dir`, and returns the records of its files.
pub(super) fn write(
    dir: &Path,
    states: &StateFiles,
    units: &[UnitRecord],
    model: &ModelFiles,
    metrics: &Value,
) -> Result<Vec<FileRecord>> {
    let target = dir.join(DIRECTORY);
    crate::atomic::create_dir(&target)?;
    let specs: Vec<TensorSpec> = units
        .iter()
        .flat_map(|unit| &unit.parts)
        .map(|part| TensorSpec::new(part.name.clone(), &part.shape))
        .collect();
    let mut writer = WeightWriter::new(&target, specs.clone(), model.form)?;
    for spec in &specs {
        writer.write(spec, &states.weights(&spec.name)?)?;
    }
    write_model_files(&target, model, Some(metrics))?;
    crate::atomic::sync_dir(&target)?;
    let mut names: Vec<String> = std::fs::read_dir(&target)
        .map_err(super::io(&target, "read"))?
        .flatten()
        .map(|entry| format!("{DIRECTORY}/{}", entry.file_name().to_string_lossy()))
        .collect();
    names.sort();
    names.iter().map(|name| states::record(dir, name)).collect()
}
