"""Who writes and who reads which chunk of a checkpoint's tensors, from the shards that each rank offers.

Between ranks go tuples of numbers: items of torch.distributed.checkpoint's plans, some objects a chunk, took the
coordinator of 64 ranks 20 s for 100,000 chunks, and numbers take it 2. A rank makes the items of only its own chunks.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import SavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from moe_mamba.checkpoint.chunks import Extent, Overlaps, fault_of_cover
from moe_mamba.checkpoint.divergence import is_finite
from moe_mamba.checkpoint.manifest import DamagedError, Stored
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.errors import UserError, shown

Kind = tuple[tuple[int, ...], torch.dtype]  # a logical tensor's shape and dtype


def _extent(shard: Shard) -> Extent:
    return tuple(shard.offsets), tuple(shard.tensor.shape)


class ShardSavePlanner(SavePlanner):
    """Plans the writing of shards: of chunks that several ranks offer, one rank writes."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        # an empty part of a tensor is what a rank has that owns nothing of it
        self.shards = [shard for shard in shards if shard.tensor.numel() or 0 in shard.shape]

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """The shards are all that is saved."""

    def create_local_plan(self) -> SavePlan:
        """What this rank offers: name and kind of a tensor -> chunks."""
        offer: dict[tuple[str, Kind], list[Extent]] = defaultdict(list)
        for shard in self.shards:
            offer[shard.name, (tuple(shard.shape), shard.tensor.dtype)].append(_extent(shard))
        return SavePlan([], planner_data=dict(offer))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Share out repeated chunks; refuse tensors with overlaps, holes, or ranks that disagree on shape or dtype.

        Returns:
            For each rank the chunks that others write; and shape and dtype of each tensor.
        """
        kinds: dict[str, Kind] = {}
        holders: dict[str, dict[Extent, list[int]]] = {}
        for rank, plan in enumerate(all_plans):
            for (name, kind), chunks in plan.planner_data.items():
                if kinds.setdefault(name, kind) != kind:
                    raise ValueError(f"{name}: ranks disagree on its shape or dtype: {kinds[name]} and {kind}")
                ranks_of = holders.setdefault(name, {})
                for chunk in chunks:
                    ranks_of.setdefault(chunk, []).append(rank)
        for name, (shape, _) in kinds.items():
            fault = fault_of_cover(shape, holders[name].keys())
            if fault:
                raise ValueError(f"{name}: the shards {fault}")
        left = _share_out(kinds, holders, len(all_plans))
        tensors = {
            name: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
            for name, (shape, dtype) in kinds.items()
        }
        return [SavePlan([], planner_data=chunks) for chunks in left], Metadata(dict(tensors))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """One item for each shard that this rank writes; its index holds the shard's number."""
        seen = set(new_plan.planner_data)
        items = []
        for number, shard in enumerate(self.shards):
            key = shard.name, *_extent(shard)
            if key not in seen:
                seen.add(key)
                items.append(_write_item(number, shard))
        return SavePlan(items, storage_data=new_plan.storage_data)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of a planned chunk.

        Raises:
            UserError: what is read only now holds NaN or Inf; what is in memory was looked at before.
        """
        assert write_item.index.index is not None
        shard = self.shards[write_item.index.index]
        if shard.read is None:
            return shard.tensor
        values = shard.read()
        if not is_finite([values]):
            raise UserError(f"{shard.name} holds NaN or Inf: give other weights")
        return values


def _write_item(number: int, shard: Shard) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(shard.offsets), shard.tensor.shape)
    properties = TensorProperties(dtype=shard.tensor.dtype)
    return WriteItem(
        index=MetadataIndex(shard.name, shard.offsets, number),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, torch.Size(shard.shape)),
    )


def _share_out(
    kinds: Mapping[str, Kind], holders: Mapping[str, Mapping[Extent, list[int]]], ranks: int
) -> list[list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """Give each repeated chunk to the holder with the fewest bytes to write; for each rank, what it need not write."""
    load = [0] * ranks
    repeated = []
    for name, chunks in holders.items():
        for (offsets, sizes), having in chunks.items():
            size = math.prod(sizes) * kinds[name][1].itemsize
            if len(having) == 1:
                load[having[0]] += size
            else:
                repeated.append((size, (name, offsets, sizes), having))
    left: list[list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = [[] for _ in range(ranks)]
    for size, chunk, having in repeated:
        writer = min(having, key=lambda rank: load[rank])
        load[writer] += size
        for rank in set(having) - {writer}:
            left[rank].append(chunk)
    return left


class ShardLoadPlanner(LoadPlanner):
    """Plans the filling of shards from whatever chunks were saved; each rank for itself.

    Args:
        path: the step's folder, for messages.
        index: its logical tensors.
        shards: what to fill.
    """

    def __init__(self, path: Path, index: Mapping[str, Stored], shards: Sequence[Shard]) -> None:
        self.path = path
        self.index = index
        self.shards: dict[str, list[Shard]] = defaultdict(list)
        for shard in shards:
            if shard.tensor.numel():
                self.shards[shard.name].append(shard)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """The index says all."""

    def create_local_plan(self) -> LoadPlan:
        """Find which parts of which stored chunks this rank's shards want; nothing of it concerns other ranks."""
        self.items: list[ReadItem] = []
        for name, shards in self.shards.items():
            stored = self.index.get(name)
            if stored is None:
                raise UserError(f"{self.path} has no tensor {name}: it is another model's checkpoint")
            if stored.shape != tuple(shards[0].shape):
                raise UserError(
                    f"{self.path}: {name} has shape {shown(list(stored.shape))} there and "
                    f"{list(shards[0].shape)} here: it is another model's checkpoint"
                )
            reads = _read_items(name, stored, shards)
            if sum(math.prod(read.lengths) for read in reads) != sum(shard.tensor.numel() for shard in shards):
                raise DamagedError(f"{self.path} does not hold all of {name}: use another checkpoint")
            self.items += reads
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Ranks read without regard to one another."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """What this rank found."""
        return LoadPlan(self.items)

    def load_bytes(self, read_item: ReadItem, value: object) -> None:
        """Checkpoints hold only tensors and JSON."""
        raise AssertionError("checkpoints hold no byte items")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a shard that a stored chunk fills."""
        assert read_item.dest_index.index is not None
        target = self.shards[read_item.dest_index.fqn][read_item.dest_index.index].tensor.detach()
        for dimension, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dimension, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The shard was filled in place."""


def _read_items(name: str, stored: Stored, shards: Sequence[Shard]) -> list[ReadItem]:
    """The parts of stored chunks that fill `shards`; indices hold the numbers of chunk and shard."""
    items = []
    overlaps = Overlaps([(chunk.offsets, chunk.sizes) for chunk in stored.chunks])
    for target, shard in enumerate(shards):
        for source, (offsets, sizes) in overlaps.of(*_extent(shard)):
            chunk = stored.chunks[source]
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(name, shard.offsets, target),
                    dest_offsets=_difference(offsets, shard.offsets),
                    storage_index=MetadataIndex(name, chunk.offsets, source),
                    storage_offsets=_difference(offsets, chunk.offsets),
                    lengths=torch.Size(sizes),
                )
            )
    return items


def _difference(left: Sequence[int], right: Sequence[int]) -> torch.Size:
    return torch.Size([a - b for a, b in zip(left, right, strict=True)])
