//! The `teacher` section of the training YAML.

use serde::Serialize;

use super::plan::{DatasetKind, Sources};
use super::reader::{Fields, Setting};
use super::resolve::count;
use super::training::RawTraining;
use crate::error::{Error, Result};

/// What the section says; `None` where it is silent.
#[derive(Debug)]
pub struct RawTeacher {
    model_name_or_path: Option<Setting<String>>,
    prompt: Option<Setting<String>>,
    max_len: Option<Setting<i64>>,
    batch_size: Option<Setting<i64>>,
}

/// A model whose scores take the place of the training labels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TeacherPlan {
    /// A local directory or a hub id, as written (`model_name_or_path`).
    #[serde(rename = "model_name_or_path")]
    pub path: String,
    /// How a language model without a score head is asked, by name.
    pub prompt: Option<String>,
    /// The most tokens of a pair; `None` takes what the teacher was trained with.
    pub max_len: Option<usize>,
    /// Pairs per forward pass. It changes no score.
    #[serde(skip)]
    pub batch_size: usize,
}

impl RawTeacher {
    /// Asks `fields` for every key of the section.
    ///
    /// # Errors
    /// A value of the wrong type.
    pub fn read(fields: &mut Fields<'_>) -> Result<Self> {
        Ok(Self {
            model_name_or_path: fields.string("model_name_or_path")?,
            prompt: fields.string("prompt")?,
            max_len: fields.integer(&["max_len"])?,
            batch_size: fields.integer(&["batch_size"])?,
        })
    }
}

impl TeacherPlan {
    /// The section with defaults.
    ///
    /// # Errors
    /// [`Error::Config`] for a value out of range, or a setting of `training` that a teacher leaves
    /// no room for; [`Error::File`] when it names no model; [`Error::Usage`] for such a flag.
    pub fn from_raw(raw: &RawTeacher, training: &RawTraining, sources: &Sources) -> Result<Self> {
        let path = raw.model_name_or_path.as_ref().ok_or_else(|| Error::File {
            path: sources.training.clone(),
            message:
                "teacher.model_name_or_path is missing; expected a model directory or a hub id"
                    .into(),
        })?;
        if path.value.is_empty() {
            return Err(path.error("expected a model directory or a hub id, found an empty text"));
        }
        if let Some(loss) = training.loss_type.as_ref().filter(|loss| loss.value.needs_groups()) {
            let message = "compares the hits of a query, but a teacher scores single pairs; use \
                           pointwise_mse or pointwise_bce";
            return Err(loss.error(message));
        }
        let grouped = training.train_dataset_type.as_ref();
        if let Some(setting) = grouped.filter(|kind| kind.value == DatasetKind::Grouped) {
            let message = "a teacher scores the pairs of any file one by one; leave the key out";
            return Err(setting.error(message));
        }
        if sources.skip_bad_records {
            let message = "--skip-bad-records: a teacher scores every record; mend the file";
            return Err(Error::Usage(message.into()));
        }
        let max_len = raw.max_len.as_ref().map(|setting| count(Some(setting), 0, 4)).transpose()?;
        let prompt = raw.prompt.as_ref().map(|setting| setting.value.clone());
        Ok(Self {
            path: path.value.clone(),
            prompt: prompt.filter(|name| !name.is_empty()),
            max_len,
            batch_size: count(raw.batch_size.as_ref(), 32, 1)?,
        })
    }
}
