"""Mixture of experts: route -> dispatch -> experts -> combine."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.kernels import activation, grouped_matmul
from moe_mamba.model.costs import (
    enter,
    leave,
    record_activation,
    record_combination,
    record_gather,
    record_routing,
    record_travel,
)
from moe_mamba.model.initialize import Initializer, matrix
from moe_mamba.model.mixers.base import Mixer, Statistics
from moe_mamba.model.mixers.dispatch import Dispatch, Dispatcher, LocalDispatcher
from moe_mamba.model.mixers.feed_forward import FeedForward, input_width
from moe_mamba.model.mixers.routing import Router, RouterStatistics, capacity_of
from moe_mamba.model.sequences import Sequences
from moe_mamba.model.sharding import Block, ShardSpec, ShardSpecs, prefixed
from moe_mamba.model.tape import Recorded, Tape
from moe_mamba.model.work import Product, Rows, Sent, Share, Work, activation_work, counts_sent, exchange, routing_work


class Experts(nn.Module):
    """Stacked experts: two bias-free matrices each, with an activation between them."""

    is_stacked = True  # each expert's slice has a generator of its own, see initialize.py

    def __init__(self, config: ModelConfig, experts: int, width: int, kernels: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.in_proj = nn.Parameter(torch.empty(experts, config.d_model, input_width(config.activation, width)))
        self.out_proj = nn.Parameter(torch.empty(experts, width, config.d_model))

    def initializers(self) -> dict[str, Initializer]:
        """How one expert's parameters start."""
        return {
            "in_proj": matrix(self.config, self.in_proj.shape[1]),
            "out_proj": matrix(self.config, self.out_proj.shape[1], residual=True),
        }

    def forward(self, rows: Tensor, counts: Tensor, capacity: int | None = None) -> Tensor:
        """Map ``rows`` (rows, d_model), sorted by expert, each by its own.

        Args:
            rows: (rows, d_model), sorted by expert.
            counts: (experts,) rows of each expert.
            capacity: rows of every expert, where all have as many.
        """
        kernels = self.kernels
        hidden = grouped_matmul(rows, self.in_proj, counts, capacity, kernels)  # (rows, input width)
        hidden = activation(hidden, self.config.activation, kernels)  # (rows, width)
        return grouped_matmul(hidden, self.out_proj, counts, capacity, kernels)  # (rows, d_model)


