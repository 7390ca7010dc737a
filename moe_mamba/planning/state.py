"""What a rank's engine keeps of a model between passes: weights, gradients, the optimizer's state, and ZeRO's buffers.

Read off DeepSpeed 0.19's ``stage_1_and_2.py`` and ``stage3.py``, and compared with what an engine really holds in every
layout of the parity matrix (``tests/planning/test_state.py``). Groups and padding are those that the engine makes
(``parallel/grouping.py``), so no rule is copied.

ZeRO 0 keeps all of everything. ZeRO 1 and 2 lay each group's weights in one flat tensor, of which a rank updates a
part: fp32 masters and two moments. Under ZeRO 1 gradients stay whole until the step, in fp32, but where the only
micro-step's are reduced as they come (on GPUs). Then, and under ZeRO 2, a rank keeps its part in fp32 where weights are
bf16; in a model that is fp32 throughout, DeepSpeed keeps whole the gradients of all parameters of which the rank
updates some. ZeRO-3 keeps a part of each parameter, in fp32, beside its master, and small parameters whole besides.
"""

import math
from dataclasses import dataclass, replace
from itertools import accumulate

from moe_mamba.parallel.buckets import BUCKET, LIVE, PERSISTENT, WHOLE_BUCKET, reduces_beside_backward
from moe_mamba.parallel.grouping import OptimizerGroup, optimizer_groups
from moe_mamba.parallel.run_plan import RunPlan

FP32, BF16 = 4, 2  # bytes


