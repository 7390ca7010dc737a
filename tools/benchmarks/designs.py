"""The benchmark's rows ``designs``: parallel layers against sequential ones, and Routing Mamba against Mamba.

In fp32 on a CPU. Models that are compared have the same active parameters, and both are ours.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.pairs import Row, Run, pair_row
from benchmarks.profiling import Profile, profile
from benchmarks.step import PROFILED_STEPS, our_loss, training_step
from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.distributed import keep_freed_memory

SLOWEST = 1.02  # of a parallel layer, against sequential ones
ROUTED_SLOWEST = 1.25  # of Routing Mamba, against Mamba


@dataclass(frozen=True)
class DesignShapes:
    """What is measured."""

    batch: int = 8
    length: int = 256
    d_model: int = 256
    vocab_size: int = 512
    experts: int = 8
    pairs: int = 4  # of Mamba and experts
    layers: int = 8  # of Mamba

    @staticmethod
    def choose(tiny: bool) -> "DesignShapes":
        """The shapes that docs/designs.md reports, or tiny ones."""
        return DesignShapes(2, 16, 32, 32, 4, 1, 1) if tiny else DesignShapes()

    @property
    def name(self) -> str:
        """Of what both have."""
        return f"d {self.d_model}, {self.experts} experts, {self.batch} x {self.length} tokens"

    @property
    def dense_dt_rank(self) -> int:
        """Of a dense Mamba that has as many weights as are active in a Routing Mamba with its router.

        The router has experts x d_model, and a step of the rank 2 x d_inner = 4 x d_model.
        """
        return -(-self.d_model // 16) + self.experts // 4


def designs(shapes: DesignShapes, repeats: int) -> list[Row | Profile]:
    """Forward and backward of both pairs of models, a step with AdamW of Routing Mamba, and where its time goes."""
    keep_freed_memory()  # as in training
    together = model_of(shapes, "(ME)", shapes.pairs)
    in_turn = model_of(shapes, "ME", shapes.pairs)
    assert active(together) == active(in_turn)
    routed = model_of(shapes, "M", shapes.layers, inner=True)
    dense = model_of(shapes, "M", shapes.layers, dt_rank=shapes.dense_dt_rank)
    assert active(routed) == active(dense), "the models differ"
    both = partial(_both_ways, shapes)
    step = partial(_step, shapes)
    name = f"Routing Mamba, M x {shapes.layers}, {shapes.name}"
    return [
        _row(
            f"parallel layers, (ME) x {shapes.pairs}, {shapes.name}, forward and backward",
            f"ME x {shapes.pairs}",
            (both(together), both(in_turn)),
            repeats,
            SLOWEST,
        ),
        _row(
            f"{name}, forward and backward",
            f"M x {shapes.layers}, the same active parameters",
            (both(routed), both(dense)),
            repeats,
            ROUTED_SLOWEST,
        ),
        _row(
            f"{name}, with AdamW of all experts",
            f"M x {shapes.layers}, the same active parameters",
            (step(routed), step(dense)),
            repeats,
            ROUTED_SLOWEST,
        ),
        profile(f"forward and backward, {name}", routed, both(routed), PROFILED_STEPS),
        profile(f"forward and backward, M x {shapes.layers}, dense", dense, both(dense), PROFILED_STEPS),
    ]


def _row(what: str, against: str, runs: tuple[Run, Run], repeats: int, slowest: float) -> Row:
    return pair_row(what, against, runs[0], lambda: runs[1], repeats, round(1 / slowest, 3))


def model_of(
    shapes: DesignShapes, pattern: str, repeat: int, *, inner: bool = False, dt_rank: int | None = None
) -> LanguageModel:
    """A model of the design, top-1, dropless; ``inner``: all three projections routed, by one router a mixer."""
    config = ModelConfig(
        pattern=pattern, repeat=repeat, d_model=shapes.d_model, vocab_size=shapes.vocab_size, dt_rank=dt_rank
    )
    keys: dict[str, Any] = {"projections": ["conv", "gate", "out"], "router": "shared"} if inner else {}
    moe = MoEConfig(experts=shapes.experts, capacity_factor=None, balance="none", inner=keys)
    model = LanguageModel(config, moe)
    initialize(model, seed=0)
    return model


def active(model: LanguageModel) -> int:
    """Parameters that a token meets, without embedding, head and norms."""
    return model.parameter_counts()["active"]


def _both_ways(shapes: DesignShapes, model: LanguageModel) -> Run:
    tokens = torch.randint(shapes.vocab_size, (shapes.batch, shapes.length))

    def run() -> None:
        our_loss(model, tokens).backward()
        model.zero_grad()

    return run


def _step(shapes: DesignShapes, model: LanguageModel) -> Run:
    tokens = torch.randint(shapes.vocab_size, (shapes.batch, shapes.length))
    return training_step(model, lambda: our_loss(model, tokens))
