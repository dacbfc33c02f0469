//! The hyper-parameters of decoders: Llama and its relatives.

use serde::Deserialize;
use serde_json::Value;

use super::Activation;
use crate::model::rotary::Rotary;
use crate::model::stage::NO_PADDING;
use crate::torch_ext::attention::Window;

/// The hyper-parameters of a decoder.
#[allow(clippy::struct_excessive_bools, reason = "each is an option of config.json")]
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// The class of transformers that loads the saved model.
    pub architecture: &'static str,
    /// Rows of the token embedding table.
    pub vocab_size: i64,
    /// The token whose embedding is not trained, or [`NO_PADDING`](crate::model::stage::NO_PADDING).
    pub padding: i64,
    /// Width `H` of the residual stream.
    pub hidden: i64,
    /// Number of query heads.
    pub heads: i64,
    /// Number of key and value heads.
    pub kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Width of the feed-forward layer.
    pub intermediate: i64,
    /// The longest input in tokens.
    pub max_positions: i64,
    /// Added to the mean square in normalisation.
    pub norm_eps: f64,
    /// Whether normalisation multiplies by `1 + weight` instead of `weight`.
    pub norm_adds_one: bool,
    /// Feed-forward non-linearity.
    pub activation: Activation,
    /// Whether query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the feed-forward projections have biases.
    pub mlp_bias: bool,
    /// Whether every head's queries and keys are normalised.
    pub qk_norm: bool,
    /// Factor on the token embeddings.
    pub embedding_scale: Option<f64>,
    /// Position embeddings of queries and keys.
    pub rotary: Rotary,
    /// What a token sees, for each layer.
    pub windows: Vec<Window>,
    /// Dropout of attention weights.
    pub attention_dropout: f64,
    /// Standard deviation for weights that a checkpoint lacks.
    pub initializer_range: f64,
    /// Where the score's weights come from.
    pub head: ScoreHead,
}

/// Where the weights `[1, H]` of a decoder's score come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScoreHead {
    /// `score.weight`, trained.
    #[default]
    Trained,
    /// The language model's: the logit of one token, less that of another where there is one.
    TokenLogit {
        /// Id of the token that means relevant.
        positive: i64,
        /// Id of the token that means irrelevant.
        negative: Option<i64>,
    },
}

/// What sets one kind of decoder apart: transformers' defaults, and what no key of `config.json`
/// says.
struct Family {
    model_type: &'static str,
    architecture: &'static str,
    vocab_size: i64,
    hidden: i64,
    intermediate: i64,
    layers: i64,
    heads: i64,
    /// `None`: as many as heads.
    kv_heads: Option<i64>,
    /// `None`: hidden / heads.
    head_dim: Option<i64>,
    max_positions: i64,
    activation: &'static str,
    /// The bias of query, key and value; `None`: as `attention_bias` says, the output's too.
    qkv_bias: Option<bool>,
    qk_norm: bool,
    sliding: Sliding,
    /// Norms multiply by `1 + weight`, embeddings are scaled by the root of `H`.
    gemma: bool,
}

/// How a family's `config.json` asks for sliding windows.
enum Sliding {
    Never,
    /// `sliding_window`, in every layer.
    Everywhere,
    /// With `use_sliding_window`, in the layers of `layer_types`, or from `max_window_layers` on.
    SomeLayers,
}

const LLAMA: Family = Family {
    model_type: "llama",
    architecture: "LlamaForSequenceClassification",
    vocab_size: 32_000,
    hidden: 4096,
    intermediate: 11_008,
    layers: 32,
    heads: 32,
    kv_heads: None,
    head_dim: None,
    max_positions: 2048,
    activation: "silu",
    qkv_bias: None,
    qk_norm: false,
    sliding: Sliding::Never,
    gemma: false,
};

const QWEN2: Family = Family {
    model_type: "qwen2",
    architecture: "Qwen2ForSequenceClassification",
    vocab_size: 151_936,
    intermediate: 22_016,
    kv_heads: Some(32),
    max_positions: 32_768,
    qkv_bias: Some(true),
    sliding: Sliding::SomeLayers,
    ..LLAMA
};

