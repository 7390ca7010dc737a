"""The CUDA convolution of Mamba's authors, package causal-conv1d, behind our signature; never picked by ``auto``.

It reads channels last as ours do, under the name (batch, channels, length) with strides; channels, strides and
addresses must then be multiples of 8 elements, for which it is given copies where they are not. Our backward operator
runs their forward function again, which records their backward one; what it computes there is small beside that.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels.causal_conv.operator import define_conv

WIDTHS = (2, 3, 4)
VECTOR = 8  # elements that it loads at once
ALIGNMENT = 16  # bytes


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor
) -> Tensor:
    """See ``moe_mamba.kernels.causal_conv``, less its final state; computes in fp32.

    Raises:
        UserError: a width that theirs does not have, or the package does not load.
    """
    width = weight.shape[1]
    if width not in WIDTHS:
        raise UserError(
            f"causal_conv: causal-conv1d (kernels=vendor) takes a weight of width 2 to 4, not {width}: "
            "choose --run.kernels=auto"
        )
    return _conv(x, weight, bias, document_starts, initial_state)


def _forward(x: Tensor, *others: Any) -> Tensor:
    theirs, document = _theirs(x, *others)
    with torch.no_grad():
        y = _call(theirs, document)
    return _ours(y, x.shape[2])[:, y.shape[2] - x.shape[1] :].clone(memory_format=torch.contiguous_format)


def _backward(y_gradient: Tensor, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    (_, length, channels), reach = x.shape, weight.shape[1] - 1
    theirs, document = _theirs(x, weight, *others)
    theirs = [one.detach().requires_grad_() for one in theirs]
    with torch.enable_grad():
        y = _call(theirs, document)
    given = F.pad(y_gradient, (0, y.shape[1] - channels, y.shape[2] - length, 0)).transpose(1, 2)
    x_gradient, weight_gradient, bias_gradient, *rest = torch.autograd.grad(y, theirs, given)
    x_gradient = _ours(x_gradient, channels)
    state_gradient = _ours(rest[0], channels) if rest else x_gradient[:, :reach]
    return (
        x_gradient[:, x_gradient.shape[1] - length :].clone(memory_format=torch.contiguous_format),
        weight_gradient[:channels].t().clone(memory_format=torch.contiguous_format).t(),
        bias_gradient[:channels].clone(),
        state_gradient.clone(memory_format=torch.contiguous_format),
    )


def _theirs(
    x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """The operands as their function takes them: x, weight, bias and the state; and each position's document.

    With documents there is no state: some versions refuse one beside them, so it goes in front of x, as part of the
    first document.
    """
    padding = -x.shape[2] % VECTOR
    if padding:
        x, initial_state = (F.pad(tensor, (0, padding)) for tensor in (x, initial_state))
        weight, bias = F.pad(weight, (0, 0, 0, padding)), F.pad(bias, (0, padding))
    if document_starts is None:
        return [_aligned(x).transpose(1, 2), weight, bias, initial_state.contiguous().transpose(1, 2)], None
    document = F.pad(document_starts.cumsum(1, dtype=torch.int32), (initial_state.shape[1], 0))
    return [torch.cat((initial_state, x), 1).transpose(1, 2), weight, bias], document


def _call(theirs: list[Tensor], document: Tensor | None) -> Tensor:
    """Their function, which is one autograd function: it records what it did even where torch's own do not."""
    x, weight, bias, *state = theirs
    if state:
        return _their_conv()(x, weight, bias, initial_states=state[0], activation="silu")
    return _their_conv()(x, weight, bias, seq_idx=document, activation="silu")


def _ours(tensor: Tensor, channels: int) -> Tensor:
    """(batch, padded channels, length) -> (batch, length, channels)."""
    return tensor.transpose(1, 2)[..., :channels]


def _aligned(x: Tensor) -> Tensor:
    """``x`` (batch, length, channels) itself where its vectors can be loaded, else a dense copy."""
    batch, length, channel = x.stride()
    dense = channel == 1 and length >= x.shape[2] and batch % VECTOR == 0 and length % VECTOR == 0
    if dense and x.data_ptr() % ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _their_conv() -> Callable[..., Any]:
    try:
        from causal_conv1d import causal_conv1d_fn
    except ImportError as error:
        raise UserError(f"causal-conv1d is installed but does not load ({error}): choose --run.kernels=auto") from error
    return causal_conv1d_fn


_conv = define_conv("causal_conv_vendor", _forward, _backward)
