#!/usr/bin/env python3
"""Writes tests/golden: what transformers and PyTorch compute, for the Rust tests to match.

The models are random and tiny; every reference value comes from transformers or from plain PyTorch
code in scripts/golden, never from this project's own. Runs in the environment that
`scripts/setup.sh --python` makes.

usage: make_golden.py            writes tests/golden anew, models included
       make_golden.py --check    recomputes from the models there and compares; writes nothing
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from golden import checkpoints, curve, decoders, lora, models, prompts, tables, text, trec

CASES = models.CASES | decoders.CASES
ROOT = Path(__file__).resolve().parent.parent / "tests" / "golden"
MADE_WITH = {
    "command": "python scripts/make_golden.py",
    "torch": torch.__version__,
    "transformers": transformers.__version__,
}
TOLERANCE = 1e-6
# fp32 training on another CPU rounds otherwise, and AdamW magnifies that.
CURVE_TOLERANCE = 1e-4


def case_description(case: models.Case) -> dict:
    """golden.json: the inputs and settings behind golden.safetensors."""
    description = {
        "made_with": MADE_WITH,
        "max_len": case.max_len,
        "pairs": [{"query": q, "content": d} for q, d in case.pairs],
        "labels": case.labels,
        "reference": "fp64 arithmetic on the fp32 weights, one pair at a time, evaluation mode, "
        "stored as fp32",
    }
    if case.curves:
        description["curves"] = {
            c.name: {
                "steps": curve.STEPS,
                "batches": curve.batches(c),
                "gradient_accumulation_steps": c.accumulation,
                "max_grad_norm": c.max_grad_norm,
            }
            for c in (curve.CURVES[name] for name in case.curves)
        }
        description["optimizer"] = {
            "name": "AdamW",
            "lr": curve.LEARNING_RATE,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": curve.WEIGHT_DECAY,
            "not_decayed": "biases and normalisation weights",
            "warmup_steps": curve.WARMUP_STEPS,
            "stable_steps": curve.STABLE_STEPS,
            "schedule": "t is the 0-based optimizer step, w = warmup_steps, s = stable_steps; "
            "lr*t/max(1,w) for t < w, lr for t < w+s, then lr*0.5*(1+cos(pi*p)) with "
            "p = (t-w-s)/max(1,steps-w-s)",
            "arithmetic": "fp32, pointwise_bce, no dropout; key.bias is left out of final.*: "
            "its exact gradient is 0, so AdamW follows rounding noise",
        }
    return description


def case_tensors(case: models.Case, directory: Path) -> dict[str, torch.Tensor]:
    """golden.safetensors, computed from the saved model in `directory`."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if case.prompt is not None:
        model = models.load_model(case, directory, torch.float64)
        return prompts.tensors(case.prompt, model, tokenizer, case.pairs, case.max_len)
    encoded = models.encode_pairs(case, tokenizer)
    tensors = models.input_tensors(encoded)
    if case.auto_class is not AutoModelForSequenceClassification:
        return tensors
    exact = models.load_model(case, directory, torch.float64)
    tensors |= models.loss_tensors(case, exact, encoded)
    for name in case.curves:
        model, run = models.load_model(case, directory, torch.float32), curve.CURVES[name]
        tensors |= curve.train(model, encoded, run)
        if case.final:
            tensors |= curve.final_tensors(model, run)
    return tensors


def adapter_tensors(name: str) -> dict[str, torch.Tensor]:
    """golden.safetensors of an adapter, computed from the saved one and its base."""
    base = lora.CASES[name].base
    encoded = models.encode_pairs(CASES[base], AutoTokenizer.from_pretrained(ROOT / base))
    return lora.tensors(CASES[base], ROOT / base, ROOT / name, encoded)


