"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a dense model becomes a mixture of experts.

Every expert of a layer is a copy of the feed-forward layer that it replaces, and the first pass gives what the dense
model gives. A token's output is the sum over its experts of weight x copy(x), so the weights have to sum to one:

- `renormalize` makes them do so, whatever the router says, and it starts as any router does.
- Otherwise the router starts so small that all scores are alike: a token's weights sum to top_k / experts by softmax,
  to top_k / 2 by sigmoid, and the copies' output projection is divided by that. The router's directions are those of
  any fresh router, and only they decide which expert is best, so that tokens spread over the experts from the start as
  they would anyhow.

The equality is of dropless routing, which evaluation has; `moe.capacity_factor` is written as null, so that the first
step of training has it too. With a capacity, tokens that their expert has no room for miss the layer's output.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import Config, MoEConfig
from moe_mamba.config_file import parse_config
from moe_mamba.convert.starting_point import MARK, write_starting_point
from moe_mamba.errors import UserError
from moe_mamba.hf.formats.base import shortest_pattern
from moe_mamba.model.initialize import LogicalWeight, logical_weights
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.feed_forward import FeedForward
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.pattern import has_experts
from moe_mamba.run.atomic import check_output
from moe_mamba.run.restore import open_trained, weight_shards

# Of a fresh router, where weights are not renormalised. Weights then differ by about 3e-7 of their value, no more than
# fp32 sums err anyhow (measured: logits were as far from the dense model's as with renormalised weights; at 1e-5 five
# times as far), and still tell the experts apart (at 1e-7 scores tie, and all ties go to one expert).
ROUTER_SCALE = 1e-6


def upcycle(
    dense: str | Path,
    output: Path,
    moe: MoEConfig,
    every: int = 1,
    noise: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
) -> tuple[Config, Path]:
    """Write a run's folder whose model has experts in the place of feed-forward layers.

    Args:
        dense: a run's folder or one of its steps'.
        output: the run's folder; it appears when it is whole.
        moe: from `routing`.
        every: see `upcycled_config`.
        noise: see `upcycled_shards`.
        seed: of routers and noise.
        overwrite: replace a run's folder at `output`.

    Returns:
        The run's configuration, and the step's folder.

    Raises:
        UserError: there is nothing to upcycle, or `output` is not empty, or holds `dense`.
    """
    check_output(output, overwrite, MARK, dense)
    trained = open_trained(dense)
    config = upcycled_config(trained.config, moe, every)
    shards = list(upcycled_shards(trained.path, config, seed, noise))
    return config, write_starting_point(output, config, trained.tokenizer, shards, overwrite)


def routing(
    *, experts: int, top_k: int = 1, router: str | None = None, renormalize: bool | None = None, **keys: Any
) -> MoEConfig:
    """The `moe` section of an upcycled model: dropless; renormalised where a token has several experts.

    Raises:
        UserError: the values contradict one another.
    """
    several = top_k > 1
    router = router or ("top_k" if several else "switch")
    renormalize = several and router == "top_k" if renormalize is None else renormalize
    moe = {"experts": experts, "top_k": top_k, "router": router, "renormalize": renormalize, "capacity_factor": None}
    return parse_config({"moe": moe | keys}).moe


def upcycled_config(dense: Config, moe: MoEConfig, every: int = 1) -> Config:
    """The configuration of `dense` with experts in the place of feed-forward layers.

    Args:
        dense: of a model whose pattern has `-` and no `E`.
        moe: from `routing`; experts are as wide as the dense layers.
        every: replace each such-many-th feed-forward layer, counted from the first.

    Raises:
        UserError: there is nothing to upcycle.
    """
    layers = dense.model.pattern * dense.model.repeat
    if has_experts(dense.model, dense.moe):
        raise UserError(f"model.pattern={dense.model.pattern} has experts (E) already: give a dense checkpoint")
    if layers.count(FeedForward.letter) < every:
        raise UserError(
            f"{dense.model.pattern} x {dense.model.repeat} has {layers.count(FeedForward.letter)} feed-forward layers "
            f"(-), and one in {every} becomes experts: give a checkpoint of M- or *-, or a lower --every"
        )
    if dense.model.mlp_bias:
        raise UserError("model.mlp_bias=true: experts have no biases, so they cannot be copies: give a model without")
    seen, new = 0, ""
    for letter in layers:
        seen += letter == FeedForward.letter
        new += MoE.letter if letter == FeedForward.letter and seen % every == 0 else letter
    pattern, repeat = shortest_pattern(new)
    tree = dense.model_dump()
    tree["model"] |= {"pattern": pattern, "repeat": repeat}
    tree["train"] |= {"warm_start": None}
    return parse_config(tree | {"moe": moe.model_dump(), "parallel": {}})


def output_scale(moe: MoEConfig) -> float:
    """What the copies' output projection is multiplied by, so that a token's weighted sum is the dense output."""
    if moe.renormalize:
        return 1.0
    score = 0.5 if moe.scores == "sigmoid" else 1.0 / moe.experts
    return 1.0 / (moe.top_k * score)


def upcycled_shards(dense: Path, config: Config, seed: int = 0, noise: float = 0.0) -> Iterator[Shard]:
    """The weights of the upcycled model, made from a dense step's folder one after the other as they are written.

    Args:
        dense: the step's folder.
        config: from `upcycled_config`.
        seed: of routers and noise.
        noise: standard deviation of what is added to each weight of an expert, in units of the root mean square
            of its matrix.
    """
    model = LanguageModel.on_meta(config.model, config.moe)
    routers = {weight.name: weight for weight in logical_weights(model, seed) if weight.name.endswith("router.weight")}
    router_scale = 1.0 if config.moe.renormalize else ROUTER_SCALE
    here = store.logical_tensors(dense)
    for shard in weight_shards(model):
        name = shard.name.removeprefix("weights/")
        if shard.name in here:
            yield _later(shard, partial(store.read_tensor, dense, shard.name))
        elif name in routers:
            yield _later(shard, partial(_router, routers[name], router_scale))
        elif name.endswith("balance_bias"):
            yield _later(shard, partial(torch.zeros, shard.shape))
        else:
            source = shard.name.replace(".experts.", ".") + ".weight"
            scale = output_scale(config.moe) if name.endswith("out_proj") else 1.0
            for expert in range(shard.shape[0]):
                entropy = (seed, expert, *name.encode())
                copy = partial(_copy, dense, source, scale, noise, entropy)
                part = torch.empty((1, *shard.shape[1:]), device="meta")
                yield Shard(shard.name, shard.shape, (expert, 0, 0), part, copy)


def _later(shard: Shard, read: Callable[[], Tensor]) -> Shard:
    return Shard(shard.name, shard.shape, shard.offsets, shard.tensor, read)


def _router(fresh: LogicalWeight, scale: float) -> Tensor:
    return fresh.make() * scale


def _copy(dense: Path, source: str, scale: float, noise: float, entropy: tuple[int, ...]) -> Tensor:
    """One expert's matrix (1, in, out), which lies transposed in the dense layer."""
    matrix = store.read_tensor(dense, source)
    if noise:
        generator = Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        rms = matrix.norm() / math.sqrt(matrix.numel())
        matrix += noise * rms * torch.empty_like(matrix).normal_(generator=generator)
    return matrix.T[None] * scale
