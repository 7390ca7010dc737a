"""The norm with its own backward, in blocks of rows that stay in a CPU's cache.

It is an operator: what traces it would unroll the loop over blocks.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_mamba.kernels.rms_norm import reference
from moe_mamba.kernels.rms_norm.operator import define_norm, new_outputs

BLOCK = 1 << 18  # elements worked on at once on a CPU; not by the number of threads, which must not change a sum


def _forward(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, ...]:
    outputs = y, stream, scale = new_outputs(x, weight, epsilon, residual)
    if residual is not None:
        torch.add(residual, x, out=stream)
    rows, y, scale = _rows(x if residual is None else stream), _rows(y), scale.view(-1, 1)
    for block in _blocks(rows):
        wide = rows[block].to(scale.dtype)
        out = wide.square()
        scale[block] = torch.rsqrt(out.mean(-1, keepdim=True) + epsilon)
        y[block] = torch.mul(wide, scale[block], out=out).mul_(weight)
    return outputs


def _backward(
    y_gradient: Tensor, stream_gradient: Tensor | None, stream: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    made = stream.new_empty(stream.shape)
    rows, given, gradient, scale = _rows(stream), _rows(y_gradient), _rows(made), scale.view(-1, 1)
    if stream_gradient is not None:
        stream_gradient = _rows(stream_gradient)
    weight_gradient = torch.zeros(weight.shape, dtype=scale.dtype, device=weight.device)
    for block in _blocks(rows):
        normal = rows[block].to(scale.dtype) * scale[block]  # (rows of the block, d)
        incoming = given[block].to(scale.dtype)
        product = incoming * normal
        weight_gradient += product.sum(0)
        shared = product.mul_(weight).mean(-1, keepdim=True)
        change = torch.mul(incoming, weight, out=product).addcmul_(normal, shared, value=-1).mul_(scale[block])
        if stream_gradient is not None:
            change += stream_gradient[block]
        gradient[block] = change
    return made, weight_gradient.to(weight.dtype)


def _rows(tensor: Tensor) -> Tensor:
    """As (rows, d); copied only where that cannot be a view."""
    return tensor.reshape(-1, tensor.shape[-1])


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Split (rows, d) into blocks: the whole on an accelerator."""
    count = max(1, BLOCK // max(1, rows.shape[1])) if rows.device.type == "cpu" else max(1, rows.shape[0])
    for first in range(0, rows.shape[0], count):
        yield slice(first, first + count)


_norm = define_norm("rms_norm_torch", _forward, _backward)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.rms_norm``; values are those of ``reference.py`` to the last bit."""
    if x.numel() <= BLOCK and not torch.is_grad_enabled():  # a token of generation is too short for more calls
        return reference.rms_norm(x, weight, epsilon, residual)
    return _norm(x, weight, epsilon, residual)
