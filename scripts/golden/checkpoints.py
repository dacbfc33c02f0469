"""Weights as torch.save writes them: whole models, and a file of awkward tensors."""

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file

INDEX = "model.safetensors.index.json"


def to_torch_format(directory: Path) -> None:
    """Turns a saved model's safetensors files into `pytorch_model*.bin`, shards into shards."""
    renamed = {}
    for path in sorted(directory.glob("model*.safetensors")):
        target = "pytorch_" + path.with_suffix(".bin").name
        torch.save(load_file(path), directory / target)
        renamed[path.name] = target
        path.unlink()
    index = directory / INDEX
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {k: renamed[v] for k, v in content["weight_map"].items()}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(content, indent=1))
        index.unlink()


def awkward_tensors() -> OrderedDict[str, torch.Tensor]:
    """What a checkpoint may hold beside plain fp32 matrices."""
    torch.manual_seed(1)
    matrix, base = torch.randn(3, 4), torch.randn(6, 2)
    tensors = OrderedDict(
        matrix=matrix,
        tied=matrix,
        view=matrix.view(4, 3),
        half=torch.randn(5).half(),
        bfloat16=torch.randn(2, 3, 4).bfloat16(),
        double=torch.randn(3).double(),
        transposed=torch.randn(4, 3).t(),
        slice=base[2:5],
        column=base[:, 1],
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
        position_ids=torch.arange(4).unsqueeze(0),
    )
    # As state_dict() of a module has it, and a number where one expects tensors.
    tensors._metadata = OrderedDict([("", {"version": 1})])
    tensors["step"] = 7
    return tensors


def write_torch_files(directory: Path) -> None:
    """`archive.bin` and, of PyTorch before 1.6, `older.bin`."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = awkward_tensors()
    torch.save(tensors, directory / "archive.bin")
    torch.save(tensors, directory / "older.bin", _use_new_zipfile_serialization=False)


def expected_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a file as fp32, as PyTorch itself reads them."""
    loaded = torch.load(path, weights_only=True)
    return {
        name: value.detach().float().contiguous().clone()
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
