"""Say what is inside a checkpoint, and whether it is valid."""

import json as json_format
import math
from collections.abc import Sequence
from typing import Any

from moe_mamba.checkpoint.inspection import inspect, inspect_tensor
from moe_mamba.checkpoint.store import resolve


def main(checkpoint: str, tensor: str | None = None, json: bool = False) -> None:
    """List what a checkpoint holds, after checking it: checksums, and that the chunks of each tensor make it up.

    Ends with "valid", or with exit code 2 and one line that names the damage, or the tensor that holds NaN or Inf.

    Args:
        checkpoint: a run's folder (its newest valid checkpoint is used) or one of its checkpoints/step-... folders.
        tensor: show only this tensor: where its chunks lie, and statistics of its values.
        json: print one JSON object instead.
    """
    path = resolve(checkpoint, finite=tensor is None)
    if tensor is not None:
        found = inspect_tensor(path, tensor)
        show = tensor_table
        is_valid = not found["nan"] and all(math.isfinite(found[key] or 0) for key in ("min", "max"))
    else:
        found = inspect(path)
        show = table
        is_valid = True
    end = "valid" if is_valid else f"{tensor} holds NaN or Inf"
    print(json_format.dumps(found | {"valid": is_valid}) if json else f"{show(found)}\n\n{path}: {end}")


def table(found: dict[str, Any]) -> str:
    """A checkpoint for people, from what `inspect` found."""
    model, layout, loss = found["model"], found["layout"], found["validation_loss"]
    known = {
        "step": _number(found["step"]),
        "tokens": _number(found["tokens"]),
        "validation loss": None if loss is None else f"{loss:.4f}",
        "model": None if model is None else _pairs(model),
        "layout": None if layout is None else _pairs(layout),
        "processes": _number(found["processes"]),
        "next step": f"{found['next_step']}: it has diverged" if found["diverged"] else found["next_step"],
    }
    kinds = [
        (f"  {name}", *(f"{kind[key]:,}" for key in ("tensors", "elements", "bytes")))
        for name, kind in found["kinds"].items()
    ]
    tensors = [
        (f"  {name}", _by(tensor["shape"]), tensor["dtype"], f"{tensor['elements']:,}", f"{tensor['chunks']:,}")
        for name, tensor in found["tensors"].items()
    ]
    sections: list[Sequence[tuple[str, ...]]] = [
        [(name, value) for name, value in known.items() if value is not None],
        [("files", "bytes"), *((f"  {name}", f"{size:,}") for name, size in found["files"].items())],
        [("kinds", "tensors", "elements", "bytes"), *kinds],
        [("tensors", "shape", "dtype", "elements", "chunks"), *tensors],
    ]
    return "\n\n".join(map(_columns, sections))


def tensor_table(found: dict[str, Any]) -> str:
    """A tensor for people, from what `inspect_tensor` found."""
    known = [(key, f"{found[key]:.6g}") for key in ("min", "max", "mean", "norm") if found[key] is not None]
    head = [("shape", _by(found["shape"])), ("dtype", found["dtype"]), ("elements", f"{found['elements']:,}")]
    chunks = [
        (f"  {_by(chunk['sizes'])}", f"at {chunk['offsets']}", chunk["file"], f"from byte {chunk['start']:,}")
        for chunk in found["chunks"]
    ]
    missing = ("NaN", f"{found['nan']:,}")
    return f"{found['name']}\n{_columns([*head, *known, missing])}\nchunks\n{_columns(chunks)}"


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _by(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes)) or "scalar"


def _pairs(section: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in section.items())


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
