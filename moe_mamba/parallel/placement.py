"""How each parameter is cut: the one table of it.

Initialisation, tensor and expert parallelism, checkpoints, planning and conversion ask here, by a parameter's full
name. A parameter is cut along axes; along an axis, each of its blocks by itself, so that [x | z] of a projection
becomes [x's part | z's part] on a rank. What is not cut is a replica on every tensor peer, and because peers see
different tokens of the residual stream, the gradients of replicas are summed over the peers that hold the same part.
Experts are cut among the ranks of the expert group; DeepSpeed sums their gradients over the ranks with the same ones.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from moe_mamba.config import Config, ModelConfig, MoEConfig
from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.feed_forward import input_width
from moe_mamba.parallel.topology import Topology

VOCABULARY_MULTIPLE = 128  # rows of a rank: matrix products of odd widths are slow


@dataclass(frozen=True)
class Cut:
    """How one axis is shared among the ranks of a group.

    Attributes:
        axis: of the parameter.
        group: ``tensor`` or ``expert``.
        block: elements along the axis that are cut as one; an axis holds ``blocks`` such blocks, each cut by itself.
        blocks: how many.
        units: pieces that a block can be cut into (channels, heads, experts).
        key: the configuration's name for the units, for refusals.
        is_replicable: ranks beyond ``units`` hold copies (key and value heads), instead of being refused.
        is_padded: the axis is lengthened until it can be cut (the vocabulary).
    """

    axis: int
    group: Literal["tensor", "expert"]
    block: int
    units: int
    key: str
    blocks: int = 1
    is_replicable: bool = False
    is_padded: bool = False

    def parts(self, size: int) -> int:
        """Different parts that ``size`` ranks hold."""
        return min(size, self.units) if self.is_replicable else size

    def length(self, size: int) -> int:
        """Elements along the axis over all parts, padding included."""
        multiple = VOCABULARY_MULTIPLE * size if self.is_padded and size > 1 else 1
        return -(-self.block // multiple) * multiple * self.blocks

    def segments(self, rank: int, size: int) -> tuple["Segment", ...]:
        """Where this rank's stretches of the axis lie, in its own memory and in the logical tensor."""
        parts = self.parts(size)
        part = rank * parts // size
        share = self.length(size) // self.blocks // parts
        first, last = part * share, min((part + 1) * share, self.block)
        return tuple(Segment(n * share, n * self.block + first, max(0, last - first)) for n in range(self.blocks))


class Segment(NamedTuple):
    """A stretch of an axis: ``length`` elements, at ``local`` in a rank's memory, at ``logical`` in the whole."""

    local: int
    logical: int
    length: int


Cuts = tuple[Cut, ...]


def cuts(model: ModelConfig, moe: MoEConfig, expert_tensor: bool = False) -> dict[str, dict[str, Cuts]]:
    """The table: letter of a layer -> name inside the layer -> cuts; the letter "" stands for the model itself.

    A parameter that it does not name is not cut.
    """
    channels = {"block": model.d_inner, "units": model.d_inner, "key": "model.expand x model.d_model"}
    head_dim = model.resolved_head_dim
    heads = {"block": model.heads * head_dim, "units": model.heads, "key": "model.heads"}
    kv_width = model.resolved_kv_heads * head_dim
    kv_heads = {"block": kv_width, "units": model.resolved_kv_heads, "key": "model.kv_heads", "is_replicable": True}
    vocabulary = {"block": model.vocab_size, "units": model.vocab_size, "key": "model.vocab_size", "is_padded": True}
    gates = input_width(model.activation, 1)  # [gate | up], or up alone

    def hidden(width: int, key: str) -> dict[str, Any]:
        return {"block": width, "units": width, "key": key}

    def tensor(axis: int, sizes: dict[str, Any], blocks: int = 1) -> Cuts:
        return (Cut(axis, "tensor", blocks=blocks, **sizes),)

    width = moe.d_expert or model.resolved_d_ff
    experts = (Cut(0, "expert", moe.experts, moe.experts, "moe.experts"),)
    hidden_of_expert = hidden(width, "moe.d_expert")
    shared = hidden(moe.shared_experts * width, "moe.shared_experts x moe.d_expert")
    return {
        "": {"embedding.weight": tensor(0, vocabulary), "head.weight": tensor(0, vocabulary)},
        "M": {
            "mixer.in_proj.weight": tensor(0, channels, blocks=2),  # [x | z]
            "mixer.conv1d.weight": tensor(0, channels),
            "mixer.conv1d.bias": tensor(0, channels),
            "mixer.x_proj.weight": tensor(1, channels),
            "mixer.dt_proj.weight": tensor(0, channels),
            "mixer.dt_proj.bias": tensor(0, channels),
            "mixer.A_log": tensor(0, channels),
            "mixer.D": tensor(0, channels),
            "mixer.out_proj.weight": tensor(1, channels),
        },
        "*": {
            "mixer.q_proj.weight": tensor(0, heads),
            "mixer.q_proj.bias": tensor(0, heads),
            "mixer.k_proj.weight": tensor(0, kv_heads),
            "mixer.k_proj.bias": tensor(0, kv_heads),
            "mixer.v_proj.weight": tensor(0, kv_heads),
            "mixer.v_proj.bias": tensor(0, kv_heads),
            "mixer.o_proj.weight": tensor(1, heads),
        },
        "-": {
            "mixer.in_proj.weight": tensor(0, hidden(model.resolved_d_ff, "model.d_ff"), blocks=gates),
            "mixer.in_proj.bias": tensor(0, hidden(model.resolved_d_ff, "model.d_ff"), blocks=gates),
            "mixer.out_proj.weight": tensor(1, hidden(model.resolved_d_ff, "model.d_ff")),
        },
        "E": {
            "mixer.experts.in_proj": experts + (tensor(2, hidden_of_expert, blocks=gates) if expert_tensor else ()),
            "mixer.experts.out_proj": experts + (tensor(1, hidden_of_expert) if expert_tensor else ()),
            "mixer.shared.in_proj.weight": tensor(0, shared, blocks=gates),
            "mixer.shared.out_proj.weight": tensor(1, shared),
        },
    }


