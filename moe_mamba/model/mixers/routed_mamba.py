"""Mamba with experts inside: projections of the mixer are mixtures, each token's by the experts that a router gave it.

Two designs. With a router for each projection it is the inner MoE of MoE-Mamba's second version (arXiv 2401.04081v2).
With one router for all of them it is Routing Mamba (Zhan et al., arXiv 2506.18145, where routing is shared): for a
token with input u, the router's shares p = softmax(W_r u) and their largest k, the set K,

    x = sum over K of W_conv,i u        z = sum over K of W_gate,i u        y = sum over K of p_i W_out,i s

where s is what convolution, scan and gate make of x and z. These, x_proj and dt_proj are common to all experts. An
expert of Routing Mamba is one matrix (``moe.inner.expert=linear``); the authors of MoE-Mamba have two with an
activation between them (``switch``).

A mixer has no residual stream inside: a token for which an expert has no room gets zero from that projection.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.costs import (
    enter,
    leave,
    record_combination,
    record_gather,
    record_routing,
    record_travel,
)
from moe_mamba.model.initialize import Initializer
from moe_mamba.model.linear import build_linear
from moe_mamba.model.mixers.base import Statistics
from moe_mamba.model.mixers.dispatch import Dispatch, Dispatcher, LocalDispatcher
from moe_mamba.model.mixers.feed_forward import input_width
from moe_mamba.model.mixers.inner_experts import LinearExperts, SwitchExperts, record_experts
from moe_mamba.model.mixers.mamba import Mamba, out_scale
from moe_mamba.model.mixers.routing import Router, capacity_of, unchanged
from moe_mamba.model.sequences import Sequences
from moe_mamba.model.sharding import Block, ShardSpec, ShardSpecs
from moe_mamba.model.tape import Recorded, Tape
from moe_mamba.model.work import (
    FP32,
    Product,
    Rows,
    Sent,
    Share,
    Work,
    activation_work,
    counts_sent,
    exchange,
    routing_work,
)

ENTRIES = ("conv", "gate")  # the halves of in_proj, in their order
PROJECTIONS = (*ENTRIES, "out")


class RoutedProjected(NamedTuple):
    """As ``Projected``, with what the way out needs: a shared router's decision, and the statistics so far."""

    x: Tensor
    z: Tensor
    dispatch: Dispatch | None
    statistics: Statistics


