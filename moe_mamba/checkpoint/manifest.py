"""What a checkpoint's folder says of itself: manifest, index and description, all JSON, and whether it is valid.

A step's folder holds
    rank-00000.safetensors  the chunks of tensors that rank 0 wrote (any safetensors reader opens it)
    index.json              logical tensor -> dtype, shape, and where each of its chunks lies
    description.json        everything that is not a tensor
    manifest.json           format version; size and checksum of every other file: written last
and, once training went on from there, next_step.json (divergence.py).
"""

import math
import stat
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import xxhash
from pydantic import Field, TypeAdapter

from moe_mamba.checkpoint.chunks import fault_of_cover
from moe_mamba.checkpoint.description import Description
from moe_mamba.errors import UserError, brief
from moe_mamba.json_file import LARGEST, Record, Size, Text, check, read_json
from moe_mamba.safetensors_header import DTYPES, TensorInfo, fault_of_header

VERSION = 1
OTHER = "use another checkpoint"  # the fix of what is damaged
INDEX_LIMIT = 2**30  # bytes: a chunk is about a hundred
DIMENSIONS = 8  # of a tensor: ours have three
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


class _FileRecord(Record):
    bytes: Size
    xxh3: Annotated[Text, Field(pattern="^[0-9a-f]{16}$")]


_FileName = Annotated[Text, Field(pattern=r"^(rank-\d{5,9}\.safetensors|index\.json|description\.json)$")]
_Sizes = Annotated[list[Size], Field(max_length=DIMENSIONS)]


class _Manifest(Record):
    files: dict[_FileName, _FileRecord]


class _Box(Record):
    offsets: _Sizes
    sizes: _Sizes
    file: Text
    start: Size


class _Entry(Record):
    dtype: Literal[tuple(DTYPES)]  # type: ignore[valid-type]
    shape: _Sizes
    boxes: Annotated[list[_Box], Field(min_length=1)]


_MANIFEST, _INDEX, _DESCRIPTION = TypeAdapter(_Manifest), TypeAdapter(dict[str, _Entry]), TypeAdapter(Description)


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """File name -> (bytes, checksum) of a step's folder.

    Raises:
        DamagedError: the manifest is missing or damaged.
        UserError: it was written in another format version.
    """
    path = folder / MANIFEST
    content = read_json(path, OTHER, DamagedError)
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is int and version != VERSION:
        raise UserError(
            f"{folder} has checkpoint format {brief(version, 20)}, but this program reads {VERSION}: "
            "use the version that wrote it"
        )
    manifest = check(content, _MANIFEST, path, OTHER, DamagedError)
    files = {name: (record.bytes, record.xxh3) for name, record in manifest.files.items()}
    if type(version) is not int or not {INDEX, DESCRIPTION} <= files.keys():
        raise DamagedError(f"{path} is not a checkpoint's manifest: {OTHER}")
    return files


def is_marked_finite(folder: Path) -> bool:
    """Whether the writer of a valid manifest says that nothing in it is NaN or Inf; older versions did not look."""
    return read_json(folder / MANIFEST, OTHER, DamagedError).get("finite") is True


def read_index(folder: Path, is_checked: bool = False) -> dict[str, Stored]:
    """Logical tensor -> dtype, shape and chunks; each tensor has as many elements as its chunks, which its files hold.

    So whoever allocates what the index says allocates no more than the files hold.

    Args:
        folder: the step's.
        is_checked: another rank looks at the files' sizes, which are as many as ranks: if all did, the file system
            would be asked as many times as the square of their number.

    Raises:
        DamagedError: the index is damaged, or does not fit the files' sizes.
        UserError: the checkpoint is of another format version.
    """
    path, files = folder / INDEX, read_manifest(folder)
    check_sizes(folder, {INDEX: files[INDEX]} if is_checked else files)
    entries = check(read_json(path, OTHER, DamagedError, limit=INDEX_LIMIT), _INDEX, path, OTHER, DamagedError)
    index = {name: _stored(entry) for name, entry in entries.items()}
    stored: dict[str, int] = defaultdict(int)
    for name, tensor in index.items():
        if fault := _fault_of_sizes(tensor, files):
            raise DamagedError(f"{path}: the chunks of {brief(name)} {fault}: {OTHER}")
        for chunk in tensor.chunks:
            stored[chunk.file] += math.prod(chunk.sizes) * tensor.dtype.itemsize
    for file, size in stored.items():
        if size > files[file][0]:
            raise DamagedError(f"{path}: chunks of {size:,} bytes are more than {file} holds: {OTHER}")
    return index


