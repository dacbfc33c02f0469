//! The hyper-parameters of ModernBERT.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{Activation, check_dropouts, check_sizes, padding_id};
use crate::model::rotary::Rotary;
use crate::torch_ext::attention::Window;

/// `model_type` of `config.json`.
pub(super) const MODEL_TYPE: &str = "modernbert";

/// How the head makes one row of a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// It takes the first token's.
    Cls,
    /// It takes the mean over all tokens.
    Mean,
}

/// What a layer's attention sees, and how it tells positions apart.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerAttention {
    /// The keys that a query sees.
    pub window: Window,
    /// Position embeddings of queries and keys.
    pub rotary: Rotary,
}

/// The hyper-parameters of ModernBERT.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::struct_excessive_bools, reason = "config.json has these switches")]
pub struct ModernBertConfig {
    /// Rows of the word embedding table.
    pub vocab_size: i64,
    /// Width `H` of the residual stream.
    pub hidden: i64,
    /// Each layer's attention.
    pub layers: Vec<LayerAttention>,
    /// Number of attention heads.
    pub heads: i64,
    /// Width of the feed-forward layer behind its gate.
    pub intermediate: i64,
    /// The longest input in tokens.
    pub max_positions: i64,
    /// The padding token, whose embedding is never trained.
    pub padding_id: Option<i64>,
    /// Added to the variance in layer normalisation.
    pub norm_eps: f64,
    /// Whether layer normalisation has biases.
    pub norm_bias: bool,
    /// Whether the projections of attention have.
    pub attention_bias: bool,
    /// Whether the feed-forward layers have.
    pub mlp_bias: bool,
    /// Whether the dense layer of the head has.
    pub classifier_bias: bool,
    /// Feed-forward non-linearity.
    pub activation: Activation,
    /// The head's non-linearity.
    pub classifier_activation: Activation,
    /// How the head makes one row of a sequence.
    pub pooling: Pooling,
    /// Dropout after the embeddings.
    pub embedding_dropout: f64,
    /// Dropout of attention weights and of attention's output.
    pub attention_dropout: f64,
    /// Dropout inside the feed-forward layer.
    pub mlp_dropout: f64,
    /// Dropout before the classifier.
    pub classifier_dropout: f64,
    /// Standard deviation for weights that a checkpoint lacks, divided by `sqrt(2 * layers)` in
    /// output projections.
    pub initializer_range: f64,
    /// Such weights are drawn again beyond so many standard deviations.
    pub initializer_cutoff: f64,
}

/// `config.json` of `modernbert`, with transformers' defaults for what it leaves out.
#[derive(Debug, Deserialize)]
#[serde(default)]
#[allow(clippy::struct_excessive_bools, reason = "config.json has these switches")]
struct Raw {
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    head_dim: Option<i64>,
    hidden_activation: String,
    max_position_embeddings: i64,
    initializer_range: f64,
    initializer_cutoff_factor: Option<f64>,
    norm_eps: f64,
    norm_bias: bool,
    attention_bias: bool,
    attention_dropout: f64,
    layer_types: Option<Vec<String>>,
    global_attn_every_n_layers: i64,
    global_rope_theta: f64,
    local_rope_theta: f64,
    local_attention: i64,
    sliding_window: Option<i64>,
    embedding_dropout: f64,
    mlp_bias: bool,
    mlp_dropout: f64,
    classifier_pooling: Pooling,
    classifier_dropout: f64,
    classifier_bias: bool,
    classifier_activation: String,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            vocab_size: 50368,
            hidden_size: 768,
            intermediate_size: 1152,
            num_hidden_layers: 22,
            num_attention_heads: 12,
            head_dim: None,
            hidden_activation: "gelu".into(),
            max_position_embeddings: 8192,
            initializer_range: 0.02,
            initializer_cutoff_factor: Some(2.0),
            norm_eps: 1e-5,
            norm_bias: false,
            attention_bias: false,
            attention_dropout: 0.0,
            layer_types: None,
            global_attn_every_n_layers: 3,
            global_rope_theta: 160_000.0,
            local_rope_theta: 10_000.0,
            local_attention: 128,
            sliding_window: None,
            embedding_dropout: 0.0,
            mlp_bias: false,
            mlp_dropout: 0.0,
            classifier_pooling: Pooling::Cls,
            classifier_dropout: 0.0,
            classifier_bias: false,
            classifier_activation: "gelu".into(),
        }
    }
}

/// Reads the ModernBERT that `raw`, a whole `config.json`, describes.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read(raw: &Value) -> Result<ModernBertConfig, String> {
    let config: Raw = serde_json::from_value(raw.clone())
        .map_err(|error| format!("cannot read the {MODEL_TYPE} configuration: {error}"))?;
    config.check(raw)
}