@dataclass(frozen=True)
class Shard:
    """What a rank holds of one parameter or buffer.

    Attributes:
        name: full name, the same on every rank and in every layout.
        shape: of the logical tensor.
        segments: for each axis, the stretches that this rank holds.
        local_shape: of the rank's memory, padding included.
        tensor_axis: the axis that tensor peers share; None where each holds the whole.
        is_expert: its gradient is summed by DeepSpeed over the ranks with the same experts.
        replicas: tensor peers that hold this same part, whose gradients are summed; they are neighbours.
        is_first_replica: whether this rank is the first of them, which counts in norms.
    """

    name: str
    shape: tuple[int, ...]
    segments: tuple[tuple[Segment, ...], ...]
    local_shape: tuple[int, ...]
    tensor_axis: int | None
    is_expert: bool
    replicas: int
    is_first_replica: bool

    @property
    def is_padded(self) -> bool:
        """Whether some of the rank's memory stands for nothing."""
        return any(
            sum(segment.length for segment in segments) < length
            for segments, length in zip(self.segments, self.local_shape, strict=True)
        )

    def boxes(
        self, offsets: Sequence[int] | None = None, sizes: Sequence[int] | None = None
    ) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """The parts of a box of this rank's memory that are one box of the logical tensor; padding is left out.

        Args:
            offsets: of the box in the rank's memory; None: the whole.
            sizes: of the box.

        Yields:
            offsets in the logical tensor, and the slices of the given box.
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


def shards(model: LanguageModel, topology: Topology) -> dict[str, Shard]:
    """Full name -> what this rank holds of every parameter and buffer of ``model``, a whole one on any device."""
    table = cuts(model.config, model.moe_config, topology.expert_tensor)
    found = {}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        found[name] = _shard(name, tuple(tensor.shape), _cuts_of(name, model.config.layers, table), topology)
    return found


def _cuts_of(name: str, layers: str, table: dict[str, dict[str, Cuts]]) -> Cuts:
    if not name.startswith("layers."):
        return table[""].get(name, ())
    _, index, local = name.split(".", 2)
    return table[layers[int(index)]].get(local, ())


def _shard(name: str, shape: tuple[int, ...], its_cuts: Cuts, topology: Topology) -> Shard:
    ranks = {
        "tensor": (topology.tensor_rank, topology.tensor),
        "expert": (topology.expert_rank, topology.expert),
    }
    segments: list[tuple[Segment, ...]] = [(Segment(0, 0, length),) for length in shape]
    local_shape = list(shape)
    tensor_axis, parts = None, 1
    for cut in its_cuts:
        rank, size = ranks[cut.group]
        segments[cut.axis] = cut.segments(rank, size)
        local_shape[cut.axis] = cut.length(size) // cut.parts(size)
        if cut.group == "tensor" and cut.parts(size) > 1:
            tensor_axis, parts = cut.axis, cut.parts(size)
    is_expert = any(cut.group == "expert" for cut in its_cuts)
    replicas = 1 if is_expert else topology.tensor // parts
    return Shard(
        name,
        shape,
        tuple(segments),
        tuple(local_shape),
        tensor_axis,
        is_expert,
        replicas,
        topology.tensor_rank % replicas == 0,
    )


def check_cuts(config: Config, topology: Topology) -> None:
    """Refuse a layout into which the model cannot be cut.

    Raises:
        UserError: names the parameter's size, the number of ranks, and one that would do.
    """
    for cut in _misfits(config, topology):
        key, size = f"parallel.{cut.group}", getattr(topology, cut.group)
        fitting = next((n for n in range(size - 1, 0, -1) if _fits(config, topology.resized(cut.group, n))), None)
        relation = "neither divides nor is a multiple of" if cut.is_replicable else "does not divide"
        mend = f"set {key}={fitting}, or change {cut.key}" if fitting else f"change {cut.key}"
        raise UserError(f"{key}={size} {relation} {cut.key}={cut.units}: {mend}")


def _fits(config: Config, topology: Topology) -> bool:
    return topology.fits(config) and not any(True for _ in _misfits(config, topology))


def _misfits(config: Config, topology: Topology) -> Iterator[Cut]:
    """Cuts that cannot be made."""
    table = cuts(config.model, config.moe, topology.expert_tensor)
    for letter in ("", *dict.fromkeys(config.model.pattern)):
        for cut in itertools.chain.from_iterable(table[letter].values()):
            size = topology.tensor if cut.group == "tensor" else topology.expert
            if not (cut.is_padded or cut.units % size == 0 or (cut.is_replicable and size % cut.units == 0)):
                yield cut
