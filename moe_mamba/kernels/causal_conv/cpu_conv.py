"""The convolution in C++ (``csrc/causal_conv.cpp``), bias and SiLU in the same pass, with its own backward.

Nothing but the inputs is kept. The gradients of weight and bias leave as one partial sum for each batch row, which are
added here in a fixed order, so that results do not depend on the number of threads.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from moe_mamba.kernels.causal_conv.operator import define_conv
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


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor
) -> dict[str, Tensor | None]:
    """The operands as C++ takes them, by the names of ``_Conv``."""
    work = torch.promote_types(x.dtype, torch.float32)
    return {
        "x": unit_stride(x),
        "initial_state": unit_stride(initial_state),
        "taps": weight.to(work).t().flip(0).contiguous(),  # (width, channels), the present first
        "bias": bias.to(work).contiguous(),
        "starts": None if document_starts is None else document_starts.contiguous(),
    }


def _forward(x: Tensor, *others: Any) -> Tensor:
    y = x.new_empty(x.shape)
    _call("causal_conv_forward", {**_inputs(x, *others), "y": y})
    return y


def _backward(y_gradient: Tensor, x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    (batch, _, channels), width = x.shape, weight.shape[1]
    work = torch.promote_types(x.dtype, torch.float32)
    gradients = {
        "x_gradient": x.new_empty(x.shape),
        "state_gradient": x.new_empty(batch, width - 1, channels),
        "taps_gradient": x.new_empty(batch, width, channels, dtype=work),
        "bias_gradient": x.new_empty(batch, channels, dtype=work),
    }
    inputs = _inputs(x, weight, *others)
    _call("causal_conv_backward", {**inputs, **gradients, "y_gradient": unit_stride(y_gradient)})
    return (
        gradients["x_gradient"],
        sum_in_order(gradients["taps_gradient"], 0).flip(0).t().to(x.dtype),
        sum_in_order(gradients["bias_gradient"], 0).to(x.dtype),
        gradients["state_gradient"],
    )


def _call(function: str, tensors: dict[str, Tensor | None]) -> None:
    """Call C++ with a ``Conv`` for these tensors, which live until it returns."""
    x, taps = tensors["x"], tensors["taps"]
    assert x is not None and taps is not None
    batch, length, channels = x.shape
    groups, threads = -(-channels // GROUP), torch.get_num_threads()
    conv = _Conv(batch, length, channels, taps.shape[0], groups, TYPES[x.dtype], threads)
    getattr(library(), function)(fill(conv, tensors))


causal_conv = define_conv("causal_conv_cpu", _forward, _backward, "CPU")
"""See ``moe_mamba.kernels.causal_conv``, less its final state; computes in fp64 for fp64 inputs, else in fp32."""
