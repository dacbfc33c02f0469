//! A model on disk, whatever its form: a whole one, or an adapter with the model that it is for.

use std::iter;
use std::path::PathBuf;

use super::lora::peft::{AdapterConfig, CONFIG_FILE};
use super::weights::WeightFiles;
use super::{ModelConfig, stages};
use crate::error::{Error, Result};
use crate::hub::{self, ModelDir};
use crate::text::tokenizer_file;

/// A model that was found and opened; its weights are still on disk.
#[derive(Debug)]
pub struct Pretrained {
    /// The directory with the tokenizer, and `reranker.json` where there is one.
    pub dir: PathBuf,
    /// The hub's commit that the model is a snapshot of.
    pub revision: Option<String>,
    /// Its configuration.
    pub config: ModelConfig,
    /// Its weights, with those of an adapter merged in as they are read.
    pub weights: WeightFiles,
    /// Where it is an adapter, the model that it is for.
    pub base: Option<String>,
}

impl Pretrained {
    /// Opens the model that `name` means ([`hub::resolve`]): a directory or a hub id of a model, or
    /// of an adapter in peft's form.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such model, or no model under an adapter; [`Error::File`] or
    /// [`Error::Io`] that names what is missing or wrong.
    pub fn open(name: &str) -> Result<Self> {
        let (ModelDir { path: dir, revision }, adapter) = find(name)?;
        let Some((adapter, base)) = adapter else {
            let config = ModelConfig::from_dir(&dir)?;
            let weights = WeightFiles::open(&dir)?;
            return Ok(Self { dir, revision, config, weights, base: None });
        };
        let config = ModelConfig::from_dir(&base.path)?;
        let parameters: Vec<_> =
            stages(&config).iter().flat_map(|stage| stage.parameters()).collect();
        let weights = WeightFiles::open(&base.path)?.with_adapter(&dir, &adapter, &parameters)?;
        // Adapters that peft saved have none of their own.
        let dir = if tokenizer_file(&dir).is_some() { dir } else { base.path };
        Ok(Self { dir, revision, config, weights, base: Some(adapter.base) })
    }

    /// Completes the model that `name` means by what scoring reads beside it, where another program has
    /// fetched it without ([`hub::settle`]). [`Pretrained::open`], which comes later, asks the hub for
    /// nothing where a model is whole.
    pub fn settle(name: &str) {
        hub::settle(name);
        // What an adapter lacks is read from its base's directory.
        if let Some(adapter) = bare_adapter(name) {
            hub::settle(&adapter.base);
        }
    }

    /// As [`Pretrained::settle`], for training: that reads an adapter's tokenizer, and nothing else.
    pub fn settle_tokenizer(name: &str) {
        if bare_adapter(name).is_some() {
            hub::settle(name);
        }
    }

    /// The directories that [`Pretrained::open`] reads: the model's, and that of an adapter's base.
    ///
    /// # Errors
    /// As [`Pretrained::open`].
    pub fn directories(name: &str) -> Result<Vec<PathBuf>> {
        let (found, adapter) = find(name)?;
        Ok(iter::once(found.path).chain(adapter.map(|(_, base)| base.path)).collect())
    }
}

/// What the adapter `name` says, where it is on the disk without a tokenizer of its own.
fn bare_adapter(name: &str) -> Option<AdapterConfig> {
    let dir = hub::cached(name).filter(|dir| tokenizer_file(dir).is_none())?;
    AdapterConfig::from_dir(&dir).ok()?
}

/// What `name` means, and where it is an adapter, what that says and the model that it is for.
fn find(name: &str) -> Result<(ModelDir, Option<(AdapterConfig, ModelDir)>)> {
    let found = hub::resolve(name)?;
    let Some(adapter) = AdapterConfig::from_dir(&found.path)? else { return Ok((found, None)) };
    let base = hub::resolve(&adapter.base).map_err(|error| match error {
        Error::Usage(message) => Error::File {
            path: found.path.join(CONFIG_FILE),
            message: format!("base_model_name_or_path: {message}"),
        },
        other => other,
    })?;
    Ok((found, Some((adapter, base))))
}
