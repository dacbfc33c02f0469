//! The encoder trunk: post-norm transformer layers as in BERT (Devlin et al., 2019) and RoBERTa (Liu
//! et al., 2019), with transformers' sequence-classification head. Families differ only in
//! [`EncoderConfig`].

use tch::{Kind, Tensor};

use super::config::{EncoderConfig, PositionIds};
use super::stage::{
    ForwardContext, Init, NO_PADDING, PackedBatch, Parameter, Stage, TensorSpec, Width, dropout,
    embedding, inner, layer_norm, to_fp32,
};
use super::views::Views;
use crate::error::Result;
use crate::torch_ext::attention::{AttentionOptions, Projections, Window, packed_attention};

/// The stages of an encoder with its head: embeddings, layers, head.
#[must_use]
pub fn stages(config: &EncoderConfig) -> Vec<Box<dyn Stage>> {
    let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(Embeddings(config.clone()))];
    for index in 0..config.layers {
        stages.push(Box::new(Layer { config: config.clone(), index }));
    }
    stages.push(Box::new(Head(config.clone())));
    stages
}

fn weight(name: String, shape: &[i64]) -> Parameter {
    Parameter::one(TensorSpec::new(name, shape), true)
}

fn norm(config: &EncoderConfig, name: &str) -> [Parameter; 2] {
    let part = |what: &str| TensorSpec::new(format!("{name}.{what}"), &[config.hidden]);
    [Parameter::one(part("weight"), false), Parameter::one(part("bias"), false)]
}

fn dense(name: &str, out: i64, width: i64) -> [Parameter; 2] {
    [
        Parameter::linear(vec![TensorSpec::new(format!("{name}.weight"), &[out, width])]),
        Parameter::one(TensorSpec::new(format!("{name}.bias"), &[out]), false),
    ]
}

#[derive(Debug)]
struct Embeddings(EncoderConfig);

impl Stage for Embeddings {
    fn name(&self) -> String {
        "embeddings".into()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let c = &self.0;
        let table = |kind: &str, rows| {
            weight(format!("{}.embeddings.{kind}_embeddings.weight", c.prefix), rows)
        };
        let mut all = vec![
            table("word", &[c.vocab_size, c.hidden]),
            table("position", &[c.max_positions, c.hidden]),
            table("token_type", &[c.type_vocab_size, c.hidden]),
        ];
        all.extend(norm(c, &format!("{}.embeddings.LayerNorm", c.prefix)));
        all
    }

    fn saved_bytes_per_token(&self, width: Width) -> usize {
        let hidden = self.0.hidden as usize;
        // The sum before and after normalisation, the output, a mask of bytes, three ids.
        hidden * (2 * width.value + width.normed) + hidden + 3 * size_of::<i64>()
    }

    fn backward_bytes_per_token(&self, width: Width) -> usize {
        // Before and after normalisation.
        2 * self.0.hidden as usize * width.value
    }

    fn forward(
        &self,
        mut views: Views<'_>,
        _input: Option<&Tensor>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let [word, position, token_type, gamma, beta] = views.take();
        let batch = context.batch;
        let padding = self.0.padding_id.unwrap_or(NO_PADDING);
        let (positions, position_padding) = match self.0.positions {
            PositionIds::FromZero => (batch.position_ids.shallow_clone(), NO_PADDING),
            PositionIds::AfterPadding => (positions_after(padding, batch)?, padding),
        };
        let sum = embedding(word, &batch.input_ids, padding)?
            .f_add(&embedding(token_type, &batch.type_ids, NO_PADDING)?)?
            .f_add(&embedding(position, &positions, position_padding)?)?;
        let normed = layer_norm(&sum, gamma, Some(beta), self.0.layer_norm_eps)?;
        dropout(normed, self.0.hidden_dropout, context.dropout_seed.is_some())
    }
}

/// Positions `[T]` as RoBERTa counts them: `padding + n` for the `n`-th token of a sequence that is
/// not `padding`, and `padding` for one that is.
fn positions_after(padding: i64, batch: &PackedBatch) -> Result<Tensor> {
    let ids = &batch.input_ids;
    let counted = ids.f_not_equal(padding)?.f_to_kind(Kind::Int64)?;
    let so_far = counted.f_cumsum(0, Kind::Int64)?;
    let first_row =
        Tensor::f_arange(ids.size1()?, (Kind::Int64, ids.device()))?.f_sub(&batch.position_ids)?;
    let before = so_far.f_sub(&counted)?.f_index_select(0, &first_row)?;
    Ok(so_far.f_sub(&before)?.f_mul(&counted)?.f_add_scalar(padding)?)
}

#[derive(Debug)]
struct Layer {
    config: EncoderConfig,
    index: i64,
}

impl Layer {
    fn is_last(&self) -> bool {
        self.index + 1 == self.config.layers
    }
}

impl Stage for Layer {
    fn name(&self) -> String {
        format!("layer {}", self.index)
    }

