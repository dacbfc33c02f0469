#!/usr/bin/env python3
"""The peer of the scoring benchmark: sentence-transformers' CrossEncoder.predict.

It reads JSON lines with query and content, and prints one JSON line: the seconds that `predict` took
for them, by the clock and on the CPU (loading the library and the model does not count), and their
logits.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from sentence_transformers import CrossEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32, help="the library's default")
    parser.add_argument("--max-len", type=int, default=512)
    arguments = parser.parse_args()
    with arguments.input.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    pairs = [(record["query"], record["content"]) for record in records]
    model = CrossEncoder(arguments.model, num_labels=1, max_length=arguments.max_len, device="cpu")
    start, cpu = time.perf_counter(), time.process_time()
    scores = model.predict(
        pairs,
        batch_size=arguments.batch_size,
        activation_fn=torch.nn.Identity(),
        show_progress_bar=False,
    )
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps({**times, "logits": [float(score) for score in scores]}))


if __name__ == "__main__":
    main()
