#!/usr/bin/env python3
"""Scores 100,000 pairs on one rank, on two, and on two that are killed half-way, and compares.

The pairs are queries of the example data with its documents, cut short. `reranker score` scores them
with MiniLM and a head of random numbers, on the CPU in fp32. Two ranks have to give the lines of one
in the same order, scores within 1e-6. Half-way through a job SIGKILL goes to the launcher and all
that it started; the same command then has to keep what was scored, say so, and end with the same
lines. The logits are compared with those of sentence-transformers' `CrossEncoder.predict`, and the
pairs a second of both printed: ours of the whole command, the peer's of `predict` alone. Exit code 1
where anything differs.

usage: check_scoring.py [--pairs 100000] [--words 25] [--peer-pairs N] [--threads N] [--result FILE]
       --words        of a document, at most
       --peer-pairs   how many of the pairs the peer scores; all, unless given; 0 leaves it out
       --threads      of one rank and of the peer; all cores, unless given. On cores that others use
                      too, threads that wait for each other slow the peer most: give 1 there
       --result       writes the figures there as JSON
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benches"))

from bench import BIN, check_built, default_model, machine
from score_throughput import PEER, SOURCE, with_head

TOLERANCE = 1e-6
# Of another program's arithmetic.
PEER_TOLERANCE = 1e-4
KEPT = re.compile(r"(\d+) pairs scored(?:, (\d+) of them before)?;")
TIMEOUT_S = 3600.0


def expect(condition: object, message: str) -> None:
    """Ends the check with a message unless the condition holds."""
    if not condition:
        sys.exit(f"check_scoring: {message}")


def cut(text: str, words: int) -> str:
    """The first `words` words; of a text without spaces, twice as many characters."""
    return text[: 2 * words] if " " not in text else " ".join(text.split()[:words])


def write_pairs(path: Path, count: int, words: int) -> None:
    """Writes `count` different pairs, with documents of one to `words` words."""
    records = [json.loads(line) for line in SOURCE.read_text("utf-8").splitlines()]
    source = random.Random(666)
    queries = sorted({record["query"] for record in records})
    documents = sorted({record["content"] for record in records})
    every = list(product(queries, documents))
    expect(count <= len(every), f"the example data has {len(every)} pairs, {count} were asked for")
    with path.open("w", encoding="utf-8") as file:
        for query, document in source.sample(every, count):
            pair = {"query": query, "content": cut(document, source.randint(1, words))}
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")


class Timer:
    """Seconds of a `with` block by the clock, and on the CPU for the processes that it ran."""

    def __enter__(self) -> "Timer":
        self.begin = time.perf_counter(), self.cpu()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.begin[0]
        self.cpu_seconds = self.cpu() - self.begin[1]

    @staticmethod
    def cpu() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    def rate(self, pairs: int) -> dict:
        """What is told of it."""
        figures = {"pairs_per_s": pairs / self.seconds, "pairs_per_cpu_s": pairs / self.cpu_seconds}
        return {"pairs": pairs} | {key: round(value, 1) for key, value in figures.items()}


def command(ranks: int, model: Path, directory: Path, output: str) -> list[str]:
    """Scores the pairs in `directory` into its file `output`, on so many ranks."""
    launch = [str(BIN / "rr-launch"), "--cpu", "--nproc", str(ranks), "--"] if ranks > 1 else []
    score = [str(BIN / "reranker"), "score", "--device", "cpu", "--model", str(model)]
    files = ["--input", str(directory / "pairs.jsonl"), "--output", str(directory / output)]
    return [*launch, *score, *files]


def score(words: list[str]) -> tuple[Timer, int, int]:
    """Runs a scoring command to its end: its time, the pairs it has, and those it had before."""
    with Timer() as timer:
        run = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT_S)
    expect(run.returncode == 0, f"{' '.join(words)} ended with {run.returncode}: {run.stderr}")
    told = KEPT.search(run.stderr)
    expect(told, f"it does not say what it has scored: {run.stderr}")
    return timer, int(told[1]), int(told[2] or 0)


def family(pid: int) -> list[int]:
    """A process and all that it started, and that these did."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        found = [int(child) for child in children.read_text().split()]
    except OSError:
        found = []
    return [pid, *(each for child in found for each in family(child))]