def write_json(path: Path, value: object) -> None:
    """Writes it indented, so that a change reads well in a diff."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def table_files() -> dict[str, object]:
    """The golden files that need no model, by name."""
    metric_definitions = {
        "ndcg@10": "gain 2^label - 1, discount log2(rank + 1), ideal over all hits; 0 without gain",
        "mrr@10": "1 / rank of the first hit with label > 0, 0 below rank 10",
        "map": "average precision over the whole list, label > 0 is relevant",
        "source": "trec_eval through pytrec-eval-terrier; nDCG also checked with scikit-learn",
    }
    return {
        "losses.json": {
            "made_with": MADE_WITH,
            "definitions": tables.LOSS_DEFINITIONS,
            "cases": tables.losses(),
        },
        "schedule.json": {"made_with": MADE_WITH, "cases": tables.schedules()},
        "metrics.json": {
            "made_with": MADE_WITH,
            "definitions": metric_definitions,
            "cases": tables.metrics(),
        },
        "trec.json": {"made_with": MADE_WITH, **trec.files()},
        "truncation.json": {
            "made_with": MADE_WITH,
            "rules": {
                "only_second": "transformers, truncation='only_second'",
                "long_query": "no room for the document (transformers refuses): it becomes empty, "
                "and the query is cut at its end so that the pair has max_len tokens",
            },
            "tokenizers": {
                case: text.truncation_cases(AutoTokenizer.from_pretrained(ROOT / case))
                for case in ("bert_tiny", "roberta_tiny", "xlm_roberta_odd")
            },
        },
    }


def write_golden(output: Path) -> None:
    """Computes every golden file from the models in tests/golden, into `output`."""
    for name, case in CASES.items():
        (output / name).mkdir(parents=True, exist_ok=True)
        save_file(case_tensors(case, ROOT / name), output / name / "golden.safetensors")
        write_json(output / name / "golden.json", case_description(case))
    for name in lora.CASES:
        (output / name).mkdir(parents=True, exist_ok=True)
        save_file(adapter_tensors(name), output / name / "golden.safetensors")
    (output / "torch_files").mkdir(exist_ok=True)
    for name in ("archive", "older"):
        tensors = checkpoints.expected_tensors(ROOT / "torch_files" / f"{name}.bin")
        save_file(tensors, output / "torch_files" / f"{name}.safetensors")
    for name, content in table_files().items():
        write_json(output / name, content)


def differences(fresh: object, stored: object, where: str) -> list[str]:
    """Paths at which two JSON values differ by more than rounding."""
    if isinstance(fresh, dict) and isinstance(stored, dict) and fresh.keys() == stored.keys():
        keys = fresh.keys() - {"made_with"}
        return [d for k in sorted(keys) for d in differences(fresh[k], stored[k], f"{where}.{k}")]
    if isinstance(fresh, list) and isinstance(stored, list) and len(fresh) == len(stored):
        pairs = enumerate(zip(fresh, stored, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}[{i}]")]
    if isinstance(fresh, float) and isinstance(stored, float):
        return [] if abs(fresh - stored) <= TOLERANCE else [where]
    return [] if fresh == stored else [where]


def tensor_differences(fresh: Path, stored: Path, where: str) -> list[str]:
    """Names of the tensors that differ by more than rounding."""
    new, old = load_file(fresh), load_file(stored)
    found = [f"{where}: {name}" for name in sorted(new.keys() ^ old.keys())]
    for name in sorted(new.keys() & old.keys()):
        trained = "curve" in name or name.startswith("final.")
        tolerance = CURVE_TOLERANCE if trained else TOLERANCE
        same_shape = new[name].shape == old[name].shape
        if not (same_shape and torch.allclose(new[name], old[name], rtol=0.0, atol=tolerance)):
            found.append(f"{where}: {name}")
    return found


def check() -> int:
    """Recomputes the golden files and compares. Returns the exit code."""
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary)
        write_golden(fresh)
        found, count = [], 0
        for path in sorted(p for p in fresh.rglob("*") if p.is_file()):
            name, count = path.relative_to(fresh), count + 1
            if path.suffix == ".safetensors":
                found += tensor_differences(path, ROOT / name, str(name))
            else:
                stored = json.loads((ROOT / name).read_text(encoding="utf-8"))
                found += differences(
                    json.loads(path.read_text(encoding="utf-8")), stored, str(name)
                )
    for difference in found:
        print(f"tests/golden/{difference} differs from what {MADE_WITH['command']} gives")
    print(f"{count} golden files recomputed, {len(found)} differences")
    return 1 if found else 0


def main() -> int:
    """Parses the arguments, writes or checks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.check:
        return check()
    for seed, (name, case) in enumerate(CASES.items(), start=1):
        models.write_model(case, ROOT / name, seed)
    for seed, (name, adapter) in enumerate(lora.CASES.items(), start=101):
        lora.write_adapter(adapter, ROOT / adapter.base, ROOT / name, seed)
    checkpoints.write_torch_files(ROOT / "torch_files")
    write_golden(ROOT)
    size = sum(p.stat().st_size for p in ROOT.rglob("*") if p.is_file())
    print(f"{ROOT}: {size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
