//! The decoder trunk: pre-norm transformer layers as in Llama (Touvron et al., 2023), with
//! transformers' sequence-classification head. Families differ only in [`DecoderConfig`].

use tch::Tensor;

use super::config::{DecoderConfig, ScoreHead};
use super::stage::{
    ForwardContext, Init, Parameter, Stage, TensorSpec, Width, embedding, inner, rms_norm, to_fp32,
};
use super::views::Views;
use crate::error::Result;
use crate::torch_ext::attention::{AttentionOptions, Projections, packed_attention};

/// The token embedding table, which may also be the language model's head.
const EMBEDDINGS: &str = "model.embed_tokens.weight";

/// The stages of a decoder with its head: embeddings, layers, head.
#[must_use]
pub fn stages(config: &DecoderConfig) -> Vec<Box<dyn Stage>> {
    let mut stages: Vec<Box<dyn Stage>> = vec![Box::new(Embeddings(config.clone()))];
    for index in 0..config.windows.len() {
        stages.push(Box::new(Layer { config: config.clone(), index }));
    }
    stages.push(Box::new(Head(config.clone())));
    stages
}

fn norm(name: String, width: i64) -> Parameter {
    Parameter::one(TensorSpec::new(name, &[width]), false)
}

fn normalise(c: &DecoderConfig, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    rms_norm(x, weight, c.norm_eps, c.norm_adds_one)
}

#[derive(Debug)]
struct Embeddings(DecoderConfig);

impl Stage for Embeddings {
    fn name(&self) -> String {
        "embeddings".into()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let c = &self.0;
        vec![Parameter::one(TensorSpec::new(EMBEDDINGS, &[c.vocab_size, c.hidden]), true)]
    }

    fn saved_bytes_per_token(&self, width: Width) -> usize {
        self.0.hidden as usize * width.value + size_of::<i64>()
    }

    fn backward_bytes_per_token(&self, width: Width) -> usize {
        self.0.hidden as usize * width.value
    }

    fn forward(
        &self,
        mut views: Views<'_>,
        _input: Option<&Tensor>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let rows = embedding(views.one(), &context.batch.input_ids, self.0.padding)?;
        match self.0.embedding_scale {
            // The factor itself is rounded to the precision of the table.
            Some(scale) => Ok(rows.f_mul(&Tensor::from(scale as f32).f_to_kind(rows.f_kind()?)?)?),
            None => Ok(rows),
        }
    }
}

#[derive(Debug)]
struct Layer {
    config: DecoderConfig,
    index: usize,
}

impl Layer {
    fn is_last(&self) -> bool {
        self.index + 1 == self.config.windows.len()
    }

    /// The weight of a product over `names`, stacked, and its bias where there is one.
    fn product(&self, names: &[(&str, i64)], width: i64, bias: bool) -> Vec<Parameter> {
        let part = |name: &str, what: &str, shape: &[i64]| {
            TensorSpec::new(format!("model.layers.{}.{name}.{what}", self.index), shape)
        };
        let weights = names.iter().map(|&(name, out)| part(name, "weight", &[out, width]));
        let mut all = vec![Parameter::linear(weights.collect())];
        if bias {
            let biases = names.iter().map(|&(name, out)| part(name, "bias", &[out]));
            all.push(Parameter::stacked(biases.collect(), false));
        }
        all
    }

