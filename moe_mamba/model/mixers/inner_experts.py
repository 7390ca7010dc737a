"""Experts that stand in the place of a projection: of one matrix each, or of two with an activation between them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.kernels import activation, grouped_matmul
from moe_mamba.model.costs import record_activation
from moe_mamba.model.initialize import Initializer, matrix, uniform
from moe_mamba.model.mixers.dispatch import Dispatch
from moe_mamba.model.mixers.feed_forward import input_width
from moe_mamba.model.mixers.routing import unchanged
from moe_mamba.model.tape import Recorded, Tape
from moe_mamba.model.work import Share


class LinearExperts(nn.Module):
    """Stacked experts of one matrix each, weight (experts, in, out), which starts as the one of Mamba's projection."""

    is_stacked = True  # each expert's slice has a generator of its own, see initialize.py

    def __init__(self, experts: int, width: int, out: int, scale: float, kernels: str) -> None:
        super().__init__()
        self.fan_in, self.scale, self.kernels = width, scale, kernels
        self.weight = nn.Parameter(torch.empty(experts, width, out))

    def initializers(self) -> dict[str, Initializer]:
        """How one expert starts."""
        return {"weight": uniform(self.fan_in, self.scale)}

    def forward(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Map ``rows`` (rows, in), sorted by expert, each by its own, to (rows, out)."""
        return grouped_matmul(rows, self.weight, dispatch.counts, dispatch.capacity, self.kernels)


class SwitchExperts(nn.Module):
    """Stacked experts of two matrices each, with the model's activation between them.

    Attributes:
        reduce: turns this rank's part of all hidden units' inputs into the inputs of its own hidden units, where a
            layout shards what experts read.
        gather: turns this rank's hidden units into those of all, where a layout shards what experts write.
    """

    is_stacked = True

    def __init__(
        self, config: ModelConfig, experts: int, sizes: tuple[int, int, int], writes_to_stream: bool, kernels: str
    ) -> None:
        super().__init__()
        width, hidden, out = sizes
        self.config, self.writes_to_stream, self.kernels = config, writes_to_stream, kernels
        self.reduce: Callable[[Tensor], Tensor] = unchanged
        self.gather: Callable[[Tensor], Tensor] = unchanged
        self.in_proj = nn.Parameter(torch.empty(experts, width, input_width(config.activation, hidden)))
        self.out_proj = nn.Parameter(torch.empty(experts, hidden, out))
        self.fan_ins = width, hidden

    def initializers(self) -> dict[str, Initializer]:
        """How one expert's parameters start: as those of the layers ``E``."""
        width, hidden = self.fan_ins
        return {
            "in_proj": matrix(self.config, width),
            "out_proj": matrix(self.config, hidden, residual=self.writes_to_stream),
        }

    def forward(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Map ``rows`` (rows, in), sorted by expert, each by its own, to (rows, out)."""
        counts, capacity, kernels = dispatch.counts, dispatch.capacity, self.kernels
        hidden = self.reduce(grouped_matmul(rows, self.in_proj, counts, capacity, kernels))  # (rows, input width)
        hidden = self.gather(activation(hidden, self.config.activation, kernels))  # (rows, hidden)
        return grouped_matmul(hidden, self.out_proj, counts, capacity, kernels)


def record_experts(
    config: ModelConfig, moe: MoEConfig, share: Share, tape: Tape, x: Recorded, rows: int, is_out: bool
) -> Recorded:
    """What a projection's experts make of (rows, in); ``is_out``: these are channels, else it makes channels."""
    routing, channels = moe.inner_routing, config.resolved_d_inner // share.tensor
    read, made = (channels, config.d_model) if is_out else (config.d_model, channels)
    here = routing.experts // share.inner_expert
    if moe.inner.expert == "linear":
        return tape.linear(x, rows, read, made, here)
    hidden, gates = routing.d_expert or config.resolved_d_ff, input_width(config.activation, 1)
    mine = hidden // share.tensor
    y = tape.linear(x, rows, read, gates * (hidden if is_out else mine), here)
    if is_out and share.tensor > 1:  # parts of sums: by units, this rank's sums, and by rows again
        y = tape.one(y, numbers=rows * gates * hidden)
        y = tape.one(tape.one(y, numbers=rows * gates * mine), numbers=rows * gates * mine)
    y = record_activation(tape, y, rows, mine, config.activation)
    if not is_out and share.tensor > 1:  # by units, and those of all ranks
        y = tape.one(tape.one(y, numbers=rows * mine), numbers=rows * hidden)
    return tape.linear(y, rows, mine if is_out else hidden, made, here)
