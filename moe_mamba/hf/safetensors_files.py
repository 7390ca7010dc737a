"""Safetensors files as Transformers shards them, written in parts: no tensor need be whole in memory.

The library's own writer wants every tensor of a file at once, so the format's head (8 bytes of length, then JSON) is
written here; everything reads the files with the library.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Header:
    """A tensor to write: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path,
    tensors: Sequence[Header],
    max_shard_bytes: int,
    read: Callable[[Sequence[Header]], Iterable[Tensor]],
) -> list[Path]:
    """Write ``model.safetensors``, or shards ``model-00001-of-00002.safetensors`` and their index.

    Args:
        folder: where to.
        tensors: in the order in which they are put into files.
        max_shard_bytes: bytes of tensors in a file; one larger tensor is a file of its own.
        read: gives the values of the tensors of a file, in the order asked for and in their dtype, each in one or more
            contiguous parts in row-major order.

    Returns:
        The files of tensors.
    """
    shards = _cut(tensors, max_shard_bytes)
    names = [ONE_FILE]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        # Wide dtypes first keeps every tensor at a multiple of its element's size.
        _write_file(folder / name, sorted(shard, key=lambda tensor: -tensor.dtype.itemsize), read)
    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / name for name in names]


def _cut(tensors: Sequence[Header], limit: int) -> list[list[Header]]:
    shards: list[list[Header]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _write_file(path: Path, tensors: Sequence[Header], read: Callable[[Sequence[Header]], Iterable[Tensor]]) -> None:
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        head[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + tensor.bytes],
        }
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for part in read(tensors):
            stream.write(part.reshape(-1).view(torch.uint8).numpy().data)
    if (size := path.stat().st_size) != 8 + len(text) + end:
        raise RuntimeError(f"{path.name} has {size} bytes of {8 + len(text) + end}")
