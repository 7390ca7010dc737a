"""The layouts of a run that fit a cluster, best first.

Whatever keeps a layout from being trained is found by arithmetic before anything of it is counted, and shapes are
worked out once for each (tensor, expert, expert_tensor): ZeRO, offloading, recomputation and the
micro-batch change none.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe_mamba.config import Config
from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.pattern import has_experts
from moe_mamba.parallel.placement import check_shards
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.cluster import GIB, Cluster
from moe_mamba.planning.estimate import Estimate, run_plan, with_keys
from moe_mamba.planning.load import Load, dropless
from moe_mamba.planning.micro_batch import possible_micro_batches

# A search takes an even load, of which the fullest rank of an expert group has this much more.
MARGIN = 1.1


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        best: layouts that fit, fastest first, each with its fastest micro-batch.
        tried: combinations of keys that were counted.
        impossible: layouts that model or batch cannot be shared in.
        too_large: combinations whose memory is not enough at any micro-batch.
        least: the one that misses the memory by least, where none fits.
    """

    best: list[Estimate]
    tried: int
    impossible: int
    too_large: int
    least: Estimate | None


def search(
    config: Config,
    cluster: Cluster,
    gpus: int,
    load: Load | None = None,
    tokens: int | None = None,
    price: float | None = None,
) -> Found:
    """Count every layout of a run on a cluster.

    Args:
        config: of the run; its ``parallel`` section, ``train.recompute`` and ``train.micro_batch`` are searched over,
            its global batch stays.
        cluster: where it runs.
        gpus: devices.
        load: of the experts; None: even, and ``MARGIN`` more on the fullest rank.
        tokens: budget; None: the configuration's.
        price: money per GPU hour.

    Raises:
        UserError: no layout can be made of so many devices.
    """
    wanted = tokens or config.steps * config.train.global_batch * config.data.sequence_length
    model = LanguageModel.on_meta(config.model, config.moe, config.run.kernels)
    (load or Load()).check(model)
    experts = min(dropless(model).values(), default=1)
    best: list[Estimate] = []
    tried = impossible = too_large = 0
    least: Estimate | None = None
    for layout in _layouts(config, cluster, gpus):
        if layout is None:
            impossible += 1
            continue
        loaded = load or margin_load(experts, layout.parallel.expert)
        plan = run_plan(layout, cluster, gpus, loaded, model)
        fit: set[tuple[int, bool]] = set()  # without offloading, which is slower and would be chosen by nobody
        for variant in _variants(plan):
            parallel, recompute = variant.config.parallel, variant.config.train.recompute
            if parallel.offload_optimizer and (parallel.zero, recompute) in fit:
                continue
            tried += 1
            smallest, fitting = _fitting(Estimate(variant, cluster, loaded, 0, wanted, price))
            if fitting:
                fit.add((parallel.zero, recompute))
                best.append(max(fitting, key=lambda one: one.tokens_per_second))
                continue
            too_large += 1
            if least is None or smallest.memory.total < least.memory.total:
                least = smallest
    if not tried:
        raise UserError(
            f"no layout of {gpus} GPUs shares train.global_batch={config.train.global_batch} and the model: give a "
            "global batch with more divisors, or another --gpus"
        )
    best.sort(key=lambda one: -one.tokens_per_second)
    return Found(best, tried, impossible, too_large, least)


