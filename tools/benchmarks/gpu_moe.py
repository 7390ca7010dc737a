"""The benchmark's row ``gpu_moe``: a layer of 32 experts in bf16, against DeepSpeed's own and a dense product."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.gpu_clock import gpu_row, rates
from benchmarks.pairs import Row, Run, peer
from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.mixers.routing import balance_loss
from moe_mamba.model.sequences import Sequences

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class LayerShapes:
    """What is measured."""

    tokens: int
    d_model: int
    d_expert: int
    experts: int

    @property
    def operations(self) -> float:
        """Forward and backward, in the experts' two matrices, at capacity 1."""
        return 3 * 2 * 2 * self.tokens * self.d_model * self.d_expert

    @property
    def traffic(self) -> float:
        """Bytes of weights read twice and their gradients written, and of what each matrix reads and writes."""
        weights = 3 * 2 * self.experts * self.d_model * self.d_expert
        activations = 3 * self.tokens * 2 * (self.d_model + self.d_expert)
        return DTYPE.itemsize * (weights + activations)


NARROW = LayerShapes(tokens=16384, d_model=512, d_expert=1536, experts=32)
WIDE = LayerShapes(tokens=32768, d_model=2048, d_expert=6144, experts=32)
TINY = LayerShapes(tokens=64, d_model=16, d_expert=32, experts=4)


def moe_rows(device: torch.device, tiny: bool, repeats: int) -> list[Row]:
    """Forward and backward with capacity 1: at the paper's width against DeepSpeed, at a wide one against one product.

    The dense product has as many operations: its rate is the most that experts could reach.
    """
    rows = []
    for shapes, against, goal, theirs in (
        (TINY if tiny else NARROW, "DeepSpeed's MoE", 2.0, deepspeed_layer),
        (TINY if tiny else WIDE, "one dense product of as many operations", 0.7, dense_product),
    ):
        x, gradient = torch.randn(2, shapes.tokens, shapes.d_model, device=device, dtype=DTYPE)
        x.requires_grad_()
        name = (
            f"MoE layer, {shapes.experts} experts, forward and backward, bf16, {shapes.tokens:,} tokens, "
            f"d {shapes.d_model}, experts of {shapes.d_expert:,}"
        )
        floor = rates(device).floor(shapes.traffic, shapes.operations, in_bf16=True)
        ours = our_layer(shapes, x, gradient)
        with one_process() if theirs is deepspeed_layer else contextlib.nullcontext():
            peer_run = partial(theirs, shapes, x, gradient)
            rows.append(gpu_row(name, against, ours, peer_run, repeats, goal, device, floor))
    return rows


def our_layer(shapes: LayerShapes, x: Tensor, gradient: Tensor) -> Run:
    """Our layer with the paper's router, as it trains on one device."""
    config = ModelConfig(pattern="E", repeat=1, d_model=shapes.d_model, d_ff=shapes.d_expert)
    with torch.device(x.device):
        layer = MoE(config, MoEConfig(experts=shapes.experts, capacity_factor=1.0))
    layer.experts.to(DTYPE)
    _fill(layer)

    def run() -> None:
        y, statistics, _ = layer(x, Sequences(1, len(x)))
        balance = balance_loss(statistics["router"])
        torch.autograd.grad([y, balance], [x, *layer.parameters()], [gradient, torch.ones_like(balance)])

    return run


def deepspeed_layer(shapes: LayerShapes, x: Tensor, gradient: Tensor) -> Run:
    """DeepSpeed's layer with experts and gate of the same shapes; a process group is joined."""
    layer = deepspeed_moe(shapes.d_model, shapes.d_expert, shapes.experts).to(x.device, DTYPE)
    _fill(layer)

    def run() -> None:
        y, balance, _ = layer(x)
        torch.autograd.grad([y, balance], [x, *layer.parameters()], [gradient, torch.ones_like(balance)])

    return run


def deepspeed_moe(d_model: int, d_expert: int, experts: int) -> nn.Module:
    """DeepSpeed's stock layer at capacity 1."""
    MoELayer = peer("deepspeed.moe.layer", "MoE", "deepspeed")
    expert = nn.Sequential(
        nn.Linear(d_model, d_expert, bias=False), nn.ReLU(), nn.Linear(d_expert, d_model, bias=False)
    )
    layer = MoELayer(d_model, expert, experts, 1)
    layer.set_deepspeed_parallelism()
    return layer


def dense_product(shapes: LayerShapes, x: Tensor, gradient: Tensor) -> Run:
    """One matrix in place of all experts: as many operations, nothing routed."""
    weight = torch.randn(2 * shapes.d_expert, shapes.d_model, device=x.device, dtype=DTYPE, requires_grad=True)
    wide = torch.randn(len(x), 2 * shapes.d_expert, device=x.device, dtype=DTYPE)

    def run() -> None:
        torch.autograd.grad(nn.functional.linear(x, weight), [x, weight], wide)

    return run


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A process group of only this process, where DeepSpeed is there; what it says goes to standard error."""
    sys.stdout.flush()
    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        try:
            from moe_mamba.parallel.distributed import finish_world, start_world
            from moe_mamba.parallel.topology import World

            start_world(World(0, 1, 0, 1))
        except ImportError:  # the row then says what is missing
            yield
            return
        try:
            yield
        finally:
            finish_world()
    finally:
        sys.stdout.flush()
        os.dup2(output, sys.stdout.fileno())
        os.close(output)


def _fill(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
