//! `config.json` of a Hugging Face model directory, as far as the model's mathematics needs it.

mod decoder;
mod encoder;
mod modernbert;
#[cfg(test)]
mod tests;

use std::path::Path;

use serde_json::Value;
use tch::Tensor;

pub use decoder::{DecoderConfig, ScoreHead};
pub use encoder::{EncoderConfig, HeadForm, PositionIds};
pub use modernbert::{LayerAttention, ModernBertConfig, Pooling};

use super::lora::Lora;
use crate::config::ModelKind;
use crate::error::{Error, Result};

/// The non-linearity between the two feed-forward products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// Exact GELU.
    Gelu,
    /// GELU with the tanh approximation.
    GeluTanh,
    /// Rectified linear unit.
    Relu,
    /// `x * sigmoid(x)`.
    Silu,
}

impl Activation {
    /// The non-linearity that transformers calls `name`, found under `key`.
    fn read(key: &str, name: &str) -> Result<Self, String> {
        match name {
            "gelu" => Ok(Self::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" => Ok(Self::GeluTanh),
            "relu" => Ok(Self::Relu),
            "silu" | "swish" => Ok(Self::Silu),
            other => Err(format!(
                "{key} {other:?} is not supported, expected gelu, gelu_new, gelu_pytorch_tanh, \
                 relu or silu"
            )),
        }
    }

    /// Applies it, element by element.
    ///
    /// # Errors
    /// [`Error::Torch`] from libtorch.
    pub fn apply(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Gelu => x.f_gelu("none")?,
            Self::GeluTanh => x.f_gelu("tanh")?,
            Self::Relu => x.f_relu()?,
            Self::Silu => x.f_silu()?,
        })
    }
}

/// The kinds of trunk, each with its hyper-parameters.
#[derive(Debug, Clone, PartialEq)]
pub enum Trunk {
    /// Every token sees every other; the head reads the first.
    Encoder(EncoderConfig),
    /// The same with rotary positions and windows.
    ModernBert(ModernBertConfig),
    /// Every token sees those before it, or all where `is_causal` is false; the head reads the last.
    Decoder(DecoderConfig),
}

impl Trunk {
    fn read(model_type: &str, raw: &Value) -> Result<Self, String> {
        if raw.get("quantization_config").is_some_and(|value| !value.is_null()) {
            return Err("quantization_config is not supported, expected plain weights".into());
        }
        let families = encoder::FAMILIES;
        if let Some(family) = families.iter().find(|family| family.model_type == model_type) {
            return encoder::read(family, raw).map(Self::Encoder);
        }
        if model_type == modernbert::MODEL_TYPE {
            return modernbert::read(raw).map(Self::ModernBert);
        }
        if let Some(decoder) = decoder::read(model_type, raw) {
            return decoder.map(Self::Decoder);
        }
        let supported: Vec<_> = families
            .iter()
            .map(|family| family.model_type)
            .chain([modernbert::MODEL_TYPE])
            .chain(decoder::model_types())
            .collect();
        Err(format!(
            "unknown architecture: model_type is {model_type:?}, supported: {}",
            supported.join(", ")
        ))
    }
}

/// A model directory's configuration, read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of `config.json`.
    pub model_type: String,
    /// The trunk and its hyper-parameters.
    pub trunk: Trunk,
    /// The whole file, from which a saved model's `config.json` is made.
    pub raw: Value,
    /// Adapters that are trained in place of the weights; the file has none.
    pub lora: Option<Lora>,
}