impl Raw {
    fn check(&self, raw: &Value) -> Result<ModernBertConfig, String> {
        check_sizes(&[
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("global_attn_every_n_layers", self.global_attn_every_n_layers),
            ("local_attention", self.local_attention),
        ])?;
        check_dropouts(&[
            ("embedding_dropout", self.embedding_dropout),
            ("attention_dropout", self.attention_dropout),
            ("mlp_dropout", self.mlp_dropout),
            ("classifier_dropout", self.classifier_dropout),
        ])?;
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if hidden % heads != 0 {
            return Err(format!(
                "hidden_size {hidden} does not divide by num_attention_heads {heads}"
            ));
        }
        if let Some(dim) = self.head_dim.filter(|&dim| dim != hidden / heads) {
            return Err(format!("head_dim is {dim}, expected {}", hidden / heads));
        }
        if !(self.norm_eps >= 0.0 && self.initializer_range >= 0.0) {
            return Err(format!(
                "norm_eps is {} and initializer_range {}, expected neither below 0",
                self.norm_eps, self.initializer_range
            ));
        }
        // transformers falls back to 3 where the key is null.
        let initializer_cutoff = self.initializer_cutoff_factor.unwrap_or(3.0);
        if initializer_cutoff < 0.5 {
            return Err(format!(
                "initializer_cutoff_factor is {initializer_cutoff}, expected at least 0.5"
            ));
        }
        Ok(ModernBertConfig {
            vocab_size: self.vocab_size,
            hidden,
            layers: self.layers(raw)?,
            heads,
            intermediate: self.intermediate_size,
            max_positions: self.max_position_embeddings,
            padding_id: padding_id(raw, 50283, self.vocab_size)?,
            norm_eps: self.norm_eps,
            norm_bias: self.norm_bias,
            attention_bias: self.attention_bias,
            mlp_bias: self.mlp_bias,
            classifier_bias: self.classifier_bias,
            activation: Activation::read("hidden_activation", &self.hidden_activation)?,
            classifier_activation: Activation::read(
                "classifier_activation",
                &self.classifier_activation,
            )?,
            pooling: self.classifier_pooling,
            embedding_dropout: self.embedding_dropout,
            attention_dropout: self.attention_dropout,
            mlp_dropout: self.mlp_dropout,
            classifier_dropout: self.classifier_dropout,
            initializer_range: self.initializer_range,
            initializer_cutoff,
        })
    }

    /// The attention of each layer: by `layer_types`, or global in every n-th layer.
    fn layers(&self, raw: &Value) -> Result<Vec<LayerAttention>, String> {
        let global = LayerAttention {
            window: Window::FULL,
            rotary: self.rotary(raw, "full_attention", self.global_rope_theta)?,
        };
        // The window holds as many keys on either side.
        let radius = self.sliding_window.unwrap_or(self.local_attention / 2);
        let local = LayerAttention {
            window: Window::local(radius),
            rotary: self.rotary(raw, "sliding_attention", self.local_rope_theta)?,
        };
        let Some(types) = &self.layer_types else {
            let every = self.global_attn_every_n_layers;
            let layer = |index: i64| if index % every == 0 { &global } else { &local };
            return Ok((0..self.num_hidden_layers).map(layer).cloned().collect());
        };
        if types.len() as i64 != self.num_hidden_layers {
            return Err(format!(
                "layer_types has {} entries, expected num_hidden_layers {}",
                types.len(),
                self.num_hidden_layers
            ));
        }
        let layer = |name: &String| match name.as_str() {
            "full_attention" => Ok(global.clone()),
            "sliding_attention" => Ok(local.clone()),
            other => Err(format!(
                "layer_types has {other:?}, expected full_attention or sliding_attention"
            )),
        };
        types.iter().map(layer).collect()
    }

    /// The position embeddings of layers of `layer_type`: what `rope_parameters` says of them, in
    /// older files `rope_scaling` and `theta`.
    fn rotary(&self, raw: &Value, layer_type: &str, theta: f64) -> Result<Rotary, String> {
        let object = |key: &str| raw.get(key).and_then(Value::as_object);
        let mut parameters = Map::from_iter([("rope_theta".to_owned(), json!(theta))]);
        for (kind, given) in object("rope_parameters").into_iter().flatten() {
            match (kind.as_str(), given.as_object()) {
                ("full_attention" | "sliding_attention", Some(given)) if kind == layer_type => {
                    parameters.extend(given.clone());
                }
                ("full_attention" | "sliding_attention", _) => {}
                _ => {
                    return Err(format!(
                        "rope_parameters has {kind}, expected full_attention and sliding_attention"
                    ));
                }
            }
        }
        parameters.extend(object("rope_scaling").cloned().unwrap_or_default());
        let dim = self.hidden_size / self.num_attention_heads;
        let config = json!({ "rope_parameters": parameters });
        Rotary::read(&config, dim, self.max_position_embeddings)
    }
}
