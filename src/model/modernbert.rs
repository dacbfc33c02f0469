//! ModernBERT (Warner et al., 2024) with transformers' sequence-classification head: pre-norm
//! layers, gated feed-forward parts, rotary positions, and attention that in most layers sees only
//! a window.

use tch::{Kind, Tensor};

use super::config::{ModernBertConfig, Pooling};
use super::stage::{
    ForwardContext, Init, NO_PADDING, PackedBatch, Parameter, Stage, TensorSpec, Width, dropout,
    embedding, inner, layer_norm, to_fp32,
};
use super::views::Views;
use crate::error::Result;
use crate::torch_ext::attention::{AttentionOptions, Projections, packed_attention};

/// The stages of the model with its head: embeddings, layers, head.
#[must_use]
pub fn stages(config: &ModernBertConfig) -> Vec<Box<dyn Stage>> {
    let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(Embeddings(config.clone()))];
    for index in 0..config.layers.len() {
        stages.push(Box::new(Layer { config: config.clone(), index }));
    }
    stages.push(Box::new(Head(config.clone())));
    stages
}

/// Weight and, with `bias`, bias of a layer; `init` is for weights that a checkpoint may lack.
fn layer(name: &str, shape: &[i64], bias: bool, init: Init) -> Vec<Parameter> {
    let weight = TensorSpec::new(format!("{name}.weight"), shape).or_init(init);
    let weight = match shape {
        [_, _] => Parameter::linear(vec![weight]),
        _ => Parameter::one(weight, false),
    };
    let mut all = vec![weight];
    if bias {
        let init = if init == Init::FromCheckpoint { init } else { Init::Zeros };
        let bias = TensorSpec::new(format!("{name}.bias"), &shape[..1]).or_init(init);
        all.push(Parameter::one(bias, false));
    }
    all
}

fn dense(name: &str, shape: [i64; 2], bias: bool) -> Vec<Parameter> {
    layer(name, &shape, bias, Init::FromCheckpoint)
}

fn norm(config: &ModernBertConfig, name: &str) -> Vec<Parameter> {
    layer(name, &[config.hidden], config.norm_bias, Init::FromCheckpoint)
}

/// Layer normalisation of `x`.
fn normalise(config: &ModernBertConfig, x: &Tensor, views: &mut Views<'_>) -> Result<Tensor> {
    let weight = views.one();
    let bias = config.norm_bias.then(|| views.one());
    layer_norm(x, weight, bias, config.norm_eps)
}

#[derive(Debug)]
struct Embeddings(ModernBertConfig);

impl Stage for Embeddings {
    fn name(&self) -> String {
        "embeddings".into()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let c = &self.0;
        let name = "model.embeddings.tok_embeddings.weight";
        let mut all = vec![Parameter::one(TensorSpec::new(name, &[c.vocab_size, c.hidden]), true)];
        all.extend(norm(c, "model.embeddings.norm"));
        all
    }

    fn saved_bytes_per_token(&self, width: Width) -> usize {
        let hidden = self.0.hidden as usize;
        // The embedding before and after normalisation, a mask of bytes, an id.
        hidden * (width.value + width.normed) + hidden + size_of::<i64>()
    }

    fn backward_bytes_per_token(&self, width: Width) -> usize {
        2 * self.0.hidden as usize * width.value
    }

    fn forward(
        &self,
        mut views: Views<'_>,
        _input: Option<&Tensor>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let padding = self.0.padding_id.unwrap_or(NO_PADDING);
        let words = embedding(views.one(), &context.batch.input_ids, padding)?;
        let normed = normalise(&self.0, &words, &mut views)?;
        dropout(normed, self.0.embedding_dropout, context.dropout_seed.is_some())
    }
}

#[derive(Debug)]
struct Layer {
    config: ModernBertConfig,
    index: usize,
}

impl Layer {
    /// Whether only the rows that the head reads are computed behind attention.
    fn is_cut(&self) -> bool {
        self.index + 1 == self.config.layers.len() && self.config.pooling == Pooling::Cls
    }

    /// The first layer's input is the embeddings' normalised output.
    fn has_attention_norm(&self) -> bool {
        self.index > 0
    }

    /// Rotary attention on the projections `[T, 3 * H]`; `[T, H]`.
    fn attend(&self, qkv: &Tensor, context: ForwardContext<'_>) -> Result<Tensor> {
        let c = &self.config;
        let attention = &c.layers[self.index];
        let (tokens, dim) = (qkv.size2()?.0, c.hidden / c.heads);
        let parts = qkv.f_view([tokens, 3, c.heads, dim])?;
        let kind = qkv.f_kind()?;
        let angles = context.batch.angles(&attention.rotary, kind)?;
        // As in transformers, in fp32 whatever the precision.
        let rotated = |part: i64| -> Result<Tensor> {
            let part = parts.f_select(1, part)?.f_to_kind(Kind::Float)?;
            Ok(angles.rotate(&part)?.f_to_kind(kind)?)
        };
        let projections = Projections::Split {
            query: &rotated(0)?,
            key: &rotated(1)?,
            value: &parts.f_select(1, 2)?,
        };
        let options = AttentionOptions {
            cu_seqlens: &context.batch.cu_seqlens,
            heads: c.heads,
            kv_heads: c.heads,
            window: attention.window,
            scale: (dim as f64).sqrt().recip(),
            dropout: context.dropout_seed.map_or(0.0, |_| c.attention_dropout),
            seed: context.dropout_seed.unwrap_or(0),
        };
        packed_attention(projections, options)
    }
}

impl Stage for Layer {
    fn name(&self) -> String {
        format!("layer {}", self.index)
    }