    /// Attention of every token, before the output projection: `[T, heads * head_dim]`.
    fn attend(
        &self,
        x: &Tensor,
        views: &mut Views<'_>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let heads = [c.heads, c.kv_heads, c.kv_heads];
        let qkv = views.linear(x, c.qkv_bias)?.f_view([-1, heads.iter().sum(), c.head_dim])?;
        let mut parts = qkv.f_split_with_sizes(heads, 1)?;
        let angles = context.batch.angles(&c.rotary, qkv.f_kind()?)?;
        for part in &mut parts[..2] {
            if c.qk_norm {
                *part = normalise(c, part, views.one())?;
            }
            *part = angles.rotate(part)?;
        }
        let projections = Projections::Split { query: &parts[0], key: &parts[1], value: &parts[2] };
        let train = context.dropout_seed.is_some();
        let options = AttentionOptions {
            cu_seqlens: &context.batch.cu_seqlens,
            heads: c.heads,
            kv_heads: c.kv_heads,
            window: c.windows[self.index],
            scale: (c.head_dim as f64).sqrt().recip(),
            dropout: if train { c.attention_dropout } else { 0.0 },
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
        let (queries, keys) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let mut all = vec![norm(at("input_layernorm.weight"), c.hidden)];
        let qkv =
            [("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys)];
        all.extend(self.product(&qkv, c.hidden, c.qkv_bias));
        if c.qk_norm {
            all.push(norm(at("self_attn.q_norm.weight"), c.head_dim));
            all.push(norm(at("self_attn.k_norm.weight"), c.head_dim));
        }
        all.extend(self.product(&[("self_attn.o_proj", c.hidden)], queries, c.output_bias));
        all.push(norm(at("post_attention_layernorm.weight"), c.hidden));
        let gate_up = [("mlp.gate_proj", c.intermediate), ("mlp.up_proj", c.intermediate)];
        all.extend(self.product(&gate_up, c.hidden, c.mlp_bias));
        all.extend(self.product(&[("mlp.down_proj", c.hidden)], c.intermediate, c.mlp_bias));
        all
    }

    fn saved_bytes_per_token(&self, width: Width) -> usize {
        let c = &self.config;
        let [hidden, inner, heads, kv_heads, dim] =
            [c.hidden, c.intermediate, c.heads, c.kv_heads, c.head_dim].map(|size| size as usize);
        // Normalisation keeps its input in fp32 where that is not the input itself, the result
        // before the weight, and the one after.
        let normed = |size: usize| {
            let wide = if width.value == size_of::<f32>() { 0 } else { size_of::<f32>() };
            size * (2 * width.value + wide)
        };
        let rotated = (heads + kv_heads) * dim;
        let qk_norm = if c.qk_norm { normed(rotated) } else { 0 };
        // Projections, and what attention keeps: rotated ones, values and its own output.
        let attention = (rotated + kv_heads * dim) * width.value
            + (rotated + (heads + kv_heads) * dim) * width.attention;
        let all_rows = normed(hidden) + qk_norm + attention;
        if self.is_last() {
            return all_rows;
        }
        // Two sums; gate and up, the gate's activation, and their product.
        all_rows + normed(hidden) + (2 * hidden + 4 * inner) * width.value
    }

    fn backward_bytes_per_token(&self, width: Width) -> usize {
        let c = &self.config;
        let [hidden, inner, heads, kv_heads, dim] =
            [c.hidden, c.intermediate, c.heads, c.kv_heads, c.head_dim].map(|size| size as usize);
        let projections = (heads + 2 * kv_heads) * dim;
        // Attention's output and input, its projections, and those before rotation in one piece.
        let attention = 2 * hidden * width.value + 3 * projections * width.attention;
        // Two sums; gate and up, the gate's activation, and their product.
        if self.is_last() { attention } else { (2 * hidden + 4 * inner) * width.value }
    }

    fn forward(
        &self,
        mut views: Views<'_>,
        input: Option<&Tensor>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let c = &self.config;
        let residual = inner(input);
        let x = normalise(c, residual, views.one())?;
        let attended = self.attend(&x, &mut views, context)?;
        // The head reads one row of each sequence, and nothing after attention mixes rows: the last
        // layer computes only those.
        let (attended, residual) = if self.is_last() {
            let rows = &context.batch.last_rows;
            (attended.f_index_select(0, rows)?, residual.f_index_select(0, rows)?)
        } else {
            (attended, residual.shallow_clone())
        };
        let residual = residual.f_add(&views.linear(&attended, c.output_bias)?)?;
        let x = normalise(c, &residual, views.one())?;
        let gate_up = views.linear(&x, c.mlp_bias)?.f_chunk(2, -1)?;
        let gated = c.activation.apply(&gate_up[0])?.f_mul(&gate_up[1])?;
        Ok(residual.f_add(&views.linear(&gated, c.mlp_bias)?)?)
    }
}

#[derive(Debug)]
struct Head(DecoderConfig);

impl Stage for Head {
    fn name(&self) -> String {
        "head".into()
    }

    fn parameters(&self) -> Vec<Parameter> {
        let c = &self.0;
        let score = TensorSpec::new("score.weight", &[1, c.hidden]);
        let score = match c.head {
            ScoreHead::Trained => score.or_init(Init::Normal(c.initializer_range)),
            ScoreHead::TokenLogit { positive, negative } => score.or_init(Init::TokenRows {
                tables: ["lm_head.weight", EMBEDDINGS],
                rows: c.vocab_size,
                positive,
                negative,
            }),
        };
        vec![norm("model.norm.weight".into(), c.hidden), Parameter::linear(vec![score])]
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
        _context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let x = normalise(&self.0, inner(input), views.one())?;
        to_fp32(&views.linear(&x, false)?.f_squeeze_dim(1)?)
    }
}
