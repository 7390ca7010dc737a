"""Tensors out of a Hugging Face folder, one at a time: safetensors, or the torch file that state-spaces publishes.

No pickle is executed: `pytorch_model.bin` is one, and goes through torch's restricted reader, which builds tensors and
refuses everything else. Where both are there, safetensors are read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_mamba import json_file
from moe_mamba.errors import UserError, brief
from moe_mamba.hf.safetensors_files import INDEX, ONE_FILE
from moe_mamba.json_file import Record, Text
from moe_mamba.safetensors_header import DTYPE_NAMES

TORCH_FILE = "pytorch_model.bin"
FIX = "fetch the folder again"
MOST_SHARED = 2  # times the size of a torch file: a tied head is there twice, and strides of 0 could claim anything


class _Index(Record):
    weight_map: dict[str, Text]


_INDEX = TypeAdapter(_Index)


@dataclass(frozen=True)
class Stored:
    """A tensor in a folder.

    Attributes:
        shape: its sizes.
        dtype: F32, F16, BF16, or whatever else a safetensors file says.
        read: gives it, on the CPU; a view of the file, read where it is touched.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; NaN and Infinity are taken, which Transformers writes.

    Raises:
        UserError: it is missing, truncated, or no object.
    """
    content = json_file.read_json(path, FIX, allow_nan=True)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: {FIX}")
    return content


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Name -> tensor, of all that the folder's weight files hold; only their heads are read.

    Raises:
        UserError: there is no such file, a shard or a tensor is missing, or a file is truncated or refused.
    """
    if (folder / ONE_FILE).is_file():
        return _safetensors(folder / ONE_FILE)
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if (folder / TORCH_FILE).is_file():
        return _torch_file(folder / TORCH_FILE)
    raise UserError(
        f"{folder} holds no supported weights: it needs {ONE_FILE}, {INDEX} with its shards, or {TORCH_FILE}"
    )


def _safetensors(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            return {
                name: Stored(tuple(slice.get_shape()), slice.get_dtype(), partial(_read_safetensor, path, name))
                for name, slice in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({brief(error, 100)}): {FIX}") from None


def _read_safetensor(path: Path, name: str) -> Tensor:
    """One tensor; the file is opened only for it, so that no more of it stays in memory."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _sharded(folder: Path) -> dict[str, Stored]:
    path = folder / INDEX
    index = json_file.check(read_json(path), _INDEX, path, FIX).weight_map
    found: dict[str, Stored] = {}
    here = {path.name for path in folder.iterdir() if path.is_file()}  # an index may name files outside the folder
    for shard in sorted(set(index.values())):
        if shard not in here:
            raise UserError(f"{folder} has no file {brief(shard)}, but {INDEX} names it: {FIX}")
        tensors = _safetensors(folder / shard)
        if twice := found.keys() & tensors.keys():
            raise UserError(f"{folder / shard} has the tensor {brief(min(twice))}, as another file has: {FIX}")
        found |= tensors
    missing = [name for name in index if name not in found]
    if missing:
        raise UserError(f"{folder / index[missing[0]]} has no tensor {brief(missing[0])}, which {INDEX} names: {FIX}")
    return found


def _torch_file(path: Path) -> dict[str, Stored]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a reader of pickles has an error for every way in which a file is none
        raise UserError(
            f"{path} is truncated, or refused because it holds more than tensors ({type(error).__name__}: "
            f"{brief(str(error).partition('.')[0], 60)}): if you trust it, convert it to safetensors"
        ) from None
    if not isinstance(content, dict) or not all(isinstance(name, str) and _is_plain(content[name]) for name in content):
        raise UserError(f"{path} is not a mapping of names to plain tensors: give a folder with {ONE_FILE}")
    size = path.stat().st_size
    if sum(tensor.nbytes for tensor in content.values()) > MOST_SHARED * size:
        raise UserError(f"{path} has tensors larger than its {size:,} bytes: give a folder with {ONE_FILE}")
    return {
        name: Stored(tuple(tensor.shape), DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), partial(_itself, tensor))
        for name, tensor in content.items()
    }


def _is_plain(value: object) -> bool:
    """Whether it is a tensor whose values are there, neither sparse nor on the meta device."""
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def _itself(tensor: Tensor) -> Tensor:
    return tensor
