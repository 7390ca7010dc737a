"""Models and training on any layout, against the same on one process: what the tests of parallelism share."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from moe_mamba.config import Config
from moe_mamba.config_file import parse_config
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers import attention, feed_forward
from moe_mamba.model.mixers.routing import Router, update_balance_bias
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.distributed import reduce_over_data, start_world
from moe_mamba.parallel.groups import Groups, start_groups
from moe_mamba.parallel.parallelize import build_model
from moe_mamba.parallel.placement import ParameterShard, check_shards
from moe_mamba.parallel.replicas import group_of_replicas, sum_over_replicas
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.train.objective import Objective
from tests.designs import split

VOCABULARY, LENGTH, GLOBAL_BATCH = 301, 8, 24
DECISIVE = 8.0  # routers start with larger weights than in a run, so that fewer of their decisions are near a tie
# Least distance of a decision from a tie, in scores: a hundred times what rounding moves them by in some steps.
MARGIN, MARGIN_FLOAT64 = 2e-4, 1e-6


@dataclass(frozen=True, order=True)
class Layout:
    """A world of ``ranks`` processes and how it is laid out."""

    ranks: int
    tensor: int = 1
    expert: int = 1
    zero: int = 1
    expert_tensor: bool = False

    @property
    def data(self) -> int:
        return self.ranks // self.tensor

    def __str__(self) -> str:
        sharded = " sharded by tensor" * self.expert_tensor
        return f"TP {self.tensor} EP {self.expert}{sharded} DP {self.data} ZeRO {self.zero}"


def legal_layouts(pattern: str, ranks: int = 8) -> list[Layout]:
    """Every TP 1, 2, 4 x EP 1, 2, 4 x DP x ZeRO 0, 1, 2 that `ranks` processes can be laid out in."""
    axes = itertools.product(
        range(1, ranks + 1), (1, 2, 4), (1, 2, 4) if "E" in pattern or " " in pattern else (1,), (0, 1, 2)
    )
    layouts = [Layout(*axis) for axis in axes]
    return [
        layout
        for layout in layouts
        if layout.ranks % layout.tensor == 0 and layout.ranks % layout.expert == 0 and GLOBAL_BATCH % layout.data == 0
    ]


def config_of(pattern: str, layout: Layout, accumulation: int = 1, **keys: Any) -> Config:
    """A tiny model of `pattern` in `layout`; keys are written section__key."""
    pattern, inner = split(pattern)
    tree: dict[str, dict[str, Any]] = {
        "model": {
            "pattern": pattern,
            "repeat": 1,
            "d_model": 16,
            "d_state": 4,
            "heads": 4,
            "kv_heads": 2,
            "d_ff": 24,
            "vocab_size": VOCABULARY,
            "activation": "swiglu",
            "mamba_norms": True,
        },
        "moe": {"experts": 4, "d_expert": 12, "capacity_factor": None, "z_loss_weight": 1e-3, "inner": inner},
        "data": {"sequence_length": LENGTH},
        "train": {
            "global_batch": GLOBAL_BATCH,
            "micro_batch": GLOBAL_BATCH // layout.data // accumulation,
            "learning_rate": 3e-3,
        },
        "parallel": {
            "tensor": layout.tensor,
            "expert": layout.expert,
            "expert_tensor": layout.expert_tensor,
            "zero": layout.zero,
        },
    }
    for key, value in keys.items():
        section, name = key.split("__")
        tree.setdefault(section, {})[name] = value
    return parse_config(tree)


def batch_of(step: int, config: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and document starts (sequences, length) of a whole global batch; pure function of the step."""
    generator = torch.Generator().manual_seed(1000 * config.run.seed + step)
    shape = (config.train.global_batch, config.data.sequence_length)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
    targets = (7 * tokens + 3) % config.model.vocab_size  # something to learn
    targets[torch.rand(shape, generator=generator) < 0.1] = -100
    document_starts = torch.rand(shape, generator=generator) < 0.15
    document_starts[:, 0] = True
    return tokens, targets, document_starts


def share_of(values: Tensor, topology: Topology, micro_step: int, micro_batch: int) -> Tensor:
    """This rank's rows of a micro-step."""
    first = (micro_step * topology.data + topology.data_rank) * micro_batch
    return values[first : first + micro_batch]


@dataclass
class Built:
    """A rank's part of a model."""

    topology: Topology
    groups: Groups
    held: dict[str, ParameterShard]
    model: LanguageModel


def build(config: Config) -> Built:
    """In a worker: join, shard, fill."""
    world = World.from_environment()
    topology = Topology.of(config, world)
    check_shards(config, topology)
    start_world(world)
    plan = RunPlan.of(config, topology)
    groups = start_groups(plan)
    with mock.patch.object(attention, "zeros", _spread), mock.patch.object(feed_forward, "zeros", _spread):
        model = build_model(plan, groups)
    for router in model.routers().values():
        router.weight.data *= DECISIVE
    return Built(topology, groups, plan.shards, model)


def _spread(weight: Tensor, generator: torch.Generator) -> None:
    """What biases of projections start as here: zeros would hide one that is added twice."""
    weight.copy_(torch.linspace(-1, 1, len(weight)))


Chunks = list[tuple[str, tuple[int, ...], tuple[int, ...], Tensor]]
"""(name, shape of the logical tensor, offsets, values) of what a rank holds."""


def chunks_of(tensors: dict[str, Tensor], held: dict[str, ParameterShard]) -> Chunks:
    """A rank's parts of logical tensors."""
    return [
        (name, held[name].shape, logical, tensor[local].detach().clone())
        for name, tensor in tensors.items()
        for logical, local in held[name].chunks()
    ]


