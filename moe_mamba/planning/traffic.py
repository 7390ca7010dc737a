"""What a training step sends: the bytes and calls of each collective of one rank.

Layers say themselves what they send (``Mixer.sends``); what the engine, the objective and the vocabulary add is
written down here. Nothing is run: tests compare it, to the byte and to the call, with what gloo counts of the engine's
own step, at every stage of ZeRO.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import NamedTuple

from moe_mamba.kernels.cross_entropy.linear import CHUNK
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.base import Mixer
from moe_mamba.model.pattern import layer_specs
from moe_mamba.model.work import FP32, Rows, Sent, Share, crossings, layer_crossings
from moe_mamba.parallel.buckets import BUCKET, LIVE, PERSISTENT, WHOLE_BUCKET
from moe_mamba.parallel.grouping import OptimizerGroup, optimizer_groups
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology
from moe_mamba.planning.load import Load

FP64 = 8
BF16 = 2
GATHERED = 50_000_000  # elements that ZeRO-3 gathers ahead together, by DeepSpeed's default
FIGURES = 7  # that the trainer adds to the norm: loss, targets of the next batch, and one for each reason to stop
REDUCED_BESIDE = "gradients"
BESIDE = "experts beside"


class Flow(NamedTuple):
    """Calls of one kind of collective over one group in a training step, of one rank.

    Attributes:
        kind: of the collective.
        group: whose ranks take part; see ``members``.
        ranks: how many they are.
        bytes: of all calls; of each the larger side on the rank, of an all-to-all what it sends.
        calls: how many.
        part: what it is for: tensor, vocabulary, counts, experts, ``experts beside`` (on the way while other mixers of
            the layer compute), statistics, gradients, replicas, weights or norm.
    """

    kind: str
    group: str
    ranks: int
    bytes: int
    calls: int
    part: str


def traffic_of(plan: RunPlan, micro_batch: int, accumulation: int, load: Load, figures: int = FIGURES) -> list[Flow]:
    """What the rank of ``plan`` sends in one training step; groups of one rank send nothing and are left out.

    Args:
        plan: of the run, as this rank sees it.
        micro_batch: sequences of a micro-step of each group of tensor-parallel ranks.
        accumulation: micro-steps of a step.
        load: how many rows ranks send to experts.
        figures: numbers that travel with the norm of the gradient.
    """
    total: Counter[tuple[str, str, str]] = Counter()
    calls: Counter[tuple[str, str, str]] = Counter()

    def add(kind: str, group: str, part: str, size: int, times: int) -> None:
        if times and len(members(plan.topology, group)) > 1:
            total[kind, group, part] += size * times
            calls[kind, group, part] += times

    recompute = plan.config.train.recompute
    for sent, layers in (*_of_layers(plan, micro_batch, load), *_of_vocabulary(plan, micro_batch)):
        forward = sent.forward * (2 if recompute and sent.is_repeated else 1)
        add(sent.kind, sent.group, sent.part, sent.bytes, layers * accumulation * (forward + sent.backward))
    numbers = _statistics(plan.model)
    add("all-reduce", "world", "statistics", numbers * FP32, accumulation if numbers else 0)
    for kind, group, part, size, times in _of_engine(plan, accumulation):
        add(kind, group, part, size, times)
    add("all-reduce", "world", "norm", (1 + figures) * FP64, 1)
    return [
        Flow(kind, group, len(members(plan.topology, group)), size, calls[kind, group, part], part)
        for (kind, group, part), size in total.items()
    ]


@lru_cache(maxsize=4)
def _statistics(model: LanguageModel) -> int:
    """Numbers that the routers of a model measure."""
    return sum(2 * router.config.experts + 4 for router in model.routers().values())


def members(topology: Topology, group: str) -> tuple[int, ...]:
    """Ranks of the group of this name that the topology's rank is in."""
    return _members(topology, group)


