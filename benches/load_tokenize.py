#!/usr/bin/env python3
"""Pairs loaded and tokenized per second: ours against the datasets library, on the same file.

The file is generated: short texts, four documents a query, as pointwise records. Ours is the whole
command `reranker check` with an empty cache directory: start-up, reading, validation, tokenization,
the cache on the disk, the report. The peer is `load_dataset("json")` and `.map(tokenize,
batched=True)` with the same fast tokenizer, without its start-up, by one process with the
tokenizer's own threads and by a process a core; the faster one of the two counts. Both take turns.

With `--large` it also shows what memory ours takes at one and at ten million pairs, no peer: the
most that `reranker check` holds while it builds the cache and when it finds it, and the most that
any process of a launch holds that trains a tiny model for some steps, after its own check has built
the cache for that model's tokenizer. Memory is told apart into anonymous, which the process alone
holds, and all resident pages, with those of mapped files among them.

usage: load_tokenize.py [--model DIR] [--pairs 50000] [--rounds 3] [--large] [--result FILE]
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import BIN, ROOT, check_built, default_model, fail_with_log, summarize

MAX_LEN = 128
# A third of the words of the longest documents: for speed, and for files of millions of pairs.
WORDS = 12
SHORT_WORDS = 3
DOCUMENTS_PER_QUERY = 4
TINY_MODEL = ROOT / "tests" / "golden" / "bert_tiny"
TRAINED_STEPS = 50
LARGE = (1_000_000, 10_000_000)
LOOK_EVERY_S = 0.02


def write_pairs(path: Path, pairs: int, words: list[str], longest: int) -> None:
    """Writes `pairs` pointwise records, documents of up to three times `longest` words."""
    source = random.Random(666)
    # Sampling every word anew would take longer than all that is measured.
    lengths = range(1 + longest // 3, longest + 1)
    parts = [" ".join(source.choices(words, k=source.choice(lengths))) for _ in range(50_000)]
    with path.open("w", encoding="utf-8", buffering=1 << 20) as file:
        for number in range(pairs):
            if number % DOCUMENTS_PER_QUERY == 0:
                query = f"{' '.join(source.choices(words, k=source.randint(3, 7)))} {number}"
            a, b, c = source.choices(parts, k=3)
            file.write(
                f'{{"query": "{query}", "content": "{a} {b} {c}", "label": {number % 2}}}\n'
            )


def vocabulary(model: Path) -> list[str]:
    """Words that the tokenizer knows, and some that it has to take apart."""
    lines = (model / "vocab.txt").read_text("utf-8").splitlines()
    words = [word for word in lines if word.isascii() and word.isalpha() and len(word) > 2]
    return words[:8000] + [a + b for a, b in zip(words[8000:10000], words[10000:12000])]


def peer_python() -> Path:
    """The interpreter of the peer's environment, which is made where there is none."""
    cache = Path(os.environ.get("RERANKER_CACHE", Path.home() / ".cache" / "reranker"))
    home = cache / "bench-datasets"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        print("making the environment of the datasets library", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        # Debian splits off what a virtual environment needs for a pip of its own.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
        pip = [os.environ.get("PYTHON", "python3"), "-m", "pip", "--python", str(python)]
        needs = str(ROOT / "benches" / "requirements-datasets.txt")
        subprocess.run([*pip, "install", "--quiet", "-r", needs], check=True)
        (home / "complete").touch()
    return python


def settings(directory: Path, model: Path, data: Path, **more: object) -> Path:
    """A training YAML with a cache and an output directory of its own below `directory`."""
    keys = {
        "model_name_or_path": model,
        "model_type": "bert_encoder",
        "train_dataset": data,
        "max_len": MAX_LEN,
        "cache_dir": directory / "cache",
        "output_dir": directory / "output",
        **more,
    }
    config = directory / "config.yaml"
    config.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return config


def ours_seconds(directory: Path, model: Path, data: Path) -> float:
    """Seconds of `reranker check` that has to build the cache."""
    config = settings(directory, model, data)
    command = [str(BIN / "reranker"), "check", "--config", str(config)]
    log = directory / "log.txt"
    with log.open("w") as output:
        begin = time.perf_counter()
        code = subprocess.run(command, stdout=output, stderr=output).returncode
        seconds = time.perf_counter() - begin
    if code != 0:
        fail_with_log(command, log)
    return seconds


def peer_seconds(directory: Path, python: Path, model: Path, data: Path, processes: int) -> float:
    """Seconds of loading and mapping by the datasets library."""
    values = {
        "--model": model,
        "--data": data,
        "--cache": directory / "cache",
        "--max-len": MAX_LEN,
        "--processes": processes,
    }
    words = [str(word) for pair in values.items() for word in pair]
    command = [str(python), str(ROOT / "benches" / "peer_tokenize.py"), *words]
    log = directory / "log.txt"
    variables = {**os.environ, "TOKENIZERS_PARALLELISM": "false" if processes > 1 else "true"}
    variables.pop("OMP_NUM_THREADS", None)
    with log.open("w") as output:
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=output, text=True, env=variables
        )
    if ended.returncode != 0:
        fail_with_log(command, log)
    return float(ended.stdout.split()[-1])


