"""Safetensors files as Transformers shards them, written in parts: no tensor need be whole in memory."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moe_mamba.safetensors_header import TensorInfo, make_header

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_tensors(
    folder: Path,
    tensors: Sequence[TensorInfo],
    max_shard_bytes: int,
    read: Callable[[Sequence[TensorInfo]], Iterable[Tensor]],
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
    shards = _split_into_files(tensors, max_shard_bytes)
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


def _split_into_files(tensors: Sequence[TensorInfo], limit: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _write_file(
    path: Path, tensors: Sequence[TensorInfo], read: Callable[[Sequence[TensorInfo]], Iterable[Tensor]]
) -> None:
    header, (*_, size) = make_header(tensors, {"format": "pt"})
    with path.open("wb") as stream:
        stream.write(header)
        for part in read(tensors):
            stream.write(part.reshape(-1).view(torch.uint8).numpy().data)
    if (written := path.stat().st_size) != size:
        raise RuntimeError(f"{path.name} has {written} bytes of {size}")