impl ModelConfig {
    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] when the file is missing, is not JSON, or names an
    /// architecture or an option that is not supported.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let file = |message: String| Error::File { path: path.clone(), message };
        if !dir.is_dir() {
            return Err(Error::File {
                path: dir.to_owned(),
                message: "no such model directory; expected one with config.json, \
                          model.safetensors and tokenizer.json"
                    .into(),
            });
        }
        let text = std::fs::read_to_string(&path).map_err(|source| Error::Io {
            path: path.clone(),
            action: "read",
            source,
        })?;
        let raw: Value = serde_json::from_str(&text)
            .map_err(|error| file(format!("not valid JSON: {error}")))?;
        let model_type = raw.get("model_type").and_then(Value::as_str).unwrap_or("").to_owned();
        let trunk = Trunk::read(&model_type, &raw).map_err(file)?;
        Ok(Self { model_type, trunk, raw, lora: None })
    }

    /// The family of models it belongs to, as a configuration names it.
    #[must_use]
    pub fn kind(&self) -> ModelKind {
        match &self.trunk {
            Trunk::Encoder(_) | Trunk::ModernBert(_) => ModelKind::BertEncoder,
            Trunk::Decoder(_) => ModelKind::LlmDecoder,
        }
    }

    /// Width of the residual stream.
    #[must_use]
    pub fn hidden(&self) -> usize {
        match &self.trunk {
            Trunk::Encoder(encoder) => encoder.hidden as usize,
            Trunk::ModernBert(modernbert) => modernbert.hidden as usize,
            Trunk::Decoder(decoder) => decoder.hidden as usize,
        }
    }

    /// Rows of the word embedding table.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        match &self.trunk {
            Trunk::Encoder(encoder) => encoder.vocab_size as usize,
            Trunk::ModernBert(modernbert) => modernbert.vocab_size as usize,
            Trunk::Decoder(decoder) => decoder.vocab_size as usize,
        }
    }

    /// Rows of the segment table, where the model has one.
    #[must_use]
    pub fn segments(&self) -> Option<usize> {
        match &self.trunk {
            Trunk::Encoder(encoder) => Some(encoder.type_vocab_size as usize),
            Trunk::ModernBert(_) | Trunk::Decoder(_) => None,
        }
    }

    /// The longest input in tokens.
    #[must_use]
    pub fn max_positions(&self) -> usize {
        match &self.trunk {
            Trunk::Encoder(encoder) => encoder.longest_input() as usize,
            Trunk::ModernBert(modernbert) => modernbert.max_positions as usize,
            Trunk::Decoder(decoder) => decoder.max_positions as usize,
        }
    }

    /// The class of transformers that loads a saved model.
    #[must_use]
    pub fn architecture(&self) -> &'static str {
        match &self.trunk {
            Trunk::Encoder(encoder) => encoder.architecture,
            Trunk::ModernBert(_) => "ModernBertForSequenceClassification",
            Trunk::Decoder(decoder) => decoder.architecture,
        }
    }

    /// The same model without dropout.
    #[must_use]
    pub fn without_dropout(mut self) -> Self {
        match &mut self.trunk {
            Trunk::Encoder(encoder) => {
                encoder.hidden_dropout = 0.0;
                encoder.attention_dropout = 0.0;
                encoder.classifier_dropout = 0.0;
            }
            Trunk::ModernBert(modernbert) => {
                modernbert.embedding_dropout = 0.0;
                modernbert.attention_dropout = 0.0;
                modernbert.mlp_dropout = 0.0;
                modernbert.classifier_dropout = 0.0;
            }
            Trunk::Decoder(decoder) => decoder.attention_dropout = 0.0,
        }
        if let Some(lora) = &mut self.lora {
            lora.dropout = 0.0;
        }
        self
    }
}

/// Refuses the first size that is not at least 1.
fn check_sizes(sizes: &[(&str, i64)]) -> Result<(), String> {
    match sizes.iter().find(|(_, value)| *value < 1) {
        Some((name, value)) => Err(format!("{name} is {value}, expected at least 1")),
        None => Ok(()),
    }
}

/// Refuses the first dropout that is no probability below 1.
fn check_dropouts(dropouts: &[(&str, f64)]) -> Result<(), String> {
    match dropouts.iter().find(|(_, p)| !(0.0..1.0).contains(p)) {
        Some((name, value)) => Err(format!("{name} is {value}, expected a probability below 1")),
        None => Ok(()),
    }
}

/// `pad_token_id` of `raw`: `default` where it is absent, none where it is null.
fn padding_id(raw: &Value, default: i64, vocab_size: i64) -> Result<Option<i64>, String> {
    let id = match raw.get("pad_token_id") {
        None => default,
        Some(Value::Null) => return Ok(None),
        Some(id) => {
            id.as_i64().ok_or_else(|| format!("pad_token_id is {id}, expected a number"))?
        }
    };
    if (0..vocab_size).contains(&id) {
        return Ok(Some(id));
    }
    Err(format!("pad_token_id {id} does not fit the vocabulary of {vocab_size}"))
}
