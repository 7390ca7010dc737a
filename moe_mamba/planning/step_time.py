"""How long a training step takes, by part: a roofline of what layers declare, and of what the engine moves besides.

Products take their operations at the rate that a product of their size reaches, and never less than the memory's time
for their operands; passes take the memory's. What travels is in ``traffic.py``. On GPUs two things run beside
computing: ZeRO's reductions beside the backward pass that they follow, and rows on their way to experts beside the
other mixers of their layer.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.work import (
    Attended,
    Pass,
    Product,
    Scan,
    Work,
    layer_norm_work,
    vocabulary_work,
)
from moe_mamba.parallel.buckets import reduces_beside_backward
from moe_mamba.parallel.grouping import optimizer_groups
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.planning.cluster import Cluster
from moe_mamba.planning.load import Load
from moe_mamba.planning.traffic import BESIDE, Flow, layer_kinds, members, name_of, share_of, traffic_of

FP32 = 4  # bytes
Seconds = defaultdict[str, float]
COMPUTED = ("products", "experts", "attention", "scan", "memory")
PARTS = (*COMPUTED, "inside", "between", "optimizer", "host")
# Bytes of a number of the gradient that the engine reads and writes: added to an fp32 sum after each pass (of an fp32
# gradient that is the only one, nothing); into a bucket, divided, and out of it; into the flat gradient for AdamW.
ACCUMULATED, REDUCED, FLATTENED = 3 * FP32, 6 * FP32, 2 * FP32
# AdamW reads gradient, master and two moments and writes the last three; before, the norm reads the gradient.
UPDATED = 8 * FP32
OPERATORS_A_PARAMETER = 8  # that the engine starts for each parameter in a step
HOST_MEMORY_RATE = 200e9  # bytes a second of a machine's own memory, all its processes together
BACKWARD = 2  # of a forward pass's operations and operators


@dataclass(frozen=True)
class StepTime:
    """Seconds of a training step of one rank.

    Attributes:
        parts: what is computed, ``inside`` and ``between`` (what of the collectives nothing hides), ``optimizer``, and
            ``host``: what the host needs longer than the device.
        hidden: seconds of collectives that run beside computing.
        flops: of the model's count, that the rank's share of the step is.
    """

    parts: dict[str, float]
    hidden: float
    flops: float

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """What limits: the longest of several kinds of parts."""
        groups = {
            "matrix products": ("products", "experts", "attention"),
            "the scan": ("scan",),
            "the memory's rate": ("memory",),
            "the engine and the optimizer": ("optimizer",),
            "links inside machines": ("inside",),
            "links between machines": ("between",),
            "the host": ("host",),
        }
        return max(groups, key=lambda name: sum(self.parts[part] for part in groups[name]))


def step_time(plan: RunPlan, cluster: Cluster, micro_batch: int, accumulation: int, load: Load) -> StepTime:
    """The expected time of a step of the rank of ``plan``.

    Args:
        plan: of the run, as this rank sees it; under an uneven load the fullest rank is the one to ask.
        cluster: what devices and links can do.
        micro_batch: sequences of a micro-step of a group of tensor-parallel ranks.
        accumulation: micro-steps of a step.
        load: how many rows ranks send to experts.
    """
    passes = _passes(plan, cluster, micro_batch, load)
    forward = 2 if plan.config.train.recompute else 1
    parts: Seconds = defaultdict(float)
    backward = 0.0  # of the passes that ZeRO reduces beside: of every micro-step at ZeRO 2 and 3, else of the last
    for name in COMPUTED:
        ahead, back = passes.forward[name], passes.backward[name]
        parts[name] = accumulation * (forward * ahead + back)
        backward += back + (forward - 1) * ahead
    engine, operators = _engine(plan, accumulation, cluster)
    parts["optimizer"] = engine
    beside = accumulation * (passes.beside_forward * forward + passes.beside_backward)
    flows = traffic_of(plan, micro_batch, accumulation, load)
    backward *= accumulation if plan.config.parallel.zero >= 2 else 1
    hidden = _collectives(plan, cluster, flows, backward, beside, parts)
    operators += accumulation * passes.operators * (forward + BACKWARD)
    device = sum(parts.values())
    parts["host"] = max(0.0, operators * cluster.operator - device) if cluster.is_gpu else 0.0
    tokens = micro_batch * accumulation * plan.config.data.sequence_length / plan.topology.tensor
    flops = tokens * flops_per_token(plan.model, plan.config.data.sequence_length)
    return StepTime({name: parts[name] for name in PARTS}, hidden, flops)


@lru_cache(maxsize=4)
def flops_per_token(model: LanguageModel, length: int) -> int:
    """As the model counts them, once."""
    return model.flops_per_token(length)


@dataclass
class _Passes:
    """Seconds of a micro-step by part, operators of its forward pass, and what rows may travel beside."""

    forward: Seconds
    backward: Seconds
    operators: int = 0
    beside_forward: float = 0.0
    beside_backward: float = 0.0


def _passes(plan: RunPlan, cluster: Cluster, micro_batch: int, load: Load) -> _Passes:
    """What one micro-step computes; layers that are alike are counted once."""
    found = _Passes(defaultdict(float), defaultdict(float))
    for works, times, is_beside in _works(plan, micro_batch, load):
        for work in works:
            part, forward, backward = seconds_of(work, cluster, plan.config.train.precision == "bf16")
            found.forward[part] += times * forward
            found.backward[part] += times * backward
            found.operators += times * (work.operators if isinstance(work, Pass) else 2)
            if is_beside:
                found.beside_forward += times * forward
                found.beside_backward += times * backward
    return found


def _works(plan: RunPlan, micro_batch: int, load: Load) -> Iterator[tuple[list[Work], int, bool]]:
    """(work, how many times, whether rows travel beside it) of all layers and of the vocabulary."""
    model, moe = plan.config.model, plan.config.moe
    share = share_of(plan, micro_batch, load)
    for (mixers, prefix), times in layer_kinds(plan, load).items():
        yield [layer_norm_work(model, share)], times, False
        begun = any(mixer.begins for mixer in mixers)
        for place, mixer in enumerate(mixers):
            asked = share_of(plan, micro_batch, load, name_of(prefix, place, mixers))
            yield mixer.work(model, moe, asked), times, begun and not mixer.begins
    yield vocabulary_work(model, share, _rows_of_vocabulary(plan)), 1, False


def _rows_of_vocabulary(plan: RunPlan) -> int:
    return plan.shards["embedding.weight" if plan.model.head is None else "head.weight"].local_shape[0]


def seconds_of(work: Work, cluster: Cluster, is_half: bool) -> tuple[str, float, float]:
    """The part that work belongs to, and its seconds in the forward and the backward pass."""
    reached, width = cluster.reached, 2 if is_half else FP32
    memory = cluster.memory_rate * reached.memory
    if isinstance(work, Product):
        share = reached.experts if work.groups else reached.products
        rows = work.rows / max(1, work.groups)
        rate = cluster.product_rate(is_half and not work.is_fp32, min(rows, work.inner, work.out), share)
        operands = work.rows * (work.inner + work.out) + max(1, work.groups) * work.inner * work.out
        seconds = max(work.flops / rate, operands * (FP32 if work.is_fp32 else width) / memory)
        return "experts" if work.groups else "products", seconds, BACKWARD * seconds
    if isinstance(work, Attended):
        rate = cluster.attention or reached.attention * (cluster.bf16 if is_half else cluster.fp32)
        seconds = max(work.flops / rate, work.bytes / memory)
        return "attention", seconds, BACKWARD * seconds
    if isinstance(work, Scan):
        read = work.tokens * work.channels * work.width / memory  # forward x, delta, z and y; backward twice as many
        seconds = max(work.flops / (cluster.plain * reached.scan), 4 * read)
        return "scan", seconds, BACKWARD * seconds
    forward = cluster.pass_seconds(work.forward, work.operators)
    return "memory", forward, cluster.pass_seconds(work.backward, BACKWARD * work.operators)


def _engine(plan: RunPlan, accumulation: int, cluster: Cluster) -> tuple[float, int]:
    """Seconds of what the engine does to gradients, weights and moments in a step, and the operators that it starts."""
    config, zero = plan.config, plan.config.parallel.zero
    device = host = 0.0
    parameters = 0
    for group in optimizer_groups(plan):
        owned = group.size if zero == 0 else group.padded / group.ranks
        parameters += len(group.names)
        if accumulation > 1 or not group.is_fp32:
            device += group.size * ACCUMULATED * accumulation
        if zero or group.ranks > 1:
            device += group.size * REDUCED * (accumulation if zero >= 2 else 1)
        device += owned * FLATTENED if zero else 0
        if config.parallel.offload_optimizer:
            host += owned * (FP32 * accumulation + (FP32 if group.is_fp32 else 2))
        else:
            device += owned * UPDATED
        if zero:
            device += owned * (FP32 + (FP32 if group.is_fp32 else 2))  # masters to running weights
    seconds = device / (cluster.memory_rate * cluster.reached.memory) + host / cluster.host_rate
    if config.parallel.offload_optimizer:  # AdamW on the host: its memory is shared by a machine's ranks
        seconds += host / FP32 * UPDATED / HOST_MEMORY_RATE * cluster.gpus_per_machine
    operators = OPERATORS_A_PARAMETER * parameters
    return seconds + (0 if cluster.is_gpu else operators * cluster.operator), operators


def _collectives(
    plan: RunPlan, cluster: Cluster, flows: Sequence[Flow], backward: float, beside: float, parts: Seconds
) -> float:
    """Add to ``parts`` what of the collectives nothing hides; returns the seconds that are hidden."""
    seconds: dict[str, list[float]] = {"exposed": [0.0, 0.0], "gradients": [0.0, 0.0], BESIDE: [0.0, 0.0]}
    largest = max(size for group in optimizer_groups(plan) for size in group.sizes)
    reduces = reduces_beside_backward(
        plan.config.parallel.zero, "cuda" if cluster.is_gpu else "cpu", plan.topology.world.size, largest
    )
    for flow in flows:
        ranks = members(plan.topology, flow.group)
        where = "exposed"
        if cluster.is_gpu and flow.part == BESIDE:
            where = BESIDE
        elif reduces and flow.part == "gradients":
            where = "gradients"
        for place, value in enumerate(cluster.collective_seconds(flow.kind, flow.bytes, flow.calls, ranks)):
            seconds[where][place] += value
    room = {"exposed": 0.0, BESIDE: beside * cluster.reached.beside, "gradients": backward * cluster.reached.beside}
    hidden = 0.0
    for name, (inside, between) in seconds.items():
        whole = inside + between
        share = min(1.0, room[name] / whole) if whole else 0.0
        hidden += share * whole
        parts["inside"] += (1 - share) * inside
        parts["between"] += (1 - share) * between
    return hidden
