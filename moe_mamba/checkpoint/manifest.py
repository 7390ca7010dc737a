"""What a checkpoint's folder says of itself: manifest, index and description, all JSON, and whether it is valid.

A step's folder holds
    rank-00000.safetensors  the chunks of tensors that rank 0 wrote (any safetensors reader opens it)
    index.json              logical tensor -> dtype, shape, and where each of its chunks lies
    description.json        everything that is not a tensor
    manifest.json           format version; size and checksum of every other file: written last
and, once training went on from there, next_step.json (divergence.py).
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from moe_mamba.errors import UserError
from moe_mamba.safetensors_header import DTYPES

VERSION = 1
MANIFEST, INDEX, DESCRIPTION = "manifest.json", "index.json", "description.json"
SLAB = 32 * 2**20  # bytes copied at once: a save or a load needs no more memory than this beside the tensors


class DamagedError(UserError):
    """A file of a checkpoint is missing, truncated, or not what was written; an older checkpoint may do."""


class Chunk(NamedTuple):
    """A stored part of a logical tensor: `sizes` elements at `offsets`, from byte `start` of `file` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int


@dataclass(frozen=True)
class Stored:
    """A logical tensor as the index knows it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: use another checkpoint") from None
    except (ValueError, RecursionError):
        raise DamagedError(f"{path} is not JSON: use another checkpoint") from None


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, checksum) of a step's folder.

    Raises:
        DamagedError: the manifest is missing or truncated.
        UserError: it was written in another format version.
    """
    content = _read_json(folder / MANIFEST)
    try:
        version = content["version"]
        files = {name: (int(record["bytes"]), str(record["xxh3"])) for name, record in content["files"].items()}
        names_are_plain = all(Path(name).name == name for name in files)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DamagedError(f"{folder / MANIFEST} is not a checkpoint's manifest: use another checkpoint") from None
    if version != VERSION:
        raise UserError(
            f"{folder} has checkpoint format {version}, but this program reads {VERSION}: use the version that wrote it"
        )
    if not names_are_plain or not {INDEX, DESCRIPTION} <= files.keys():
        raise DamagedError(f"{folder / MANIFEST} is not a checkpoint's manifest: use another checkpoint")
    return files


def is_marked_finite(folder: Path) -> bool:
    """Whether the writer of a valid manifest says that nothing in it is NaN or Inf; older versions did not look."""
    return _read_json(folder / MANIFEST).get("finite") is True


def read_index(folder: Path) -> dict[str, Stored]:
    """Logical tensor -> dtype, shape and chunks; every chunk is checked to lie inside its tensor and its file."""
    files = read_manifest(folder)
    check_sizes(folder, files)
    content = _read_json(folder / INDEX)
    try:
        index = {name: _stored(entry) for name, entry in content.items()}
        is_valid = all(
            tensor.chunks and all(_lies_inside(chunk, tensor, files) for chunk in tensor.chunks)
            for tensor in index.values()
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise DamagedError(f"{folder / INDEX} does not fit the checkpoint's files: use another checkpoint")
    return index


def _stored(entry: dict[str, Any]) -> Stored:
    chunks = [
        Chunk(
            tuple(map(int, chunk["offsets"])), tuple(map(int, chunk["sizes"])), str(chunk["file"]), int(chunk["start"])
        )
        for chunk in entry["boxes"]
    ]
    return Stored(DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), chunks)


def _lies_inside(chunk: Chunk, tensor: Stored, files: dict[str, tuple[int, str]]) -> bool:
    length = math.prod(chunk.sizes) * tensor.dtype.itemsize
    return 0 <= chunk.start <= files[chunk.file][0] - length and all(
        min(offset, size) >= 0 and offset + size <= whole
        for offset, size, whole in zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
    )


def read_description(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; of a valid manifest, but without reading the tensors.

    Raises:
        UserError: the checkpoint is damaged or of another format.
    """
    check_sizes(folder, read_manifest(folder))
    description = _read_json(folder / DESCRIPTION)
    if not isinstance(description, dict):
        raise DamagedError(f"{folder / DESCRIPTION} is not a checkpoint's description: use another checkpoint")
    return description


def check_sizes(folder: Path, files: dict[str, tuple[int, str]]) -> None:
    """Raise a DamagedError that names the first file that is missing or has another size than was written."""
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing: use another checkpoint")
        if (found := path.stat().st_size) != size:
            raise DamagedError(f"{path} has {found} bytes, {size} were written: use another checkpoint")


def verify(folder: Path) -> None:
    """Check sizes and checksums of all files.

    Raises:
        DamagedError: names the file.
        UserError: the checkpoint is of another format version.
    """
    files = read_manifest(folder)
    check_sizes(folder, files)
    with ThreadPoolExecutor(8) as pool:  # hashing is faster than most disks give one reader
        checksums = pool.map(_checksum, [folder / name for name in files])
        for (name, (_, expected)), found in zip(files.items(), checksums, strict=True):
            if found != expected:
                raise DamagedError(
                    f"{folder / name} is not what was written (its checksum differs): use another checkpoint"
                )


def _checksum(path: Path) -> str:
    digest, buffer = xxhash.xxh3_64(), bytearray(2**20)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