def is_alive(pid: int) -> bool:
    """Whether it still runs; what nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_half_way(words: list[str], partial: Path, pairs: int) -> int:
    """Starts a job and kills all of it when half of the pairs are scored; how many it killed."""
    job = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + TIMEOUT_S
    # Four bytes a score.
    while sum(log.stat().st_size for log in partial.glob("*.scores")) < pairs // 2 * 4:
        expect(job.poll() is None, "the job was done before it could be killed")
        expect(time.monotonic() < limit, "the job does not get to half of the pairs")
        time.sleep(0.05)
    killed = family(job.pid)
    for pid in killed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    expect(job.wait() == -signal.SIGKILL, "the launcher was not killed")
    time.sleep(2)
    alive = [pid for pid in killed if is_alive(pid)]
    expect(not alive, f"processes {alive} are still there")
    return len(killed)


def logits(path: Path, pairs: int) -> list[float]:
    """The logits of a whole output, whose lines have to be numbered in order."""
    with path.open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    expect([line["index"] for line in lines] == list(range(pairs)), f"{path.name}: lines out of order")
    return [line["logit"] for line in lines]


def compare(name: str, ours: list[float], others: list[float], tolerance: float) -> float:
    """The largest difference, which has to be within the tolerance."""
    apart = max(abs(a - b) for a, b in zip(ours, others, strict=True))
    # Written so that NaN fails.
    expect(apart <= tolerance, f"{name}: logits {apart:.1e} apart, expected at most {tolerance:.0e}")
    return apart


def peer(model: Path, directory: Path, count: int) -> tuple[dict, list[float]]:
    """Rate of `predict` for the first `count` pairs, and its logits."""
    some = directory / "peer.jsonl"
    with (directory / "pairs.jsonl").open(encoding="utf-8") as file:
        some.write_text("".join(islice(file, count)), "utf-8")
    words = [sys.executable, str(PEER), "--model", str(model), "--input", str(some)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S)
    expect(run.returncode == 0, f"{' '.join(words)} failed: {run.stderr}")
    result = json.loads(run.stdout)
    timer = Timer()
    timer.seconds, timer.cpu_seconds = result["seconds"], result["cpu_seconds"]
    return timer.rate(count), result["logits"]


class Check:
    """The steps, each of which tells its figures as it ends; they are about files in `directory`."""

    def __init__(self, directory: Path, model: Path, pairs: int) -> None:
        self.directory, self.model, self.pairs = directory, model, pairs
        self.figures: dict[str, dict] = {}

    def tell(self, step: str, **values: object) -> None:
        """Prints the figures of a step, and keeps them."""
        self.figures[step] = values
        print(f"{step}: " + ", ".join(f"{name} {each}" for name, each in values.items()), flush=True)

    def one_rank(self) -> None:
        """What all else is compared with."""
        timer, scored, _ = score(command(1, self.model, self.directory, "one.jsonl"))
        expect(scored == self.pairs, f"{scored} pairs of {self.pairs}")
        ours = logits(self.directory / "one.jsonl", self.pairs)
        different = len(set(ours))
        expect(different > self.pairs // 10, f"only {different} different logits: a blind model")
        self.tell("1 rank", **timer.rate(self.pairs))

    def against_peer(self, count: int) -> None:
        """The peer scores the first `count` pairs."""
        rate, theirs = peer(self.model, self.directory, count)
        ours = logits(self.directory / "one.jsonl", self.pairs)[:count]
        apart = compare("CrossEncoder.predict", ours, theirs, PEER_TOLERANCE)
        self.tell("CrossEncoder.predict", **rate, largest_difference=f"{apart:.1e}")
        own = self.figures["1 rank"]
        ratios = {key: round(own[key] / rate[key], 2) for key in ("pairs_per_s", "pairs_per_cpu_s")}
        self.tell("ratio", **ratios)

    def same_as_one_rank(self, output: str) -> dict:
        """How far an output is from that of one rank, line by line."""
        one, other = self.directory / "one.jsonl", self.directory / output
        apart = compare(output, logits(one, self.pairs), logits(other, self.pairs), TOLERANCE)
        return {
            "lines": self.pairs,
            "largest_difference": f"{apart:.1e}",
            "same_bytes": one.read_bytes() == other.read_bytes(),
        }

    def two_ranks(self) -> None:
        """From beginning to end."""
        timer, _, _ = score(command(2, self.model, self.directory, "two.jsonl"))
        self.tell("2 ranks", **timer.rate(self.pairs), **self.same_as_one_rank("two.jsonl"))

    def killed(self) -> None:
        """Two ranks that are killed half-way, and the same command again."""
        output = self.directory / "killed.jsonl"
        partial = output.with_name("killed.jsonl.partial")
        words = command(2, self.model, self.directory, output.name)
        killed = kill_half_way(words, partial, self.pairs)
        expect(not output.exists(), "half an output")
        _, scored, kept = score(words)
        expect(scored == self.pairs, f"{scored} pairs of {self.pairs}")
        expect(
            self.pairs * 0.45 <= kept < self.pairs,
            f"{kept} of {self.pairs} pairs were kept, expected about half",
        )
        expect(not partial.exists(), f"{partial.name} is left")
        same = self.same_as_one_rank(output.name)
        self.tell("2 ranks, killed", processes_killed=killed, pairs_kept=kept, **same)


def check(arguments: argparse.Namespace, directory: Path) -> dict:
    """Runs all of it; the figures."""
    write_pairs(directory / "pairs.jsonl", arguments.pairs, arguments.words)
    steps = Check(directory, with_head(default_model(), directory / "model"), arguments.pairs)
    steps.one_rank()
    wanted = arguments.pairs if arguments.peer_pairs is None else arguments.peer_pairs
    if count := min(arguments.pairs, wanted):
        steps.against_peer(count)
    steps.two_ranks()
    steps.killed()
    return steps.figures


def main() -> None:
    """Checks, and keeps the figures where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=25)
    parser.add_argument("--peer-pairs", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args()
    check_built()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="reranker-scoring-") as name:
        figures = check(arguments, Path(name))
    if arguments.result:
        words = " ".join(["python", *sys.argv])
        record = {"command": words, "date": time.strftime("%Y-%m-%d"), **figures, "machine": machine()}
        arguments.result.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
