#!/usr/bin/env python3
"""Pairs scored per second: `reranker score` against sentence-transformers' CrossEncoder.predict.

Both score the same pairs, drawn from the queries and documents of example_data, in fp32 on the same
cores. Ours is the whole command: start-up, reading, tokenizing, scoring, writing. The peer is the
call of `predict` alone, with its batch size of 32, which sorts by length and pads inside a batch.
Both take turns. The logits of both are compared as well.

usage: score_throughput.py [--model DIR] [--pairs 2000] [--rounds 3] [--result FILE]
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import BIN, ROOT, check_built, default_model, fail_with_log, summarize

PEER = ROOT / "benches" / "peer_score.py"
SOURCE = ROOT / "example_data" / "train_pointwise.jsonl"
# Apart by rounding, over six layers in fp32.
TOLERANCE = 1e-4


def write_pairs(path: Path, count: int) -> None:
    """Writes `count` pairs: random queries with random documents of the example data."""
    records = [json.loads(line) for line in SOURCE.read_text("utf-8").splitlines()]
    source = random.Random(666)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            pair = {
                "query": source.choice(records)["query"],
                "content": source.choice(records)["content"],
            }
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")


def with_head(model: Path, directory: Path) -> Path:
    """A model that both sides load with the same head: `model` with one of fixed numbers."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(666)
    reranker = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    reranker.save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


def run(command: list[str], log: Path) -> str:
    """The standard output of a command, which has to succeed."""
    with log.open("w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    if done.returncode != 0:
        fail_with_log(command, log)
    return done.stdout


def ours(model: Path, pairs: Path, directory: Path, max_len: int) -> tuple[float, list[float]]:
    """Seconds of the whole command, and the logits."""
    output = directory / "scores.jsonl"
    command = [str(BIN / "reranker"), "score", "--device", "cpu", "--model", str(model)]
    command += ["--input", str(pairs), "--output", str(output), "--max-len", str(max_len)]
    start = time.perf_counter()
    run(command, directory / "ours.log")
    seconds = time.perf_counter() - start
    lines = output.read_text("utf-8").splitlines()
    return seconds, [json.loads(line)["logit"] for line in lines]


def peer(model: Path, pairs: Path, directory: Path, max_len: int) -> tuple[float, list[float]]:
    """Seconds of `predict`, and the logits."""
    command = [sys.executable, str(PEER), "--model", str(model), "--input", str(pairs)]
    command += ["--max-len", str(max_len)]
    result = json.loads(run(command, directory / "peer.log"))
    return result["seconds"], result["logits"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="by default the quick start's MiniLM")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--max-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result", type=Path, help="where to keep the figures, as JSON")
    arguments = parser.parse_args()
    check_built()
    rates = {"ours": [], "peer": []}
    logits = {}
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        pairs = directory / "pairs.jsonl"
        write_pairs(pairs, arguments.pairs)
        model = with_head((arguments.model or default_model()).resolve(), directory / "model")
        for turn in range(1, arguments.rounds + 1):
            for side, score in (("ours", ours), ("peer", peer)):
                seconds, logits[side] = score(model, pairs, directory, arguments.max_len)
                rates[side].append(arguments.pairs / seconds)
                print(f"round {turn}: {side} {rates[side][-1]:.1f} pairs/s", flush=True)
    apart = max(abs(a - b) for a, b in zip(logits["ours"], logits["peer"], strict=True))
    print(f"logits at most {apart:.1e} apart")
    if not apart <= TOLERANCE:
        sys.exit(f"expected at most {TOLERANCE:.0e}")
    more = {"pairs": arguments.pairs, "largest_difference": apart}
    summarize("pairs/s", rates, arguments.result, more)


if __name__ == "__main__":
    main()
