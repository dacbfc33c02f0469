//! `reranker.json`: what a saved model needs beside its weights, so that nobody types a template
//! or a length twice.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::atomic::write_synced;
use crate::error::{Error, Result};

/// The file's name inside a model directory.
pub const FILE_NAME: &str = "reranker.json";

/// The version of the format that this program writes.
const FORMAT_VERSION: u32 = 1;

/// The contents of `reranker.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sidecar {
    /// Version of this format.
    pub format_version: u32,
    /// `bert_encoder` or `llm_decoder`.
    pub model_type: String,
    /// The query goes where `{}` stands.
    pub query_format: String,
    /// The document goes where `{}` stands.
    pub document_format: String,
    /// Between query and document; decoders only.
    pub seq: String,
    /// After the document; decoders only.
    pub special_token: String,
    /// How a language model without a score head is asked, by the name of its prompt; the four
    /// texts above then do not matter.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    /// The most tokens of a pair that the model was trained with.
    pub max_len: usize,
    /// The label that training mapped to 0.
    pub min_label: f64,
    /// The label that training mapped to 1.
    pub max_label: f64,
    /// The model that training started from.
    pub base_model: String,
    /// The hub's commit of that model; null where it was a local directory.
    #[serde(default)]
    pub base_revision: Option<String>,
    /// The run's whole configuration.
    pub run: Value,
    /// The last validation metrics, null where there was no validation.
    pub metrics: Value,
}

impl Sidecar {
    /// The sidecar of a run's model.
    #[must_use]
    pub fn of_run(
        plan: &crate::config::Plan,
        base_revision: Option<String>,
        metrics: Value,
    ) -> Self {
        let run = plan.to_json();
        let model_type = run["model"]["model_type"].as_str().unwrap_or_default().to_owned();
        Self {
            format_version: FORMAT_VERSION,
            model_type,
            query_format: plan.model.query_format.clone(),
            document_format: plan.model.document_format.clone(),
            seq: plan.model.seq.clone(),
            special_token: plan.model.special_token.clone(),
            prompt: None,
            max_len: plan.data.max_len,
            min_label: plan.data.labels.min,
            max_label: plan.data.labels.max,
            base_model: plan.model.path.clone(),
            base_revision,
            run,
            metrics,
        }
    }

    /// Reads the sidecar of a model directory; `None` where there is none, as in models that
    /// another program trained.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] when it cannot be read or is of a later version.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE_NAME);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Error::Io { path, action: "read", source }),
        };
        let file = |message: String| Error::File { path: path.clone(), message };
        let value: Value = serde_json::from_str(&text)
            .map_err(|error| file(format!("not valid JSON: {error}")))?;
        let version = value["format_version"].as_u64();
        if version != Some(u64::from(FORMAT_VERSION)) {
            return Err(file(format!(
                "format_version is {}, this program reads {FORMAT_VERSION}",
                value["format_version"]
            )));
        }
        serde_json::from_value(value)
            .map(Some)
            .map_err(|error| file(format!("not a reranker description: {error}")))
    }

    /// Writes the sidecar into `dir`.
    ///
    /// # Errors
    /// [`Error::Io`] with the file.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).unwrap_or_default() + "\n";
        write_synced(&dir.join(FILE_NAME), text.as_bytes())
    }
}