    fn parameters(&self) -> Vec<Parameter> {
        let c = &self.config;
        let at = |rest: &str| format!("{}.encoder.layer.{}.{rest}", self.config.prefix, self.index);
        let projections = |what: &str, shape: &[i64]| {
            ["query", "key", "value"]
                .map(|p| TensorSpec::new(at(&format!("attention.self.{p}.{what}")), shape))
                .to_vec()
        };
        let mut all = vec![
            Parameter::linear(projections("weight", &[c.hidden, c.hidden])),
            Parameter::stacked(projections("bias", &[c.hidden]), false),
        ];
        all.extend(dense(&at("attention.output.dense"), c.hidden, c.hidden));
        all.extend(norm(c, &at("attention.output.LayerNorm")));
        all.extend(dense(&at("intermediate.dense"), c.intermediate, c.hidden));
        all.extend(dense(&at("output.dense"), c.hidden, c.intermediate));
        all.extend(norm(c, &at("output.LayerNorm")));
        all
    }

    fn saved_bytes_per_token(&self, width: Width) -> usize {
        let (hidden, inner) = (self.config.hidden as usize, self.config.intermediate as usize);
        // Attention keeps projections and its own output.
        let attention = 4 * hidden * width.attention;
        if self.is_last() {
            return attention;
        }
        // Two sums before normalisation and two outputs of it; the feed-forward layer before and
        // after its activation; two masks of bytes.
        let sums = 2 * hidden * width.normed;
        attention + sums + (2 * hidden + 2 * inner) * width.value + 2 * hidden
    }

    fn backward_bytes_per_token(&self, width: Width) -> usize {
        let (hidden, inner) = (self.config.hidden as usize, self.config.intermediate as usize);
        // Attention's output and input, its projections, and those once more in one piece.
        let attention = 2 * hidden * width.value + 6 * hidden * width.attention;
        // Two sums; the feed-forward layer before and after its activation.
        if self.is_last() { attention } else { (2 * hidden + 2 * inner) * width.value }
    }

    fn forward(
        &self,
        mut views: Views<'_>,
        input: Option<&Tensor>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let train = context.dropout_seed.is_some();
        let residual = inner(input);
        let qkv = views.linear(residual, true)?;
        let options = AttentionOptions {
            cu_seqlens: &context.batch.cu_seqlens,
            heads: c.heads,
            kv_heads: c.heads,
            window: Window::FULL,
            scale: ((c.hidden / c.heads) as f64).sqrt().recip(),
            dropout: if train { c.attention_dropout } else { 0.0 },
            seed: context.dropout_seed.unwrap_or(0),
        };
        let attended = packed_attention(Projections::Fused(&qkv), options)?;
        // The head reads one row of each sequence, and nothing after attention mixes rows: the last
        // layer computes only those.
        let (attended, residual) = if self.is_last() {
            let rows = &context.batch.first_rows;
            (attended.f_index_select(0, rows)?, residual.f_index_select(0, rows)?)
        } else {
            (attended, residual.shallow_clone())
        };
        let attended = dropout(views.linear(&attended, true)?, c.hidden_dropout, train)?;
        let [gamma, beta] = views.take();
        let x = layer_norm(&attended.f_add(&residual)?, gamma, Some(beta), c.layer_norm_eps)?;
        let up = c.activation.apply(&views.linear(&x, true)?)?;
        let down = dropout(views.linear(&up, true)?, c.hidden_dropout, train)?;
        let [gamma, beta] = views.take();
        layer_norm(&down.f_add(&x)?, gamma, Some(beta), c.layer_norm_eps)
    }
}

#[derive(Debug)]
struct Head(EncoderConfig);

impl Stage for Head {
    fn name(&self) -> String {
        "head".into()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let c = &self.0;
        let dense = |name: &str, out: i64| {
            let normal = Init::Normal(c.initializer_range);
            let weight = TensorSpec::new(format!("{name}.weight"), &[out, c.hidden]);
            let bias = TensorSpec::new(format!("{name}.bias"), &[out]);
            [
                Parameter::linear(vec![weight.or_init(normal)]),
                Parameter::one(bias.or_init(Init::Zeros), false),
            ]
        };
        [dense(c.head.dense, c.hidden), dense(c.head.projection, 1)].concat()
    }

    fn saved_bytes_per_token(&self, _width: Width) -> usize {
        // It sees one row of each sequence.
        0
    }

    fn backward_bytes_per_token(&self, _width: Width) -> usize {
        0
    }

    fn forward(
        &self,
        mut views: Views<'_>,
        input: Option<&Tensor>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let (p, train) = (self.0.classifier_dropout, context.dropout_seed.is_some());
        let mut first = inner(input).shallow_clone();
        if self.0.head.dropout_first {
            first = dropout(first, p, train)?;
        }
        let dense = dropout(views.linear(&first, true)?.f_tanh()?, p, train)?;
        to_fp32(&views.linear(&dense, true)?.f_squeeze_dim(1)?)
    }
}