class MoE(Mixer):
    """A mixture-of-experts layer: routed experts, and shared ones that see every token."""

    letter, title = "E", "mixture of experts"
    settings = ("activation",)
    gathers_tokens = False  # routers and experts work on each rank's own tokens
    routes = True
    begins = True

    def __init__(self, config: ModelConfig, moe: MoEConfig, kernels: str = "auto") -> None:
        super().__init__()
        width = moe.d_expert or config.resolved_d_ff
        self.router = Router(config.d_model, moe, kernels)
        self.experts = Experts(config, moe.experts, width, kernels)
        shared = moe.shared_experts
        self.shared = FeedForward(config, shared * width, kernels=kernels) if shared else None
        self.dispatcher: Dispatcher = LocalDispatcher(kernels)

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "MoE":
        """See ``Mixer``."""
        return cls(config, moe, kernels)

    @classmethod
    def looks_ahead(cls, config: ModelConfig, moe: MoEConfig) -> bool:
        """Experts that choose their tokens choose among later ones, too."""
        return moe.router == "expert_choice"

    @classmethod
    def depends_on_batch(cls, config: ModelConfig, moe: MoEConfig) -> bool:
        """With a capacity, the tokens of a batch displace each other."""
        return moe.evaluation_capacity is not None

    def forward(self, x: Tensor, sequences: Sequences, state: None = None) -> tuple[Tensor, Statistics, None]:
        """Map ``x`` (tokens, d_model); a token that every expert dropped gets zero, so it rides the residual."""
        return self.start(x, sequences)()

    def start(
        self, x: Tensor, sequences: Sequences, state: None = None
    ) -> Callable[[], tuple[Tensor, Statistics, None]]:
        """See ``Mixer``: what begins is the tokens' way to their experts."""
        return partial(self._finish, self.start_routed(x, sequences), x, sequences)

    def _finish(
        self, finish_routed: Callable[[], tuple[Tensor, RouterStatistics]], x: Tensor, sequences: Sequences
    ) -> tuple[Tensor, Statistics, None]:
        y, statistics = finish_routed()
        if self.shared is not None:
            y = y + self.shared(x, sequences)[0]
        return y, {"router": statistics}, None

    def start_routed(self, x: Tensor, sequences: Sequences) -> Callable[[], tuple[Tensor, RouterStatistics]]:
        """Begin the routed experts' part of the output, (tokens, d_model)."""
        routing, statistics = self.router(x, sequences)
        dispatch = self.dispatcher.plan(routing)
        return partial(self._finish_routed, self.dispatcher.send(x, dispatch), dispatch, statistics)

    def _finish_routed(
        self, receive: Callable[[], Tensor], dispatch: Dispatch, statistics: RouterStatistics
    ) -> tuple[Tensor, RouterStatistics]:
        rows = self.experts(receive(), dispatch.counts, capacity=dispatch.capacity)
        return self.dispatcher.combine(rows, dispatch), statistics

    def idle_parameters(self) -> int:
        """Those of the routed experts that did not get the token."""
        routed = sum(weight.numel() for weight in self.experts.parameters())
        return routed - round(routed * self.router.experts_per_token / self.router.config.experts)

    @classmethod
    def shard_specs(cls, config: ModelConfig, moe: MoEConfig) -> ShardSpecs:
        """Each rank has some experts; with ``parallel.expert_tensor`` a part of each one's width, too."""
        width = moe.d_expert or config.resolved_d_ff
        experts = ShardSpec(0, "expert", (Block(moe.experts, units=moe.experts),), "moe.experts")
        block, gates = Block(width, units=width), input_width(config.activation, 1)
        shared = FeedForward.hidden_specs(config, moe.shared_experts * width, "moe.shared_experts x moe.d_expert")
        return {
            "experts.in_proj": (experts, ShardSpec(2, "expert_tensor", (block,) * gates, "moe.d_expert")),
            "experts.out_proj": (experts, ShardSpec(1, "expert_tensor", (block,), "moe.d_expert")),
            **(prefixed("shared", shared) if moe.shared_experts else {}),
        }

    @classmethod
    def kernel_operations(cls, config: ModelConfig, moe: MoEConfig) -> dict[str, int]:
        """See ``Mixer``."""
        return dict.fromkeys(("sort_by_expert", "gather_rows", "combine_rows", "grouped_matmul", "activation"), 0)

    @classmethod
    def record(
        cls, config: ModelConfig, moe: MoEConfig, share: Share, tape: Tape, x: Recorded, joins: bool
    ) -> Recorded:
        """See ``Mixer``."""
        d_model, width = config.d_model, moe.d_expert or config.resolved_d_ff
        tokens, rows = cls._routed(moe, share)
        here, hidden = moe.experts // share.expert, width // share.tensor if share.expert_tensor else width
        routed = enter(tape, x, share, d_model, joins or not share.expert_tensor)
        decision = record_routing(tape, moe, routed, tokens, rows.sent)
        sent = record_gather(tape, routed, rows.sent, d_model)
        y = record_travel(tape, sent, rows.received, d_model, share.expert)
        y = tape.linear(y, rows.received, d_model, input_width(config.activation, hidden), here)
        y = record_activation(tape, y, rows.received, hidden, config.activation)
        made = tape.linear(y, rows.received, hidden, d_model, here)
        y = record_travel(tape, made, rows.sent, d_model, share.expert, rows.received)
        y = record_combination(tape, y, decision, tokens, d_model, (sent, made))
        y = leave(tape, y, share, d_model, joins or not share.expert_tensor)
        if moe.shared_experts:
            shared = FeedForward.record_hidden(config, moe.shared_experts * width, share, tape, x, joins)
            y = tape.add(y, shared)
        return y

    @classmethod
    def _routed(cls, moe: MoEConfig, share: Share) -> tuple[int, Rows]:
        """Tokens that a rank routes, and the rows that it exchanges with the experts of its group."""
        ranks = 1 if share.expert_tensor else share.tensor
        tokens = share.tokens // ranks
        if moe.router == "expert_choice":
            capacity = capacity_of(moe, share.length)
            rows = moe.experts * share.batch // ranks * (capacity or 0)
        elif (capacity := capacity_of(moe, tokens)) is not None:
            rows = moe.experts * capacity
        else:
            return tokens, share.rows_of("expert", "router", moe.experts, tokens * moe.top_k)
        return tokens, Rows(rows, rows)

    @classmethod
    def work(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> list[Work]:
        """See ``Mixer``."""
        tokens, rows = cls._routed(moe, share)
        width = moe.d_expert or config.resolved_d_ff
        hidden = width // share.tensor if share.expert_tensor else width
        made, here = input_width(config.activation, hidden), moe.experts // share.expert
        work: list[Work] = [
            *routing_work(tokens, config.d_model, moe.experts, rows.received, share.width, share.expert),
            Product(rows.received, config.d_model, made, here),
            activation_work(rows.received, made, hidden, share.width),
            Product(rows.received, hidden, config.d_model, here),
        ]
        if moe.shared_experts:
            work += FeedForward.hidden_work(config, moe.shared_experts * width, share)
        return work

    @classmethod
    def sends(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> list[Sent]:
        """See ``Mixer``: rows to their experts and back; without a capacity their numbers before."""
        _, rows = cls._routed(moe, share)
        counts = [counts_sent("expert", moe.experts)] if moe.capacity_factor is None else []
        row = config.d_model * share.width
        return [*counts, *exchange("expert", rows, row, row)]

    @classmethod
    def crossings(cls, config: ModelConfig, moe: MoEConfig, share: Share) -> int:
        """See ``Mixer``: of routed experts where tensor-parallel ranks share each, and of shared experts."""
        return share.expert_tensor + bool(moe.shared_experts)
