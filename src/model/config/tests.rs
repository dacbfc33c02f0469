//! What `config.json` may say, and what is said about the rest.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::json;

use super::*;
use crate::model::rotary::Rotary;
use crate::torch_ext::attention::Window;

fn read(raw: &Value) -> Result<Trunk, String> {
    Trunk::read(raw["model_type"].as_str().unwrap(), raw)
}

fn encoder(raw: &Value) -> EncoderConfig {
    let Trunk::Encoder(encoder) = read(raw).unwrap() else { panic!("{raw} is another trunk") };
    encoder
}

fn modernbert(raw: &Value) -> ModernBertConfig {
    let Trunk::ModernBert(config) = read(raw).unwrap() else { panic!("{raw} is another trunk") };
    config
}

fn layer(window: Window, dim: i64, theta: f64) -> LayerAttention {
    LayerAttention { window, rotary: Rotary::unscaled(dim, theta).unwrap() }
}

#[test]
fn what_is_left_out_is_transformers_default() {
    let defaults = |model_type: &str| encoder(&json!({ "model_type": model_type }));
    let sizes = |c: &EncoderConfig| (c.vocab_size, c.padding_id, c.longest_input());
    assert_eq!(sizes(&defaults("bert")), (30522, Some(0), 512));
    assert_eq!(sizes(&defaults("roberta")), (50265, Some(1), 510));
    assert_eq!(sizes(&defaults("xlm-roberta")), (30522, Some(1), 510));
    assert_eq!(defaults("roberta").classifier_dropout, 0.1, "as hidden_dropout_prob");

    let config = modernbert(&json!({ "model_type": "modernbert" }));
    let (global, local) = (layer(Window::FULL, 64, 160e3), layer(Window::local(64), 64, 10e3));
    assert_eq!(config.layers.len(), 22);
    assert_eq!(config.layers[..4], [global.clone(), local.clone(), local, global]);
    assert_eq!(config.padding_id, Some(50283));
}

/// The position table's rows below and at the padding token are of no use to an input.
#[test]
fn roberta_counts_positions_from_behind_the_padding_token() {
    let raw = |pad: i64| json!({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": pad});
    assert_eq!(encoder(&raw(1)).longest_input(), 512);
    assert_eq!(encoder(&raw(9)).longest_input(), 504);
    assert_eq!(
        read(&raw(513)).unwrap_err(),
        "max_position_embeddings is 514, which leaves no position: they begin after pad_token_id"
    );
}

#[test]
fn modernbert_lists_its_layers_in_three_ways() {
    let layers = |more: Value| {
        let mut raw =
            json!({"model_type": "modernbert", "num_hidden_layers": 3, "local_attention": 7});
        raw.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        modernbert(&raw).layers
    };
    let (global, local) = (layer(Window::FULL, 64, 160e3), layer(Window::local(3), 64, 10e3));
    let every_second = layers(json!({"global_attn_every_n_layers": 2}));
    assert_eq!(every_second, [global.clone(), local.clone(), global.clone()]);
    let types = json!(["sliding_attention", "sliding_attention", "full_attention"]);
    assert_eq!(layers(json!({"layer_types": types})), [local.clone(), local.clone(), global]);
    let older = json!({"global_rope_theta": 5.0, "local_rope_theta": 6, "sliding_window": 1});
    let nearest = layer(Window::local(1), 64, 6.0);
    assert_eq!(layers(older), [layer(Window::FULL, 64, 5.0), nearest.clone(), nearest]);
    let newer = json!({"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 5.0},
        "sliding_attention": {"rope_type": "default"},
    }});
    assert_eq!(layers(newer), [layer(Window::FULL, 64, 5.0), local.clone(), local]);
}

#[test]
fn what_changes_the_mathematics_is_refused_by_name() {
    for (raw, expected) in [
        (
            json!({"model_type": "gpt2"}),
            "unknown architecture: model_type is \"gpt2\", supported: bert, roberta, xlm-roberta, \
             modernbert, qwen2, qwen3, llama, mistral, gemma",
        ),
        (
            json!({"model_type": "roberta", "quantization_config": {"bits": 4}}),
            "quantization_config is not supported, expected plain weights",
        ),
        (
            json!({"model_type": "xlm-roberta", "position_embedding_type": "relative_key"}),
            "position_embedding_type \"relative_key\" is not supported, expected \"absolute\"",
        ),
        (
            json!({"model_type": "roberta", "is_decoder": true}),
            "is_decoder is true; expected an encoder",
        ),
        (
            json!({"model_type": "roberta", "hidden_act": "mish"}),
            "hidden_act \"mish\" is not supported, expected gelu, gelu_new, gelu_pytorch_tanh, \
             relu or silu",
        ),
        (
            json!({"model_type": "roberta", "pad_token_id": null}),
            "pad_token_id is null; expected the id that positions count from",
        ),
        (
            json!({"model_type": "bert", "pad_token_id": 30522}),
            "pad_token_id 30522 does not fit the vocabulary of 30522",
        ),
        (
            json!({"model_type": "modernbert", "classifier_pooling": "max"}),
            "cannot read the modernbert configuration: unknown variant `max`, expected `cls` or \
             `mean`",
        ),
        (
            json!({"model_type": "modernbert", "classifier_activation": "mish"}),
            "classifier_activation \"mish\" is not supported, expected gelu, gelu_new, \
             gelu_pytorch_tanh, relu or silu",
        ),
        (
            json!({"model_type": "modernbert", "rope_scaling": {"rope_type": "longrope"}}),
            "rope_parameters: rope_type \"longrope\" is not supported, expected default, linear, \
             dynamic, llama3 or yarn",
        ),
        (
            json!({"model_type": "modernbert", "rope_parameters": {"rope_theta": 5.0}}),
            "rope_parameters has rope_theta, expected full_attention and sliding_attention",
        ),
        (
            json!({"model_type": "modernbert", "layer_types": ["full_attention"]}),
            "layer_types has 1 entries, expected num_hidden_layers 22",
        ),
        (
            json!({"model_type": "modernbert", "num_hidden_layers": 1,
                   "layer_types": ["chunked_attention"]}),
            "layer_types has \"chunked_attention\", expected full_attention or sliding_attention",
        ),
        (json!({"model_type": "modernbert", "head_dim": 32}), "head_dim is 32, expected 64"),
        (
            json!({"model_type": "modernbert", "num_attention_heads": 256}),
            "rotary embeddings need an even head dimension, found 3",
        ),
        (
            json!({"model_type": "modernbert", "mlp_dropout": 1.0}),
            "mlp_dropout is 1, expected a probability below 1",
        ),
    ] {
        assert_eq!(read(&raw).unwrap_err(), expected, "{raw}");
    }
}
