"""The benchmark's row ``moe``: our mixture of experts against DeepSpeed's own, on one and two gloo processes."""

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.pairs import Row, compare
from moe_mamba.config import Config, ModelConfig, MoEConfig
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.mixers.routing import balance_loss
from moe_mamba.model.sequences import Sequences
from moe_mamba.parallel.topology import Topology, World

Pass = Callable[[Tensor], tuple[Tensor, Tensor]]  # the stream -> (output, balance loss)


@dataclass(frozen=True)
class MoEShapes:
    """What is measured: ``tokens`` in all, split among the processes."""

    tokens: int = 4096
    d_model: int = 256
    d_expert: int = 768
    experts: tuple[int, ...] = (8, 32, 128)
    worlds: tuple[int, ...] = (1, 2)

    @staticmethod
    def choose(tiny: bool) -> "MoEShapes":
        """The shapes that docs/measurements.md reports, or tiny ones."""
        return MoEShapes(128, 16, 32, (2,), (2,)) if tiny else MoEShapes()


def moe_rows(shapes: MoEShapes, repeats: int) -> list[Row]:
    """Forward and backward in fp32 on the CPU at EP 1 and 2: with capacity 1, and dropless with an uneven load."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in shapes.worlds:
            torch.multiprocessing.spawn(_rank, (ranks, Path(folder), shapes, repeats), ranks)
            rows += [Row(**fields) for fields in json.loads((Path(folder) / f"rows-{ranks}.json").read_text())]
    return rows


def _rank(rank: int, ranks: int, folder: Path, shapes: MoEShapes, repeats: int) -> None:
    """One process of a world of ``ranks``; the first writes the rows down."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # only the table goes to standard output; DeepSpeed talks
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    from moe_mamba.parallel.distributed import finish_world, start_world

    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks)
    topology = Topology(World(rank, ranks, rank, ranks), expert=ranks)
    start_world(topology.world)
    rows = []
    with contextlib.redirect_stderr(io.StringIO()) if rank else contextlib.nullcontext():
        for experts in shapes.experts:
            for uneven in (False, True):
                torch.manual_seed(0)
                router = torch.randn(experts, shapes.d_model) / shapes.d_model**0.5
                if uneven:
                    router[0] *= 100  # where its logit is positive, for half of the tokens, it is the largest
                ours = our_pass(shapes, experts, uneven, router, topology)
                theirs = their_pass(shapes, experts, uneven, router, ranks)
                torch.manual_seed(rank)
                x, gradient = torch.randn(2, shapes.tokens // ranks, shapes.d_model)
                x.requires_grad_()
                pairs = repeats if uneven else 3 * repeats  # the undropped mode is slow, and far from its goal
                pair = compare(both_ways(*ours, x, gradient), both_ways(*theirs, x, gradient), pairs)
                load = "dropless, half of the tokens to one" if uneven else "capacity 1"
                name = f"MoE layer, EP {ranks}, {experts} experts, {load}, {shapes.tokens:,} tokens"
                against = "DeepSpeed's MoE" + (" without dropping" if uneven else "")
                rows.append(Row(name, against, "ms", *pair, goal=2.0 if uneven else 0.95))
    if rank == 0:
        (folder / f"rows-{ranks}.json").write_text(json.dumps([asdict(row) for row in rows]))
    finish_world()


def our_pass(
    shapes: MoEShapes, experts: int, uneven: bool, router: Tensor, topology: Topology
) -> tuple[nn.Module, Pass]:
    """Our layer, sharded as in training."""
    from moe_mamba.parallel.groups import start_groups
    from moe_mamba.parallel.parallelize import build_model
    from moe_mamba.parallel.run_plan import RunPlan

    config = Config(
        model=ModelConfig(pattern="E", repeat=1, d_model=shapes.d_model, d_ff=shapes.d_expert),
        moe=MoEConfig(experts=experts, capacity_factor=None if uneven else 1.0),
    )
    plan = RunPlan.of(config, topology)
    model = build_model(plan, start_groups(plan))
    (layer,) = (module for module in model.modules() if isinstance(module, MoE))
    layer.router.weight.data.copy_(router)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y, statistics, _ = layer(x, Sequences(1, len(x)))
        return y, balance_loss(statistics["router"])

    return layer, run


def their_pass(shapes: MoEShapes, experts: int, uneven: bool, router: Tensor, ranks: int) -> tuple[nn.Module, Pass]:
    """DeepSpeed's layer, with experts and gate of the same shapes."""
    import deepspeed.moe.layer

    expert = nn.Sequential(
        nn.Linear(shapes.d_model, shapes.d_expert, bias=False),
        nn.ReLU(),
        nn.Linear(shapes.d_expert, shapes.d_model, bias=False),
    )
    layer = deepspeed.moe.layer.MoE(shapes.d_model, expert, experts, ranks, drop_tokens=not uneven)
    layer.set_deepspeed_parallelism()
    layer.deepspeed_moe.gate.wg.weight.data.copy_(router)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y, balance, _ = layer(x)
        return y, balance

    return layer, run


def both_ways(layer: nn.Module, run: Pass, x: Tensor, gradient: Tensor) -> Callable[[], None]:
    """A forward and a backward pass, over when the slowest process is done."""
    parameters = list(layer.parameters())

    def step() -> None:
        y, balance = run(x)
        torch.autograd.grad([y, balance], [x, *parameters], [gradient, torch.ones_like(balance)])
        dist.barrier()

    return step
