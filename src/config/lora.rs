//! The `lora` section of the training YAML.

use serde::Serialize;

use super::reader::{Fields, OneOrMany, Setting};
use super::resolve::count;
use crate::error::Result;

/// What the section says; `None` where it is silent.
#[derive(Debug)]
pub struct RawLora {
    r: Option<Setting<i64>>,
    alpha: Option<Setting<f64>>,
    dropout: Option<Setting<f64>>,
    target_modules: Option<Setting<OneOrMany>>,
    modules_to_save: Option<Setting<Vec<String>>>,
}

/// Low-rank adapters in place of the weights, with peft's defaults.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LoraPlan {
    /// Rank of the adapters.
    pub r: usize,
    /// Their product is multiplied by `alpha / r`.
    pub alpha: f64,
    /// Dropout on their input while training.
    pub dropout: f64,
    /// The linear layers that get one; `None` is peft's choice for the model's family.
    pub target_modules: Option<TargetModules>,
    /// Modules that are trained whole beside the head, which always is.
    pub modules_to_save: Vec<String>,
}

/// How layers are named.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// `all-linear`, or a regular expression over whole module names.
    Text(String),
    /// Ends of module names.
    Names(Vec<String>),
}

/// The word for every linear layer but the head's.
pub const ALL_LINEAR: &str = "all-linear";

impl RawLora {
    /// Asks `fields` for every key of the section.
    ///
    /// # Errors
    /// A value of the wrong type.
    pub fn read(fields: &mut Fields<'_>) -> Result<Self> {
        Ok(Self {
            r: fields.integer(&["r"])?,
            alpha: fields.float("alpha")?,
            dropout: fields.float("dropout")?,
            target_modules: fields.one_or_many("target_modules")?,
            modules_to_save: fields.strings("modules_to_save")?,
        })
    }
}

impl LoraPlan {
    /// The section with defaults.
    ///
    /// # Errors
    /// A value out of range.
    pub fn from_raw(raw: &RawLora) -> Result<Self> {
        let alpha = raw.alpha.as_ref();
        if let Some(setting) = alpha.filter(|setting| setting.value <= 0.0) {
            return Err(
                setting.error(format!("expected a number above 0, found {}", setting.value))
            );
        }
        let dropout = raw.dropout.as_ref();
        if let Some(setting) = dropout.filter(|setting| !(0.0..1.0).contains(&setting.value)) {
            let found = setting.value;
            return Err(setting.error(format!("expected a probability below 1, found {found}")));
        }
        let saved = raw.modules_to_save.as_ref();
        if let Some(setting) = saved.filter(|setting| setting.value.iter().any(String::is_empty)) {
            return Err(setting.error("expected names of modules, found an empty text"));
        }
        let target_modules = match raw.target_modules.as_ref() {
            None => None,
            Some(setting) => Some(match &setting.value {
                OneOrMany::One(text) if !text.is_empty() => TargetModules::Text(text.clone()),
                OneOrMany::Many(names)
                    if !names.is_empty() && !names.iter().any(String::is_empty) =>
                {
                    TargetModules::Names(names.clone())
                }
                OneOrMany::One(_) | OneOrMany::Many(_) => {
                    return Err(setting.error("expected names of modules, found none"));
                }
            }),
        };
        Ok(Self {
            r: count(raw.r.as_ref(), 8, 1)?,
            alpha: alpha.map_or(8.0, |setting| setting.value),
            dropout: dropout.map_or(0.0, |setting| setting.value),
            target_modules,
            modules_to_save: saved.map(|setting| setting.value.clone()).unwrap_or_default(),
        })
    }
}