@lru_cache(maxsize=4096)
def _members(topology: Topology, group: str) -> tuple[int, ...]:
    size, rank, tensor = topology.world.size, topology.world.rank, topology.tensor
    lane = range(topology.tensor_rank, size, tensor)  # ranks with the same part of each layer
    pool = lane if topology.expert_tensor else range(size)
    place = pool.index(rank)
    if group == "world":
        return tuple(range(size))
    if group == "data":
        return tuple(lane)
    if group == "expert":
        return tuple(pool[place // topology.expert * topology.expert :][: topology.expert])
    if group == "expert_data":
        return tuple(pool[place % topology.expert :: topology.expert])
    if group in ("inner_expert", "inner_expert_data"):
        inner, mine = topology.inner_expert, topology.data_rank
        return tuple(lane[mine // inner * inner :][:inner] if group == "inner_expert" else lane[mine % inner :: inner])
    count = tensor if group == "tensor" else int(group.removeprefix("replicas "))
    return tuple(range(rank // count * count, rank // count * count + count))


def share_of(plan: RunPlan, micro_batch: int, load: Load, prefix: str = "") -> Share:
    """The rank's part of a micro-step, for the declarations of a layer.

    Args:
        plan: of the run.
        micro_batch: sequences.
        load: of the experts.
        prefix: full name of the mixer that is asked, before the names of its routers.
    """
    config, topology = plan.config, plan.topology
    return Share(
        batch=micro_batch,
        length=config.data.sequence_length,
        width=2 if config.train.precision == "bf16" else FP32,
        rows_of=partial(_rows, topology, load, prefix),
        tensor=topology.tensor,
        expert=topology.expert,
        inner_expert=topology.inner_expert,
        expert_tensor=topology.expert_tensor,
        resets=config.data.reset_at_document,
    )


def _rows(topology: Topology, load: Load, prefix: str, group: str, router: str, experts: int, rows: int) -> Rows:
    """What this rank exchanges with the experts of its group, by the load."""
    ranks = topology.expert if group == "expert" else topology.inner_expert
    place = topology.expert_rank if group == "expert" else topology.inner_expert_rank
    if ranks == 1:
        return Rows(rows, rows)
    matrix = _matrix(load, ranks, experts, rows, f"{prefix}.{router}" if prefix else None)
    here = experts // ranks
    return Rows(sum(matrix[place]), sum(sum(row[place * here : (place + 1) * here]) for row in matrix))


def layer_kinds(plan: RunPlan, load: Load) -> Counter[tuple[tuple[type[Mixer], ...], str]]:
    """(mixers of a layer, full name before them) -> how many such layers there are.

    Names are left out, and alike layers counted together, unless each router has a load of its own.
    """
    found: Counter[tuple[tuple[type[Mixer], ...], str]] = Counter()
    for index, spec in enumerate(layer_specs(plan.config.model, plan.config.moe)):
        found[spec.mixers, f"layers.{index}.mixer" if load.recorded is not None else ""] += 1
    return found


def name_of(prefix: str, place: int, mixers: Sequence[object]) -> str:
    """Full name of a mixer, of its layer's and its place there; nothing where names are left out."""
    return f"{prefix}.{place}" if prefix and len(mixers) > 1 else prefix


def _of_layers(plan: RunPlan, micro_batch: int, load: Load) -> Iterator[tuple[Sent, int]]:
    """What the layers send, and how many do; rows are beside other work where a layer has several mixers."""
    model, moe = plan.config.model, plan.config.moe
    for (mixers, prefix), times in layer_kinds(plan, load).items():
        for place, mixer in enumerate(mixers):
            share = share_of(plan, micro_batch, load, name_of(prefix, place, mixers))
            for sent in mixer.sends(model, moe, share):
                yield sent._replace(part=BESIDE) if len(mixers) > 1 and sent.begins else sent, times
        for sent in layer_crossings(mixers, model, moe, share_of(plan, micro_batch, load)):
            yield sent, times


@lru_cache(maxsize=256)
def _matrix(load: Load, ranks: int, experts: int, rows: int, router: str | None) -> list[list[int]]:
    return load.matrix(ranks, experts, rows, router)


def _of_vocabulary(plan: RunPlan, micro_batch: int) -> Iterator[tuple[Sent, int]]:
    """Embedding and head: an exit and an entry of the tokens, and what chunks of logits are reduced by.

    Of each token the largest logit, and together the target's logit and the sum.
    """
    if plan.topology.tensor == 1:
        return
    config = plan.config
    share = share_of(plan, micro_batch, Load.parse("even"))
    # ZeRO-3 keeps the embedding in fp32, and its sums leave it before they are cast.
    from_embedding = replace(share, width=FP32) if config.parallel.zero == 3 else share
    entry, exit_ = (list(crossings(one, config.model.d_model, 1)) for one in (share, from_embedding))
    for sent in (*entry[:2], *exit_[2:]):
        yield sent._replace(part="vocabulary", is_repeated=False), 1
    head = plan.shards["embedding.weight" if plan.model.head is None else "head.weight"]
    size = chunk_of_tokens(share.tokens, head.local_shape[0] * share.width)
    for first in range(0, share.tokens, size):
        tokens = min(size, share.tokens - first)
        for numbers in (1, 2):
            size_of_call = numbers * tokens * FP32
            yield Sent("all-reduce", "tensor", size_of_call, forward=1, is_repeated=False, part="vocabulary"), 1


def chunk_of_tokens(tokens: int, row: int) -> int:
    """Tokens of a chunk of the head, whose logits take ``row`` bytes each."""
    return max(1, -(-tokens // max(1, -(-tokens * row // CHUNK))))


Calls = Iterator[tuple[str, str, str, int, int]]
"""(kind, group, part, bytes of a call, calls)."""


def _of_engine(plan: RunPlan, accumulation: int) -> Calls:
    """What the engine sends between the passes, and beside them: gradients, replicas' gradients and new weights."""
    groups, zero = optimizer_groups(plan), plan.config.parallel.zero
    if zero == 3:
        yield from _of_zero_3(plan, groups, accumulation)
    else:
        yield from _of_gradients(groups, zero, accumulation if zero == 2 else 1)
    for replicas, numbers in sorted(_replicas(plan, groups).items()):
        yield "all-reduce", f"replicas {replicas}", "replicas", numbers * FP32, 1
    if zero in (1, 2):
        for group in groups:
            yield "all-gather", sharing(group), "weights", group.padded * (FP32 if group.is_fp32 else BF16), 1


def sharing(group: OptimizerGroup) -> str:
    """The ranks that hold a group's parameters: those whose gradients are averaged."""
    return "data" if group.experts is None else f"{group.experts}_data"


def _of_gradients(groups: Sequence[OptimizerGroup], zero: int, times: int) -> Calls:
    """All-reduces of gradients in fp32, in buckets; each bucket's experts by themselves.

    DeepSpeed's ZeRO all-reduces at stages 1 and 2, where a reduce-scatter would do.
    """
    if zero == 0:
        for ranks in dict.fromkeys(map(sharing, groups)):
            sizes = [size for group in groups if sharing(group) == ranks for size in group.sizes]
            for together in _filled(sizes, WHOLE_BUCKET):
                yield "all-reduce", ranks, "gradients", together * FP32, times
        return
    bucket: Counter[str] = Counter()
    for group in groups:
        part, ranks = group.partition, sharing(group)
        for size in group.sizes:
            if bucket and bucket.total() + size > BUCKET:
                yield from _reduced(bucket, times)
                bucket.clear()
            if size > BUCKET:  # travels by itself, in the parts that ranks own
                owned = [min(part, size - first) for first in range(0, size, part)]
                for together in _filled(owned, BUCKET):
                    yield "all-reduce", ranks, "gradients", together * FP32, times
            else:
                bucket[ranks] += size
    yield from _reduced(bucket, times)


def _reduced(bucket: Mapping[str, int], times: int) -> Calls:
    for ranks, numbers in bucket.items():
        yield "all-reduce", ranks, "gradients", numbers * FP32, times


def _filled(sizes: list[int], most: int) -> Iterator[int]:
    """Sums of neighbouring sizes, each ended by the one with which it exceeds ``most``."""
    total = 0
    for size in sizes:
        total += size
        if total > most:
            yield total
            total = 0
    if total:
        yield total


def _replicas(plan: RunPlan, groups: Sequence[OptimizerGroup]) -> Counter[int]:
    """Ranks that hold the same -> elements of them whose gradients lie on this rank before the step.

    At ZeRO 0 all; at 1 and 2 those in its part of each flat group; at 3 its part of each parameter, padded.
    """
    found: Counter[int] = Counter()
    zero, rank = plan.config.parallel.zero, plan.topology.world.rank
    for group in groups:
        part, end = group.partition, 0
        first = part * members(plan.topology, sharing(group)).index(rank)
        for name, size in zip(group.names, group.sizes, strict=True):
            begin, end = end, end + size
            owned = max(0, min(end, first + part) - max(begin, first))
            mine = {0: size, 3: -(-size // group.ranks)}.get(zero, owned)
            if (replicas := plan.shards[name].replicas) > 1 and mine:
                found[replicas] += mine
    return found


def _of_zero_3(plan: RunPlan, groups: Sequence[OptimizerGroup], accumulation: int) -> Calls:
    """ZeRO-3's weights and gradients; each parameter is padded to a multiple of its ranks.

    In each micro-step weights are gathered before a module's forward pass, in bf16 but for those that stay fp32, and
    before its backward pass again, unless that is so near that DeepSpeed keeps them (``LIVE`` elements of modules in
    between); and gradients are reduce-scattered in fp32. Small weights stay gathered, and are so after the update.
    """
    kept_fp32 = plan.model.fp32_parameter_names()
    is_half = plan.config.train.precision == "bf16"
    widths: Counter[int] = Counter()
    whole = 0
    for group in groups:
        for name, size in zip(group.names, group.sizes, strict=True):
            padded = -(-size // group.ranks) * group.ranks
            whole += padded
            if size <= PERSISTENT:
                yield "all-gather", sharing(group), "weights", padded * FP32, 1
            else:
                widths[BF16 if is_half and name not in kept_fp32 else FP32] += padded
    gathered = widths.total()
    again = max(0, gathered - LIVE // 2)
    for width, numbers in widths.items():
        times = -(-numbers // GATHERED)
        size = numbers * width * (gathered + again) // gathered
        for part in range(times):
            yield "all-gather", "data", "weights", size * (part + 1) // times - size * part // times, accumulation
    for first in range(0, whole, BUCKET):
        yield "reduce-scatter", "data", "gradients", min(BUCKET, whole - first) * FP32, accumulation
