"""The CUDA convolution of Mamba's authors, package causal-conv1d, behind our signature; never picked by ``auto``.

It reads channels last as ours do, under the name (batch, channels, length) with strides; channels, strides and
addresses must then be multiples of 8 elements, for which it is given copies where they are not.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mamba.errors import UserError

WIDTHS = (2, 3, 4)
VECTOR = 8  # elements that it loads at once
ALIGNMENT = 16  # bytes


@torch.compiler.disable
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor
) -> Tensor:
    """See ``moe_mamba.kernels.causal_conv``, less its final state; computes in fp32.

    Raises:
        UserError: a width that theirs does not have, or the package does not load.
    """
    channels, width = weight.shape
    if width not in WIDTHS:
        raise UserError(
            f"causal_conv: causal-conv1d (kernels=vendor) takes a weight of width 2 to 4, not {width}: "
            "choose --run.kernels=auto"
        )
    padding = -channels % VECTOR
    if padding:
        x, initial_state = (F.pad(tensor, (0, padding)) for tensor in (x, initial_state))
        weight, bias = F.pad(weight, (0, 0, 0, padding)), F.pad(bias, (0, padding))
    operator = _their_conv()
    if document_starts is None:
        state = initial_state.contiguous().transpose(1, 2)
        y = operator(_aligned(x).transpose(1, 2), weight, bias, initial_states=state, activation="silu")
    else:
        # Some versions refuse a state beside documents: so the state goes in front, as part of the first document.
        x = torch.cat((initial_state, x), 1)
        document = F.pad(document_starts.cumsum(1, dtype=torch.int32), (width - 1, 0))
        y = operator(x.transpose(1, 2), weight, bias, seq_idx=document, activation="silu")[..., width - 1 :]
    return y.transpose(1, 2)[..., :channels]


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
