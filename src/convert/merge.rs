//! An adapter and its base model to one ordinary model directory.

use std::path::Path;

use crate::atomic::StagedDir;
use crate::checkpoint::Sidecar;
use crate::checkpoint::model_dir::{MAX_SHARD_BYTES, ModelFiles, write_model_files};
use crate::checkpoint::weight_writer::WeightWriter;
use crate::error::{Error, Result};
use crate::model::{Pretrained, stages};

/// Writes the adapter `name` (a directory or a hub id) merged into its base model as the model
/// directory `target`, a tensor at a time, in fp32. Returns the base model's name.
///
/// # Errors
/// [`Error::Usage`] when it is no adapter or `target` is there; what opening it reports;
/// [`Error::File`] for a tensor that neither holds; [`Error::Io`] with a file that cannot be written.
pub fn merge(name: &str, target: &Path) -> Result<String> {
    if target.exists() {
        let target = target.display();
        return Err(Error::Usage(format!("{target} is already there; choose another --output")));
    }
    Pretrained::settle(name);
    let Pretrained { dir, config, weights, base, .. } = Pretrained::open(name)?;
    let Some(base) = base else {
        return Err(Error::Usage(format!("{name} is no adapter: there is nothing to merge")));
    };
    let sidecar = Sidecar::from_dir(&dir)?;
    let files = ModelFiles::read(&config, &dir, sidecar, MAX_SHARD_BYTES)?;
    let parameters = stages(&config).into_iter().flat_map(|stage| stage.parameters());
    let specs: Vec<_> = parameters.flat_map(|parameter| parameter.parts).collect();
    let staged = StagedDir::new(target)?;
    let mut writer = WeightWriter::new(staged.path(), specs.clone(), files.form)?;
    for spec in &specs {
        let values = weights.read(spec)?.ok_or_else(|| Error::File {
            path: dir.clone(),
            message: format!("neither the adapter nor {base} has {}", spec.name),
        })?;
        writer.write(spec, &values)?;
    }
    write_model_files(staged.path(), &files, None)?;
    staged.publish()?;
    Ok(base)
}
