#!/usr/bin/env python3
"""Scores pairs with models of ours through transformers and sentence-transformers, and compares.

Proof that `<output_dir>/model` is an ordinary Hugging Face directory: both libraries load it, and
give the scores that `reranker score` gave, within 1e-5. An adapter is loaded by peft, with the model
that it names, and has to hold whole what peft would otherwise draw. Exit code 1 where they do not.

usage: check_interop.py PAIRS.jsonl OUTPUT_DIR...
       PAIRS        {"query", "content"} a line; of the first 200 those are compared whose query
                    leaves room for a document, at least 16
       OUTPUT_DIR   of a run, with `model/`, and with `scores.jsonl` by `reranker score` of PAIRS
"""

import argparse
import json
import os
import sys
from itertools import islice
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import AutoPeftModelForSequenceClassification
from sentence_transformers import CrossEncoder
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from golden.text import encode_joined

TOLERANCE = 1e-5
MOST_PAIRS = 200
LEAST_PAIRS = 16


def read_jsonl(path: Path) -> list[dict]:
    """The first MOST_PAIRS records."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, MOST_PAIRS)]


def leaves_room(tokenizer: PreTrainedTokenizerBase, query: str, max_len: int) -> bool:
    """Whether a token of a document fits behind the query; transformers refuses what does not."""
    query_length = len(tokenizer(query, add_special_tokens=False)["input_ids"])
    return query_length + tokenizer.num_special_tokens_to_add(pair=True) < max_len


def load_model(directory: Path) -> torch.nn.Module:
    """The model in fp32, or the adapter on the model that it names."""
    of_kind = AutoModelForSequenceClassification
    if is_adapter(directory):
        of_kind = AutoPeftModelForSequenceClassification
    model = of_kind.from_pretrained(directory, num_labels=1, dtype=torch.float32)
    return model.eval()


def is_adapter(directory: Path) -> bool:
    """Whether peft loads it."""
    return (directory / "adapter_config.json").exists()


def transformers_logits(directory: Path, pairs: list[tuple[str, str]], max_len: int) -> list[float]:
    """One logit a pair, each pair run by itself in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = load_model(directory)
    logits = []
    for query, document in pairs:
        # A batch of one: on two plain strings an empty document would be taken for none.
        inputs = tokenizer(
            [query], [document], truncation="only_second", max_length=max_len, return_tensors="pt"
        )
        with torch.no_grad():
            logits.append(model(**inputs).logits.item())
    return logits


def joined_logits(
    directory: Path, texts: dict, pairs: list[tuple[str, str]]
) -> list[float]:
    """One logit a pair by a decoder, in batches of eight that transformers pads at the right."""
    # As tokenizer.json says: AutoTokenizer would build the tokenizer that the family usually has.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    template = [texts[key] for key in ("query_format", "seq", "document_format", "special_token")]
    model = load_model(directory)
    encoded = [
        encode_joined(tokenizer, template, query.strip(), document.strip(), texts["max_len"])
        for query, document in pairs
    ]
    logits = []
    for first in range(0, len(encoded), 8):
        inputs = tokenizer.pad(encoded[first : first + 8], return_tensors="pt")
        with torch.no_grad():
            logits += model(**inputs).logits.squeeze(-1).tolist()
    return logits


def cross_encoder_scores(
    directory: Path, pairs: list[tuple[str, str]], max_len: int
) -> list[float]:
    """One score in 0..1 a pair, by CrossEncoder's own batching, padding and activation."""
    model = CrossEncoder(str(directory), device="cpu", max_length=max_len)
    text = {"truncation": "only_second", "max_length": max_len}
    return model.predict(pairs, batch_size=8, processing_kwargs={"text": text}).tolist()


def compare(library: str, field: str, theirs: list[float], ours: list[float]) -> bool:
    """Prints the largest difference; true when it is within the tolerance."""
    gaps = [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
    largest = max(gaps)
    print(f"  {library}: largest difference in {field} {largest:.2e} (pair {gaps.index(largest)})")
    # Written so that NaN fails.
    return largest <= TOLERANCE


def family_of(directory: Path) -> str:
    """`model_type` of the model's configuration."""
    return json.loads((directory / "config.json").read_text("utf-8"))["model_type"]


def check(run: Path, pairs: list[tuple[str, str]]) -> bool:
    """Whether both libraries give the scores of this run's model."""
    model = run / "model"
    texts = json.loads((model / "reranker.json").read_text("utf-8"))
    max_len = texts["max_len"]
    library = "peft" if is_adapter(model) else "transformers"
    family = library if is_adapter(model) else family_of(model)
    scores = read_jsonl(run / "scores.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(model)
    if [r["index"] for r in scores] != list(range(len(pairs))):
        print(
            f"{run}/scores.jsonl: {len(scores)} scores out of order or of other pairs;"
            f" expected index 0 to {len(pairs) - 1}"
        )
        return False
    if texts["model_type"] == "llm_decoder":
        print(f"{run} ({family}): {len(pairs)} pairs, joined as text")
        logits = joined_logits(model, texts, pairs)
        return compare(library, "logit", logits, [r["logit"] for r in scores])
    fit = [i for i, (query, _) in enumerate(pairs) if leaves_room(tokenizer, query, max_len)]
    print(f"{run} ({family}): {len(fit)} of {len(pairs)} pairs leave room for a document")
    pairs, scores = [pairs[i] for i in fit], [scores[i] for i in fit]
    logits = transformers_logits(model, pairs, max_len)
    if is_adapter(model):
        ours = [r["logit"] for r in scores]
        return len(fit) >= LEAST_PAIRS and compare(library, "logit", logits, ours)
    sigmoids = cross_encoder_scores(model, pairs, max_len)
    return len(fit) >= LEAST_PAIRS and all(
        [
            compare(library, "logit", logits, [r["logit"] for r in scores]),
            compare("sentence-transformers", "score", sigmoids, [r["score"] for r in scores]),
        ]
    )


def main() -> int:
    """Parses the arguments, scores with both libraries, compares."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("output_dir", type=Path, nargs="+")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    # With several, a process in twenty computes cosines with half the accuracy at their first call
    # (pytorch/pytorch issue 188792).
    torch.set_num_threads(1)

    pairs = [(r["query"], r["content"]) for r in read_jsonl(arguments.pairs)]
    agree = [check(run, pairs) for run in arguments.output_dir]
    print(f"{sum(agree)} of {len(agree)} models: same scores within {TOLERANCE}")
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
