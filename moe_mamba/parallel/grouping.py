"""How parameters are grouped for the optimizer and for ZeRO: arithmetic, so that planning counts what the engine makes.

ZeRO lays a group's parameters one behind the other, with padding at the end, and each of the ranks that hold the same
parameters updates one of as many equal parts.
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_mamba.config import Config
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.groups import expert_group_name
from moe_mamba.parallel.placement import ParameterShard
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology

# Elements of a group of experts at most: ZeRO copies a group together when it starts, and whole at a step in fp32.
LARGEST_OF_EXPERTS = 178_956_971
ALIGNMENT = 2  # elements: ZeRO's parts of a group begin at multiples of four bytes, also in bf16


_known: "weakref.WeakKeyDictionary[LanguageModel, dict[Any, tuple[OptimizerGroup, ...]]]" = weakref.WeakKeyDictionary()


class Member(NamedTuple):
    """A parameter as its group sees it.

    Attributes:
        name: full name.
        size: elements on a rank.
        is_fp32: else bf16.
        decay: of the weight.
        experts: name of the group of ranks that share it as experts; None: it is none.
    """

    name: str
    size: int
    is_fp32: bool
    decay: float
    experts: str | None


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters of one dtype and weight decay, which the same ranks hold.

    Attributes:
        names: of the parameters, in order.
        sizes: elements of each on a rank.
        is_fp32: else bf16.
        decay: of their weights.
        experts: whose group of ranks shares them as experts, see ``ParameterShard``; None: they are none.
        ranks: that hold the same parameters.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    is_fp32: bool
    decay: float
    experts: str | None
    ranks: int

    @property
    def size(self) -> int:
        """Elements on a rank."""
        return sum(self.sizes)

    @property
    def partition(self) -> int:
        """Elements that a rank updates under ZeRO 1 and 2, padding included."""
        return -(-self.size // (ALIGNMENT * self.ranks)) * ALIGNMENT

    @property
    def padded(self) -> int:
        """Elements in memory under ZeRO 1 and 2."""
        return self.partition * self.ranks


def group_members(members: Iterable[Member]) -> list[list[Member]]:
    """Parameters in groups of one dtype (ZeRO cannot mix them), decay and kind: bf16 first, experts behind all others.

    The first group's dtype is the one by which ZeRO decides whether gradients need an fp32 accumulator. The order is
    that of DeepSpeed's own ``split_params_into_different_moe_groups_for_optimizer``, but where there are experts of two
    kinds: there it has the order of a set of strings, which differs from process to process.
    """
    groups: dict[tuple[bool, bool, float, str], list[Member]] = defaultdict(list)
    for member in members:
        key = member.experts is not None, member.is_fp32, member.decay, member.experts or ""
        groups[key].append(member)
    ordered = []
    for key in sorted(groups):
        ordered += _parts(groups[key]) if key[0] else [groups[key]]
    return ordered


def _parts(members: list[Member]) -> list[list[Member]]:
    """Experts in groups of at most ``LARGEST_OF_EXPERTS`` elements, or of one parameter that is larger."""
    parts: list[list[Member]] = []
    size = 0
    for member in members:
        if not parts or size + member.size > LARGEST_OF_EXPERTS:
            parts.append([])
            size = 0
        parts[-1].append(member)
        size += member.size
    return parts


def optimizer_groups(plan: RunPlan) -> tuple[OptimizerGroup, ...]:
    """The groups that a run's engine makes, in its order; nothing is made for it.

    Args:
        plan: of the run, on any rank: groups have the same sizes on all.
    """
    config, known = plan.config, _known.setdefault(plan.model, {})
    in_fp32 = config.train.precision == "fp32" or config.parallel.zero == 3
    # All else that groups depend on; a search asks for the same ones many times.
    key = plan.topology, in_fp32, config.train.weight_decay, config.train.decay_all
    if key not in known:
        known[key] = _groups_of(plan, in_fp32)
    return known[key]


def _groups_of(plan: RunPlan, in_fp32: bool) -> tuple[OptimizerGroup, ...]:
    model, topology = plan.model, plan.topology
    kept, not_decayed = model.fp32_parameter_names(), model.not_decayed()
    members = []
    for name, parameter in model.named_parameters():
        shard = plan.shards[name]
        is_decayed = parameter.dim() >= 2 and name not in not_decayed
        experts = expert_group_name(topology, shard.experts) if shard.experts and topology.is_sharded else None
        size = math.prod(shard.local_shape)
        members.append(Member(name, size, in_fp32 or name in kept, decay(plan.config, is_decayed), experts))
    return tuple(
        OptimizerGroup(
            tuple(member.name for member in group),
            tuple(member.size for member in group),
            group[0].is_fp32,
            group[0].decay,
            plan.shards[group[0].name].experts if group[0].experts else None,
            sharing_ranks(plan.shards[group[0].name], topology),
        )
        for group in group_members(members)
    )


def decay(config: Config, is_decayed: bool) -> float:
    """Weight decay of a parameter: of matrices; norms, biases, D and A_log have none, unless ``train.decay_all``."""
    return config.train.weight_decay if is_decayed or config.train.decay_all else 0.0


def sharing_ranks(shard: ParameterShard, topology: Topology) -> int:
    """Ranks among which ZeRO shares a parameter's state: those whose gradients of it are averaged."""
    if shard.experts is None:
        return topology.data
    if shard.experts == "inner_expert":
        return topology.data // topology.inner_expert
    return (topology.data if topology.expert_tensor else topology.world.size) // topology.expert