class Memory:
    """The most memory, in MB, that one process of a tree was seen to hold."""

    def __init__(self) -> None:
        self.anonymous = self.resident = 0.0

    def look(self, root: int) -> None:
        """Looks at `root` and all that it started."""
        children = [root]
        while children:
            process = Path("/proc") / str(children.pop())
            try:
                for task in (process / "task").iterdir():
                    children += map(int, (task / "children").read_text().split())
                lines = (process / "status").read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                continue
            megabytes = {
                name: int(value.split()[0]) / 1024
                for name, _, value in (line.partition(":") for line in lines)
                if name in ("RssAnon", "VmHWM")
            }
            self.anonymous = max(self.anonymous, megabytes.get("RssAnon", 0.0))
            self.resident = max(self.resident, megabytes.get("VmHWM", 0.0))

    def figures(self) -> dict[str, float]:
        """For the result file."""
        return {"anonymous_mb": round(self.anonymous, 1), "resident_mb": round(self.resident, 1)}


def watch(command: list[str], log: Path, until: str | None = None) -> tuple[Memory, float]:
    """Runs the command to its end, or until its log holds `until`; memory and seconds."""
    memory = Memory()
    with log.open("w") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output)
        stopped = False
        while process.poll() is None:
            memory.look(process.pid)
            if until and not stopped and until in log.read_text("utf-8", errors="replace"):
                process.send_signal(signal.SIGTERM)
                stopped = True
            time.sleep(LOOK_EVERY_S)
        seconds = time.perf_counter() - begin
    if not stopped and (process.returncode != 0 or until):
        fail_with_log(command, log)
    return memory, seconds


def measure_memory(pairs: int, model: Path) -> dict:
    """Builds, opens and trains from a cache of `pairs` pairs."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        data = directory / "pairs.jsonl"
        write_pairs(data, pairs, vocabulary(model), SHORT_WORDS)
        config = settings(directory, model, data)
        check = [str(BIN / "reranker"), "check", "--config", str(config)]
        built, seconds = watch(check, directory / "log.txt")
        opened, again = watch(check, directory / "log.txt")
        cache = sum(path.stat().st_size for path in directory.glob("cache/*/*"))
        # A model that computes next to nothing: what is left is the data.
        tiny = {"log_interval": TRAINED_STEPS, "batch_size": 16, "max_len": 48}
        config = settings(directory, TINY_MODEL, data, **tiny)
        launch = [str(BIN / "rr-launch"), "--cpu", "--nproc", "2", "--config", str(config)]
        trained, _ = watch(launch, directory / "log.txt", f"trained step={TRAINED_STEPS} ")
        figures = {
            "pairs": pairs,
            "file_mb": round(data.stat().st_size / 1e6),
            "cache_mb": round(cache / 1e6),
            "build_s": round(seconds, 1),
            "open_s": round(again, 1),
            "build": built.figures(),
            "open": opened.figures(),
            "train": trained.figures(),
        }
    print(f"memory at {pairs} pairs: {figures}", flush=True)
    return figures


def main() -> None:
    """Parses the arguments, runs the rounds, sums up."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="default: MiniLM-L6 of the quick start")
    parser.add_argument("--pairs", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="memory at 1 and 10 million pairs")
    parser.add_argument("--result", type=Path, help="a JSON file to keep the figures in")
    arguments = parser.parse_args()
    check_built()
    model = (arguments.model or default_model()).resolve()
    python = peer_python()

    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "pairs.jsonl"
        write_pairs(data, arguments.pairs, vocabulary(model), WORDS)
        for turn in range(arguments.rounds):
            for side, values in rates.items():
                seconds = []
                for processes in [1] if side == "ours" else [1, cores]:
                    directory = Path(temporary) / f"{side}-{turn}-{processes}"
                    directory.mkdir()
                    if side == "ours":
                        seconds.append(ours_seconds(directory, model, data))
                    else:
                        seconds.append(peer_seconds(directory, python, model, data, processes))
                    shutil.rmtree(directory)
                values.append(arguments.pairs / min(seconds))
                shown = ", ".join(f"{value:.1f} s" for value in seconds)
                print(f"round {turn + 1}: {side} {values[-1]:.0f} pairs/s ({shown})", flush=True)
    more: dict = {"pairs": arguments.pairs}
    if arguments.large:
        more["memory"] = [measure_memory(pairs, model) for pairs in LARGE]
    summarize("pairs/s", rates, arguments.result, more)


if __name__ == "__main__":
    main()
