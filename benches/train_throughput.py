#!/usr/bin/env python3
"""Training pairs per second: ours against a plain transformers + torch.optim.AdamW loop.

Both sides train the same model on the same pairs with the same batch size, one worker on the CPU,
taking turns (ours, peer, ours, peer, ...) in one go. The clock of a run starts after its first
optimizer step and stops after its last, so that starting up is left out on both sides.

usage: train_throughput.py [--model DIR] [--data FILE] [--steps 9] [--rounds 3] [--result FILE]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import (
    PEER,
    ROOT,
    Job,
    check_built,
    default_model,
    fail_with_log,
    read_steps,
    summarize,
    take_lines,
)


def pairs_per_second(command: list[str], directory: Path) -> float:
    """Runs the command to its end; reads its rate off the metrics that it left in `directory`."""
    log = directory / "log.txt"
    with log.open("w") as output:
        code = subprocess.run(command, stdout=output, stderr=output, cwd=ROOT).returncode
    steps = read_steps(directory)
    if code != 0 or len(steps) < 2:
        fail_with_log(command, log)
    first, last = steps[0], steps[-1]
    return (last["pairs"] - first["pairs"]) / (last["elapsed_s"] - first["elapsed_s"])


def main() -> None:
    """Parses the arguments, runs the rounds, sums up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: MiniLM-L6 of the quick start")
    parser.add_argument("--data", type=Path, default=ROOT / "example_data/train_pointwise.jsonl")
    parser.add_argument("--steps", type=int, default=9, help="the first is not measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-len", type=int, default=512)
    parser.add_argument("--result", type=Path, help="a JSON file to keep the figures in")
    arguments = parser.parse_args()
    check_built()
    if arguments.steps < 2:
        sys.exit("--steps has to be at least 2: the first is not measured")

    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "train.jsonl"
        take_lines(arguments.data, arguments.steps * arguments.batch_size, data)
        model = (arguments.model or default_model()).resolve()
        job = Job(model, data, arguments.batch_size, arguments.max_len)
        for turn in range(1, arguments.rounds + 1):
            for side, values in rates.items():
                directory = Path(temporary) / f"{side}-{turn}"
                directory.mkdir()
                peer = [sys.executable, str(PEER), *job.peer_arguments(directory)]
                command = job.ours(directory) if side == "ours" else peer
                values.append(pairs_per_second(command, directory))
                print(f"round {turn}: {side} {values[-1]:.2f} pairs/s", flush=True)
    summarize("pairs/s", rates, arguments.result)


if __name__ == "__main__":
    main()
