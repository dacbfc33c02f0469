#!/usr/bin/env python3
"""What checkpoints cost: the pause of training, bytes per second against dd, resume against a start.

Trains MiniLM with a checkpoint every few steps; writes as many bytes as a checkpoint has with dd to
the same disk, flushed, after each round; kills the run behind its last checkpoint, starts it again,
and times both starts up to their first optimizer step, with warm caches. The pause is what the
program says; the rest is measured from here.

usage: checkpoint.py [--rounds 3] [--save-steps 4] [--interval 100] [--directory DIR] [--result FILE]
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import BIN, ROOT, Job, check_built, default_model, fail_with_log, machine, read_steps
from bench import take_lines

PAIRS = 160
BATCH_SIZE = 8
MAX_LEN = 512
SAVES = re.compile(r"saved \S+/checkpoints/step-\d+ \(([\d.]+) MB\) in ([\d.]+) s; .* ([\d.]+) s$", re.M)


def first_step(command: list[str], log: Path, killed: bool) -> float:
    """Seconds up to the first step that this start tells of; the run then goes on to its end."""
    env = dict(os.environ)
    if killed:
        # When it is about to save for the last time.
        env["RR_FAIL_POINT"] = f"before_states:{PAIRS // BATCH_SIZE // SAVE_STEPS}@0"
    with log.open("w") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT, env=env)
        while "trained step=" not in log.read_text() and process.poll() is None:
            time.sleep(0.001)
        elapsed = time.perf_counter() - begin
        if (process.wait() != 0) != killed or "trained step=" not in log.read_text():
            fail_with_log(command, log)
    return elapsed


def dd_seconds(directory: Path, megabytes: float) -> float:
    """Seconds of dd for as many bytes, until they are on the disk."""
    target = directory / "dd"
    command = ["dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={round(megabytes)}"]
    begin = time.perf_counter()
    subprocess.run([*command, "conv=fsync"], check=True, capture_output=True)
    elapsed = time.perf_counter() - begin
    target.unlink()
    return elapsed


def one_round(job: Job, directory: Path, figures: dict[str, list[float]]) -> None:
    """A run that is killed and goes on; adds what it costs to `figures`."""
    command = job.ours(directory)
    command += ["--set", f"save_steps={SAVE_STEPS}"]
    logs = [directory / "killed.txt", directory / "resumed.txt"]
    figures["cold start, s"].append(first_step(command, logs[0], killed=True))
    figures["resume, s"].append(first_step(command, logs[1], killed=False))
    # Steps that no save was under way in would be faster; these are what a user sees.
    times = [step["elapsed_s"] for step in read_steps(directory / "output")]
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    figures["step, s"] += [gap for gap in gaps if gap > 0]
    saved = SAVES.findall(logs[0].read_text())
    if not saved:
        sys.exit("the log tells of no checkpoint")
    for megabytes, seconds, pause in saved:
        figures["checkpoint, MB"].append(float(megabytes))
        figures["written beside training, MB/s"].append(float(megabytes) / max(float(seconds), 0.05))
        figures["pause, s"].append(float(pause))
    size = figures["checkpoint, MB"][-1]
    figures["dd, MB/s"].append(size / dd_seconds(directory, size))


def main() -> None:
    """Parses the arguments, runs the rounds, prints medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save-steps", type=int, default=4)
    parser.add_argument("--interval", type=int, default=100, help="save_steps that the share is for")
    parser.add_argument("--directory", type=Path, help="where to write [a temporary one]")
    parser.add_argument("--result", type=Path, help="a JSON file to keep the figures in")
    arguments = parser.parse_args()
    check_built()
    global SAVE_STEPS
    SAVE_STEPS = arguments.save_steps
    names = ["step, s", "pause, s", "checkpoint, MB", "written beside training, MB/s", "dd, MB/s"]
    figures: dict[str, list[float]] = {name: [] for name in [*names, "cold start, s", "resume, s"]}
    model = arguments.model or default_model()
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
            directory = Path(name)
            data = directory / "pairs.jsonl"
            take_lines(ROOT / "example_data/train_pointwise.jsonl", PAIRS, data)
            one_round(Job(model, data, BATCH_SIZE, MAX_LEN), directory, figures)
    medians = {name: statistics.median(values) for name, values in figures.items()}
    for name, median in medians.items():
        print(f"{name:32} {median:8.3f}")
    share = medians["pause, s"] / (arguments.interval * medians["step, s"])
    disk = medians["written beside training, MB/s"] / medians["dd, MB/s"]
    resume = medians["resume, s"] / medians["cold start, s"]
    print(f"a checkpoint every {arguments.interval} steps pauses training for {share:.2%} of its time")
    print(f"written at {disk:.2f} of dd's rate; a resume takes {resume:.2f} of a cold start's time")
    if arguments.result:
        record = {"benchmark": "checkpoint", "command": " ".join(["python", *sys.argv])}
        record |= {"medians": medians, "figures": figures, "machine": machine()}
        arguments.result.write_text(json.dumps(record, indent=1) + "\n")


SAVE_STEPS = 4

if __name__ == "__main__":
    main()
