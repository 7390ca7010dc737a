"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a dense model becomes a mixture of experts.

Every expert is a copy of what it replaces: of a feed-forward layer, or of a projection inside a Mamba mixer. The first
pass gives what the dense model gives. A token's output is the sum over its experts of weight x copy(x), so the weights
have to sum to one:

- `renormalize` makes them do so, whatever the router says, and it starts as any router does.
- Otherwise the router starts so small that all scores are alike: a token's weights sum to top_k / experts by softmax,
  to top_k / 2 by sigmoid, and the copies' output projection is divided by that. The router's directions are those of
  any fresh router, and only they decide which expert is best, so that tokens spread over the experts from the start as
  they would anyhow. The router of an output projection reads channels, whose size is each model's own: it is measured,
  and makes up for it.

Where one router serves all projections of a mixer, the copies of the convolution's and the gate's half are summed as
they are, and are divided by top_k.

The equality is of dropless routing, which evaluation has; `moe.capacity_factor` is written as null, so that the first
step of training has it too. With a capacity, tokens that their expert has no room for miss the layer's output.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import Config, ModelConfig, MoEConfig
from moe_mamba.config_file import parse_config
from moe_mamba.convert.starting_point import MARK, write_starting_point
from moe_mamba.errors import UserError
from moe_mamba.hf.formats.base import shortest_pattern
from moe_mamba.model.initialize import LogicalWeight, logical_weights
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.feed_forward import FeedForward
from moe_mamba.model.mixers.mamba import Mamba
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.mixers.routed_mamba import ENTRIES
from moe_mamba.model.pattern import has_experts
from moe_mamba.run.atomic import check_output
from moe_mamba.run.restore import Trained, open_trained, restore_trained, weight_shards

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
    """Write a run's folder whose model has experts in the place of feed-forward layers, or of projections in Mamba.

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
    sizes = channel_sizes(trained) if _routes_channels_by_size(config.moe) else {}
    shards = list(upcycled_shards(trained.path, config, seed, noise, sizes))
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
    """The configuration of `dense` with experts in the place of feed-forward layers, or inside Mamba.

    Args:
        dense: of a model without experts.
        moe: from `routing`; experts are as wide as what they replace. With `moe.inner.projections` it is those.
        every: replace each such-many-th feed-forward layer, or the projections of each such-many-th Mamba layer,
            counted from the first.

    Raises:
        UserError: there is nothing to upcycle.
    """
    if has_experts(dense.model, dense.moe):
        raise UserError(f"model.pattern={dense.model.pattern} has experts already: give a dense checkpoint")
    replaced, becomes = (Mamba, "gets them inside") if moe.inner.projections else (FeedForward, "becomes experts")
    layers = dense.model.pattern * dense.model.repeat
    if layers.count(replaced.letter) < every:
        raise UserError(
            f"{dense.model.pattern} x {dense.model.repeat} has {layers.count(replaced.letter)} {replaced.title} layers "
            f"({replaced.letter}), and one in {every} {becomes}: give a checkpoint with more, or a lower --every"
        )
    tree = dense.model_dump()
    tree["train"] |= {"warm_start": None}
    tree |= {"moe": moe.model_dump(), "parallel": {}}
    if replaced is Mamba:
        if moe.inner.expert != "linear":
            raise UserError(
                f"moe.inner.expert={moe.inner.expert}: a projection is one matrix, of which only linear experts can be "
                "copies: set linear"
            )
        tree["moe"]["inner"]["every"] = every
    else:
        pattern, repeat = _with_experts(dense.model, every)
        tree["model"] |= {"pattern": pattern, "repeat": repeat}
    return parse_config(tree)


def _with_experts(model: ModelConfig, every: int) -> tuple[str, int]:
    """The pattern, and how often it is repeated, with experts for each such-many-th feed-forward layer.

    Raises:
        UserError: experts cannot be copies of these layers.
    """
    if model.mlp_bias:
        raise UserError("model.mlp_bias=true: experts have no biases, so they cannot be copies: give a model without")
    seen, new = 0, ""
    for letter in model.pattern * model.repeat:
        seen += letter == FeedForward.letter
        new += MoE.letter if letter == FeedForward.letter and seen % every == 0 else letter
    return shortest_pattern(new)


def output_scale(moe: MoEConfig) -> float:
    """What the copies' output projection is multiplied by, so that a token's weighted sum is the dense output."""
    if moe.renormalize:
        return 1.0
    score = 0.5 if moe.scores == "sigmoid" else 1.0 / moe.experts
    return 1.0 / (moe.top_k * score)


def _routes_channels_by_size(moe: MoEConfig) -> bool:
    """Whether there are routers that have to be small, of inputs that no norm has made alike in size."""
    return moe.inner.router == "own" and "out" in moe.inner.projections and not moe.inner_routing.renormalize


@torch.no_grad()
def channel_sizes(trained: Trained) -> dict[str, float]:
    """Full name of each Mamba mixer -> root mean square of what its output projection reads, over random tokens."""
    model = restore_trained(trained, torch.device("cpu")).model
    sizes: dict[str, float] = {}

    def measure(name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
        sizes[name] = float(inputs[0].square().mean().sqrt()) or 1.0

    for name, module in model.named_modules():
        if isinstance(module, Mamba):
            module.out_proj.register_forward_pre_hook(partial(measure, name))
    model(torch.randint(trained.config.model.vocab_size, (4, 128), generator=Generator().manual_seed(0)))
    return sizes


@dataclass(frozen=True)
class _Origin:
    """What of the dense model a matrix is a copy of: some rows of a tensor, multiplied."""

    name: str
    rows: slice
    scale: float = 1.0

    def read(self, dense: Path) -> Tensor:
        return store.read_tensor(dense, self.name)[self.rows]


def _origin(name: str, config: Config) -> _Origin:
    """What of the dense model becomes the tensor `name`: experts, or what is left of a projection's rows."""
    d_inner, moe = config.model.resolved_d_inner, config.moe
    halves = dict(zip(ENTRIES, (slice(d_inner), slice(d_inner, None)), strict=True))
    if inside := re.fullmatch(r"(.+)\.(conv|gate|out)_experts\.weight", name):
        mixer, projection = inside.groups()
        is_weighted = moe.inner.router == "own" or projection == "out"
        scale = output_scale(moe.inner_routing) if is_weighted else 1.0 / moe.inner_routing.top_k
        if projection == "out":
            return _Origin(f"{mixer}.out_proj.weight", slice(None), scale)
        return _Origin(f"{mixer}.in_proj.weight", halves[projection], scale)
    if ".experts." in name:
        scale = output_scale(moe) if name.endswith("out_proj") else 1.0
        return _Origin(name.replace(".experts.", ".") + ".weight", slice(None), scale)
    (left,) = halves.keys() - set(moe.inner.projections)
    return _Origin(name, halves[left])


