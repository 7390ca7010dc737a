"""How a checkpoint is written and read: safetensors and JSON, and never a pickle.

`Writer` and `Reader` stand in for the storage of torch.distributed.checkpoint, whose own writes and loads pickles.
"""

import dataclasses
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from moe_mamba.atomic_file import synchronize
from moe_mamba.checkpoint.manifest import (
    DESCRIPTION,
    INDEX,
    MANIFEST,
    SLAB,
    VERSION,
    Chunk,
    DamagedError,
    name_of_chunk,
    read_index,
)
from moe_mamba.safetensors_header import DTYPE_NAMES, TensorInfo, make_header


@dataclass(frozen=True)
class Written:
    """The file that a rank wrote: its size and checksum, and the chunks of each tensor in it."""

    file: str
    bytes: int
    checksum: str
    chunks: dict[str, list[Chunk]]


class HashedFile:
    """A file that is hashed while it is written, so that no byte is read twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream = path.open("xb")
        self.hash = xxhash.xxh3_64()
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self.stream.write(data)
        self.hash.update(data)
        self.bytes += len(data)

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.stream.close()
        if kind is None:
            synchronize(self.path)


def _row_bytes(sizes: Sequence[int], dtype: torch.dtype) -> int:
    return max(1, math.prod(sizes[1:]) * dtype.itemsize)


def _bytes_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # one element may have any stride, and views refuse that
    return flat.view(torch.uint8).numpy().data


def _slabs(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of `tensor` in row-major order, at most `SLAB` at once; views of contiguous CPU memory."""
    tensor = tensor.reshape(1) if tensor.dim() == 0 else tensor
    row = _row_bytes(tensor.shape, tensor.dtype)
    if row > SLAB:
        for part in tensor:
            yield from _slabs(part)
    elif tensor.numel():
        for part in tensor.split(max(1, SLAB // row)):
            yield _bytes_view(part.cpu().contiguous())


def read_chunk(
    stream: Any, start: int, sizes: Sequence[int], offsets: Sequence[int], target: Tensor, dtype: torch.dtype
) -> None:
    """Fill `target` with the part at `offsets` of a stored chunk of `sizes` that begins at byte `start` of `stream`.

    Only rows (of the first dimension) that the part lies in are read, but whole, slab by slab, and the part is taken
    from them in memory: a part of their columns costs a read of them all. Rows too large for a slab are entered one
    by one, so that a shard along an inner dimension of stacked experts reads only what it needs.

    Raises:
        DamagedError: the file ends before the chunk does.
    """
    if not sizes:
        sizes, offsets, target = (1,), (0,), target.reshape(1)
    row, rows = _row_bytes(sizes, dtype), target.shape[0]
    if row > SLAB:
        for position in range(rows):
            row_start = start + (offsets[0] + position) * row
            read_chunk(stream, row_start, sizes[1:], offsets[1:], target[position], dtype)
        return
    step = max(1, SLAB // row)
    for first in range(0, rows, step):
        slab = torch.empty((min(step, rows - first), *sizes[1:]), dtype=dtype)
        stream.seek(start + (offsets[0] + first) * row)
        if stream.readinto(_bytes_view(slab)) != slab.nbytes:
            raise DamagedError(f"{stream.name} ends too early: use another checkpoint")
        for dimension in range(1, len(sizes)):
            slab = slab.narrow(dimension, offsets[dimension], target.shape[dimension])
        target[first : first + step].copy_(slab)


def _header(items: list[WriteItem]) -> tuple[bytes, list[int]]:
    """The header of a safetensors file with `items` in order, and the byte that each item starts at."""
    tensors = []
    for item in items:
        assert item.tensor_data is not None
        chunk, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
        shape, offsets, sizes = tuple(item.tensor_data.size), tuple(chunk.offsets), tuple(chunk.sizes)
        tensors.append(TensorInfo(name_of_chunk(item.index.fqn, shape, offsets, sizes), dtype, sizes))
    header, starts = make_header(tensors)
    return header, starts[:-1]


def _write_chunk(file: HashedFile, item: WriteItem, planner: SavePlanner, start: int) -> Chunk:
    """Append a chunk; what was read only for it is let go on return, before the next one is read."""
    data = planner.resolve_data(item)
    assert isinstance(data, Tensor) and item.index.offset is not None
    for slab in _slabs(data.detach()):
        file.write(slab)
    return Chunk(tuple(item.index.offset), tuple(data.shape), file.path.name, start)


class Writer(StorageWriter):
    """Storage of torch.distributed.checkpoint: a safetensors file per rank, then JSON by the coordinator.

    The manifest says that all numbers are finite: whoever saves has looked.

    Args:
        folder: an empty folder that every rank sees.
        description: what is not a tensor, JSON.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder = folder
        self.description = description

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Every rank knows its file from the plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """A rank's plan stands as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name each rank's file."""
        return [
            dataclasses.replace(plan, storage_data=f"rank-{rank:05d}.safetensors") for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Stream this rank's chunks into its file (none without chunks); largest elements first, as alignment wants."""
        results: list[WriteResult] = []
        items = sorted(plan.items, key=lambda item: -item.tensor_data.properties.dtype.itemsize)  # type: ignore[union-attr]
        if items:
            name, chunks = plan.storage_data, defaultdict(list)
            header, starts = _header(items)
            with HashedFile(self.folder / name) as file:
                file.write(header)
                for item, start in zip(items, starts, strict=True):
                    assert file.bytes == start, f"{item.index} has another size than its plan"
                    chunks[item.index.fqn].append(_write_chunk(file, item, planner, start))
            written = Written(name, file.bytes, file.hash.hexdigest(), dict(chunks))
            results = [WriteResult(MetadataIndex(name), file.bytes, written)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write index, description and, last, the manifest; check that every file has the size it should have."""
        written: list[Written] = [result.storage_data for rank in results for result in rank]
        index = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            chunks = [chunk._asdict() for file in written for chunk in file.chunks.get(name, ())]
            index[name] = {"dtype": DTYPE_NAMES[tensor.properties.dtype], "shape": list(tensor.size), "boxes": chunks}
        files = {file.file: {"bytes": file.bytes, "xxh3": file.checksum} for file in written}
        for name, content in ((INDEX, index), (DESCRIPTION, self.description)):
            files[name] = self._write_json(name, content)
        for name, record in files.items():
            if (size := (self.folder / name).stat().st_size) != record["bytes"]:
                raise OSError(f"{name} has {size} bytes of {record['bytes']} after writing")
        about = {"format": "moe_mamba checkpoint", "version": VERSION, "finite": True}
        self._write_json(MANIFEST, about | {"files": files})
        synchronize(self.folder)

    def _write_json(self, name: str, content: object) -> dict[str, Any]:
        with HashedFile(self.folder / name) as file:
            file.write(json.dumps(content, indent=None if name == INDEX else 2).encode())
        return {"bytes": file.bytes, "xxh3": file.hash.hexdigest()}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Only used by an explicit call."""
        return False


class Reader(StorageReader):
    """Storage of torch.distributed.checkpoint: reads of a step's folder only the bytes that a plan asks for.

    Args:
        folder: the step's.
        is_checked: see ``read_index``.
    """

    def __init__(self, folder: Path, is_checked: bool = False) -> None:
        self.folder = folder
        self.index = read_index(folder, is_checked)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Planners have the index already."""
        return Metadata({})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The index was read at the start."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """A rank's plan stands as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Ranks read without regard to one another."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill the planner's tensors, file by file and forwards."""
        by_file: dict[str, list[tuple[Chunk, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            assert item.storage_index.index is not None
            chunk = self.index[item.storage_index.fqn].chunks[item.storage_index.index]
            by_file[chunk.file].append((chunk, item))
        for name, reads in by_file.items():
            with (self.folder / name).open("rb") as stream:
                for chunk, item in sorted(reads, key=lambda read: read[0].start):
                    target, dtype = planner.resolve_tensor(item), self.index[item.storage_index.fqn].dtype
                    read_chunk(stream, chunk.start, chunk.sizes, item.storage_offsets, target, dtype)
                    planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Only used by an explicit call."""
        return False
