"""What a checkpoint holds, and whether it is whole: for people and programs that look at one from outside."""

import math
from pathlib import Path
from typing import Any

import torch

from moe_mamba.checkpoint.divergence import read_next_step
from moe_mamba.checkpoint.manifest import Stored, read_description, read_index, read_manifest
from moe_mamba.checkpoint.storage import read_chunk
from moe_mamba.errors import UserError, brief
from moe_mamba.safetensors_header import DTYPE_NAMES

PART = 2**22  # elements of a tensor looked at together in float64
MODEL_KEYS = ("pattern", "repeat", "d_model", "d_state", "vocab_size")
LAYOUT_KEYS = ("tensor", "expert", "expert_tensor", "zero")


def inspect(path: Path) -> dict[str, Any]:
    """All that a step's folder says of itself.

    Args:
        path: a valid step's folder, as `store.resolve` gives it.

    Returns:
        A JSON object. ``step``, ``tokens``, ``validation_loss``, ``model``, ``layout`` (keys of the configuration)
        and ``processes`` are None where whoever saved did not say; ``files`` maps names to bytes; ``kinds`` sums up
        ``tensors`` (name -> shape, dtype, elements, bytes, chunks) by the first part of their names. ``next_step``
        says what the step that training made from it gave, and ``diverged`` whether that was not finite; None where
        it was not made.

    Raises:
        UserError: the folder is damaged; names the tensor or the file.
    """
    index, description = read_index(path), read_description(path)
    config = description.get("config") or {}
    tensors = {name: _summary(tensor) for name, tensor in sorted(index.items())}
    kinds: dict[str, dict[str, int]] = {}
    for name, tensor in tensors.items():
        kind = kinds.setdefault(name.partition("/")[0], {"tensors": 0, "elements": 0, "bytes": 0})
        for key, value in (("tensors", 1), ("elements", tensor["elements"]), ("bytes", tensor["bytes"])):
            kind[key] += value
    files = {name: size for name, (size, _) in read_manifest(path).items()}
    next_step = read_next_step(path)
    return {
        "path": str(path),
        "step": description.get("step"),
        "tokens": description.get("tokens"),
        "validation_loss": description.get("validation_loss"),
        "model": _keys(config.get("model"), MODEL_KEYS),
        "layout": _keys(config.get("parallel"), LAYOUT_KEYS),
        "processes": description.get("processes"),
        "next_step": None if next_step is None else str(next_step),
        "diverged": None if next_step is None else not next_step.is_finite,
        "kinds": kinds,
        "files": files,
        "tensors": tensors,
    }


def inspect_tensor(path: Path, name: str) -> dict[str, Any]:
    """One tensor of a valid step's folder: its chunks, and statistics in float64, read chunk by chunk.

    Returns:
        A JSON object: ``name``, ``shape``, ``dtype``, ``elements``, ``chunks`` (offsets, sizes, file and first byte of
        each); ``nan``, the number of values that are none; and of the others ``min``, ``max``, ``mean`` and ``norm``
        (None where there are no others).

    Raises:
        UserError: there is no such tensor, or the folder is damaged.
    """
    index = read_index(path)
    if name not in index:
        raise UserError(f"{path} has no tensor {brief(name)}: run without --tensor to list its tensors")
    tensor = index[name]
    chunks = [chunk._asdict() for chunk in tensor.chunks]
    return {"name": name} | _summary(tensor) | {"chunks": chunks} | _statistics(path, tensor)


def _summary(tensor: Stored) -> dict[str, Any]:
    elements = math.prod(tensor.shape)
    return {
        "shape": list(tensor.shape),
        "dtype": DTYPE_NAMES[tensor.dtype],
        "elements": elements,
        "bytes": elements * tensor.dtype.itemsize,
        "chunks": len(tensor.chunks),
    }


def _keys(section: Any, keys: tuple[str, ...]) -> dict[str, Any] | None:
    return {key: section[key] for key in keys if key in section} if isinstance(section, dict) else None


def _statistics(path: Path, tensor: Stored) -> dict[str, Any]:
    lowest, highest, total, squares, numbers, missing = math.inf, -math.inf, 0.0, 0.0, 0, 0
    for chunk in tensor.chunks:
        values = torch.empty(chunk.sizes, dtype=tensor.dtype)
        if not values.numel():
            continue
        with (path / chunk.file).open("rb") as stream:
            read_chunk(stream, chunk.start, chunk.sizes, (0,) * len(chunk.sizes), values, tensor.dtype)
        for part in values.flatten().split(PART):
            exact = part.double()
            exact = exact[~exact.isnan()]
            missing += part.numel() - exact.numel()
            numbers += exact.numel()
            if exact.numel():
                lowest, highest = min(lowest, exact.min().item()), max(highest, exact.max().item())
                total, squares = total + exact.sum().item(), squares + exact.square().sum().item()
    known = {"min": lowest, "max": highest, "mean": total / max(1, numbers), "norm": math.sqrt(squares)}
    return {"nan": missing} | (known if numbers else dict.fromkeys(known))
