"""The norm with its own backward, in blocks of rows that stay in a CPU's cache.

It keeps the stream and one number per row, where autograd keeps three tensors in fp32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_mamba.kernels.rms_norm import reference

BLOCK = 1 << 18  # elements worked on at once on a CPU; not by the number of threads, which must not change a sum


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.rms_norm``; values are those of ``reference.py`` to the last bit."""
    if x.numel() <= BLOCK and not torch.is_grad_enabled():  # a token of generation is too short for more calls
        return reference.rms_norm(x, weight, epsilon, residual)
    if residual is None:
        return _RMSNorm.apply(x, weight, epsilon, None), x
    return _RMSNorm.apply(x, weight, epsilon, residual)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> Any:
        ctx.set_materialize_grads(False)
        stream = x if residual is None else residual + x
        rows = _rows(stream)
        work = torch.promote_types(x.dtype, torch.float32)
        scale = rows.new_empty(rows.shape[0], 1, dtype=work)
        y = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for block in _blocks(rows):
            wide = rows[block].to(work)
            out = wide.square()
            scale[block] = torch.rsqrt(out.mean(-1, keepdim=True) + epsilon)
            y[block] = torch.mul(wide, scale[block], out=out).mul_(weight)
        ctx.save_for_backward(stream, weight, scale)  # a view of an output would keep the graph alive for ever
        return y.view(x.shape) if residual is None else (y.view(x.shape), stream)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, y_gradient: Tensor | None, stream_gradient: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if y_gradient is None:
            return stream_gradient, None, None, stream_gradient
        stream, weight, scale = ctx.saved_tensors
        rows, given = _rows(stream), _rows(y_gradient)
        gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
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
        gradient = gradient.view(y_gradient.shape)
        return gradient, weight_gradient.to(weight.dtype), None, gradient if ctx.needs_input_grad[3] else None


def _rows(tensor: Tensor) -> Tensor:
    """As (rows, d); copied only where that cannot be a view."""
    return tensor.reshape(-1, tensor.shape[-1])


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Split (rows, d) into blocks: the whole on an accelerator."""
    count = max(1, BLOCK // max(1, rows.shape[1])) if rows.device.type == "cpu" else max(1, rows.shape[0])
    for first in range(0, rows.shape[0], count):
        yield slice(first, first + count)
