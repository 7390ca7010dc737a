"""One token of many sequences in C++ (``csrc/decode_step.cpp``): bias, SiLU and the new state in one pass."""

import ctypes

import torch
from torch import Tensor

from moe_mamba.kernels.causal_conv.operator import define_step
from moe_mamba.kernels.extension import TYPES, Strided, library, rows
from moe_mamba.kernels.launch import dense, unit_stride


class _ConvStep(ctypes.Structure):
    """``ConvStep`` in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "channels", "width", "type", "threads")),
        *((name, Strided) for name in ("x", "y", "state", "new_state")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
    )


def _step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    (batch, channels), width = x.shape, weight.shape[1]
    x, state, weight, bias = unit_stride(x), unit_stride(state), dense(weight, x.dtype), dense(bias, x.dtype)
    y, new_state = x.new_empty(batch, channels), x.new_empty(batch, width - 1, channels)
    step = _ConvStep(
        batch, channels, width, TYPES[x.dtype], torch.get_num_threads(), rows(x), rows(y),
        (state.data_ptr(), state.stride(0), state.stride(1)), (new_state.data_ptr(), (width - 1) * channels, channels),
        weight.data_ptr(), bias.data_ptr(),
    )  # fmt: skip
    library().causal_conv_step(ctypes.byref(step))
    return y, new_state


causal_conv_step = define_step("causal_conv_step_cpu", _step, "CPU")
"""See ``moe_mamba.kernels.causal_conv_step``; computes in fp64 for fp64 inputs, else in fp32."""
