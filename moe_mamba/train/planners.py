"""Who writes and who reads which box of a checkpoint's tensors, from the pieces that each rank offers."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moe_mamba.errors import UserError
from moe_mamba.parallel.pieces import Piece
from moe_mamba.train.manifest import DamagedError


def _chunk(piece: Piece) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(piece.offsets), piece.tensor.shape)


class PieceSavePlanner(DefaultSavePlanner):
    """Plans the writing of pieces: of boxes that several ranks offer, one rank writes."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        # an empty part of a tensor (a rank that owns nothing of it) would collide with the box that begins there
        self.pieces = {(p.name, tuple(p.offsets)): p for p in pieces if p.tensor.numel() or 0 in p.shape}

    def create_local_plan(self) -> SavePlan:
        """One item a piece."""
        return SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(piece.name, piece.offsets),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        _chunk(piece), TensorProperties(dtype=piece.tensor.dtype), torch.Size(piece.shape)
                    ),
                )
                for piece in self.pieces.values()
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Drop repeated boxes; refuse tensors with overlaps, holes, or ranks that disagree on shape or dtype."""
        kinds: dict[str, set[tuple[object, ...]]] = defaultdict(set)
        for item in (item for plan in all_plans for item in plan.items):
            assert item.tensor_data is not None
            kinds[item.index.fqn].add((item.tensor_data.size, item.tensor_data.properties.dtype))
        for name, found in kinds.items():
            if len(found) > 1:
                raise ValueError(f"{name}: ranks disagree on its shape or dtype: {sorted(map(str, found))}")
        plans, metadata = super().create_global_plan(all_plans)
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            volume = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
            if volume != math.prod(tensor.size):
                raise ValueError(f"{name}: the pieces hold {volume} of {math.prod(tensor.size)} elements")
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The memory of a planned box."""
        assert write_item.index.offset is not None
        return self.pieces[write_item.index.fqn, tuple(write_item.index.offset)].tensor


class PieceLoadPlanner(LoadPlanner):
    """Plans the filling of pieces from whatever boxes were saved."""

    def __init__(self, path: Path, pieces: Sequence[Piece]) -> None:
        self.path = path
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        for piece in pieces:
            if piece.tensor.numel():
                self.pieces[piece.name].append(piece)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Keep the index of the checkpoint."""
        assert metadata is not None
        self.metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        """Which parts of which stored boxes this rank's pieces want."""
        items: list[ReadItem] = []
        for name, pieces in self.pieces.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise UserError(f"{self.path} has no tensor {name}: it is a checkpoint of another model")
            if tuple(stored.size) != tuple(pieces[0].shape):
                raise UserError(
                    f"{self.path}: {name} has shape {list(stored.size)} there and {list(pieces[0].shape)} here: "
                    "it is a checkpoint of another model"
                )
            reads = create_read_items_for_chunk_list(name, stored, [_chunk(piece) for piece in pieces])
            if sum(math.prod(read.lengths) for read in reads) != sum(piece.tensor.numel() for piece in pieces):
                raise DamagedError(f"{self.path} does not hold all of {name}: use another checkpoint")
            items += reads
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Ranks read without regard to one another."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """The plan stands."""
        return central_plan

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