class RoutedMamba(Mamba):
    """Mamba whose projections named by ``moe.inner.projections`` are mixtures of experts.

    Attributes:
        reduce: turns this rank's part of the output's sums into the output, where a layout shards the channels and
            ``out`` is routed; else ``out_proj`` does it.
    """

    title = "Mamba with experts inside"
    routes = True

    def __init__(self, config: ModelConfig, moe: MoEConfig, kernels: str = "auto") -> None:
        super().__init__(config, kernels)
        self.inner, self.routing = moe.inner, moe.inner_routing
        self.dispatcher: Dispatcher = LocalDispatcher(kernels)
        self.reduce: Callable[[Tensor], Tensor] = unchanged
        plain = [name for name in ENTRIES if name not in self.inner.projections]
        width = len(plain) * config.resolved_d_inner
        self.in_proj = build_linear(config.d_model, width, kernels=kernels) if plain else None  # type: ignore[assignment]
        if "out" in self.inner.projections:
            self.out_proj = None  # type: ignore[assignment]
        if self.inner.router == "shared":
            self.router = Router(config.d_model, self.routing, kernels)
        for name in PROJECTIONS:
            if name in self.inner.projections:
                width = config.resolved_d_inner if name == "out" else config.d_model
                if self.inner.router == "own":
                    self.add_module(f"{name}_router", Router(width, self.routing, kernels))
                self.add_module(f"{name}_experts", self._experts(name, width))

    def _experts(self, name: str, width: int) -> nn.Module:
        config, moe = self.config, self.routing
        out = config.d_model if name == "out" else config.resolved_d_inner
        if self.inner.expert == "linear":
            scale = out_scale(config) if name == "out" else 1.0
            return LinearExperts(moe.experts, width, out, scale, self.kernels)
        sizes = width, moe.d_expert or config.resolved_d_ff, out
        return SwitchExperts(config, moe.experts, sizes, name == "out", self.kernels)

    @classmethod
    def serves(cls, moe: MoEConfig, number: int) -> bool:
        """See ``Mixer``."""
        return bool(moe.inner.projections) and number % moe.inner.every == 0

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "RoutedMamba":
        """See ``Mixer``."""
        return cls(config, moe, kernels)

    def initializers(self) -> dict[str, Initializer]:
        """Those of Mamba's parameters that are left."""
        own = dict(self.named_parameters())
        return {name: fill for name, fill in super().initializers().items() if name in own}

    def project(self, u: Tensor, sequences: Sequences) -> RoutedProjected:
        """See ``Mamba``; rows are on their way while what is not routed is computed."""
        routed: list[str] = [name for name in ENTRIES if name in self.inner.projections]
        is_shared = self.inner.router == "shared"
        statistics: Statistics = {}
        dispatches: list[tuple[list[str], Dispatch, Callable[[], Tensor]]] = []
        for names, router in [(routed, "router")] if is_shared else [([name], f"{name}_router") for name in routed]:
            routing, statistics[router] = self.get_submodule(router)(u, sequences)
            dispatch = self.dispatcher.plan(routing)
            dispatches.append((names, dispatch, self.dispatcher.send(u, dispatch) if names else lambda: u))
        parts: dict[str, Tensor] = {}
        if self.in_proj is not None:
            plain = [name for name in ENTRIES if name not in routed]
            parts |= zip(plain, self.in_proj(u).chunk(len(plain), dim=-1), strict=True)
        for names, dispatch, receive in dispatches:
            rows = receive()
            made = [self.get_submodule(f"{name}_experts")(rows, dispatch) for name in names]
            if is_shared:
                made = self.dispatcher.combine_unweighted(made, dispatch)
            else:
                made = [self.dispatcher.combine(made[0], dispatch)]
            parts |= zip(names, made, strict=True)
        return RoutedProjected(parts["conv"], parts["gate"], dispatches[0][1] if is_shared else None, statistics)

    def project_back(self, y: Tensor, projected: Any, sequences: Sequences) -> tuple[Tensor, Statistics]:
        """See ``Mamba``."""
        _, _, dispatch, statistics = projected
        if self.out_proj is not None:
            return self.out_proj(y), statistics
        if dispatch is None:
            routing, measured = self.get_submodule("out_router")(y, sequences)
            statistics = statistics | {"out_router": measured}
            dispatch = self.dispatcher.plan(routing)
        rows = self.get_submodule("out_experts")(self.dispatcher.send(y, dispatch)(), dispatch)
        return self.reduce(self.dispatcher.combine(rows, dispatch)), statistics

    def idle_parameters(self) -> int:
        """Those of the experts that did not get the token."""
        experts = [module for module in self.children() if isinstance(module, LinearExperts | SwitchExperts)]
        routed = sum(weight.numel() for module in experts for weight in module.parameters())
        return routed - routed * self.routing.top_k // self.routing.experts

    @classmethod
    def shard_specs(cls, config: ModelConfig, moe: MoEConfig) -> ShardSpecs:
        """As Mamba; experts are shared among the ranks of one part of the channels, of which each has that part."""
        inner, routing = moe.inner, moe.inner_routing
        specs = super().shard_specs(config, moe)
        channels = Block(config.resolved_d_inner, units=config.resolved_d_inner)
        key = config.d_inner_key
        plain = [name for name in ENTRIES if name not in inner.projections]
        if plain:
            specs["in_proj.weight"] = (ShardSpec(0, "tensor", (channels,) * len(plain), key),)
        else:
            del specs["in_proj.weight"]
        if "out" in inner.projections:
            del specs["out_proj.weight"]
        experts = ShardSpec(0, "inner_expert", (Block(routing.experts, units=routing.experts),), "moe.inner.experts")
        for name in inner.projections:
            made, read = (ShardSpec(axis, "tensor", (channels,), key) for axis in (2, 1))
            if inner.expert == "linear":
                specs[f"{name}_experts.weight"] = (experts, read if name == "out" else made)
                continue
            width = routing.d_expert or config.resolved_d_ff
            units = (Block(width, units=width),)
            if name == "out":
                first = ShardSpec(1, "tensor", (channels,), key, is_reduced=True)
                second = ShardSpec(1, "tensor", units, "moe.inner.d_expert")
            else:
                first = ShardSpec(2, "tensor", units * input_width(config.activation, 1), "moe.inner.d_expert")
                second = made
            specs |= {f"{name}_experts.in_proj": (experts, first), f"{name}_experts.out_proj": (experts, second)}
        if inner.router == "own" and "out" in inner.projections:
            specs["out_router.weight"] = (ShardSpec(1, "tensor", (channels,), key, is_reduced=True),)
        return specs

    @classmethod
    def kernel_operations(cls, config: ModelConfig, moe: MoEConfig) -> dict[str, int]:
        """See ``Mixer``."""
        used = ["sort_by_expert", "gather_rows", "combine_rows", "grouped_matmul"]
        used += ["activation"] * (moe.inner.expert == "switch")
        return super().kernel_operations(config, moe) | dict.fromkeys(used, 0)

    @classmethod
    def record(
        cls, config: ModelConfig, moe: MoEConfig, share: Share, tape: Tape, x: Recorded, joins: bool
    ) -> Recorded:
        """See ``Mixer``."""
        inner, tokens, channels = moe.inner, share.tokens, config.resolved_d_inner // share.tensor
        x = enter(tape, x, share, config.d_model, joins)
        routed: list[str] = [name for name in ENTRIES if name in inner.projections]
        decision: Recorded | None = None
        parts: dict[str, Recorded] = {}
        if inner.router == "shared":
            decision = record_routing(tape, moe.inner_routing, x, tokens, cls._rows(moe, "conv", share).sent)
            parts |= zip(routed, cls._record_ways(config, moe, share, tape, x, decision, routed), strict=True)
        else:
            for name in routed:
                parts[name] = cls._record_ways(config, moe, share, tape, x, None, [name])[0]
        if plain := [name for name in ENTRIES if name not in routed]:
            made = tape.linear(x, tokens, config.d_model, len(plain) * channels)
            parts |= zip(plain, tape.split(made, *[tokens * channels] * len(plain)), strict=True)
        y = cls.record_inner(config, share, tape, parts["conv"], parts["gate"])
        if "out" not in inner.projections:
            y = tape.linear(y, tokens, channels, config.d_model)
        else:
            y = cls._record_ways(config, moe, share, tape, y, decision, ["out"])[0]
        return leave(tape, y, share, config.d_model, joins)

    @classmethod
    def _record_ways(
        cls,
        config: ModelConfig,
        moe: MoEConfig,
        share: Share,
        tape: Tape,
        x: Recorded,
        decision: Recorded | None,
        names: list[str],
    ) -> list[Recorded]:
        """Projections of the same rows; ``decision``: of the shared router, None: of this projection's own."""
        if not names:
            return []
        tokens, channels, routing = share.tokens, config.resolved_d_inner // share.tensor, moe.inner_routing
        read, made = (channels, config.d_model) if names == ["out"] else (config.d_model, channels)
        rows, ranks, is_weighted = cls._rows(moe, names[0], share), share.inner_expert, decision is None
        if decision is None:
            decision = record_routing(tape, routing, x, tokens, rows.sent)
        y = record_travel(tape, record_gather(tape, x, rows.sent, read), rows.received, read, ranks)
        outputs = [record_experts(config, moe, share, tape, y, rows.received, name == "out") for name in names]
        is_weighted = is_weighted or names == ["out"]
        if ranks > 1 and len(outputs) > 1:
            outputs = [tape.one(*outputs, numbers=rows.received * made * len(outputs))]
        width = made * (len(names) // len(outputs))
        outputs = [record_travel(tape, one, rows.sent, width, ranks, rows.received) for one in outputs]
        if is_weighted:
            return [record_combination(tape, outputs[0], decision, tokens, width)]
        if routing.capacity_factor is None and routing.top_k == 1:  # rows in another order
            summed = [tape.one(one, numbers=tokens * width) for one in outputs]
        else:
            plain = tape.tensor(rows.sent, FP32, has_gradient=False)
            summed = [record_combination(tape, one, plain, tokens, width) for one in outputs]
        return summed if len(summed) == len(names) else list(tape.split(summed[0], *[tokens * made] * len(names)))

    @classmethod
    def _rows(cls, moe: MoEConfig, name: str, share: Share) -> Rows:
        """Rows that a rank exchanges for a projection, and with which router's decision."""
        routing = moe.inner_routing
        router = "router" if moe.inner.router == "shared" else f"{name}_router"
        if (capacity := capacity_of(routing, share.tokens)) is not None:
            return Rows(routing.experts * capacity, routing.experts * capacity)
        return share.rows_of("inner_expert", router, routing.experts, share.tokens * routing.top_k)

    @classmethod
    def work(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> list[Work]:
        """See ``Mixer``; the rows of a shared router are gathered once for both ways in."""
        inner, routing, channels = moe.inner, moe.inner_routing, config.resolved_d_inner // share.tensor
        here, work = routing.experts // share.inner_expert, cls.inner_work(config, share)
        plain = [name for name in ENTRIES if name not in inner.projections]
        if plain:
            work.append(Product(share.tokens, config.d_model, len(plain) * channels))
        if "out" not in inner.projections:
            work.append(Product(share.tokens, channels, config.d_model))
        for name in inner.projections:
            rows = cls._rows(moe, name, share).received
            read, made = (channels, config.d_model) if name == "out" else (config.d_model, channels)
            is_first = inner.router == "own" or name == inner.projections[0]
            routed = routing_work(share.tokens, read, routing.experts, rows, share.width, share.inner_expert)
            work += routed if is_first else [one for one in routed if not isinstance(one, Product)]
            if inner.expert == "linear":
                work.append(Product(rows, read, made, here))
                continue
            # Where tensor-parallel ranks share what an expert reads, each makes its part of all hidden units' inputs.
            hidden = routing.d_expert or config.resolved_d_ff
            first, second = (hidden, hidden // share.tensor) if name == "out" else (hidden // share.tensor, hidden)
            width = input_width(config.activation, first)
            work += [
                Product(rows, read, width, here),
                activation_work(rows, input_width(config.activation, hidden // share.tensor), first, share.width),
                Product(rows, second, made, here),
            ]
        return work

    @classmethod
    def sends(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> list[Sent]:
        """See ``Mixer``: as Mamba; rows of each routed projection, and what switch experts sum or gather inside."""
        inner, routing, channels = moe.inner, moe.inner_routing, config.resolved_d_inner // share.tensor
        sends, is_shared = super().sends(config, moe, share), inner.router == "shared"
        ways = {name: (config.d_model, channels) for name in ENTRIES if name in inner.projections}
        if is_shared and ways:  # one journey for all ways in
            ways = {next(iter(ways)): (config.d_model, len(ways) * channels)}
        if "out" in inner.projections:
            ways["out"] = channels, config.d_model
        if routing.capacity_factor is None:
            sends += [counts_sent("inner_expert", routing.experts)] * (1 if is_shared else len(ways))
        for name, (read, made) in ways.items():
            rows = cls._rows(moe, name, share)
            sends += exchange("inner_expert", rows, read * share.width, made * share.width, name != "out")
        if "out" in inner.projections and not is_shared:
            size = share.tokens * routing.experts * FP32
            sends.append(Sent("all-reduce", "tensor", size, forward=1, backward=1))
        if inner.expert == "switch":
            sends += [sent for name in inner.projections for sent in cls._hidden_sends(config, moe, name, share)]
        return sends

    @classmethod
    def _hidden_sends(cls, config: ModelConfig, moe: MoEConfig, name: str, share: Share) -> list[Sent]:
        """The hidden units of switch experts: gathered on the ways in, their inputs' sums scattered on the way out."""
        hidden = moe.inner_routing.d_expert or config.resolved_d_ff
        size = cls._rows(moe, name, share).received * hidden * share.width
        if name != "out":
            gathered = Sent("all-gather", "tensor", size, forward=1)
            return [gathered, Sent("reduce-scatter", "tensor", size, backward=1)]
        size *= input_width(config.activation, 1)
        scattered = Sent("reduce-scatter", "tensor", size, forward=1)
        return [scattered, Sent("all-gather", "tensor", size, backward=1)]
