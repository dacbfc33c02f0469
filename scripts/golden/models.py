"""The tiny random checkpoints, and what transformers computes from them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from . import checkpoints
from .text import LABELS, MAX_LEN, PAIRS, encode_joined, encode_pair
from .tiny_tokenizers import BUILDERS

Encoded = list[dict[str, torch.Tensor]]

POSITIONS = 64
PADDED_PAIR = ("why is <pad> [PAD] light", "the moon <pad> [PAD] is old")
"""Text that spells out padding tokens: a model must not count them as it counts others."""


@dataclass(frozen=True)
class Case:
    """A checkpoint: its family, how its config.json differs, how it is saved, what is computed."""

    model_type: str
    options: dict
    tokenizer: str = "wordpiece"
    # What is saved; only classifiers are computed with.
    auto_class: type = AutoModelForSequenceClassification
    # Files of at most so much.
    shard_size: str = "5GB"
    # Saved as this, in safetensors or as torch.save does.
    dtype: torch.dtype = torch.float32
    format: str = "safetensors"
    # Names of the training curves, and whether the parameters after them are kept too.
    curves: tuple[str, ...] = ()
    final: bool = False
    losses: tuple[str, ...] = ("pointwise_bce",)
    # What a decoder's input is joined from; encoders have their tokenizer's template.
    template: tuple[str, str, str, str] | None = None
    # How a language model is asked.
    prompt: str | None = None
    max_len: int = MAX_LEN
    # A pair more than the others.
    extra: list[tuple[str, str]] = field(default_factory=lambda: [PADDED_PAIR])

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(query, document) in order."""
        return PAIRS + self.extra

    @property
    def labels(self) -> list[float]:
        """One for each pair."""
        return LABELS + [0.75] * len(self.extra)


BERT = dict(
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    max_position_embeddings=POSITIONS,
    type_vocab_size=2,
)
# The tokens of the WordPiece tokenizer.
MODERNBERT = dict(
    pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=None, eos_token_id=None
)
CASES = {
    # Plain sizes; the loss curves are run on this one, so no dropout.
    "bert_tiny": Case(
        "bert",
        BERT
        | dict(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            hidden_act="gelu",
            initializer_range=0.3,
        ),
        curves=("curve", "curve_clip"),
        final=True,
        losses=("pointwise_bce", "pointwise_mse"),
        extra=[],
    ),
    # Sizes that divide by little, another activation and epsilon, dropout to be read, shards.
    "bert_odd": Case(
        "bert",
        BERT
        | dict(
            hidden_size=36,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=50,
            hidden_act="relu",
            layer_norm_eps=1e-5,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            classifier_dropout=0.2,
            initializer_range=0.25,
        ),
        losses=("pointwise_bce", "pointwise_mse"),
        shard_size="48KB",
        extra=[],
    ),
    # A bare trunk with its pooler: names without the `bert.` prefix, no classifier.
    "bert_nohead": Case(
        "bert",
        BERT
        | dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            hidden_act="gelu_new",
            initializer_range=0.2,
        ),
        auto_class=AutoModel,
        extra=[],
    ),
    # One segment; as many positions as the longest input and the offset need.
    "roberta_tiny": Case(
        "roberta",
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=MAX_LEN + 2,
            type_vocab_size=1,
            initializer_range=0.3,
        ),
        tokenizer="bytes",
        curves=("curve",),
    ),
    # Odd sizes, another padding token, two segments of which one is used; half precision on disk,
    # in shards as torch.save writes them.
    "xlm_roberta_odd": Case(
        "xlm-roberta",
        dict(
            hidden_size=36,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=50,
            hidden_act="gelu_new",
            layer_norm_eps=1e-5,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            classifier_dropout=0.3,
            max_position_embeddings=POSITIONS,
            type_vocab_size=2,
            initializer_range=0.15,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=3,
        ),
        tokenizer="unigram",
        dtype=torch.float16,
        format="torch",
        shard_size="48KB",
        curves=("curve",),
    ),
    # ModernBERT's defaults in small: no biases, every third layer global, a window of five tokens.
    "modernbert_tiny": Case(
        "modernbert",
        MODERNBERT
        | dict(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=POSITIONS,
            local_attention=5,
            initializer_range=0.3,
        ),
        curves=("curve",),
    ),
    # Everything else: biases, mean pooling, listed layers, other activations and frequencies.
    "modernbert_odd": Case(
        "modernbert",
        MODERNBERT
        | dict(
            hidden_size=36,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=26,
            hidden_activation="relu",
            max_position_embeddings=MAX_LEN,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            local_attention=12,
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
            },
            norm_eps=1e-3,
            norm_bias=True,
            attention_bias=True,
            mlp_bias=True,
            classifier_bias=True,
            classifier_pooling="mean",
            classifier_activation="silu",
            embedding_dropout=0.1,
            attention_dropout=0.2,
            mlp_dropout=0.1,
            classifier_dropout=0.3,
            initializer_range=0.3,
        ),
        dtype=torch.bfloat16,
        curves=("curve",),
    ),
    # As a masked language model leaves it: with the dense layer of the head, without classifier.
    "modernbert_nohead": Case(
        "modernbert",
        MODERNBERT
        | dict(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=POSITIONS,
            initializer_range=0.3,
        ),
        auto_class=AutoModelForMaskedLM,
    ),
}


