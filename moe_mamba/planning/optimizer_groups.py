"""The engine's groups of parameters, worked out without an engine: what ZeRO flattens, pads and shares.

As ``parallel.optimizer.parameter_groups`` makes them of a model on its device; a test compares the two.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_mamba.parallel.placement import ParameterShard
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology

FP32, BF16 = 4, 2  # bytes
MOST_OF_EXPERTS = 178_956_971  # elements: DeepSpeed begins another group of experts past it
ALIGNMENT = 2  # numbers: DeepSpeed pads a flat group to a multiple of as many for each rank that shares it

Sharing = Literal["data", "expert_data", "inner_expert_data"]
"""The ranks whose gradients are averaged, and among which ZeRO shares the state: those with the same part."""


class Held(NamedTuple):
    """A parameter of a group.

    Attributes:
        name: full name.
        numbers: elements that this rank holds, padding of the vocabulary included.
        replicas: tensor-parallel ranks that hold the same ones.
    """

    name: str
    numbers: int
    replicas: int


@dataclass(frozen=True)
class OptimizerGroup:
    """Parameters that ZeRO flattens together.

    Attributes:
        width: bytes of a number of the running weights.
        decay: weight decay.
        sharing: the ranks that share its state.
        ranks: how many they are.
        held: its parameters, in order.
    """

    width: int
    decay: float
    sharing: Sharing
    ranks: int
    held: tuple[Held, ...]

    @property
    def numbers(self) -> int:
        """Elements, without padding of the group."""
        return sum(one.numbers for one in self.held)

    @property
    def padded(self) -> int:
        """Elements of ZeRO's flat group at stages 1 and 2."""
        unit = ALIGNMENT * self.ranks
        return -(-self.numbers // unit) * unit


def sharing_of(shard: ParameterShard, topology: Topology) -> Sharing:
    """Whose gradients of a parameter are averaged."""
    if shard.experts is None or not topology.is_sharded:
        return "data"
    return "expert_data" if shard.experts == "expert" else "inner_expert_data"


def sharing_ranks(sharing: Sharing, topology: Topology) -> int:
    """How many they are."""
    if sharing == "data":
        return topology.data
    if sharing == "inner_expert_data":
        return topology.data // topology.inner_expert
    return (topology.data if topology.expert_tensor else topology.world.size) // topology.expert


def optimizer_groups(plan: RunPlan) -> list[OptimizerGroup]:
    """The groups in the order of the engine's: bf16 first, without decay first, experts behind all others."""
    config, model, topology = plan.config, plan.model, plan.topology
    keep, not_decayed = model.fp32_parameter_names(), model.not_decayed()
    # ZeRO-3 cannot mix types, and keeps all in fp32.
    is_half = config.train.precision == "bf16" and config.parallel.zero < 3
    found: dict[tuple[bool, Sharing, bool, float], list[Held]] = {}
    for name, parameter in model.named_parameters():
        shard = plan.shards[name]
        is_matrix = parameter.dim() >= 2 and name not in not_decayed
        decay = config.train.weight_decay if is_matrix or config.train.decay_all else 0.0
        sharing, is_fp32 = sharing_of(shard, topology), not is_half or name in keep
        numbers = math.prod(shard.local_shape)
        held = Held(name, numbers, shard.replicas)
        found.setdefault((sharing != "data", sharing, is_fp32, decay), []).append(held)
    # Experts lie behind the others; of these, DeepSpeed keeps the order of precision and decay, then of the names.
    ordered = sorted(found, key=lambda key: (key[0], key[2], key[3], key[1]))
    return [
        OptimizerGroup(FP32 if is_fp32 else BF16, decay, sharing, sharing_ranks(sharing, topology), part)
        for is_expert, sharing, is_fp32, decay in ordered
        for part in _parts(found[is_expert, sharing, is_fp32, decay], is_expert)
    ]


def _parts(held: list[Held], is_expert: bool) -> list[tuple[Held, ...]]:
    """Groups of experts end where the next parameter would make them too large."""
    parts: list[list[Held]] = [[]]
    size = 0
    for one in held:
        if is_expert and parts[-1] and size + one.numbers > MOST_OF_EXPERTS:
            parts.append([])
            size = 0
        parts[-1].append(one)
        size += one.numbers
    return [tuple(part) for part in parts]
