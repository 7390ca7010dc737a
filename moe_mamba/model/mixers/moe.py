"""Mixture of experts: route -> dispatch -> experts -> combine.

The dispatcher is an object of its own: another one is all that spreading experts over devices changes.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.kernels import activation, combine_rows, gather_rows, grouped_matmul
from moe_mamba.model.initialize import Initializer, matrix
from moe_mamba.model.mixers.feed_forward import FeedForward, input_width
from moe_mamba.model.mixers.routing import Router, RouterStatistics, Routing
from moe_mamba.model.sequences import Sequences


class Dispatcher(Protocol):
    """Brings rows to the experts of this device, and their outputs back."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Any]:
        """Turn ``x`` (tokens, d_model) into (rows sorted by expert, rows of each expert, what combine needs).

        Where the routing has a capacity, all experts have as many rows.
        """

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Sum the weighted outputs of a token's experts, (tokens, d_model); zero for a token without any."""


class LocalDispatcher:
    """All experts are on this device; ``kernels`` names the back end of its gather and its sum."""

    def __init__(self, kernels: str) -> None:
        self._kernels = kernels

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Any]:
        """Gather the tokens in the order of the experts."""
        return gather_rows(x, routing.token, routing.slot, backend=self._kernels), routing.counts, routing

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Sum the weighted outputs; the sum over a token's experts is in the weights' dtype (fp32)."""
        return combine_rows(rows, handle.weight, handle.token, handle.slot, backend=self._kernels)


class Experts(nn.Module):
    """Stacked experts: two bias-free matrices each, with an activation between them."""

    is_stacked = True  # each expert's slice has a generator of its own, see initialize.py

    def __init__(self, config: ModelConfig, experts: int, width: int) -> None:
        super().__init__()
        self.config = config
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
        kernels = self.config.kernels
        hidden = grouped_matmul(rows, self.in_proj, counts, capacity, kernels)  # (rows, input width)
        hidden = activation(hidden, self.config.activation, kernels)  # (rows, width)
        return grouped_matmul(hidden, self.out_proj, counts, capacity, kernels)  # (rows, d_model)


class MoE(nn.Module):
    """A mixture-of-experts layer: routed experts, and shared ones that see every token."""

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        width = moe.d_expert or config.resolved_d_ff
        self.router = Router(config, moe)
        self.experts = Experts(config, moe.experts, width)
        self.shared = FeedForward(config, moe.shared_experts * width) if moe.shared_experts else None
        self.dispatcher: Dispatcher = LocalDispatcher(config.kernels)

    def forward(self, x: Tensor, sequences: Sequences, state: None = None) -> tuple[Tensor, RouterStatistics, None]:
        """Map ``x`` (tokens, d_model); a token that every expert dropped gets zero, so it rides the residual."""
        y, statistics = self.routed(x, sequences)
        if self.shared is not None:
            y = y + self.shared(x, sequences)[0]
        return y, statistics, None

    def routed(self, x: Tensor, sequences: Sequences) -> tuple[Tensor, RouterStatistics]:
        """Give the routed experts' part of the output, (tokens, d_model)."""
        routing, statistics = self.router(x, sequences)
        rows, counts, handle = self.dispatcher.dispatch(x, routing)
        capacity = None if routing.capacity is None else len(rows) // len(counts)
        return self.dispatcher.combine(self.experts(rows, counts, capacity), handle), statistics
