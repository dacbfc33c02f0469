#!/usr/bin/env python3
"""Loads a JSON Lines file of pairs and tokenizes it with the datasets library; prints seconds.

The clock starts after the imports and with the tokenizer loaded, and stops when the tokenized
data set is on the disk as Arrow files.

usage: peer_tokenize.py --model DIR --data FILE --cache DIR --max-len N --processes N
"""

import argparse
import time
from pathlib import Path

import datasets
from transformers import AutoTokenizer


def main() -> None:
    """Parses the arguments, tokenizes, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--max-len", type=int, required=True)
    parser.add_argument("--processes", type=int, required=True)
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)

    def tokenize(batch: dict) -> dict:
        return tokenizer(
            batch["query"],
            batch["content"],
            truncation="only_second",
            max_length=arguments.max_len,
        )

    begin = time.perf_counter()
    loaded = datasets.load_dataset(
        "json", data_files=str(arguments.data), split="train", cache_dir=str(arguments.cache)
    )
    processes = arguments.processes if arguments.processes > 1 else None
    tokenized = loaded.map(
        tokenize, batched=True, num_proc=processes, remove_columns=["query", "content"]
    )
    seconds = time.perf_counter() - begin
    assert len(tokenized) == len(loaded)
    print(seconds)


if __name__ == "__main__":
    main()
