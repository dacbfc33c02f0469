//! The hyper-parameters of encoders: BERT and its relatives.

use serde::Deserialize;
use serde_json::Value;

use super::Activation;

/// `model_type`s that this trunk computes.
pub(super) const MODEL_TYPES: &[&str] = &["bert"];

/// The hyper-parameters of an encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    /// Rows of the word embedding table.
    pub vocab_size: i64,
    /// Width `H` of the residual stream.
    pub hidden: i64,
    /// Number of layers.
    pub layers: i64,
    /// Number of attention heads.
    pub heads: i64,
    /// Width of the feed-forward layer.
    pub intermediate: i64,
    /// Rows of the position table: the longest input in tokens.
    pub max_positions: i64,
    /// Rows of the segment table.
    pub type_vocab_size: i64,
    /// Added to the variance in layer normalisation.
    pub layer_norm_eps: f64,
    /// Feed-forward non-linearity.
    pub activation: Activation,
    /// Dropout after embeddings and each sub-layer.
    pub hidden_dropout: f64,
    /// Dropout of attention weights.
    pub attention_dropout: f64,
    /// Dropout before the classifier.
    pub classifier_dropout: f64,
    /// Standard deviation for weights that a checkpoint lacks.
    pub initializer_range: f64,
}

/// `config.json` of `bert`, with transformers' defaults for what it leaves out.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct RawBert {
    vocab_size: i64,
    hidden_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    intermediate_size: i64,
    hidden_act: String,
    hidden_dropout_prob: f64,
    attention_probs_dropout_prob: f64,
    max_position_embeddings: i64,
    type_vocab_size: i64,
    initializer_range: f64,
    layer_norm_eps: f64,
    classifier_dropout: Option<f64>,
    position_embedding_type: String,
    is_decoder: bool,
}

impl Default for RawBert {
    fn default() -> Self {
        Self {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: "gelu".into(),
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            classifier_dropout: None,
            position_embedding_type: "absolute".into(),
            is_decoder: false,
        }
    }
}

/// Reads the encoder that `raw`, a `config.json` of a supported `model_type`, describes.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read(model_type: &str, raw: &Value) -> Result<EncoderConfig, String> {
    let bert: RawBert = serde_json::from_value(raw.clone())
        .map_err(|error| format!("cannot read the {model_type} configuration: {error}"))?;
    bert.check()
}

impl RawBert {
    fn check(&self) -> Result<EncoderConfig, String> {
        let activation = Activation::read("hidden_act", &self.hidden_act)?;
        if self.position_embedding_type != "absolute" {
            return Err(format!(
                "position_embedding_type {:?} is not supported, expected \"absolute\"",
                self.position_embedding_type
            ));
        }
        if self.is_decoder {
            return Err("is_decoder is true; expected an encoder".into());
        }
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ];
        if let Some((name, value)) = sizes.iter().find(|(_, value)| *value < 1) {
            return Err(format!("{name} is {value}, expected at least 1"));
        }
        if self.hidden_size % self.num_attention_heads != 0 {
            return Err(format!(
                "hidden_size {} does not divide by num_attention_heads {}",
                self.hidden_size, self.num_attention_heads
            ));
        }
        if !(self.layer_norm_eps >= 0.0 && self.initializer_range >= 0.0) {
            return Err(format!(
                "layer_norm_eps is {} and initializer_range {}, expected neither below 0",
                self.layer_norm_eps, self.initializer_range
            ));
        }
        let classifier_dropout = self.classifier_dropout.unwrap_or(self.hidden_dropout_prob);
        let dropouts = [
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("classifier_dropout", classifier_dropout),
        ];
        if let Some((name, value)) = dropouts.iter().find(|(_, p)| !(0.0..1.0).contains(p)) {
            return Err(format!("{name} is {value}, expected a probability below 1"));
        }
        Ok(EncoderConfig {
            vocab_size: self.vocab_size,
            hidden: self.hidden_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            intermediate: self.intermediate_size,
            max_positions: self.max_position_embeddings,
            type_vocab_size: self.type_vocab_size,
            layer_norm_eps: self.layer_norm_eps,
            activation,
            hidden_dropout: self.hidden_dropout_prob,
            attention_dropout: self.attention_probs_dropout_prob,
            classifier_dropout,
            initializer_range: self.initializer_range,
        })
    }
}
