"""One token of many sequences in C++ (``csrc/decode_step.cpp``): reads and writes each state once."""

import ctypes

import torch
from torch import Tensor

from moe_mamba.kernels.extension import TYPES, Strided, library, rows
from moe_mamba.kernels.launch import dense, unit_stride
from moe_mamba.kernels.selective_scan.operator import define_step


class _ScanStep(ctypes.Structure):
    """``ScanStep`` in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "d_inner", "d_state", "type", "threads")),
        *((name, Strided) for name in ("x", "delta", "z", "B", "C", "y")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "delta_bias", "state", "new_state")),
    )


def _step(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    work = state.dtype
    (batch, d_inner), d_state = x.shape, A.shape[1]
    x, delta, B, C = unit_stride(x), unit_stride(delta), unit_stride(B), unit_stride(C)
    z = None if z is None else unit_stride(z)
    A, D = dense(A, work), dense(D, work)
    delta_bias = None if delta_bias is None else dense(delta_bias, work)
    before = state.transpose(1, 2).contiguous()
    y, new_state = x.new_empty(batch, d_inner), state.new_empty(batch, d_state, d_inner)  # as in _fake
    step = _ScanStep(
        batch, d_inner, d_state, TYPES[x.dtype], torch.get_num_threads(),
        rows(x), rows(delta), rows(z), rows(B), rows(C), rows(y), A.data_ptr(), D.data_ptr(),
        None if delta_bias is None else delta_bias.data_ptr(), before.data_ptr(), new_state.data_ptr(),
    )  # fmt: skip
    library().selective_scan_step(ctypes.byref(step))
    return y, new_state.transpose(1, 2)


def _fake(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
          delta_bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), state.new_empty(state.transpose(1, 2).shape).transpose(1, 2)


selective_scan_step = define_step("selective_scan_step_cpu", _step, _fake, "CPU")
"""See ``moe_mamba.kernels.selective_scan_step``; computes in the dtype of the state.

States lie with channels innermost, (batch, d_state, d_inner) in memory, as ``cpu_scan`` leaves them.
"""
