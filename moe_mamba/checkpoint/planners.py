"""Who writes and who reads which box of a checkpoint's tensors, from the pieces that each rank offers.

Between ranks go tuples of numbers: items of torch.distributed.checkpoint's plans, some objects a box, took the
coordinator of 64 ranks 20 s for 100,000 boxes, and numbers take it 2. A rank makes the items of its own boxes alone.
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
from moe_mamba.checkpoint.shards import Piece
from moe_mamba.errors import UserError

Kind = tuple[tuple[int, ...], torch.dtype]  # a logical tensor's shape and dtype


def _extent(piece: Piece) -> Extent:
    return tuple(piece.offsets), tuple(piece.tensor.shape)


class PieceSavePlanner(SavePlanner):
    """Plans the writing of pieces: of boxes that several ranks offer, one rank writes."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        # an empty part of a tensor is what a rank has that owns nothing of it
        self.pieces = [piece for piece in pieces if piece.tensor.numel() or 0 in piece.shape]

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """The pieces are all that is saved."""

    def create_local_plan(self) -> SavePlan:
        """What this rank offers: name and kind of a tensor -> boxes."""
        offer: dict[tuple[str, Kind], list[Extent]] = defaultdict(list)
        for piece in self.pieces:
            offer[piece.name, (tuple(piece.shape), piece.tensor.dtype)].append(_extent(piece))
        return SavePlan([], planner_data=dict(offer))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Share out repeated boxes; refuse tensors with overlaps, holes, or ranks that disagree on shape or dtype.

        Returns:
            For each rank the boxes that others write; and shape and dtype of each tensor.
        """
        kinds: dict[str, Kind] = {}
        holders: dict[str, dict[Extent, list[int]]] = {}
        for rank, plan in enumerate(all_plans):
            for (name, kind), boxes in plan.planner_data.items():
                if kinds.setdefault(name, kind) != kind:
                    raise ValueError(f"{name}: ranks disagree on its shape or dtype: {kinds[name]} and {kind}")
                ranks_of = holders.setdefault(name, {})
                for box in boxes:
                    ranks_of.setdefault(box, []).append(rank)
        for name, (shape, _) in kinds.items():
            fault = fault_of_cover(shape, holders[name].keys())
            if fault:
                raise ValueError(f"{name}: the pieces {fault}")
        left = _share_out(kinds, holders, len(all_plans))
        tensors = {
            name: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
            for name, (shape, dtype) in kinds.items()
        }
        return [SavePlan([], planner_data=boxes) for boxes in left], Metadata(dict(tensors))

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """One item for each piece that this rank writes; its index holds the piece's number."""
        seen = set(new_plan.planner_data)
        items = []
        for number, piece in enumerate(self.pieces):
            key = piece.name, *_extent(piece)
            if key not in seen:
                seen.add(key)
                items.append(_write_item(number, piece))
        return SavePlan(items, storage_data=new_plan.storage_data)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The values of a planned box.

        Raises:
            UserError: what is read only now holds NaN or Inf; what is in memory was looked at before.
        """
        assert write_item.index.index is not None
        piece = self.pieces[write_item.index.index]
        if piece.read is None:
            return piece.tensor
        values = piece.read()
        if not is_finite([values]):
            raise UserError(f"{piece.name} holds NaN or Inf: give other weights")
        return values


def _write_item(number: int, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape)
    properties = TensorProperties(dtype=piece.tensor.dtype)
    return WriteItem(
        index=MetadataIndex(piece.name, piece.offsets, number),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(chunk, properties, torch.Size(piece.shape)),
    )


def _share_out(
    kinds: Mapping[str, Kind], holders: Mapping[str, Mapping[Extent, list[int]]], ranks: int
) -> list[list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """Give each repeated box to the holder with the fewest bytes to write; for each rank, what it need not write."""
    load = [0] * ranks
    repeated = []
    for name, boxes in holders.items():
        for (offsets, sizes), having in boxes.items():
            size = math.prod(sizes) * kinds[name][1].itemsize
            if len(having) == 1:
                load[having[0]] += size
            else:
                repeated.append((size, (name, offsets, sizes), having))
    left: list[list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = [[] for _ in range(ranks)]
    for size, box, having in repeated:
        writer = min(having, key=lambda rank: load[rank])
        load[writer] += size
        for rank in set(having) - {writer}:
            left[rank].append(box)
    return left


class PieceLoadPlanner(LoadPlanner):
    """Plans the filling of pieces from whatever boxes were saved; each rank for itself.

    Args:
        path: the step's folder, for messages.
        index: its logical tensors.
        pieces: what to fill.
    """

    def __init__(self, path: Path, index: Mapping[str, Stored], pieces: Sequence[Piece]) -> None:
        self.path = path
        self.index = index
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            if piece.tensor.numel():
                self.pieces[piece.name].append(piece)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """The index says all."""

    def create_local_plan(self) -> LoadPlan:
        """Find which parts of which stored boxes this rank's pieces want; nothing of it concerns other ranks."""
        self.items: list[ReadItem] = []
        for name, pieces in self.pieces.items():
            stored = self.index.get(name)
            if stored is None:
                raise UserError(f"{self.path} has no tensor {name}: it is a checkpoint of another model")
            if stored.shape != tuple(pieces[0].shape):
                raise UserError(
                    f"{self.path}: {name} has shape {list(stored.shape)} there and {list(pieces[0].shape)} here: "
                    "it is a checkpoint of another model"
                )
            reads = _read_items(name, stored, pieces)
            if sum(math.prod(read.lengths) for read in reads) != sum(piece.tensor.numel() for piece in pieces):
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
        """Checkpoints hold tensors and JSON alone."""
        raise AssertionError("checkpoints hold no byte items")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a piece that a stored box fills."""
        assert read_item.dest_index.index is not None
        target = self.pieces[read_item.dest_index.fqn][read_item.dest_index.index].tensor.detach()
        for dimension, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dimension, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The piece was filled in place."""


def _read_items(name: str, stored: Stored, pieces: Sequence[Piece]) -> list[ReadItem]:
    """The parts of stored boxes that fill `pieces`; indices hold the numbers of box and piece."""
    items = []
    overlaps = Overlaps([(box.offsets, box.sizes) for box in stored.boxes])
    for target, piece in enumerate(pieces):
        for source, (offsets, sizes) in overlaps.of(*_extent(piece)):
            box = stored.boxes[source]
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(name, piece.offsets, target),
                    dest_offsets=_difference(offsets, piece.offsets),
                    storage_index=MetadataIndex(name, box.offsets, source),
                    storage_offsets=_difference(offsets, box.offsets),
                    lengths=torch.Size(sizes),
                )
            )
    return items


def _difference(left: Sequence[int], right: Sequence[int]) -> torch.Size:
    return torch.Size([a - b for a, b in zip(left, right, strict=True)])