    fn parameters(&self) -> Vec<Parameter> {
        let c = &self.config;
        let at = |rest: &str| format!("model.layers.{}.{rest}", self.index);
        let mut all = Vec::new();
        if self.has_attention_norm() {
            all.extend(norm(c, &at("attn_norm")));
        }
        all.extend(dense(&at("attn.Wqkv"), [3 * c.hidden, c.hidden], c.attention_bias));
        all.extend(dense(&at("attn.Wo"), [c.hidden, c.hidden], c.attention_bias));
        all.extend(norm(c, &at("mlp_norm")));
        all.extend(dense(&at("mlp.Wi"), [2 * c.intermediate, c.hidden], c.mlp_bias));
        all.extend(dense(&at("mlp.Wo"), [c.hidden, c.intermediate], c.mlp_bias));
        all
    }

    fn saved_bytes_per_token(&self, width: Width) -> usize {
        let (hidden, inner) = (self.config.hidden as usize, self.config.intermediate as usize);
        // Attention keeps queries, keys, values and its own output; before it stand the norm's
        // output and the rotary halves.
        let attention = 4 * hidden * width.attention + 3 * hidden * width.value;
        if self.is_cut() {
            return attention;
        }
        // Two sums, two norms' outputs; the gate's halves, the activation, their product; masks.
        let sums = 2 * hidden * width.normed;
        attention + sums + (2 * hidden + 4 * inner) * width.value + hidden + inner
    }

    fn backward_bytes_per_token(&self, width: Width) -> usize {
        let (hidden, inner) = (self.config.hidden as usize, self.config.intermediate as usize);
        // Attention's output and input, its projections, and those before rotation in one piece.
        let attention = 2 * hidden * width.value + 9 * hidden * width.attention;
        // Two sums; the gate's halves, also in one piece, and the product.
        if self.is_cut() { attention } else { (2 * hidden + 5 * inner) * width.value }
    }

    fn forward(
        &self,
        mut views: Views<'_>,
        input: Option<&Tensor>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let train = context.dropout_seed.is_some();
        let mut residual = inner(input).shallow_clone();
        let normed = if self.has_attention_norm() {
            normalise(c, &residual, &mut views)?
        } else {
            residual.shallow_clone()
        };
        let mut attended = self.attend(&views.linear(&normed, c.attention_bias)?, context)?;
        if self.is_cut() {
            let rows = &context.batch.first_rows;
            attended = attended.f_index_select(0, rows)?;
            residual = residual.f_index_select(0, rows)?;
        }
        let attended = views.linear(&attended, c.attention_bias)?;
        let x = residual.f_add(&dropout(attended, c.attention_dropout, train)?)?;
        let normed = normalise(c, &x, &mut views)?;
        let up = views.linear(&normed, c.mlp_bias)?;
        let gated = c
            .activation
            .apply(&up.f_narrow(1, 0, c.intermediate)?)?
            .f_mul(&up.f_narrow(1, c.intermediate, c.intermediate)?)?;
        let down = views.linear(&dropout(gated, c.mlp_dropout, train)?, c.mlp_bias)?;
        Ok(x.f_add(&down)?)
    }
}

/// Last normalisation, pooling, dense layer, normalisation, classifier.
#[derive(Debug)]
struct Head(ModernBertConfig);

impl Head {
    /// One row of each sequence `[B, H]`, in the order of transformers: normalised, then pooled.
    fn pool(&self, normed: Tensor, batch: &PackedBatch) -> Result<Tensor> {
        if self.0.pooling == Pooling::Cls {
            return Ok(normed);
        }
        let kind = normed.f_kind()?;
        let means = batch.cu_seqlens.as_slice().windows(2).map(|bounds| -> Result<Tensor> {
            let rows = normed.f_narrow(0, bounds[0], bounds[1] - bounds[0])?;
            Ok(rows.f_mean_dim(&[0_i64][..], true, kind)?)
        });
        Ok(Tensor::f_cat(&means.collect::<Result<Vec<_>>>()?, 0)?)
    }
}

impl Stage for Head {
    fn name(&self) -> String {
        "head".into()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let c = &self.0;
        let drawn = |std: f64| Init::TruncatedNormal { std, cutoff: c.initializer_cutoff };
        let output_std = c.initializer_range / (2.0 * c.layers.len() as f64).sqrt();
        let square = [c.hidden, c.hidden];
        let classifier_std = (c.hidden as f64).sqrt().recip();
        [
            norm(c, "model.final_norm"),
            layer("head.dense", &square, c.classifier_bias, drawn(output_std)),
            layer("head.norm", &[c.hidden], c.norm_bias, Init::Ones),
            layer("classifier", &[1, c.hidden], true, drawn(classifier_std)),
        ]
        .concat()
    }

    fn saved_bytes_per_token(&self, width: Width) -> usize {
        match self.0.pooling {
            // It sees one row of each sequence.
            Pooling::Cls => 0,
            Pooling::Mean => self.0.hidden as usize * width.value,
        }
    }

    fn backward_bytes_per_token(&self, width: Width) -> usize {
        self.saved_bytes_per_token(width)
    }

    fn forward(
        &self,
        mut views: Views<'_>,
        input: Option<&Tensor>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let c = &self.0;
        let pooled = self.pool(normalise(c, inner(input), &mut views)?, context.batch)?;
        let dense = c.classifier_activation.apply(&views.linear(&pooled, c.classifier_bias)?)?;
        let normed = normalise(c, &dense, &mut views)?;
        let normed = dropout(normed, c.classifier_dropout, context.dropout_seed.is_some())?;
        to_fp32(&views.linear(&normed, true)?.f_squeeze_dim(1)?)
    }
}