const FAMILIES: &[Family] = &[
    QWEN2,
    Family {
        model_type: "qwen3",
        architecture: "Qwen3ForSequenceClassification",
        head_dim: Some(128),
        qkv_bias: None,
        qk_norm: true,
        ..QWEN2
    },
    LLAMA,
    Family {
        model_type: "mistral",
        architecture: "MistralForSequenceClassification",
        intermediate: 14_336,
        kv_heads: Some(8),
        max_positions: 131_072,
        qkv_bias: Some(false),
        sliding: Sliding::Everywhere,
        ..LLAMA
    },
    Family {
        model_type: "gemma",
        architecture: "GemmaForSequenceClassification",
        vocab_size: 256_000,
        hidden: 3072,
        intermediate: 24_576,
        layers: 28,
        heads: 16,
        kv_heads: Some(16),
        head_dim: Some(256),
        max_positions: 8192,
        activation: "gelu_pytorch_tanh",
        gemma: true,
        ..LLAMA
    },
];

/// `model_type`s that this trunk computes.
pub(super) fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.model_type)
}

/// `config.json` of a decoder as far as it is read.
#[derive(Debug, Deserialize)]
struct RawDecoder {
    vocab_size: Option<i64>,
    hidden_size: Option<i64>,
    intermediate_size: Option<i64>,
    num_hidden_layers: Option<i64>,
    num_attention_heads: Option<i64>,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    hidden_act: Option<String>,
    max_position_embeddings: Option<i64>,
    initializer_range: Option<f64>,
    rms_norm_eps: Option<f64>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    attention_dropout: Option<f64>,
    use_sliding_window: Option<bool>,
    /// Absent and null differ.
    #[serde(default, deserialize_with = "present")]
    #[expect(clippy::option_option, reason = "outside: present; inside: not null")]
    sliding_window: Option<Option<i64>>,
    max_window_layers: Option<i64>,
    layer_types: Option<Vec<String>>,
    use_bidirectional_attention: Option<bool>,
    is_causal: Option<bool>,
    #[serde(default, deserialize_with = "present")]
    #[expect(clippy::option_option, reason = "outside: present; inside: not null")]
    pad_token_id: Option<Option<i64>>,
}

#[expect(clippy::option_option, reason = "outside: present; inside: not null")]
fn present<'de, D: serde::Deserializer<'de>>(value: D) -> Result<Option<Option<i64>>, D::Error> {
    Option::deserialize(value).map(Some)
}

/// Reads the decoder that `config`, a `config.json`, describes; `None` when `model_type` is not one.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read(model_type: &str, config: &Value) -> Option<Result<DecoderConfig, String>> {
    let family = FAMILIES.iter().find(|family| family.model_type == model_type)?;
    let raw = serde_json::from_value::<RawDecoder>(config.clone())
        .map_err(|error| format!("cannot read the {model_type} configuration: {error}"));
    Some(raw.and_then(|raw| raw.check(family, config)))
}