def upcycled_shards(
    dense: Path, config: Config, seed: int = 0, noise: float = 0.0, sizes: Mapping[str, float] | None = None
) -> Iterator[Shard]:
    """The weights of the upcycled model, made from a dense step's folder one after the other as they are written.

    Args:
        dense: the step's folder.
        config: from `upcycled_config`.
        seed: of routers and noise.
        noise: standard deviation of what is added to each weight of an expert, in units of the root mean square
            of its matrix.
        sizes: from `channel_sizes`, where routers read channels and have to be small.
    """
    model = LanguageModel.on_meta(config.model, config.moe)
    routers = {weight.name: weight for weight in logical_weights(model, seed) if weight.name.endswith("router.weight")}
    routing = config.moe.inner_routing if config.moe.inner.projections else config.moe
    router_scale = 1.0 if routing.renormalize else ROUTER_SCALE
    sizes = sizes or {}
    here = store.logical_tensors(dense)
    for shard in weight_shards(model):
        name = shard.name.removeprefix("weights/")
        if shard.name in here and here[shard.name][0] == tuple(shard.shape):
            yield _later(shard, partial(store.read_tensor, dense, shard.name))
        elif name in routers:
            size = sizes.get(name.removesuffix(".out_router.weight"), 1.0)
            yield _later(shard, partial(_router, routers[name], router_scale / size))
        elif name.endswith("balance_bias"):
            yield _later(shard, partial(torch.zeros, shard.shape))
        elif shard.name in here:
            yield _later(shard, partial(_origin(shard.name, config).read, dense))
        else:
            source = _origin(shard.name, config)
            for expert in range(shard.shape[0]):
                entropy = (seed, expert, *name.encode())
                copy = partial(_copy, dense, source, noise, entropy)
                part = torch.empty((1, *shard.shape[1:]), device="meta")
                yield Shard(shard.name, shard.shape, (expert, 0, 0), part, copy)


def _later(shard: Shard, read: Callable[[], Tensor]) -> Shard:
    return Shard(shard.name, shard.shape, shard.offsets, shard.tensor, read)


def _router(fresh: LogicalWeight, scale: float) -> Tensor:
    return fresh.make() * scale


def _copy(dense: Path, source: _Origin, noise: float, entropy: tuple[int, ...]) -> Tensor:
    """One expert's matrix (1, in, out), which lies transposed in the dense layer."""
    matrix = source.read(dense)
    if noise:
        generator = Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        rms = matrix.norm() / math.sqrt(matrix.numel())
        matrix += noise * rms * torch.empty_like(matrix).normal_(generator=generator)
    return matrix.T[None] * source.scale