def assemble(ranks: list[Chunks]) -> dict[str, Tensor]:
    """The logical tensors from all ranks' parts: they must cover everything, and copies must agree."""
    whole: dict[str, Tensor] = {}
    for name, shape, offsets, values in itertools.chain.from_iterable(ranks):
        target = whole.setdefault(name, torch.full(shape, torch.nan, dtype=values.dtype))
        region = target[tuple(slice(o, o + size) for o, size in zip(offsets, values.shape, strict=True))]
        known = ~region.isnan()
        scale = values.norm() + 1e-30
        assert (region - values)[known].norm() <= 1e-5 * scale, f"ranks disagree on {name} at {offsets}"
        region.copy_(values)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"nobody holds all of {name}"
    return whole


def difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double() - expected.double()).norm() / (expected.double().norm() + 1e-30))


def sum_replicas(model: LanguageModel) -> None:
    """Sum the gradients of a model without an engine over the tensor-parallel ranks that hold the same parameters."""
    groups = [(parameter.grad, group_of_replicas(parameter)) for parameter in model.parameters()]
    sum_over_replicas([(gradient, group) for gradient, group in groups if group is not None], torch.device("cpu"))


def mean_over_data_ranks(built: Built, parameter: Tensor) -> Tensor:
    """A parameter's gradient as the engine makes it: summed over the ranks with the same part, by the data ranks."""
    from deepspeed.utils import groups

    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    if getattr(parameter, "allreduce", True):
        dist.all_reduce(gradient, group=built.groups.data)
    else:
        dist.all_reduce(gradient, group=groups._get_expert_data_parallel_group(parameter.group_name))
    return gradient / built.topology.data


@dataclass
class Trained:
    """What some steps on a layout gave: losses and norms of all steps, and this rank's parts of the logical tensors.

    Attributes:
        gradients: of the first step, before clipping: AdamW's first moment after it is a known multiple.
        margin: the least distance of any routing decision of a training step from a tie, on this rank.
    """

    losses: list[float]
    norms: list[float]
    gradients: Chunks
    weights: Chunks
    margin: float


def train(config: Config, steps: int) -> Trained:
    """In a worker: steps of the engine, as the trainer makes them."""
    built = build(config)
    engine = engines.build_engine(built.model, config, built.groups, config.train.micro_batch)
    micro_steps = GLOBAL_BATCH // (config.train.micro_batch * built.topology.data)
    losses, norms, gradients = [], [], []
    with routing_margins(built.model) as margins:
        for step in range(steps):
            tokens, targets, document_starts = batch_of(step, config)
            counted = int((targets != -100).sum())
            balanced = built.model.balanced_routers()
            objective = Objective(config.moe, counted, micro_steps, built.topology, balanced)
            for number in range(micro_steps):
                mine = [
                    share_of(v, built.topology, number, config.train.micro_batch)
                    for v in (tokens, targets, document_starts)
                ]
                output = engine(mine[0], mine[2], targets=mine[1])
                engine.backward(objective(output.cross_entropy, output.statistics))
                if number < micro_steps - 1:
                    engine.step()
            norms.append(float(engines.step(engine, config.train.gradient_clip)[0]))
            loss = reduce_over_data(objective.sums.cross_entropy.double(), built.topology)
            losses.append(float(loss) / counted)
            if config.moe.balance == "bias":
                for name, router in built.model.routers().items():
                    update_balance_bias(router, objective.sums.statistics[name].assigned, config.moe.bias_rate)
            if step == 0:
                clipped = min(1.0, config.train.gradient_clip / (norms[0] + 1e-6)) if config.train.gradient_clip else 1
                scale = (1 - config.train.beta1) * clipped
                gradients = [
                    (name, shape, offsets, values / scale)
                    for name, shape, offsets, values in shards_of(engine, built.held, "moment1/")
                ]
    return Trained(losses, norms, gradients, shards_of(engine, built.held, "weights/"), min(margins, default=1.0))


def train_far_from_ties(
    world: Any, pattern: str, layout: Layout, steps: int, accumulation: int = 1, **keys: Any
) -> tuple[int, list[Trained]]:
    """Train on data on which no routing decision comes near a tie, so that rounding moves none.

    Returns:
        The first seed of such data, and what each rank trained on it.
    """
    for seed in range(50):
        config = config_of(pattern, layout, accumulation, run__seed=seed, **keys)
        trained = world.run(train, config, steps, ranks=layout.ranks)
        if min(rank.margin for rank in trained) >= MARGIN:
            return seed, trained
    raise AssertionError(f"{pattern}: {steps} steps come within {MARGIN} of a tie on each of 50 seeds")


def shards_of(engine: Any, held: dict[str, ParameterShard], kind: str) -> Chunks:
    """Copies of the shards of one kind that a rank owns."""
    return [
        (shard.name.removeprefix(kind), shard.shape, shard.offsets, shard.tensor.detach().clone())
        for shard in engines.state_shards(engine, held)
        if shard.name.startswith(kind)
    ]


@contextlib.contextmanager
def routing_margins(model: LanguageModel) -> Iterator[list[float]]:
    """Collect, while it lasts, how far the last expert that a token chose was ahead of the next one."""
    margins: list[float] = []

    def note(router: Router, ranking: Tensor) -> None:
        best = ranking.topk(router.config.top_k + 1).values
        margins.append(float((best[:, -2] - best[:, -1]).min()))

    choose = Router._choose

    def noting(router: Router, scores: Tensor) -> Any:
        note(router, scores.detach() + router.balance_bias if router.config.balance == "bias" else scores.detach())
        return choose(router, scores)

    Router._choose = noting  # type: ignore[method-assign]
    try:
        yield margins
    finally:
        Router._choose = choose  # type: ignore[method-assign]
