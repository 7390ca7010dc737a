"""The convolution in C++ (``csrc/causal_conv.cpp``), bias and SiLU in the same pass, with its own backward.

Nothing but the inputs is kept. The gradients of weight and bias leave as one partial sum for each batch row, which are
added here in a fixed order, so that results do not depend on the number of threads.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_mamba.kernels.extension import TYPES, Strided, fill, library, sum_in_order
from moe_mamba.kernels.launch import unit_stride

GROUP = 256  # channels of a task, GROUP in C++


class _Conv(ctypes.Structure):
    """``Conv`` in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "channels", "width", "groups", "type", "threads")),
        *((name, Strided) for name in ("x", "initial_state", "y", "y_gradient", "x_gradient", "state_gradient")),
        *((name, ctypes.c_void_p) for name in ("starts", "taps", "bias", "taps_gradient", "bias_gradient")),
    )


@torch.compiler.disable
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor
) -> Tensor:
    """See ``moe_mamba.kernels.causal_conv``, less its final state; computes in fp64 for fp64 inputs, else in fp32."""
    return _CausalConv.apply(x, weight, bias, initial_state, document_starts)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor, document_starts: Tensor | None
    ) -> Tensor:
        work = torch.promote_types(x.dtype, torch.float32)
        tensors = {
            "x": unit_stride(x),
            "initial_state": unit_stride(initial_state),
            "taps": weight.to(work).t().flip(0).contiguous(),  # (width, channels), the present first
            "bias": bias.to(work).contiguous(),
            "starts": None if document_starts is None else document_starts.contiguous(),
        }
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        library().causal_conv_forward(_arguments({**tensors, "y": y}))
        ctx.names = tuple(tensors)
        ctx.save_for_backward(*tensors.values())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        x, taps, initial_state = (tensors[name] for name in ("x", "taps", "initial_state"))
        gradients = {
            "x_gradient": torch.empty_like(x, memory_format=torch.contiguous_format),
            "state_gradient": torch.empty_like(initial_state, memory_format=torch.contiguous_format),
            "taps_gradient": taps.new_empty(x.shape[0], *taps.shape),
            "bias_gradient": taps.new_empty(x.shape[0], taps.shape[1]),
        }
        y_gradient = unit_stride(y_gradient)
        library().causal_conv_backward(_arguments({**tensors, **gradients, "y_gradient": y_gradient}))
        return (
            gradients["x_gradient"],
            sum_in_order(gradients["taps_gradient"], 0).flip(0).t().to(x.dtype),
            sum_in_order(gradients["bias_gradient"], 0).to(x.dtype),
            gradients["state_gradient"],
            None,
        )


def _arguments(tensors: dict[str, Tensor | None]) -> Any:
    """``Conv`` for these tensors, by reference."""
    x, taps = tensors["x"], tensors["taps"]
    assert x is not None and taps is not None
    batch, length, channels = x.shape
    groups, threads = -(-channels // GROUP), torch.get_num_threads()
    return fill(_Conv(batch, length, channels, taps.shape[0], groups, TYPES[x.dtype], threads), tensors)
