"""Mamba's short convolution: depthwise, causal, with SiLU (arXiv 2312.00752, section 3.4 and figure 3).

y[t] = silu(bias + sum over k of weight[k] x[t - (width - 1) + k])
"""

import torch
from torch import Tensor

from moe_mamba.kernels.backends import choose
from moe_mamba.kernels.validation import (
    require_bool,
    require_dimensions,
    require_entries,
    require_one_device,
    require_same_dtype,
    require_shapes,
)

__all__ = ["causal_conv", "causal_conv_step"]


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    document_starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Convolve each channel with its own filter over the present and the past, then SiLU.

    Args:
        x: (batch, length, channels).
        weight: (channels, width); the last tap is the present; dtype of x.
        bias: (channels), dtype of x.
        document_starts: (batch, length) bool; no tap reaches from a True position or after it to before it.
        initial_state: (batch, width - 1, channels), the inputs before position 0; None: zeros; dtype of x.
        backend: ``auto``, or one of ``BACKENDS["causal_conv"]``, which says the widths that each takes.

    Returns:
        y (batch, length, channels), and the last width - 1 inputs (batch, width - 1, channels) for the tokens to come,
        zeros where a start lies behind them; both in the dtype of x.

    Raises:
        UserError: shapes or dtypes that disagree, or a back end that does not exist.
    """
    require_dimensions("causal_conv", "x", x, "batch length channels")
    require_dimensions("causal_conv", "weight", weight, "channels width")
    batch, length, channels = x.shape
    width = weight.shape[1]
    require_shapes(
        "causal_conv",
        (
            ("weight", weight, (channels, width)),
            ("bias", bias, (channels,)),
            ("document_starts", document_starts, (batch, length)),
            ("initial_state", initial_state, (batch, width - 1, channels)),
        ),
    )
    others = (("weight", weight), ("bias", bias), ("initial_state", initial_state))
    require_same_dtype("causal_conv", x.dtype, others)
    require_bool("causal_conv", "document_starts", document_starts)
    require_one_device("causal_conv", x, (*others, ("document_starts", document_starts)))
    require_entries("causal_conv", "x", x)
    _, function = choose("causal_conv", x.device.type, x.dtype, backend, width)
    if initial_state is None:
        initial_state = x.new_zeros(batch, width - 1, channels)
    return function(x, weight, bias, document_starts, initial_state), _final_state(x, document_starts, initial_state)


def causal_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Convolve one token of each of many sequences, as generation does; no gradient flows.

    Args:
        x: (batch, channels).
        weight: (channels, width); the last tap is the present; dtype of x.
        bias: (channels), dtype of x.
        state: (batch, width - 1, channels), the inputs before the token, as ``causal_conv`` gives them; dtype of x.
        backend: ``auto``, or one of ``BACKENDS["causal_conv_step"]``, which says the widths that each takes.

    Returns:
        y (batch, channels), and the state for the next token; both in the dtype of x.

    Raises:
        UserError: shapes or dtypes that disagree, or a back end that does not exist.
    """
    require_dimensions("causal_conv_step", "x", x, "batch channels")
    require_dimensions("causal_conv_step", "weight", weight, "channels width")
    batch, channels = x.shape
    width = weight.shape[1]
    shapes = (
        ("weight", weight, (channels, width)),
        ("bias", bias, (channels,)),
        ("state", state, (batch, width - 1, channels)),
    )
    require_shapes("causal_conv_step", shapes)
    others = (("weight", weight), ("bias", bias), ("state", state))
    require_same_dtype("causal_conv_step", x.dtype, others)
    require_one_device("causal_conv_step", x, others)
    require_entries("causal_conv_step", "x", x)
    _, function = choose("causal_conv_step", x.device.type, x.dtype, backend, width)
    return function(x, weight, bias, state)


def _final_state(x: Tensor, document_starts: Tensor | None, initial_state: Tensor) -> Tensor:
    """The last width - 1 inputs, (batch, width - 1, channels), zeros before the last start."""
    reach = initial_state.shape[1]
    if document_starts is None and x.shape[1] >= reach:
        return x[:, x.shape[1] - reach :].clone()  # not a view, which would keep the whole of x
    tail = torch.cat((initial_state, x[:, max(0, x.shape[1] - reach) :]), 1)
    tail = tail[:, tail.shape[1] - reach :]
    if document_starts is None or reach == 0:
        return tail
    started = torch.cat((document_starts.new_zeros(document_starts.shape[0], reach), document_starts), 1)[:, -reach:]
    # a start at a later position hides an input: starts after it, counted from the end
    later = started.flip(1).cumsum(1).flip(1) - started.long()
    return tail.masked_fill((later > 0)[..., None], 0)
