"""What a rank holds of each parameter, from what the mixers declare (``model/sharding.py``) and the layout.

Initialisation, tensor and expert parallelism, checkpoints and planning ask here, by full names.
What no group shares is replicated on every tensor-parallel rank, and because these ranks see different tokens of the
residual stream, the gradients of replicas are summed over the ranks that hold the same shard. Experts are shared among
the ranks of the expert group; DeepSpeed sums their gradients over the ranks with the same ones.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_mamba.config import Config
from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel, shard_specs
from moe_mamba.model.names import logical_names
from moe_mamba.model.sharding import Group, ShardSpec
from moe_mamba.parallel.topology import Topology

EXPERTS = ("expert", "inner_expert")
VOCABULARY_MULTIPLE = 128  # rows of a rank: matrix products of odd widths are slow


class Segment(NamedTuple):
    """A stretch of an axis: ``length`` elements, at ``local`` in a rank's memory, at ``logical`` in the whole."""

    local: int
    logical: int
    length: int


def shards_of_axis(spec: ShardSpec, size: int) -> int:
    """Different shards that ``size`` ranks hold of an axis."""
    return min(size, spec.units) if spec.is_replicable else size


def padded_width(spec: ShardSpec, width: int, size: int) -> int:
    """Elements of a block over all shards, padding included."""
    multiple = VOCABULARY_MULTIPLE * size if spec.is_padded and size > 1 else 1
    return -(-width // multiple) * multiple


def local_length(spec: ShardSpec, size: int) -> int:
    """Elements of an axis in a rank's memory, padding included."""
    return sum(padded_width(spec, block.width, size) for block in spec.blocks) // shards_of_axis(spec, size)


def segments_of_axis(spec: ShardSpec, rank: int, size: int) -> tuple[Segment, ...]:
    """Where a rank's stretches of an axis lie in its memory and in the logical tensor, one for each block."""
    count = shards_of_axis(spec, size)
    shard = rank * count // size
    segments, local, logical = [], 0, 0
    for block in spec.blocks:
        share = padded_width(spec, block.width, size) // count
        first, last = shard * share, min((shard + 1) * share, block.width)
        segments.append(Segment(local, logical + first, max(0, last - first)))
        local, logical = local + share, logical + block.width
    return tuple(segments)


@dataclass(frozen=True)
class ParameterShard:
    """What a rank holds of one parameter or buffer.

    Attributes:
        name: logical name, the same on every rank and in every layout.
        shape: of the logical tensor.
        segments: for each axis, the stretches that this rank holds.
        local_shape: of the rank's memory, padding included.
        tensor_axis: the axis that tensor-parallel ranks share; None where each holds the whole.
        experts: the group whose ranks share it as experts; DeepSpeed sums its gradient over the ranks with the same
            ones. None: it is none of experts, or of experts inside mixers that all ranks hold.
        is_reduced: see ``ShardSpec``.
        replicas: tensor-parallel ranks that hold this same shard, whose gradients are summed; they are neighbours.
        is_first_replica: whether this rank is the first of them, which counts in norms.
    """

    name: str
    shape: tuple[int, ...]
    segments: tuple[tuple[Segment, ...], ...]
    local_shape: tuple[int, ...]
    tensor_axis: int | None
    experts: Literal["expert", "inner_expert"] | None
    is_reduced: bool
    replicas: int
    is_first_replica: bool

    @property
    def is_padded(self) -> bool:
        """Whether some of the rank's memory stands for nothing."""
        return any(
            sum(segment.length for segment in segments) < length
            for segments, length in zip(self.segments, self.local_shape, strict=True)
        )

    def chunks(
        self, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None
    ) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """The parts of a chunk of this rank's memory that are one chunk of the logical tensor; padding is left out.

        Args:
            offsets: of the chunk in the rank's memory; None: the whole.
            sizes: of the chunk.

        Yields:
            offsets in the logical tensor, and the slices of the given chunk.
        """
        offsets = offsets if offsets is not None else (0,) * len(self.local_shape)
        sizes = sizes if sizes is not None else self.local_shape
        axes = []
        for start, size, segments in zip(offsets, sizes, self.segments, strict=True):
            parts = []
            for segment in segments:
                first, last = max(start, segment.local), min(start + size, segment.local + segment.length)
                if first < last:
                    parts.append((segment.logical + first - segment.local, slice(first - start, last - start)))
            axes.append(parts)
        for combination in itertools.product(*axes):
            yield tuple(logical for logical, _ in combination), tuple(part for _, part in combination)


def parameter_shards(model: LanguageModel, topology: Topology) -> dict[str, ParameterShard]:
    """Full name -> what this rank holds of every parameter and buffer of ``model``, a whole one on any device."""
    specs = shard_specs(model.config, model.moe_config)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    names = logical_names(model)
    return {path: _shard(names[path], tuple(tensor.shape), specs.get(path, ()), topology) for path, tensor in tensors}


def place(group: Group, topology: Topology) -> tuple[int, int]:
    """This rank's place in a group, and the group's size."""
    if group == "expert":
        return topology.expert_rank, topology.expert
    if group == "inner_expert":
        return topology.inner_expert_rank, topology.inner_expert
    if group == "tensor" or topology.expert_tensor:
        return topology.tensor_rank, topology.tensor
    return 0, 1


def _shard(name: str, shape: tuple[int, ...], specs: tuple[ShardSpec, ...], topology: Topology) -> ParameterShard:
    segments: list[tuple[Segment, ...]] = [(Segment(0, 0, length),) for length in shape]
    local_shape = list(shape)
    tensor_axis, count = None, 1
    for spec in specs:
        rank, size = place(spec.group, topology)
        segments[spec.axis] = segments_of_axis(spec, rank, size)
        local_shape[spec.axis] = local_length(spec, size)
        if spec.group not in EXPERTS and shards_of_axis(spec, size) > 1:
            tensor_axis, count = spec.axis, shards_of_axis(spec, size)
    experts = next((spec.group for spec in specs if spec.group in EXPERTS), None)
    if experts == "inner_expert" and topology.inner_expert == 1:
        experts = None
    replicas = 1 if experts == "expert" else topology.tensor // count
    return ParameterShard(
        name,
        shape,
        tuple(segments),
        tuple(local_shape),
        tensor_axis,
        experts,  # type: ignore[arg-type]
        any(spec.is_reduced for spec in specs),
        replicas,
        topology.tensor_rank % replicas == 0,
    )


def check_shards(config: Config, topology: Topology) -> None:
    """Refuse a layout among whose ranks the model cannot be shared.

    Raises:
        UserError: names the parameter's size, the number of ranks, and one that would do.
    """
    for spec in _misfits(config, topology):
        group: Literal["tensor", "expert"] = "expert" if spec.group in EXPERTS else "tensor"
        key, size = f"parallel.{group}", getattr(topology, group)
        over = place(spec.group, topology)[1]
        among = f" (over {over} ranks with the same channels)" if spec.group == "inner_expert" and over != size else ""
        fitting = next((n for n in range(size - 1, 0, -1) if _fits(config, topology.resized(group, n))), None)
        relation = "neither divides nor is a multiple of" if spec.is_replicable else "does not divide"
        fix = f"set {key}={fitting}, or change {spec.key}" if fitting else f"change {spec.key}"
        raise UserError(f"{key}={size}{among} {relation} {spec.key}={spec.units}: {fix}")


def _fits(config: Config, topology: Topology) -> bool:
    return topology.fits(config) and not any(True for _ in _misfits(config, topology))


def _misfits(config: Config, topology: Topology) -> Iterator[ShardSpec]:
    """Axes that the layout's ranks cannot share."""
    specs = itertools.chain.from_iterable(shard_specs(config.model, config.moe).values())
    return (spec for spec in dict.fromkeys(specs) if not spec.fits(place(spec.group, topology)[1]))
