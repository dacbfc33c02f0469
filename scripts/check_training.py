#!/usr/bin/env python3
"""Trains with `rr-launch` and with a plain PyTorch loop over the same pairs, and compares the two.

Both start from the same weights, without dropout, and take 200 optimizer steps on example_data: the
order of the pairs is what `reranker` logs at the debug level. Compared are the loss of every step
(within 1e-3) and nDCG@10 on the held-out queries at the end (within 0.005). A line a run; exit code
1 where one is farther apart.

usage: check_training.py [--short] [--only TEXT] [--minilm DIRECTORY] [--result FILE]
       --short    twenty steps of one tiny model, for scripts/test.sh
       --only     the runs whose name contains TEXT
       --minilm   what `scripts/setup.sh --quickstart` prints; its runs are left out without it
       --result   writes the figures there as JSON
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import transformers
from proof import models
from proof.loop import STABLE, TEMPLATE, WARMUP, MAX_GRAD_NORM, WEIGHT_DECAY
from proof.loop import Data, Order, Peer, train

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
EXAMPLES = ROOT / "example_data"

LOSS_TOLERANCE = 1e-3
NDCG_TOLERANCE = 0.005
RANKS = 2
# Over all ranks: eight pairs, or two groups of four.
PAIRS_PER_STEP = 8
GROUPS_PER_STEP = 2
GROUP_SIZE = 4
MAX_LEN = 64
MAX_LABEL = 2
POINTWISE = ("pointwise_bce", "pointwise_mse")
ORDER = re.compile(r"\border step=(\d+) pairs=(\[.*\])$")


@dataclass
class Run:
    """A training that both sides do."""

    model: str
    loss: str
    parallel: str
    lr: float

    @property
    def name(self) -> str:
        return f"{self.model} {self.loss} {self.parallel}"


RUNS = [
    *[
        Run("minilm", loss, "ddp", 5e-5)
        for loss in ("pointwise_bce", "pointwise_mse", "pairwise_ranknet", "listwise_ce")
    ],
    *[Run("tiny-bert", "pointwise_bce", parallel, 1e-3) for parallel in ("ddp", "zero3")],
    *[Run("tiny-xlm-roberta", "listwise_ce", parallel, 1e-3) for parallel in ("ddp", "zero3")],
    *[Run("tiny-qwen2", "pointwise_bce", parallel, 1e-3) for parallel in ("ddp", "zero3")],
]
SHORT = Run("tiny-bert", "pointwise_bce", "zero3", 1e-3)


def records(path: Path) -> list[dict]:
    """A JSON Lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def pointwise(steps: int) -> tuple[list[dict], Data]:
    """The records of so many steps, and the same as pairs with labels in 0..1."""
    chosen = records(EXAMPLES / "train_pointwise.jsonl")[: steps * PAIRS_PER_STEP]
    pairs = [(record["query"], record["content"]) for record in chosen]
    return chosen, Data(pairs, [record["label"] / MAX_LABEL for record in chosen])


def grouped(steps: int) -> tuple[list[dict], Data]:
    """Queries whose groups make so many steps, and the same as pairs with raw labels."""
    chosen, groups = [], 0
    for record in records(EXAMPLES / "train_grouped.jsonl"):
        more = math.ceil(len(record["hits"]) / GROUP_SIZE)
        has_two_labels = len({hit["label"] for hit in record["hits"]}) > 1
        if has_two_labels and groups + more <= steps * GROUPS_PER_STEP:
            chosen.append(record)
            groups += more
    return chosen, pairs_of(chosen)


def pairs_of(queries: list[dict]) -> Data:
    """Hits in the order of the file."""
    hits = [(query["query"], hit) for query in queries for hit in query["hits"]]
    return Data([(q, h["content"]) for q, h in hits], [float(h["label"]) for _, h in hits])


def ndcg_at_10(queries: list[dict], scores: list[float]) -> float:
    """Gain 2^label - 1, discount log2(rank + 1), mean over the queries with a relevant hit."""

    def dcg(labels: list[int]) -> float:
        return sum((2**label - 1) / math.log2(i + 2) for i, label in enumerate(labels[:10]))

    values, rest = [], iter(scores)
    for query in queries:
        labels = [hit["label"] for hit in query["hits"]]
        own = list(islice(rest, len(labels)))
        ideal = dcg(sorted(labels, reverse=True))
        if ideal > 0:
            ranked = sorted(range(len(labels)), key=lambda i: -own[i])
            values.append(dcg([labels[i] for i in ranked]) / ideal)
    return sum(values) / len(values)


