"""From a router's decision to rows for the experts of this device, and from their outputs back to tokens.

The dispatcher is an object of its own: another one is all that spreading experts over devices changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

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

    def combine(self, rows: Tensor, dispatch: Dispatch, weighted: bool = True) -> Tensor:
        """Sum the outputs of a token's experts, (tokens, width), by weight or as they are; zero for one without any."""


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

    def combine(self, rows: Tensor, dispatch: Dispatch, weighted: bool = True) -> Tensor:
        """Sum the outputs; the sum over a token's experts is in the weights' dtype (fp32)."""
        routing = dispatch.routing
        weight = routing.weight if weighted else routing.unweighted()
        return combine_rows(rows, weight, routing.token, routing.slot, backend=self._kernels)