impl RawDecoder {
    fn check(&self, family: &Family, config: &Value) -> Result<DecoderConfig, String> {
        let hidden = self.hidden_size.unwrap_or(family.hidden);
        let heads = self.num_attention_heads.unwrap_or(family.heads);
        // Where the file has no such key, transformers takes the family's default, not `heads`.
        let kv_heads = match config.get("num_key_value_heads") {
            Some(_) => self.num_key_value_heads.unwrap_or(heads),
            None => family.kv_heads.unwrap_or(heads),
        };
        let head_dim = self.head_dim.or(family.head_dim).unwrap_or(hidden / heads.max(1));
        let layers = self.num_hidden_layers.unwrap_or(family.layers);
        let max_positions = self.max_position_embeddings.unwrap_or(family.max_positions);
        let intermediate = self.intermediate_size.unwrap_or(family.intermediate);
        let vocab_size = self.vocab_size.unwrap_or(family.vocab_size);
        let sizes = [
            ("vocab_size", vocab_size),
            ("hidden_size", hidden),
            ("num_hidden_layers", layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", kv_heads),
            ("head_dim", head_dim),
            ("intermediate_size", intermediate),
            ("max_position_embeddings", max_positions),
        ];
        if let Some((name, value)) = sizes.iter().find(|(_, value)| *value < 1) {
            return Err(format!("{name} is {value}, expected at least 1"));
        }
        if heads % kv_heads != 0 {
            return Err(format!(
                "num_attention_heads {heads} does not divide by num_key_value_heads {kv_heads}"
            ));
        }
        if self.use_bidirectional_attention == Some(true) {
            return Err("use_bidirectional_attention is not supported, expected false".into());
        }
        let attention_bias = self.attention_bias.unwrap_or(false);
        let [norm_eps, initializer_range, attention_dropout] = self.numbers()?;
        Ok(DecoderConfig {
            architecture: family.architecture,
            vocab_size,
            padding: self.padding(family, vocab_size)?,
            hidden,
            heads,
            kv_heads,
            head_dim,
            intermediate,
            max_positions,
            norm_eps,
            norm_adds_one: family.gemma,
            activation: self.activation(family)?,
            qkv_bias: family.qkv_bias.unwrap_or(attention_bias),
            output_bias: family.qkv_bias.is_none() && attention_bias,
            mlp_bias: family.model_type == "llama" && self.mlp_bias.unwrap_or(false),
            qk_norm: family.qk_norm,
            embedding_scale: family.gemma.then(|| (hidden as f64).sqrt()),
            rotary: Rotary::read(config, head_dim, max_positions)?,
            windows: self.windows(family, layers, config)?,
            attention_dropout,
            initializer_range,
            head: ScoreHead::Trained,
        })
    }

    fn padding(&self, family: &Family, vocab_size: i64) -> Result<i64, String> {
        match self.pad_token_id.unwrap_or(family.gemma.then_some(0)) {
            // transformers counts from the end below 0; such files say -1 and mean none.
            None | Some(-1) => Ok(NO_PADDING),
            Some(id) if (0..vocab_size).contains(&id) => Ok(id),
            Some(id) => Err(format!("pad_token_id {id} is not below vocab_size {vocab_size}")),
        }
    }

    fn numbers(&self) -> Result<[f64; 3], String> {
        let eps = self.rms_norm_eps.unwrap_or(1e-6);
        let range = self.initializer_range.unwrap_or(0.02);
        let dropout = self.attention_dropout.unwrap_or(0.0);
        if !(eps >= 0.0 && range >= 0.0) {
            return Err(format!(
                "rms_norm_eps is {eps} and initializer_range {range}, expected neither below 0"
            ));
        }
        if !(0.0..1.0).contains(&dropout) {
            return Err(format!("attention_dropout is {dropout}, expected a probability below 1"));
        }
        Ok([eps, range, dropout])
    }

    fn activation(&self, family: &Family) -> Result<Activation, String> {
        match self.hidden_act.as_deref().unwrap_or(family.activation) {
            // The first Gemma files say gelu and mean the approximation, as transformers reads them.
            "gelu" if family.gemma => Ok(Activation::GeluTanh),
            name => Activation::read("hidden_act", name),
        }
    }

    fn windows(&self, family: &Family, layers: i64, config: &Value) -> Result<Vec<Window>, String> {
        let size = self.sliding_window.unwrap_or(Some(4096));
        if let Some(size) = size.filter(|&size| size < 1) {
            return Err(format!("sliding_window is {size}, expected at least 1, or null"));
        }
        // To transformers null is as good as false. Its windows that look both ways hold as many
        // positions on either side, and so one more on the left than those that do not.
        let is_causal = config.get("is_causal").is_none_or(|_| self.is_causal == Some(true));
        let (full, window) = if is_causal {
            (Window::CAUSAL, size.map_or(Window::CAUSAL, Window::causal))
        } else {
            (Window::FULL, size.map_or(Window::FULL, Window::local))
        };
        match (&family.sliding, &self.layer_types) {
            (Sliding::Never | Sliding::Everywhere, Some(_)) => {
                Err(format!("layer_types is not supported in a {}", family.model_type))
            }
            (Sliding::Never, None) => Ok(vec![full; layers as usize]),
            (Sliding::Everywhere, None) => Ok(vec![window; layers as usize]),
            (Sliding::SomeLayers, types) => {
                let window = if self.use_sliding_window == Some(true) { window } else { full };
                if let Some(types) = types {
                    return of_layer_types(types, layers, full, window);
                }
                let first = self.max_window_layers.unwrap_or(28);
                let of = |layer| if layer >= first { window } else { full };
                Ok((0..layers).map(of).collect())
            }
        }
    }
}

/// The window of each layer: `full` or `sliding`, by its type.
fn of_layer_types(
    types: &[String],
    layers: i64,
    full: Window,
    sliding: Window,
) -> Result<Vec<Window>, String> {
    if types.len() as i64 != layers {
        return Err(format!("layer_types has {} entries for {layers} layers", types.len()));
    }
    let of = |kind: &String| match kind.as_str() {
        "full_attention" => Ok(full),
        "sliding_attention" => Ok(sliding),
        other => Err(format!(
            "layer_types holds {other:?}, expected full_attention or sliding_attention"
        )),
    };
    types.iter().map(of).collect()
}