def _stored(entry: _Entry) -> Stored:
    chunks = [Chunk(tuple(box.offsets), tuple(box.sizes), box.file, box.start) for box in entry.boxes]
    return Stored(DTYPES[entry.dtype], tuple(entry.shape), chunks)


def _fault_of_sizes(tensor: Stored, files: dict[str, tuple[int, str]]) -> str | None:
    """What keeps the chunks of a tensor from lying in it and in their files, as far as sizes tell; None: nothing."""
    if math.prod(max(1, size) for size in tensor.shape) * tensor.dtype.itemsize > LARGEST:
        return f"have the shape {brief(list(tensor.shape))}, which is too large"
    for chunk in tensor.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape):
            return "have other dimensions than it"
        extents = zip(chunk.offsets, chunk.sizes, tensor.shape, strict=True)
        if any(offset + size > whole for offset, size, whole in extents):
            return "do not lie inside it"
        length = math.prod(chunk.sizes) * tensor.dtype.itemsize
        if chunk.file not in files or chunk.start + length > files[chunk.file][0]:
            return f"do not lie in the checkpoint's files ({brief(chunk.file, 40)})"
    volume, whole = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.shape)
    return None if volume == whole else f"hold {volume:,} of {whole:,} elements"


def read_description(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors; of a valid manifest, but without reading the tensors.

    Raises:
        UserError: the checkpoint is damaged or of another format.
    """
    path = folder / DESCRIPTION
    check_sizes(folder, read_manifest(folder))
    content: dict[str, Any] = read_json(path, OTHER, DamagedError, allow_nan=True)
    check(content, _DESCRIPTION, path, OTHER, DamagedError)
    return content


def check_sizes(folder: Path, files: dict[str, tuple[int, str]]) -> None:
    """Raise a DamagedError that names the first file that is missing or has another size than was written."""
    for name, (size, _) in files.items():
        path = folder / name
        try:
            found = path.stat()
        except (OSError, ValueError):
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{path} is missing, or no file: {OTHER}")
        if found.st_size != size:
            raise DamagedError(f"{path} has {found.st_size:,} bytes, {size:,} were written: {OTHER}")


def verify(folder: Path) -> None:
    """Check sizes and checksums of all files, that they fit one another, and that the chunks make up the tensors.

    Raises:
        DamagedError: names the file, and perhaps the tensor.
        UserError: the checkpoint is of another format version.
    """
    files = read_manifest(folder)
    check_sizes(folder, files)
    with ThreadPoolExecutor(8) as pool:  # hashing is faster than most disks give one reader
        checksums = pool.map(_checksum, [folder / name for name in files])
        for (name, (_, expected)), found in zip(files.items(), checksums, strict=True):
            if found != expected:
                raise DamagedError(f"{folder / name} is not what was written (its checksum differs): {OTHER}")
    # Checksums say that nothing has changed by chance. Whoever edits a file can correct them; so nothing is believed.
    step = read_description(folder).get("step")
    if step is not None and folder.name.startswith("step-") and folder.name != f"step-{step:08d}":
        raise DamagedError(f"{folder / DESCRIPTION} is of step {step}: {OTHER}, or give the folder its name again")
    index = read_index(folder)
    for name, tensor in index.items():
        if fault := fault_of_cover(tensor.shape, [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]):
            raise DamagedError(f"{folder / INDEX}: the chunks of {brief(name)} {fault}: {OTHER}")
    _check_headers(folder, index, [name for name in files if name not in (INDEX, DESCRIPTION)])


def name_of_chunk(name: str, shape: tuple[int, ...], chunk_offsets: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    """The name of a chunk in its file: the tensor's, and where it begins if it is not the whole."""
    return name if sizes == shape else f"{name}@{','.join(map(str, chunk_offsets))}"


def _check_headers(folder: Path, index: dict[str, Stored], files: list[str]) -> None:
    """Compare the header of each file of tensors with the index, so that neither is believed alone."""
    expected: dict[str, dict[str, tuple[TensorInfo, int]]] = {file: {} for file in files}
    for name, tensor in index.items():
        for chunk in tensor.chunks:
            part = name_of_chunk(name, tensor.shape, chunk.offsets, chunk.sizes)
            expected[chunk.file][part] = TensorInfo(part, tensor.dtype, chunk.sizes), chunk.start
    for file, tensors in expected.items():
        if fault := fault_of_header(folder / file, tensors):
            raise DamagedError(f"{folder / file} and {INDEX} differ ({fault}): {OTHER}")


def _checksum(path: Path) -> str:
    digest, buffer = xxhash.xxh3_64(), bytearray(2**20)
    try:
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror}): {OTHER}") from None
    return digest.hexdigest()