@dataclass(frozen=True)
class EngineState:
    """Bytes of a rank.

    Attributes:
        parameters: how many elements of weights the rank has, padding of the vocabulary included.
        weights: with buffers, and what ZeRO-3 leaves gathered between passes.
        gradients: from pass to pass; of ZeRO's ranks the one that keeps most.
        optimizer: moments and, with ZeRO, fp32 masters.
        buckets: buffers that stand while a backward pass runs, and copies that reducing one makes beside it.
        update: what reducing and stepping need when the backward pass is over.
        host: memory of the CPU that an offloaded optimizer takes.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    buckets: int
    update: int
    host: int


def state_of(plan: RunPlan, device: str, micro_steps: int = 2) -> EngineState:
    """What the engine of ``plan`` keeps.

    Args:
        plan: of the run; every rank of a layout keeps as much, but for gradients.
        device: type of the device that trains, such as ``cuda``.
        micro_steps: of a step.
    """
    groups, stage = optimizer_groups(plan), plan.config.parallel.zero
    counts = _without_zero if stage == 0 else _parts_of_parameters if stage == 3 else _parts_of_groups
    return counts(plan, groups, device, micro_steps)


def _width(group: OptimizerGroup) -> int:
    return FP32 if group.is_fp32 else BF16


def _buffers(plan: RunPlan, groups: tuple[OptimizerGroup, ...]) -> int:
    """Bytes of the balancing biases, in fp32, which every rank holds: what no group has."""
    buffers = plan.shards.keys() - {name for group in groups for name in group.names}
    return sum(FP32 * math.prod(plan.shards[name].local_shape) for name in buffers)


def _without_zero(plan: RunPlan, groups: tuple[OptimizerGroup, ...], device: str, micro_steps: int) -> EngineState:
    """All in fp32. Gradients are averaged when all are there, in copies of ``WHOLE_BUCKET`` elements."""
    count = sum(group.size for group in groups)
    together = min(count, WHOLE_BUCKET)  # copied by a single data rank as well
    return EngineState(
        parameters=count,
        weights=FP32 * count + _buffers(plan, groups),
        gradients=FP32 * count,
        optimizer=2 * FP32 * count,
        buckets=0,
        update=FP32 * together,
        host=0,
    )


def _parts_of_groups(plan: RunPlan, groups: tuple[OptimizerGroup, ...], device: str, micro_steps: int) -> EngineState:
    """ZeRO 1 and 2."""
    stage, offloads = plan.config.parallel.zero, plan.config.parallel.offload_optimizer
    count, largest = sum(group.size for group in groups), max(max(group.sizes) for group in groups)
    first = _width(groups[0])  # by which DeepSpeed decides
    owned = sum(group.partition for group in groups)
    beside = reduces_beside_backward(stage, device, plan.topology.world.size, largest)
    is_whole = stage == 1 and not (beside and micro_steps == 1)  # else reduced as they come, by hooks
    touched = _most_touched(plan, groups) if first == FP32 and not is_whole else 0
    parts = FP32 * owned if first == BF16 else FP32 * touched  # what is kept once a gradient is reduced
    staged = FP32 if stage == 1 else first  # bytes of an element of a bucket
    standing = BUCKET * staged * (2 if beside else 1)
    copied = min(count, BUCKET) * (staged + (FP32 if staged == BF16 else 0))  # flattened, and widened to travel
    reduces_in_pass = beside or (stage == 2 and count > BUCKET)
    gradients = FP32 * count if is_whole else 0 if offloads and first == FP32 else parts
    after = standing + copied + (parts if stage == 1 and first == BF16 else 0)
    step = 0 if offloads or first == BF16 else FP32 * max(group.partition for group in groups)
    host = _host(groups, first, touched if stage == 2 else 0, largest) if offloads else 0
    return EngineState(
        parameters=count,
        weights=sum(group.padded * _width(group) for group in groups) + _buffers(plan, groups),
        gradients=gradients,
        optimizer=0 if offloads else 3 * FP32 * owned,
        buckets=standing + (copied if reduces_in_pass else 0) + (largest * first if offloads else 0),
        update=max(after, step),
        host=host,
    )


def _most_touched(plan: RunPlan, groups: tuple[OptimizerGroup, ...]) -> int:
    """Elements of the parameters of which a rank updates some, on the rank where they are most."""
    topology = plan.topology
    by_group = [(group.experts, _touched(group)) for group in groups]
    most = 0
    for rank in range(topology.world.size):
        place = replace(topology, world=replace(topology.world, rank=rank))
        part = {
            None: place.data_rank,
            "inner_expert": place.data_rank // topology.inner_expert,
            "expert": (place.data_rank if topology.expert_tensor else rank) // topology.expert,
        }
        most = max(most, sum(touched[part[experts]] for experts, touched in by_group))
    return most


def _touched(group: OptimizerGroup) -> list[int]:
    """The same of a group, for each of the ranks that share it."""
    counts, first, last, held = [], 0, 0, 0
    ends = list(accumulate(group.sizes))
    for rank in range(group.ranks):
        start, stop = rank * group.partition, (rank + 1) * group.partition
        while last < len(ends) and ends[last] - group.sizes[last] < stop:
            held += group.sizes[last]
            last += 1
        while first < last and ends[first] <= start:
            held -= group.sizes[first]
            first += 1
        counts.append(held)
    return counts


def _host(groups: tuple[OptimizerGroup, ...], first: int, accumulated: int, largest: int) -> int:
    """Masters, their gradients, moments, weights on their way back, one gradient on its way, and accumulated ones."""
    state = sum(group.partition * (4 * FP32 + _width(group)) for group in groups)
    return state + largest * first + accumulated * FP32


def _parts_of_parameters(
    plan: RunPlan, groups: tuple[OptimizerGroup, ...], device: str, micro_steps: int
) -> EngineState:
    """ZeRO-3: no experts, all in fp32."""
    offloads, ranks = plan.config.parallel.offload_optimizer, plan.topology.data
    sizes = [size for group in groups for size in group.sizes]
    count, owned = sum(sizes), sum(-(-size // ranks) for size in sizes)
    # A single data rank's parts are the weights themselves: it gathers nothing.
    persistent = sum(size for size in sizes if size <= PERSISTENT) if ranks > 1 else 0
    gathered = min(count - persistent, LIVE) if ranks > 1 else 0
    return EngineState(
        parameters=count,
        weights=FP32 * (owned + persistent) + _buffers(plan, groups),
        gradients=0 if offloads else FP32 * owned,
        optimizer=0 if offloads else 3 * FP32 * owned,
        buckets=FP32 * (BUCKET + min(count, BUCKET) + gathered),
        update=FP32 * (BUCKET + max(sum(-(-size // ranks) for size in group.sizes) for group in groups)),
        host=5 * FP32 * owned if offloads else 0,
    )
