"""What the benchmarks share: the two contestants' commands, their metrics, and the summary.

Run the benchmarks with the Python of `scripts/setup.sh --python`, after `cargo build --release`.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
PEER = ROOT / "benches" / "peer_train.py"
# The labels of example_data are 0, 1, 2.
MAX_LABEL = 2


@dataclass
class Job:
    """One training run that both sides do: one epoch over `data`."""

    model: Path
    data: Path
    batch_size: int
    max_len: int
    seed: int = 666
    lr: float = 5e-5

    def ours(self, directory: Path) -> list[str]:
        """The command of our side, which writes below `directory`; its settings go there too."""
        settings = {
            "model_name_or_path": self.model,
            "model_type": "bert_encoder",
            "train_dataset": self.data,
            "train_dataset_type": "pointwise",
            "min_label": 0,
            "max_label": MAX_LABEL,
            "max_len": self.max_len,
            "loss_type": "pointwise_bce",
            "epochs": 1,
            "lr": f"{self.lr:.1e}",
            "batch_size": self.batch_size,
            "seed": self.seed,
            "log_interval": 1,
            "output_dir": directory / "output",
        }
        config = directory / "config.yaml"
        config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
        return [str(BIN / "rr-launch"), "--cpu", "--nproc", "1", "--config", str(config)]

    def peer_arguments(self, directory: Path) -> list[str]:
        """The arguments of peer_train.py for the same work."""
        values = {
            "--model": self.model,
            "--data": self.data,
            "--metrics": directory / "metrics.jsonl",
            "--batch-size": self.batch_size,
            "--max-len": self.max_len,
            "--max-label": MAX_LABEL,
            "--lr": self.lr,
            "--seed": self.seed,
        }
        return [str(word) for pair in values.items() for word in pair]


def default_model() -> Path:
    """The quick start's MiniLM, fetched when it is not there."""
    command = [str(ROOT / "scripts" / "setup.sh"), "--quickstart"]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def check_built() -> None:
    """Ends with one line unless both of our binaries are there."""
    for name in ("rr-launch", "reranker"):
        if not (BIN / name).is_file():
            sys.exit(f"{BIN / name} is missing: run cargo build --release first")


def take_lines(source: Path, count: int, target: Path) -> None:
    """Writes the first `count` records of a JSON Lines file, which has to hold that many."""
    lines = source.read_text("utf-8").splitlines(keepends=True)
    if len(lines) < count:
        sys.exit(f"{source} holds {len(lines)} pairs, {count} are needed: ask for fewer steps")
    target.write_text("".join(lines[:count]), "utf-8")


def read_steps(directory: Path) -> list[dict]:
    """The lines of the metrics.jsonl somewhere below `directory` that tell of an optimizer step."""
    steps = []
    for path in directory.rglob("metrics.jsonl"):
        for line in path.read_text("utf-8").splitlines(keepends=True):
            # The last line may be half written when a run is watched.
            record = json.loads(line) if line.endswith("\n") else {}
            if {"step", "pairs", "elapsed_s"} <= record.keys():
                steps.append(record)
    return sorted(steps, key=lambda record: record["step"])


def fail_with_log(command: list[str], log: Path) -> None:
    """Ends with the command that failed and the end of what it said."""
    tail = "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-15:])
    sys.exit(f"this command failed:\n{' '.join(command)}\n{tail}")


def summarize(
    unit: str, values: dict[str, list[float]], result: Path | None, more: dict | None = None
) -> None:
    """Prints the medians of `ours` and `peer` and their ratio, above 1 when ours is the better one.

    Seconds are better when fewer, rates when more. All of it is kept in `result`, if given, and
    `more` beside it.
    """
    ours, peer = values["ours"], values["peer"]
    median_ours, median_peer = statistics.median(ours), statistics.median(peer)
    ratio = median_peer / median_ours if unit == "seconds" else median_ours / median_peer
    print(f"median {unit}: ours {median_ours:.3g}, peer {median_peer:.3g}; ratio {ratio:.2f}")
    if result:
        record = {
            "benchmark": Path(sys.argv[0]).stem,
            "command": " ".join(["python", *sys.argv]),
            "unit": unit,
            "ours": ours,
            "peer": peer,
            "ratio_of_medians": ratio,
            **(more or {}),
            "machine": machine(),
        }
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(record, indent=1) + "\n")


def machine() -> dict:
    """What the numbers depend on."""
    import torch
    import transformers

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    cpu = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line for line in cpu if "model name" in line]
    return {
        "cpu": model[0].partition(": ")[2] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit.stdout.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
