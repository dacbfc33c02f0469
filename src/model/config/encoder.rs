//! The hyper-parameters of encoders: BERT and its relatives.

use serde::Deserialize;
use serde_json::Value;

use super::{Activation, check_dropouts, check_sizes, padding_id};

/// A family of encoders, told apart from BERT by data alone.
#[derive(Debug)]
pub(super) struct Family {
    /// `model_type` of `config.json`.
    pub(super) model_type: &'static str,
    architecture: &'static str,
    /// Stands before the name of every parameter of the trunk.
    prefix: &'static str,
    /// `vocab_size` where `config.json` names none.
    vocab_size: i64,
    /// `pad_token_id` where `config.json` names none.
    padding_id: i64,
    positions: PositionIds,
    head: HeadForm,
}

const ROBERTA: Family = Family {
    model_type: "roberta",
    architecture: "RobertaForSequenceClassification",
    prefix: "roberta",
    vocab_size: 50265,
    padding_id: 1,
    positions: PositionIds::AfterPadding,
    head: HeadForm {
        dense: "classifier.dense",
        projection: "classifier.out_proj",
        dropout_first: true,
    },
};

/// The families that this trunk computes.
pub(super) const FAMILIES: [Family; 3] = [
    Family {
        model_type: "bert",
        architecture: "BertForSequenceClassification",
        prefix: "bert",
        vocab_size: 30522,
        padding_id: 0,
        positions: PositionIds::FromZero,
        head: HeadForm {
            dense: "bert.pooler.dense",
            projection: "classifier",
            dropout_first: false,
        },
    },
    ROBERTA,
    Family {
        model_type: "xlm-roberta",
        architecture: "XLMRobertaForSequenceClassification",
        vocab_size: 30522,
        ..ROBERTA
    },
];

/// How tokens are numbered for the position table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PositionIds {
    /// 0 for the first token of a sequence, and so on.
    FromZero,
    /// As in fairseq: tokens that are not padding count up from `padding_id + 1`, and the padding
    /// token, should it stand in a text, has position `padding_id`.
    AfterPadding,
}

/// The classification head on the first token: dense layer, tanh, dropout, projection to a score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadForm {
    /// Name of the dense layer.
    pub dense: &'static str,
    /// Name of the projection.
    pub projection: &'static str,
    /// Whether dropout stands before the dense layer too.
    pub dropout_first: bool,
}

/// The hyper-parameters of an encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderConfig {
    /// `architectures` of a saved model's `config.json`.
    pub architecture: &'static str,
    /// What the trunk's parameter names begin with, `bert` for example.
    pub prefix: &'static str,
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
    /// Rows of the position table.
    pub max_positions: i64,
    /// How tokens are numbered for it.
    pub positions: PositionIds,
    /// The padding token, whose embedding is never trained.
    pub padding_id: Option<i64>,
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
    /// The head.
    pub head: HeadForm,
}

impl EncoderConfig {
    /// The longest input in tokens.
    #[must_use]
    pub fn longest_input(&self) -> i64 {
        match (self.positions, self.padding_id) {
            (PositionIds::AfterPadding, Some(padding)) => self.max_positions - padding - 1,
            _ => self.max_positions,
        }
    }
}

/// `config.json` of these families, with transformers' defaults for what it leaves out.
#[derive(Debug, Deserialize)]
#[serde(default)]
struct RawBert {
    vocab_size: Option<i64>,
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
            vocab_size: None,
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

/// Reads the encoder of `family` that `raw`, a whole `config.json`, describes.
///
/// # Errors
/// What is wrong with it.
pub(super) fn read(family: &Family, raw: &Value) -> Result<EncoderConfig, String> {
    let bert: RawBert = serde_json::from_value(raw.clone())
        .map_err(|error| format!("cannot read the {} configuration: {error}", family.model_type))?;
    bert.check(family, raw)
}

impl RawBert {
    fn check(&self, family: &Family, raw: &Value) -> Result<EncoderConfig, String> {
        if self.position_embedding_type != "absolute" {
            return Err(format!(
                "position_embedding_type {:?} is not supported, expected \"absolute\"",
                self.position_embedding_type
            ));
        }
        if self.is_decoder {
            return Err("is_decoder is true; expected an encoder".into());
        }
        let vocab_size = self.vocab_size.unwrap_or(family.vocab_size);
        check_sizes(&[
            ("vocab_size", vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("intermediate_size", self.intermediate_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("type_vocab_size", self.type_vocab_size),
        ])?;
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
        check_dropouts(&[
            ("hidden_dropout_prob", self.hidden_dropout_prob),
            ("attention_probs_dropout_prob", self.attention_probs_dropout_prob),
            ("classifier_dropout", classifier_dropout),
        ])?;
        let config = EncoderConfig {
            architecture: family.architecture,
            prefix: family.prefix,
            vocab_size,
            hidden: self.hidden_size,
            layers: self.num_hidden_layers,
            heads: self.num_attention_heads,
            intermediate: self.intermediate_size,
            max_positions: self.max_position_embeddings,
            positions: family.positions,
            padding_id: padding_id(raw, family.padding_id, vocab_size)?,
            type_vocab_size: self.type_vocab_size,
            layer_norm_eps: self.layer_norm_eps,
            activation: Activation::read("hidden_act", &self.hidden_act)?,
            hidden_dropout: self.hidden_dropout_prob,
            attention_dropout: self.attention_probs_dropout_prob,
            classifier_dropout,
            initializer_range: self.initializer_range,
            head: family.head,
        };
        if config.positions == PositionIds::AfterPadding && config.padding_id.is_none() {
            return Err("pad_token_id is null; expected the id that positions count from".into());
        }
        if config.longest_input() < 1 {
            return Err(format!(
                "max_position_embeddings is {}, which leaves no position: they begin after \
                 pad_token_id",
                config.max_positions
            ));
        }
        Ok(config)
    }
}
