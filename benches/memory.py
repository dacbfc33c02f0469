#!/usr/bin/env python3
"""Memory of every sharding strategy at 1, 2 and 4 workers, beside the formulas of the ZeRO paper.

A model of random weights in the shape of MiniLM-L6 is trained for a few steps on the CPU over Gloo.
Parameters, gradients and optimizer states are what the workers count (the last line of
metrics.jsonl); the formulas are those of Rajbhandari et al. 2020, section 3, for the number of
parameters in the weight file. In bf16 the master weights are states, and under ZeRO-3 nothing but
them is kept of the parameters between steps: the formula is taken without its 2 bytes there. "peak" is the most of parameters and gradients during a step: the whole of a stage, and of
its neighbour, comes on top there. "process" is the operating system's peak of a worker, libtorch
and activations included.

Ends with an error when a figure between steps is off its formula by more than 5 %, or a peak by
more than two stages.

usage: memory.py [--ranks 1,2,4] [--steps 4] [--result FILE]
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import BIN, ROOT, Job, check_built, fail_with_log, machine, take_lines

sys.path.insert(0, str(ROOT / "scripts"))
import random_bert

STRATEGIES = {
    "ddp": "deepspeed/zero0.yaml",
    "zero1": "deepspeed/zero1.yaml",
    "zero2": "deepspeed/zero2.yaml",
    "zero3": "deepspeed/zero3.yaml",
    "hybrid": "fsdp/hybrid.yaml",
}
KINDS = ("parameters", "gradients", "states")
BATCH_SIZE = 4
MAX_LEN = 64
TOLERANCE = 0.05


@dataclass
class Model:
    """What the formulas need: parameters of the model and of its largest stage."""

    directory: Path
    parameters: int
    largest_stage: int


@dataclass
class Row:
    """One run; all sizes in bytes, per worker."""

    strategy: str
    ranks: int
    precision: str
    held: dict[str, int]
    formula: dict[str, float]
    peak: dict[str, int]
    process: int
    two_stages: int

    def faults(self) -> list[str]:
        """What is off its formula."""
        name = f"{self.strategy}, {self.ranks} workers, {self.precision}"
        faults = []
        for kind in KINDS:
            held, formula, peak = self.held[kind], self.formula[kind], self.peak[kind]
            if abs(held - formula) > TOLERANCE * formula:
                faults.append(f"{name}: {kind} are {held}, the formula says {formula:.0f}")
            if peak > formula * (1 + TOLERANCE) + self.two_stages:
                faults.append(f"{name}: {kind} reach {peak}, the formula says {formula:.0f}")
        return faults


def formulas(strategy: str, dividing: int, precision: str, parameters: int) -> dict[str, float]:
    """Bytes of each kind on one of `dividing` workers that divide what the strategy divides."""
    stage = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "hybrid": 3}[strategy]
    width, states = (4, 8) if precision == "no" else (2, 12)

    def part(least_stage: int) -> float:
        return parameters / (dividing if stage >= least_stage else 1)

    masters_only = stage == 3 and precision != "no"
    return {
        "parameters": 0 if masters_only else width * part(3),
        "gradients": width * part(2),
        "states": states * part(1),
    }


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def commands(strategy: str, ranks: int, config: list[str]) -> list[tuple[list[str], dict]]:
    """What to start, with which environment. Hybrid workers play two machines on this one."""
    if strategy != "hybrid":
        return [([str(BIN / "rr-launch"), "--cpu", "--nproc", str(ranks), *config], {})]
    port, local = str(free_port()), ranks // 2
    return [
        (
            [str(BIN / "reranker"), "train", "--device", "cpu", *config],
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": str(rank % local),
                "LOCAL_WORLD_SIZE": str(local),
                "GROUP_RANK": str(rank // local),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(ranks)
    ]


def run(model: Model, data: Path, strategy: str, ranks: int, precision: str, directory: Path) -> Row:
    """Trains once and reads what the workers counted."""
    directory.mkdir()
    job = Job(model.directory, data, BATCH_SIZE, MAX_LEN)
    config = job.ours(directory)[-2:]
    config += ["--parallel", str(ROOT / "config" / STRATEGIES[strategy])]
    config += ["--set", f"mixed_precision={precision}"]
    log = directory / "log.txt"
    with log.open("w") as output:
        started = [
            (command, subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | env))
            for command, env in commands(strategy, ranks, config)
        ]
        codes = [(command, process.wait()) for command, process in started]
    for command, code in codes:
        if code != 0:
            fail_with_log(command, log)
    metrics = (directory / "output/runs/metrics.jsonl").read_text().splitlines()
    memory = json.loads(metrics[-1])
    dividing = ranks // 2 if strategy == "hybrid" else ranks
    width = 4 if precision == "no" else 2
    return Row(
        strategy=strategy,
        ranks=ranks,
        precision=precision,
        held=memory["held"],
        formula=formulas(strategy, dividing, precision, model.parameters),
        peak=memory["peak"],
        process=memory["peak_process"],
        two_stages=2 * width * model.largest_stage,
    )


def make_model(directory: Path) -> Model:
    """A model in the shape of MiniLM-L6, whose largest stage is the embeddings."""
    parameters = random_bert.write_model(directory, layers=6, hidden=384, heads=12, vocab=30522)
    shapes = random_bert.shapes(layers=6, hidden=384, vocab=30522)
    embeddings = [shape for name, shape in shapes.items() if ".embeddings." in name]
    return Model(directory, parameters, sum(random_bert.count(shape) for shape in embeddings))


def line(row: Row) -> str:
    """A row of the table, in MB."""

    def mb(sizes: dict[str, float], kinds: tuple[str, ...] = KINDS) -> list[str]:
        return [f"{sizes[kind] / 1e6:.1f}" for kind in kinds]

    held = sum(row.held[kind] for kind in KINDS)
    formula = sum(row.formula.values())
    cells = [row.strategy, str(row.ranks), row.precision, *mb(row.held), f"{held / 1e6:.1f}"]
    cells += [f"{formula / 1e6:.1f}", f"{100 * (held / formula - 1):+.2f} %"]
    cells += [*mb(row.peak, ("parameters", "gradients")), f"{row.process / 1e6:.0f}"]
    return "".join(f"{cell:>11}" for cell in cells)


HEADER = (
    "strategy", "workers", "precision", "parameters", "gradients", "states", "held", "formula",
    "difference", "peak par.", "peak grad.", "process",
)  # fmt: skip


def main() -> None:
    """Runs every strategy, prints the table, checks it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "example_data/train_pointwise.jsonl")
    parser.add_argument("--ranks", default="1,2,4", help="numbers of workers, with commas")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--result", type=Path, help="a JSON file to keep the figures in")
    arguments = parser.parse_args()
    check_built()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        model = make_model(Path(temporary) / "model")
        print(f"{model.parameters:,} parameters; sizes per worker in MB", flush=True)
        print("".join(f"{name:>11}" for name in HEADER), flush=True)
        for precision in ("no", "bf16"):
            for ranks in map(int, arguments.ranks.split(",")):
                data = Path(temporary) / "train.jsonl"
                take_lines(arguments.data, arguments.steps * BATCH_SIZE * ranks, data)
                for strategy in STRATEGIES:
                    if strategy == "hybrid" and ranks < 4:
                        continue
                    directory = Path(temporary) / f"{strategy}-{ranks}-{precision}"
                    rows.append(run(model, data, strategy, ranks, precision, directory))
                    print(line(rows[-1]), flush=True)
    if arguments.result:
        record = {
            "benchmark": Path(sys.argv[0]).stem,
            "command": " ".join(["python", *sys.argv]),
            "unit": "bytes per worker",
            "parameters": model.parameters,
            "rows": [asdict(row) for row in rows],
            "machine": machine(),
        }
        arguments.result.parent.mkdir(parents=True, exist_ok=True)
        arguments.result.write_text(json.dumps(record, indent=1) + "\n")
    faults = [fault for row in rows for fault in row.faults()]
    print(f"{len(rows)} runs, {len(faults)} figures off their formula", *faults, sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