def ours(run: Run, model: Path, training: list[dict], validation: Path, directory: Path):
    """Trains with rr-launch; returns losses, nDCG@10 and the order of the pairs, by step."""
    data = directory / "train.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in training), "utf-8")
    is_pointwise = run.loss in POINTWISE
    settings = {
        "model_name_or_path": str(model),
        "model_type": "llm_decoder" if "qwen" in run.model else "bert_encoder",
        "train_dataset": str(data),
        "val_dataset": str(validation),
        "train_dataset_type": "pointwise" if is_pointwise else "grouped",
        "train_group_size": GROUP_SIZE,
        "max_label": MAX_LABEL,
        "max_len": MAX_LEN,
        "loss_type": run.loss,
        "epochs": 1,
        "lr": run.lr,
        "batch_size": (PAIRS_PER_STEP if is_pointwise else GROUPS_PER_STEP) // RANKS,
        "warmup_proportion": WARMUP,
        "stable_proportion": STABLE,
        "max_grad_norm": MAX_GRAD_NORM,
        "weight_decay": WEIGHT_DECAY,
        # Given, so that no default may split off the head.
        "special_lr_groups": [{"keywords": ["no such parameter"], "lr": run.lr}],
        "log_interval": 1,
        "output_dir": str(directory / "output"),
    }
    if "qwen" in run.model:
        settings |= TEMPLATE
    config = directory / "training.yaml"
    # JSON is YAML too.
    config.write_text("".join(f"{key}: {json.dumps(settings[key])}\n" for key in settings))
    command = [str(BIN / "rr-launch"), "--cpu", "--nproc", str(RANKS), "--config", str(config)]
    if run.parallel != "ddp":
        command += ["--parallel", str(ROOT / f"config/deepspeed/{run.parallel}.yaml")]
    environment = os.environ | {"RUST_LOG": "info,reranker=debug"}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{run.name}: rr-launch failed\n{done.stderr[-3000:]}")
    found = [match for line in done.stderr.splitlines() if (match := ORDER.search(line))]
    # One micro-batch a step here.
    order = [json.loads(match[2])[0] for match in found]
    metrics = records(directory / "output/runs/metrics.jsonl")
    losses = [line["loss"] for line in metrics if line["type"] == "train"]
    ndcg = [line["ndcg@10"] for line in metrics if line["type"] == "validation"][-1]
    if [int(match[1]) for match in found] != list(range(1, len(losses) + 1)):
        sys.exit(f"{run.name}: the log does not tell the order of every step")
    return losses, ndcg, order


class Proof:
    """The runs, with the models and the peer's curves that several of them share."""

    def __init__(self, arguments: argparse.Namespace, directory: Path):
        self.directory = directory
        self.minilm = arguments.minilm
        self.steps = 20 if arguments.short else 200
        queries = records(EXAMPLES / "eval_grouped.jsonl")
        self.queries = queries[:8] if arguments.short else queries
        self.validation = directory / "validation.jsonl"
        lines = "".join(json.dumps(query) + "\n" for query in self.queries)
        self.validation.write_text(lines, "utf-8")
        self.curves = {}

    def model(self, name: str) -> Path:
        """The directory of the model, made at first use."""
        directory = self.directory / name
        if not directory.exists():
            directory.mkdir()
            if name == "minilm":
                models.with_head(self.minilm, directory)
            else:
                pairs = pointwise(self.steps)[1].pairs
                texts = (text for pair in pairs for text in pair)
                models.tiny(name.removeprefix("tiny-"), texts, directory)
        return directory

    def theirs(self, run: Run, model: Path, data: Data, order: list[Order]):
        """Losses and nDCG@10 of the plain loop; strategies that take the same steps share them."""
        key = (run.model, run.loss, json.dumps(order))
        if key not in self.curves:
            peer = Peer(model, "qwen" in run.model, MAX_LEN)
            losses = train(peer, data, run.loss, order, run.lr)
            scores = peer.score_all(pairs_of(self.queries).pairs)
            self.curves[key] = losses, ndcg_at_10(self.queries, scores)
        return self.curves[key]

    def check(self, run: Run) -> dict:
        """One run of both sides, as a line and as figures."""
        training, data = (pointwise if run.loss in POINTWISE else grouped)(self.steps)
        model = self.model(run.model)
        with tempfile.TemporaryDirectory(dir=self.directory) as directory:
            losses, ndcg, order = ours(run, model, training, self.validation, Path(directory))
        their_losses, their_ndcg = self.theirs(run, model, data, order)
        gaps = [abs(a - b) for a, b in zip(losses, their_losses, strict=True)]
        worst = max(gaps)
        # Written so that NaN fails.
        agrees = worst <= LOSS_TOLERANCE and abs(ndcg - their_ndcg) <= NDCG_TOLERANCE
        print(
            f"{run.name:42} {len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}, "
            f"at most {worst:.1e} apart (step {gaps.index(worst) + 1}); "
            f"nDCG@10 {ndcg:.4f} and {their_ndcg:.4f}{'' if agrees else '  TOO FAR APART'}",
            flush=True,
        )
        return {
            "run": run.name,
            "ranks": RANKS,
            "steps": len(losses),
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "largest_loss_difference": worst,
            "ndcg@10": ndcg,
            "their_ndcg@10": their_ndcg,
            "agrees": agrees,
        }


def machine() -> dict:
    """Where and with what this ran."""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cores": os.cpu_count(),
        "system": platform.machine(),
        "commit": commit,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> int:
    """All runs that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--result", type=Path)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Where several threads are the first to call one of them, one may get half the accuracy
    # (pytorch/pytorch issue 188792).
    for function in (torch.cos, torch.sin, torch.exp, torch.tanh, torch.erf, torch.sqrt):
        function(torch.ones(1))
    chosen = [SHORT] if arguments.short else [run for run in RUNS if arguments.only in run.name]
    if arguments.minilm is None:
        chosen = [run for run in chosen if run.model != "minilm"]
    with tempfile.TemporaryDirectory() as directory:
        proof = Proof(arguments, Path(directory))
        rows = [proof.check(run) for run in chosen]
    if arguments.result:
        command = "check_training.py " + " ".join(sys.argv[1:])
        result = {"command": command, "machine": machine(), "runs": rows}
        arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if rows and all(row["agrees"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
