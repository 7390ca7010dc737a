"""The convolution as shifted multiply-adds with its own backward, which keeps nothing but the inputs.

Batch rows are worked on one after another on a CPU, so that the passes over a row find it in the cache; this takes
half the time of ``torch.nn.functional.conv1d``, which also wants the channels before the length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mamba.kernels.causal_conv.operator import define_conv

BLOCK = 1 << 18  # elements of x that a thread works on at once


@torch.no_grad()
def causal_conv_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.causal_conv_step``; computes in fp64 for fp64 inputs, else in fp32."""
    work = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat((state, x[:, None]), 1)  # (batch, width, channels)
    out = torch.addcmul(bias.to(work), window[:, 0].to(work), weight[:, 0].to(work))
    for place in range(1, weight.shape[1]):
        out.addcmul_(window[:, place].to(work), weight[:, place].to(work))
    return F.silu(out).to(x.dtype), window[:, 1:]


def _forward(x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor) -> Tensor:
    taps, bias, masks = _operands(weight, bias, document_starts)
    y = x.new_empty(x.shape)
    for rows in _blocks(x):
        past = _past(x, initial_state, rows, taps.dtype)
        y[rows] = F.silu(_convolve(past, taps, bias, [mask[rows] for mask in masks]), inplace=True)
    return y


def _backward(
    y_gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor
) -> tuple[Tensor, ...]:
    taps, bias_work, masks = _operands(weight, bias, document_starts)
    width, length = taps.shape[0], x.shape[1]
    x_gradient, state_gradient = x.new_empty(x.shape), x.new_empty(initial_state.shape)
    # one sum a batch row, so that the number of threads, by which rows form blocks, does not change the total
    sums = taps.new_empty(width + 1, x.shape[0], x.shape[2])  # of the taps, the present first, then of the bias
    for rows in _blocks(x):
        past = _past(x, initial_state, rows, taps.dtype)
        row_masks = [mask[rows] for mask in masks]
        out = _convolve(past, taps, bias_work, row_masks)  # (rows, length, channels)
        gradient = torch.ops.aten.silu_backward(y_gradient[rows].to(taps.dtype), out)
        sums[width, rows] = gradient.sum(1)
        past_gradient = torch.zeros_like(past)
        for back in range(width):
            window = slice(width - 1 - back, width - 1 - back + length)
            tap, seen = past[:, window], gradient
            if back and row_masks:
                tap, seen = _hide(tap, row_masks[back - 1]), _hide(seen, row_masks[back - 1])
            sums[back, rows] = (seen * tap).sum(1)
            past_gradient[:, window].addcmul_(seen, taps[back])
        x_gradient[rows] = past_gradient[:, width - 1 :]
        state_gradient[rows] = past_gradient[:, : width - 1]
    total = sums.sum(1)
    weight_gradient = total[:width].flip(0).t()
    return x_gradient, weight_gradient.to(weight.dtype), total[width].to(bias.dtype), state_gradient


def _operands(weight: Tensor, bias: Tensor, document_starts: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What every block uses.

    Returns:
        The taps, the present first, (width, channels); the bias (channels); and for each tap but the present the mask
        (batch, length) of positions between which and the tap a document starts (no masks without starts).
    """
    work = torch.promote_types(weight.dtype, torch.float32)
    width = weight.shape[1]
    masks: list[Tensor] = []
    if document_starts is not None:
        hidden = document_starts
        for back in range(1, width):
            masks.append(hidden)
            hidden = hidden | F.pad(document_starts, (back, 0))[:, : document_starts.shape[1]]
    return weight.to(work).t().flip(0).contiguous(), bias.to(work), masks


def _blocks(x: Tensor) -> list[slice]:
    """Split the batch into blocks: all rows on an accelerator, as many as the cache likes on a CPU."""
    batch, length, channels = x.shape
    count = batch if x.device.type != "cpu" else max(1, BLOCK * torch.get_num_threads() // (length * channels))
    return [slice(first, first + count) for first in range(0, batch, count)]


def _past(x: Tensor, initial_state: Tensor, rows: slice, work: torch.dtype) -> Tensor:
    """The inputs with those before position 0 in front, (rows, width - 1 + length, channels)."""
    return torch.cat((initial_state[rows], x[rows]), 1).to(work)


def _convolve(past: Tensor, taps: Tensor, bias: Tensor, masks: list[Tensor]) -> Tensor:
    """The convolution before SiLU, (rows, length, channels)."""
    width = taps.shape[0]
    length = past.shape[1] - width + 1
    out = torch.addcmul(bias, past[:, width - 1 :], taps[0])
    for back in range(1, width):
        tap = past[:, width - 1 - back : width - 1 - back + length]
        if masks:
            tap = _hide(tap, masks[back - 1])
        out.addcmul_(tap, taps[back])
    return out


def _hide(inputs: Tensor, mask: Tensor) -> Tensor:
    """A copy of (rows, length, channels) with zeros where the mask (rows, length) is True.

    It selects, because 0 x NaN is NaN; by position, because starts are few and ``masked_fill`` with a mask to broadcast
    is slow on a CPU.
    """
    positions = mask.flatten().nonzero().squeeze(1)
    copy = inputs.clone(memory_format=torch.contiguous_format)
    return copy.view(-1, inputs.shape[2]).index_fill_(0, positions, 0).view(inputs.shape)


causal_conv = define_conv("causal_conv_torch", _forward, _backward)
"""See ``moe_mamba.kernels.causal_conv``, less its final state; computes in fp64 for fp64 inputs, else in fp32."""