def write_model(case: Case, directory: Path, seed: int) -> None:
    """Saves the case as a Hugging Face directory: config, weights, tokenizer."""
    tokenizer = BUILDERS[case.tokenizer](case.options["max_position_embeddings"])
    config = AutoConfig.for_model(
        case.model_type, vocab_size=len(tokenizer), num_labels=1, **case.options
    )
    torch.manual_seed(seed)
    model = case.auto_class.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # As initialised, biases are 0 and norm weights 1: a swap would go unnoticed.
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(case.dtype).save_pretrained(directory, max_shard_size=case.shard_size)
    if case.format == "torch":
        checkpoints.to_torch_format(directory)
    tokenizer.save_pretrained(directory)


def load_model(case: Case, directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The saved model in evaluation mode (no dropout), computing in `dtype`."""
    model = case.auto_class.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    )
    return model.to(dtype).eval()


def encode_pairs(case: Case, tokenizer) -> Encoded:
    """What the model is given for every pair, each [1, L] and without padding."""
    if case.template is None:
        pairs = [encode_pair(tokenizer, query, text, MAX_LEN)[1] for query, text in case.pairs]
    else:
        pairs = [
            encode_joined(tokenizer, case.template, query, text, case.max_len)
            for query, text in case.pairs
        ]
    return [{name: torch.tensor([ids]) for name, ids in inputs.items()} for inputs in pairs]


def score(model: torch.nn.Module, encoded: Encoded) -> torch.Tensor:
    """Logits [N]; each pair runs by itself, so that padding has no part in it."""
    logits = [
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits
        for inputs in encoded
    ]
    return torch.cat(logits).squeeze(-1)


def pointwise_bce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean binary cross entropy of logits [N] against labels [N] in 0..1."""
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)


def pointwise_mse(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean (sigmoid(s) - y)^2 of logits [N] against labels [N]."""
    return torch.nn.functional.mse_loss(torch.sigmoid(logits), labels)


LOSSES = {"pointwise_bce": ("", pointwise_bce), "pointwise_mse": ("mse.", pointwise_mse)}


def input_tensors(encoded: Encoded) -> dict[str, torch.Tensor]:
    """`input_ids.{i}` and, where the tokenizer gives them, `token_type_ids.{i}`, int64 [L]."""
    pairs = enumerate(encoded)
    return {f"{name}.{i}": ids[0] for i, inputs in pairs for name, ids in inputs.items()}


def loss_tensors(case: Case, model: torch.nn.Module, encoded: Encoded) -> dict[str, torch.Tensor]:
    """`logits` [N]; for each loss over all pairs, the loss and every gradient.

    `loss` and `grad.{name}` are pointwise_bce's; `mse.loss` and `mse.grad.{name}` pointwise_mse's.
    """
    labels = torch.tensor(case.labels, dtype=torch.float64)
    tensors = {}
    for prefix, loss_of in [LOSSES[name] for name in case.losses]:
        model.zero_grad()
        logits = score(model, encoded)
        loss = loss_of(logits, labels)
        loss.backward()
        tensors["logits"] = logits.detach().float()
        tensors[prefix + "loss"] = loss.detach().float()
        for name, parameter in model.named_parameters():
            tensors[f"{prefix}grad.{name}"] = parameter.grad.float()
    return tensors
