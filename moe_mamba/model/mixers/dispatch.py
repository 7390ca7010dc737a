"""From a router's decision to rows for the experts of this device, and from their outputs back to tokens.

The dispatcher is an object of its own: another one is all that spreading experts over devices changes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_mamba.kernels import combine_rows, gather_rows
from moe_mamba.model.mixers.routing import Routing


@dataclass(frozen=True)
class Dispatch:
    """A router's decision, and what it means for this device; it serves any number of products.

    Attributes:
        routing: of this device's tokens.
        counts: (experts of this device,) int64, rows of each.
        capacity: rows of every expert of this device, where all have as many; None: only ``counts`` knows.
        travel: how rows come to other devices; None: none do.
    """

    routing: Routing
    counts: Tensor
    capacity: int | None
    travel: Any = None


class Dispatcher(Protocol):
    """Brings rows to the experts of this device, and their outputs back."""

    def plan(self, routing: Routing) -> Dispatch:
        """Find out which rows come to this device."""

    def send(self, x: Tensor, dispatch: Dispatch) -> Callable[[], Tensor]:
        """Send ``x`` (tokens, width); what is returned waits for this device's rows (rows, width), sorted by expert."""

    def combine(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Sum the outputs of a token's experts by weight, (tokens, width); zero for one without any."""

    def combine_unweighted(self, outputs: Sequence[Tensor], dispatch: Dispatch) -> list[Tensor]:
        """As ``combine``, but the outputs as they are, of several products of the same rows."""


class LocalDispatcher:
    """All experts are on this device; ``kernels`` names the back end of its gather and its sum."""

    def __init__(self, kernels: str) -> None:
        self._kernels = kernels

    def plan(self, routing: Routing) -> Dispatch:
        """All rows stay."""
        return Dispatch(routing, routing.counts, routing.capacity)

    def send(self, x: Tensor, dispatch: Dispatch) -> Callable[[], Tensor]:
        """Gather the tokens in the order of the experts."""
        rows = gather_rows(x, dispatch.routing.token, dispatch.routing.slot, backend=self._kernels)
        return lambda: rows

    def combine(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Sum the outputs; the sum over a token's experts is in the weights' dtype (fp32)."""
        routing = dispatch.routing
        return combine_rows(rows, routing.weight, routing.token, routing.slot, backend=self._kernels)

    def combine_unweighted(self, outputs: Sequence[Tensor], dispatch: Dispatch) -> list[Tensor]:
        """Sum the outputs; where each token has one row, nothing is summed: they are put in the tokens' order."""
        routing = dispatch.routing
        token, slot = routing.token, routing.slot
        if routing.capacity is None and slot.shape[1] == 1:
            return [Permutation.apply(rows, slot.view(-1), token) for rows in outputs]
        weight = routing.unweighted()
        return [combine_rows(rows, weight, token, slot, backend=self._kernels) for rows in outputs]


class Permutation(torch.autograd.Function):
    """Rows in another order; the gradient is gathered by the inverse, where autograd would scatter and add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Row r is rows[order[r]]."""
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of only the rows."""
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None
