"""Adapters as peft makes them, over the tiny models, and what peft computes with them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from . import curve, models


@dataclass(frozen=True)
class Adapter:
    """An adapter: the case whose model it is for, and where it goes."""

    base: str
    target_modules: list[str]
    modules_to_save: list[str]
    r: int = 4
    alpha: int = 6


CASES = {
    # One of three stacked projections is left alone; every other product is by itself.
    "lora_bert": Adapter("bert_tiny", ["query", "value", "dense"], ["pooler"]),
    # One of two stacked projections; norms are trained beside the head.
    "lora_qwen2": Adapter("qwen2_tiny", ["q_proj", "v_proj", "up_proj", "down_proj"], ["norm"]),
}


def write_adapter(adapter: Adapter, base: Path, directory: Path, seed: int) -> None:
    """Saves a random adapter as peft does; B, which begins as zeros, is drawn too."""
    model = models.AutoModelForSequenceClassification.from_pretrained(base)
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=adapter.r,
        lora_alpha=adapter.alpha,
        target_modules=adapter.target_modules,
        modules_to_save=adapter.modules_to_save,
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(directory)
    (directory / "README.md").unlink()
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    # Relative to the repository, where tests run; a set has no order of its own.
    config["base_model_name_or_path"] = f"tests/golden/{base.name}"
    config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load(base: models.Case, base_dir: Path, directory: Path, dtype: torch.dtype) -> PeftModel:
    """The base model with the saved adapter, to be trained, in evaluation mode."""
    model = models.load_model(base, base_dir, torch.float32)
    return PeftModel.from_pretrained(model, directory, is_trainable=True).to(dtype).eval()


def saved_name(name: str) -> str:
    """A parameter's name as the adapter's file has it."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def tensors(
    base: models.Case, base_dir: Path, directory: Path, encoded: models.Encoded
) -> dict[str, torch.Tensor]:
    """`logits`, `loss`, `grad.{name}` of all that learns, `curve.*`, and `final.{name}` after it."""
    model = load(base, base_dir, directory, torch.float64)
    labels = torch.tensor(base.labels, dtype=torch.float64)
    logits = models.score(model, encoded)
    loss = models.pointwise_bce(logits, labels)
    loss.backward()
    found = {"logits": logits.detach().float(), "loss": loss.detach().float()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"grad.{saved_name(name)}"] = parameter.grad.float()
    model = load(base, base_dir, directory, torch.float32)
    found |= curve.train(model, encoded, curve.CURVES["curve"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"final.{saved_name(name)}"] = parameter.detach().clone()
    return found