def found_table(found: Found, most: int) -> str:
    """The best layouts of a search for people, fastest first."""
    head = ("tensor", "expert", "by width", "ZeRO", "offload", "recompute", "micro-batch", "GiB", "tokens/s/GPU", "MFU")
    rows: list[tuple[str, ...]] = [head]
    for one in found.best[:most]:
        topology, parallel = one.plan.topology, one.plan.config.parallel
        flags = (parallel.offload_optimizer, one.plan.config.train.recompute)
        rows.append(
            (
                *map(str, (topology.tensor, topology.expert, _yes(topology.expert_tensor), parallel.zero)),
                *map(_yes, flags),
                f"{one.accumulation} x {one.micro_batch}",
                f"{one.memory.total / GIB:.1f}",
                f"{one.tokens_per_second:,.0f}",
                f"{one.mfu:.1%}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    counts = f"{found.tried} combinations counted, {len(found.best)} fit; {found.impossible} layouts cannot share model"
    lines.append(f"{counts} or batch")
    if not found.best:
        lines.append("none fits; the one that misses by least:")
    return "\n".join(lines)


def worlds_table(config: Config, cluster: Cluster, worlds: list[int], tokens: int | None, price: float | None) -> str:
    """The best layout on each of several numbers of devices, and what limits there."""
    head = ("GPUs", "layout", "GiB", "tokens/s/GPU", "MFU", "bound", "days")
    rows: list[tuple[str, ...]] = [head]
    for gpus in worlds:
        try:
            found = search(config, cluster, gpus, None, tokens, price)
        except UserError as error:  # the other worlds are possible still
            rows.append((f"{gpus:,}", f"cannot be: {error}", "", "", "", "", ""))
            continue
        if not found.best:
            assert found.least is not None
            rows.append((f"{gpus:,}", "none fits", f"{found.least.memory.total / GIB:.0f}", "", "", "memory", ""))
            continue
        one = found.best[0]
        speed = (f"{one.tokens_per_second:,.0f}", f"{one.mfu:.1%}", one.time.bound, f"{one.days:,.1f}")
        rows.append((f"{gpus:,}", short_layout(one).replace("\n", ", "), f"{one.memory.total / GIB:.0f}", *speed))
    # A line about a world that cannot be is as long as it is, and no column's width.
    widths = [max(len(row[column]) for row in rows if row[2] or row is head) for column in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def short_layout(one: Estimate) -> str:
    """A layout in a few letters, for a picture."""
    config, topology = one.plan.config, one.plan.topology
    extras = " offload" * config.parallel.offload_optimizer + " recompute" * config.train.recompute
    experts = f" EP {topology.expert}" * has_experts(config.model, config.moe) + " by width" * topology.expert_tensor
    return f"TP {topology.tensor}{experts} ZeRO {config.parallel.zero}{extras}\n{one.accumulation} x {one.micro_batch}"


def _yes(flag: bool) -> str:
    return "yes" if flag else "-"


def margin_load(experts: int, ranks: int) -> Load:
    """A load of which the first of the ranks that share the experts gets ``MARGIN`` times the mean."""
    if ranks == 1 or experts % ranks:
        return Load()
    here = experts // ranks
    # Its first expert has all of the surplus; the others' share falls by what is taken from them.
    factor = 1 + (MARGIN - 1) * here * (experts - 1) / max(1, experts - here)
    return Load.parse(f"skewed:{min(factor, experts):.4f}")


def _layouts(config: Config, cluster: Cluster, gpus: int) -> Iterator[Config | None]:
    """Configurations of each (tensor, expert, expert_tensor) of so many devices; None: it is none."""
    tensors = [size for size in _divisors(cluster.gpus_per_machine) if gpus % size == 0]
    experts = [1]
    if has_experts(config.model, config.moe):
        most = {config.moe.experts, config.moe.inner_routing.experts if config.moe.inner.projections else 0}
        experts = [size for size in _divisors(gpus) if any(count and count % size == 0 for count in most)]
    for tensor, expert, expert_tensor in itertools.product(tensors, experts, (False, True)):
        if expert_tensor and (tensor == 1 or not has_experts(config.model, config.moe)):
            continue
        layout = with_layout(config, tensor, expert, expert_tensor)
        yield layout if _is_possible(layout, gpus) else None


def with_layout(config: Config, tensor: int, expert: int, expert_tensor: bool) -> Config:
    """The same in another layout, its micro-batch open."""
    parallel = config.parallel.model_copy(
        update={
            "tensor": tensor,
            "expert": expert,
            "expert_tensor": expert_tensor,
            "zero": 1,
            "offload_optimizer": False,
        }
    )
    train = config.train.model_copy(update={"micro_batch": None, "recompute": False})
    return config.model_copy(update={"parallel": parallel, "train": train})


def _is_possible(config: Config, gpus: int) -> bool:
    try:
        topology = Topology.of(config, World(0, gpus, 0, 1))
        check_shards(config, topology)
    except UserError:
        return False
    return True


def _variants(plan: RunPlan) -> Iterator[RunPlan]:
    """Stages of ZeRO, offloading and recomputation; with experts the configuration refuses stage 3."""
    stages = (1, 2) if has_experts(plan.config.model, plan.config.moe) else (1, 2, 3)
    for offload, zero, recompute in itertools.product((False, True), stages, (False, True)):
        yield with_keys(plan, parallel={"zero": zero, "offload_optimizer": offload}, train={"recompute": recompute})


def _fitting(one: Estimate) -> tuple[Estimate, list[Estimate]]:
    """The smallest micro-batch, and the two largest that fit: more tokens at once are faster, or as fast."""
    *several, whole = (replace(one, micro_batch=size) for size in possible_micro_batches(one.plan))
    low, high = 0, len(several)  # memory grows with the micro-batch, but a single micro-step keeps fewer gradients
    while low < high:
        middle = (low + high) // 2
        if several[middle].fits:
            low = middle + 1
        else:
            high = middle
    fitting = [*several[:low], *([whole] if whole.fits else [])]
    return (several or [whole])[0], fitting[-2:]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
