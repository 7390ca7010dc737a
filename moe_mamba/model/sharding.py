"""How a parameter may be sharded: what mixers declare, and ``parallel/placement.py`` makes shards of; no rank is known.

A parameter is sharded along axes; along an axis, each of its blocks by itself, so that [x | z] of a projection becomes
[x's shard | z's shard] on a rank. What nobody declares is replicated.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Group = Literal["tensor", "expert", "expert_tensor", "inner_expert"]
"""Whose ranks share an axis.

``expert_tensor``: the tensor-parallel group's, where ``parallel.expert_tensor`` is on. ``inner_expert``: of experts
inside a mixer whose channels tensor-parallel ranks share, the ranks with the same channels.
"""


class Block(NamedTuple):
    """Neighbouring elements of an axis that are sharded by themselves.

    Attributes:
        width: elements.
        units: shards that can be made of them at most (channels, heads, experts).
    """

    width: int
    units: int


@dataclass(frozen=True)
class ShardSpec:
    """How one axis of a parameter is shared among the ranks of a group.

    Attributes:
        axis: of the parameter.
        group: whose ranks share it.
        blocks: what the axis holds, in order; each is sharded by itself, and their widths may differ.
        key: the configuration's name for the units, for refusals.
        is_replicable: ranks beyond the units hold copies (key and value heads), instead of being refused.
        is_padded: the axis is lengthened until it can be sharded (the vocabulary).
        is_reduced: what a linear layer makes of this input axis is summed for every rank of the group, which uses it
            inside the mixer; else its sum leaves the mixer, and each rank gets the sum of its own tokens.
    """

    axis: int
    group: Group
    blocks: tuple[Block, ...]
    key: str
    is_replicable: bool = False
    is_padded: bool = False
    is_reduced: bool = False

    @property
    def units(self) -> int:
        """Shards that each block can be made of."""
        return min(block.units for block in self.blocks)

    def fits(self, size: int) -> bool:
        """Whether ``size`` ranks can share the axis."""
        return self.is_padded or all(
            block.units % size == 0 or (self.is_replicable and size % block.units == 0) for block in self.blocks
        )


ShardSpecs = dict[str, tuple[ShardSpec, ...]]
"""Name of a parameter -> its sharded axes."""


def prefixed(prefix: str, specs: ShardSpecs) -> ShardSpecs:
    """The same for parameters of a module that stands in another one."""
    return {f"{prefix}.{name}": spec for name, spec in specs.items()}
