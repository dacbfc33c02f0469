#!/usr/bin/env python3
"""Writes a BERT of random weights as a Hugging Face directory, for measurements. Needs nothing but
Python: a machine to measure on may have neither NumPy nor safetensors.

The default has the shape of MiniLM-L6 (22.7 million parameters). Its words are the tiny golden
model's, so that most of a text is unknown to it: good for speed and memory, not for ranking.

usage: random_bert.py DIRECTORY [--layers 6] [--hidden 384] [--heads 12] [--vocab 30522]
                      [--dropout 0]
"""

import argparse
import json
import random
import shutil
import struct
from array import array
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "tests" / "golden" / "bert_tiny"
POSITIONS = 512
STANDARD_DEVIATION = 0.02
# Prime, so that the rows of a matrix differ although the numbers repeat.
DISTINCT_NUMBERS = 65_537


def shapes(layers: int, hidden: int, vocab: int) -> dict[str, list[int]]:
    """The tensors of transformers' BertForSequenceClassification."""
    result = {
        "bert.embeddings.word_embeddings.weight": [vocab, hidden],
        "bert.embeddings.position_embeddings.weight": [POSITIONS, hidden],
        "bert.embeddings.token_type_embeddings.weight": [2, hidden],
        "bert.embeddings.LayerNorm.weight": [hidden],
        "bert.embeddings.LayerNorm.bias": [hidden],
    }
    wide = 4 * hidden
    for layer in range(layers):
        prefix = f"bert.encoder.layer.{layer}"
        products = {
            "attention.self.query": [hidden, hidden],
            "attention.self.key": [hidden, hidden],
            "attention.self.value": [hidden, hidden],
            "attention.output.dense": [hidden, hidden],
            "intermediate.dense": [wide, hidden],
            "output.dense": [hidden, wide],
        }
        for name, shape in products.items():
            result[f"{prefix}.{name}.weight"] = shape
            result[f"{prefix}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            result[f"{prefix}.{name}.weight"] = [hidden]
            result[f"{prefix}.{name}.bias"] = [hidden]
    result["bert.pooler.dense.weight"] = [hidden, hidden]
    result["bert.pooler.dense.bias"] = [hidden]
    result["classifier.weight"] = [1, hidden]
    result["classifier.bias"] = [1]
    return result


def count(shape: list[int]) -> int:
    """The elements of a tensor."""
    elements = 1
    for size in shape:
        elements *= size
    return elements


def write_weights(path: Path, tensors: dict[str, list[int]]) -> None:
    """A safetensors file: normalisations are the identity, biases 0, the rest is normal."""
    draw = random.Random(666)
    table = array("f", (draw.gauss(0.0, STANDARD_DEVIATION) for _ in range(DISTINCT_NUMBERS)))
    header, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + 4 * count(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    at = 0
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            elements = count(shape)
            if name.endswith("LayerNorm.weight"):
                values = array("f", [1.0]) * elements
            elif name.endswith("bias"):
                values = array("f", [0.0]) * elements
            else:
                values = (table * (elements // len(table) + 2))[at : at + elements]
                at = (at + elements) % len(table)
            values.tofile(file)


def write_model(
    directory: Path, layers: int, hidden: int, heads: int, vocab: int, dropout: float = 0.0
) -> int:
    """Writes the directory and returns the number of parameters."""
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads((TOKENIZER / "config.json").read_text())
    config |= {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": POSITIONS,
        "vocab_size": vocab,
        "initializer_range": STANDARD_DEVIATION,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory / name)
    tensors = shapes(layers, hidden, vocab)
    write_weights(directory / "model.safetensors", tensors)
    return sum(count(shape) for shape in tensors.values())


def main() -> None:
    """Parses the arguments and writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=30522)
    parser.add_argument("--dropout", type=float, default=0.0)
    arguments = parser.parse_args()
    parameters = write_model(**vars(arguments))
    print(f"{arguments.directory}: {parameters:,} parameters")


if __name__ == "__main__":
    main()
