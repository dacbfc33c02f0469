"""The tiny random decoders: every family, and every option that `config.json` may hold."""

import torch
from transformers import AutoModelForCausalLM

from .models import POSITIONS, Case

TEMPLATE = ("q: {}", " : ", "d: {}", "[SEP]")
"""query_format, seq, document_format, special_token."""

TOKENS = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)

CASES = {
    # Grouped heads, biases of query, key and value, a window in all layers but the first.
    "qwen2_tiny": Case(
        "qwen2",
        TOKENS
        | dict(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=POSITIONS,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=1,
            initializer_range=0.2,
        ),
        template=TEMPLATE,
        max_len=POSITIONS,
        curves=("curve",),
    ),
    # Norms of queries and keys, heads wider than H / heads, listed layers, biases, yarn.
    "qwen3_odd": Case(
        "qwen3",
        TOKENS
        | dict(
            hidden_size=36,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=14,
            intermediate_size=50,
            hidden_act="gelu",
            max_position_embeddings=POSITIONS,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            use_sliding_window=True,
            sliding_window=5,
            attention_bias=True,
            attention_dropout=0.1,
            rms_norm_eps=1e-4,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 300.0,
                "factor": 2.0,
                "original_max_position_embeddings": 24,
            },
            initializer_range=0.2,
        ),
        template=TEMPLATE,
        max_len=POSITIONS,
        dtype=torch.bfloat16,
        curves=("curve",),
    ),
    # Biases everywhere, Llama 3.1's frequencies, shards.
    "llama_odd": Case(
        "llama",
        TOKENS
        | dict(
            hidden_size=36,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=50,
            max_position_embeddings=POSITIONS,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            initializer_range=0.12,
        ),
        template=TEMPLATE,
        max_len=POSITIONS,
        shard_size="48KB",
        curves=("curve",),
    ),
    # Yarn's ramp, not rounded to whole pairs, with an attention factor of its own. Heads wide enough
    # that the ramp has an inside.
    "llama_yarn": Case(
        "llama",
        TOKENS
        | dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            intermediate_size=32,
            max_position_embeddings=POSITIONS,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 50.0,
                "factor": 2.5,
                "original_max_position_embeddings": 24,
                "beta_fast": 3.0,
                "beta_slow": 0.5,
                "truncate": False,
                "attention_factor": 1.3,
            },
            initializer_range=0.2,
        ),
        template=TEMPLATE,
        max_len=POSITIONS,
    ),
    # The same ramp rounded, and the attention factor from DeepSeek's two scales.
    "qwen2_yarn": Case(
        "qwen2",
        TOKENS
        | dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=1,
            num_key_value_heads=1,
            intermediate_size=32,
            max_position_embeddings=POSITIONS,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 50.0,
                "factor": 2.5,
                "original_max_position_embeddings": 24,
                "beta_fast": 1.6,
                "beta_slow": 0.5,
                "mscale": 1.9,
                "mscale_all_dim": 0.4,
            },
            initializer_range=0.12,
        ),
        template=TEMPLATE,
        max_len=POSITIONS,
    ),
    # A window in every layer, positions scaled linearly, no padding token.
    "mistral_tiny": Case(
        "mistral",
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            intermediate_size=48,
            max_position_embeddings=POSITIONS,
            sliding_window=6,
            rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
            initializer_range=0.15,
        ),
        template=TEMPLATE,
        max_len=POSITIONS,
        curves=("curve",),
    ),
    # One key head, scaled embeddings, norms around 0, NTK scaling beyond the longest input.
    "gemma_tiny": Case(
        "gemma",
        TOKENS
        | dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            intermediate_size=48,
            hidden_act="gelu",
            attention_bias=True,
            max_position_embeddings=POSITIONS,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 2.0},
            initializer_range=0.2,
        ),
        template=TEMPLATE,
        max_len=POSITIONS,
        curves=("curve",),
    ),
    # As a language model leaves it, for a head of its own.
    "qwen2_nohead": Case(
        "qwen2",
        TOKENS
        | dict(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            max_position_embeddings=POSITIONS,
        ),
        template=TEMPLATE,
        max_len=POSITIONS,
        auto_class=AutoModelForCausalLM,
    ),
    # Two rerankers that are language models, with a head of its own and with the embeddings.
    "qwen3_prompt": Case(
        "qwen3",
        dict(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=24,
            max_position_embeddings=1024,
            initializer_range=0.2,
        ),
        tokenizer="prompted",
        auto_class=AutoModelForCausalLM,
        prompt="qwen3-reranker",
        max_len=400,
    ),
    "gemma_prompt": Case(
        "gemma",
        dict(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=24,
            max_position_embeddings=512,
            initializer_range=0.2,
        ),
        tokenizer="prompted",
        auto_class=AutoModelForCausalLM,
        prompt="bge-reranker-gemma",
        max_len=300,
    ),
    # Layers that look both ways, as those of embedding models do, in full and in a window. The last
    # layer's only row that counts has nothing after it.
    "qwen2_bidirectional": Case(
        "qwen2",
        TOKENS
        | dict(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=POSITIONS,
            is_causal=False,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["full_attention", "sliding_attention", "sliding_attention"],
            initializer_range=0.2,
        ),
        template=TEMPLATE,
        max_len=POSITIONS,
    ),
}
