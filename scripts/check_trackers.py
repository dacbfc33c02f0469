#!/usr/bin/env python3
"""What TensorBoard and Weights & Biases read of a run, against its metrics.jsonl.

A tiny model is trained with `log_with: [tensorboard, wandb]`, killed under way and resumed. The event
files are read by TensorBoard's own accumulator, as its server does; the offline runs of wandb by the
reader that its client brings along. Run it with the interpreter of scripts/setup.sh --trackers.

usage: check_trackers.py RERANKER
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2
from wandb.sdk.internal.datastore import DataStore

ROOT = Path(__file__).resolve().parent.parent
CONFIG = f"""model_name_or_path: {ROOT}/tests/golden/bert_tiny
model_type: bert_encoder
train_dataset: train.jsonl
val_dataset: validation.jsonl
output_dir: out
max_len: 32
epochs: 40
lr: 1e-4
batch_size: 4
save_steps: 50
log_interval: 2
log_with: [tensorboard, wandb]
"""
KILLED_AFTER = 120


def expect(condition: object, message: str) -> None:
    """Ends the check with a message unless the condition holds."""
    if not condition:
        sys.exit(f"check_trackers: {message}")


def write_data(directory: Path) -> None:
    """Pairs to train on, and queries to validate with."""
    with (directory / "train.jsonl").open("w") as file:
        for i in range(64):
            pair = {"query": f"how to boil water {i}", "content": "water " * (i % 30 + 1)}
            file.write(json.dumps(pair | {"label": i % 2}) + "\n")
    with (directory / "validation.jsonl").open("w") as file:
        for i in range(6):
            hits = [{"content": f"tea {j} cups", "label": int(j == i)} for j in range(6)]
            file.write(json.dumps({"query": f"which cup {i}", "hits": hits}) + "\n")


def lines_of(directory: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    path = directory / "out/runs/metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def train_twice(reranker: str, directory: Path) -> list[dict]:
    """Kills the run, lets it go on to its end; all lines of both starts, the first ones first."""
    command = [reranker, "train", "--device", "cpu", "--config", "t.yaml"]
    process = subprocess.Popen(command, cwd=directory, stderr=subprocess.DEVNULL)
    while not any(line.get("step", 0) >= KILLED_AFTER for line in lines_of(directory)):
        expect(process.poll() is None, "the run ended before it could be killed")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = lines_of(directory)
    run = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    expect(run.returncode == 0, f"the resumed run failed: {run.stderr}")
    expect("no more metrics" not in run.stderr, f"a tracker was lost: {run.stderr}")
    return first


def expected(lines: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """The figures of metrics.jsonl as `train/loss` and so on, by step."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for key, value in line.items():
            is_place = key in ("type", "step", "resumed_after")
            if not is_place and type(value) in (int, float) and "step" in line:
                series.setdefault(f"{line['type']}/{key}", []).append((line["step"], value))
    return series


def same(ours: list[tuple[int, float]], theirs: list[tuple[int, float]], places: float) -> bool:
    """Whether both tell the same figures at the same steps."""
    return len(ours) == len(theirs) and all(
        a[0] == b[0] and abs(a[1] - b[1]) <= places * max(1e-12, abs(a[1]))
        for a, b in zip(ours, theirs, strict=True)
    )


def check_tensorboard(directory: Path, series: dict[str, list[tuple[int, float]]]) -> int:
    """One run without overlap: what the killed start told after its checkpoint is dropped."""
    events = EventAccumulator(str(directory / "out/runs"), size_guidance={"scalars": 0}).Reload()
    tags = set(events.Tags()["scalars"])
    expect(tags == set(series), f"TensorBoard has {sorted(tags)}, expected {sorted(series)}")
    for tag, ours in series.items():
        theirs = [(event.step, event.value) for event in events.Scalars(tag)]
        # Event files hold 32-bit floats.
        expect(same(ours, theirs, 1e-6), f"TensorBoard's {tag} is {theirs[:60]}, ours {ours[:60]}")
    return sum(map(len, series.values()))


def records(path: Path) -> list[wandb_internal_pb2.Record]:
    """The records of an offline run of wandb, as far as they are whole."""
    store, found = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        found.append(wandb_internal_pb2.Record.FromString(data))
    return found


def history(found: list[wandb_internal_pb2.Record]) -> dict[str, list[tuple[int, float]]]:
    """What a run of wandb has logged, by step."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in found:
        if record.WhichOneof("record_type") != "history":
            continue
        items = record.history.item
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
        for tag, value in row.items():
            if "/" in tag:
                series.setdefault(tag, []).append((row["step"], value))
    return series


def check_wandb(directory: Path, first: list[dict], lines: list[dict]) -> str:
    """The killed start is a failed run, the resumed one goes on under the same name; its name."""
    paths = sorted((directory / "out/runs/wandb").glob("offline-run-*/*.wandb"))
    expect(len(paths) == 2, f"wandb has {paths}, expected two offline runs")
    killed, resumed = (records(path) for path in paths)
    runs = [next(r.run for r in found if r.HasField("run")) for found in (killed, resumed)]
    expect(runs[0].run_id == runs[1].run_id, f"runs {runs[0].run_id} and {runs[1].run_id}")
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    expect(config["training"]["lr"] == 1e-4, f"its configuration is {config}")
    ends = ([r.exit.exit_code for r in found if r.HasField("exit")] for found in (killed, resumed))
    codes = [code for end in ends for code in end]
    expect(codes == [1, 0], f"exit codes {codes}, expected 1 of the killed run and then 0")
    ours = expected(after_resume(lines))
    theirs = history(resumed)
    expect(set(ours) == set(theirs), f"wandb has {sorted(theirs)}, expected {sorted(ours)}")
    for tag in ours:
        expect(same(ours[tag], theirs[tag], 1e-12), f"wandb's {tag} is {theirs[tag]}, ours {ours[tag]}")
    seen = history(killed)["train/loss"]
    told = expected(first)["train/loss"]
    expect(same(told[: len(seen)], seen[: len(told)], 1e-12), "wandb's first run differs")
    # What was on its way to the client ends with the process.
    expect(len(seen) >= max(1, len(told) - 10), f"wandb saw {len(seen)} of {len(told)} lines")
    return runs[0].run_id


def after_resume(lines: list[dict]) -> list[dict]:
    """The lines of the second start: the clock of each start begins at 0."""
    train = [line for line in lines if line["type"] == "train"]
    pairs = zip(train, train[1:], strict=False)
    kept = next(a["step"] for a, b in pairs if b["elapsed_s"] < a["elapsed_s"])
    return [line for line in lines if line["step"] > kept]


def main() -> None:
    """Makes the run and reads it back."""
    reranker = str(Path(sys.argv[1]).resolve())
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RERANKER_PYTHON": sys.executable,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_data(directory)
        (directory / "t.yaml").write_text(CONFIG)
        first = train_twice(reranker, directory)
        lines = [line for line in lines_of(directory) if "step" in line]
        figures = check_tensorboard(directory, expected(lines))
        run = check_wandb(directory, [line for line in first if "step" in line], lines)
    print(f"{figures} figures over a kill and a resume: TensorBoard reads them, wandb run {run} too")


if __name__ == "__main__":
    main()
