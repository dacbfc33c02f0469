#!/usr/bin/env python3
"""Memory of LoRA against full training: forecast for a decoder of 1.5 billion parameters, and
measured on one of the same family that is scaled down, beside its forecast.

The forecasts are `reranker check`'s; for them a model needs no more than a configuration, a tokenizer
and the header of its weights, which are zeros that take no room on the disk. The measured figures
are what the workers count (the last line of metrics.jsonl), on the CPU over Gloo; "process" is the
operating system's peak of a worker, libtorch included.

Ends with an error when a measured figure is off its forecast by more than 1 MB.

usage: lora_memory.py [--result FILE]
"""

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import BIN, ROOT, check_built, fail_with_log, machine, take_lines

TOKENIZER = ROOT / "tests/golden/qwen2_tiny"
KINDS = ("parameters", "gradients", "states")
LORA = ["lora.r=16", "lora.target_modules=all-linear"]
# The shape of Qwen2.5-1.5B, and a fourth of it in each direction.
LARGE = dict(hidden=1536, layers=28, heads=12, kv_heads=2, inner=8960, vocab=151936)
SMALL = dict(hidden=384, layers=7, heads=6, kv_heads=1, inner=2240, vocab=38000)
LINE = re.compile(
    r"memory per worker: parameters (\d+) MB, gradients (\d+) MB, optimizer states (\d+) MB, "
    r"gathered (\d+) MB, activations up to (\d+) MB; (\d+) MB in all"
)
WORDS = ("parameters", "gradients", "states", "gathered", "activations", "all")


@dataclass
class Row:
    """One run or forecast, in MB per worker."""

    model: str
    method: str
    strategy: str
    workers: int
    forecast: dict[str, int]
    held: dict[str, float] | None = None
    process: float | None = None

    def faults(self) -> list[str]:
        """What was held otherwise than foretold."""
        if self.held is None:
            return []
        name = f"{self.model}, {self.method}, {self.strategy}, {self.workers} workers"
        return [
            f"{name}: {kind} are {self.held[kind]:.1f} MB, forecast {self.forecast[kind]}"
            for kind in KINDS
            if abs(self.held[kind] - self.forecast[kind]) > 1
        ]


