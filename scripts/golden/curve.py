"""A plain PyTorch training loop: twenty optimizer steps, with and without clipping."""

import math
from dataclasses import dataclass

import torch

from .models import Encoded, pointwise_bce, score
from .text import LABELS

STEPS = 20
PAIRS_PER_BATCH = 4
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
WARMUP_STEPS = int(0.1 * STEPS)
STABLE_STEPS = 0


@dataclass
class Curve:
    """One training run: its name in the golden file, and how it differs from the plain one."""

    name: str
    accumulation: int = 1
    max_grad_norm: float | None = None


CURVES = {
    curve.name: curve
    for curve in [Curve("curve"), Curve("curve_clip", accumulation=2, max_grad_norm=0.5)]
}


def batches(curve: Curve) -> list[list[int]]:
    """Pair indices of each batch: the pairs in turn, with a stride that varies the mixture."""
    count = STEPS * curve.accumulation
    order = [(5 * i + i // len(LABELS)) % len(LABELS) for i in range(count * PAIRS_PER_BATCH)]
    return [order[i * PAIRS_PER_BATCH : (i + 1) * PAIRS_PER_BATCH] for i in range(count)]


def learning_rate(step: int) -> float:
    """The rate of optimizer step `step`, 0-based: linear warm-up, constant, half cosine to 0."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * step / max(1, WARMUP_STEPS)
    decay_from = WARMUP_STEPS + STABLE_STEPS
    if step < decay_from:
        return LEARNING_RATE
    progress = (step - decay_from) / max(1, STEPS - decay_from)
    return LEARNING_RATE * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW with decay on everything but biases and normalisation weights, which are vectors."""
    decayed, rest = [], []
    for parameter in model.parameters():
        (rest if parameter.dim() == 1 else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": WEIGHT_DECAY},
        {"params": rest, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8)


def train(model: torch.nn.Module, encoded: Encoded, curve: Curve) -> dict[str, torch.Tensor]:
    """Trains `model` in place; returns `{curve}.loss`, `.lr` and `.grad_norm` [20].

    The loss of a step is the mean over all its pairs; the norm is the one before clipping.
    """
    optimizer = build_optimizer(model)
    dtype = next(model.parameters()).dtype
    labels = torch.tensor(LABELS, dtype=dtype)
    plan = batches(curve)
    losses, rates, norms = [], [], []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.zero_grad()
        total = 0.0
        for batch in plan[step * curve.accumulation : (step + 1) * curve.accumulation]:
            logits = score(model, [encoded[i] for i in batch])
            loss = pointwise_bce(logits, labels[batch]) / curve.accumulation
            loss.backward()
            total += loss.item()
        limit = math.inf if curve.max_grad_norm is None else curve.max_grad_norm
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item())
        optimizer.step()
        losses.append(total)
        rates.append(learning_rate(step))
    return {
        f"{curve.name}.loss": torch.tensor(losses),
        f"{curve.name}.lr": torch.tensor(rates),
        f"{curve.name}.grad_norm": torch.tensor(norms),
    }


def final_tensors(model: torch.nn.Module, curve: Curve) -> dict[str, torch.Tensor]:
    """`final.{name}` after `curve`, `{curve}.final.{name}` after another one."""
    prefix = "final" if curve.name == "curve" else f"{curve.name}.final"
    # A key bias adds the same to all scores of a softmax row: its true gradient is 0, and AdamW
    # turns what rounding leaves of it into steps of full size. Nothing to compare.
    return {
        f"{prefix}.{name}": parameter.detach().float().clone()
        for name, parameter in model.named_parameters()
        if not name.endswith("key.bias")
    }