def shapes(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int) -> dict:
    """The tensors of transformers' Qwen2Model."""
    keys = hidden // heads * kv_heads
    result = {"model.embed_tokens.weight": [vocab, hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, out in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
            result[f"{at}.self_attn.{name}.weight"] = [out, hidden]
            result[f"{at}.self_attn.{name}.bias"] = [out]
        result[f"{at}.self_attn.o_proj.weight"] = [hidden, hidden]
        for name in ("gate_proj", "up_proj"):
            result[f"{at}.mlp.{name}.weight"] = [inner, hidden]
        result[f"{at}.mlp.down_proj.weight"] = [hidden, inner]
        for name in ("input_layernorm", "post_attention_layernorm"):
            result[f"{at}.{name}.weight"] = [hidden]
    return result


def write_model(directory: Path, shape: dict[str, int]) -> int:
    """Writes the directory, with zeros for weights; returns the number of parameters."""
    directory.mkdir()
    config = json.loads((TOKENIZER / "config.json").read_text())
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config |= dict(zip((*names, "intermediate_size", "vocab_size"), shape.values(), strict=True))
    config |= {"max_position_embeddings": 4096, "use_sliding_window": False}
    for stale in ("layer_types", "head_dim", "sliding_window"):
        config.pop(stale, None)
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((TOKENIZER / name).read_bytes())
    header, offset, parameters = {}, 0, 0
    for name, size in shapes(**shape).items():
        elements = size[0] * (size[1] if len(size) > 1 else 1)
        header[name] = {
            "dtype": "BF16", "shape": size, "data_offsets": [offset, offset + 2 * elements]
        }  # fmt: skip
        offset, parameters = offset + 2 * elements, parameters + elements
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return parameters


def settings(model: Path, data: Path, method: str, strategy: str, output: Path) -> list[str]:
    """The command line behind the command."""
    keys = [
        f"model_name_or_path={model}", "model_type=llm_decoder", f"train_dataset={data}",
        f"output_dir={output}", "val_dataset=", "max_len=128", "batch_size=4", "epochs=1",
        "mixed_precision=bf16", "lr=1e-4", *(LORA if method == "lora" else []),
    ]  # fmt: skip
    flags = [flag for key in keys for flag in ("--set", key)]
    parallel = ["--parallel", str(ROOT / f"config/deepspeed/{strategy}.yaml")]
    return ["--config", str(ROOT / "config/quickstart.yaml"), *parallel, *flags]


def forecast(command: list[str]) -> dict[str, int]:
    """What `reranker check` foretells."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = LINE.search(done.stdout)
    if done.returncode != 0 or found is None:
        sys.exit(f"{' '.join(command)}: {done.stderr}{done.stdout}")
    return dict(zip(WORDS, map(int, found.groups()), strict=True))


def measure(row: Row, command: list[str], directory: Path) -> None:
    """Trains, and reads what the workers counted."""
    directory.mkdir()
    log = directory / "log.txt"
    with log.open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=output, check=False)
    if done.returncode != 0:
        fail_with_log(command, log)
    memory = json.loads((directory / "output/runs/metrics.jsonl").read_text().splitlines()[-1])
    row.held = {kind: memory["held"][kind] / 1e6 for kind in KINDS}
    row.process = memory["peak_process"] / 1e6


def line(row: Row) -> str:
    """A row of the table."""
    cells = [row.model, row.method, row.strategy, str(row.workers)]
    cells += [str(row.forecast[word]) for word in WORDS]
    if row.held is not None:
        cells += [f"{row.held[kind]:.1f}" for kind in KINDS] + [f"{row.process:.0f}"]
    return "".join(f"{cell:>12}" for cell in cells)


def main() -> None:
    """Forecasts, measures, prints the table, checks it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=ROOT / "example_data/train_pointwise.jsonl")
    parser.add_argument("--result", type=Path, help="a JSON file to keep the figures in")
    arguments = parser.parse_args()
    check_built()
    rows: list[Row] = []
    held = ("held par.", "held grad.", "held states", "process")
    print("".join(f"{n:>12}" for n in ("model", "method", "strategy", "workers", *WORDS, *held)))
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for name, shape, worlds in (("large", LARGE, (1, 8)), ("small", SMALL, (1, 2))):
            parameters = write_model(root / name, shape)
            print(f"{name}: {parameters:,} parameters; MB per worker, bf16", flush=True)
            for workers in worlds:
                data = root / f"{name}-{workers}.jsonl"
                take_lines(arguments.data, 12 * workers, data)
                for strategy in ("zero0", "zero3"):
                    for method in ("full", "lora"):
                        place = root / f"{name}-{method}-{strategy}-{workers}"
                        words = settings(root / name, data, method, strategy, place / "output")
                        check = [str(BIN / "reranker"), "check", *words]
                        check += ["--gpus" if name == "large" else "--nproc", str(workers)]
                        row = Row(name, method, strategy, workers, forecast(check))
                        if name == "small":
                            launcher = [str(BIN / "rr-launch"), "--cpu", "--nproc", str(workers)]
                            measure(row, [*launcher, *words], place)
                        rows.append(row)
                        print(line(row), flush=True)
    if arguments.result:
        record = {
            "benchmark": Path(sys.argv[0]).stem,
            "command": " ".join(["python", *sys.argv]),
            "unit": "MB per worker",
            "lora": LORA,
            "rows": [asdict(row) for row in rows],
            "machine": machine(),
        }
        arguments.result.write_text(json.dumps(record, indent=1) + "\n")
    faults = [fault for row in rows for fault in row.faults()]
    print(f"{len(rows)} rows, {len(faults)} figures off their forecast", *faults, sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
