"""The norm of bf16 rows in C++ (``csrc/rms_norm.cpp``), without gradients: one call, where torch makes nine."""

import ctypes

import torch
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.extension import library
from moe_mamba.kernels.launch import dense, unit_stride
from moe_mamba.kernels.rms_norm import torch_rms_norm


class _Norm(ctypes.Structure):
    """``Norm`` in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "d", "threads", "x_stride", "residual_stride")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "y", "stream")),
    )


def _run(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    y, stream = _fake(x, weight, epsilon, residual)
    if y.numel() == 0:
        return y, stream
    d, weight = x.shape[-1], dense(weight, torch.float32)
    rows = unit_stride(x if x.dim() == 2 else x.reshape(-1, d))
    others = rows if residual is None else unit_stride(residual if x.dim() == 2 else residual.reshape(-1, d))
    norm = _Norm(
        rows.shape[0], d, torch.get_num_threads(), rows.stride(0), others.stride(0), epsilon, rows.data_ptr(),
        None if residual is None else others.data_ptr(), weight.data_ptr(), y.data_ptr(),
        None if residual is None else stream.data_ptr(),
    )  # fmt: skip
    library().rms_norm(ctypes.byref(norm))
    return y, stream


def _fake(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


_norm = operators.define(
    "rms_norm_cpu(Tensor x, Tensor weight, float epsilon, Tensor? residual) -> (Tensor y, Tensor stream)",
    _run,
    _fake,
    "CPU",
    is_constant=True,
)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.rms_norm``."""
    if torch.is_grad_enabled() or x.dtype != torch.bfloat16:
        return torch_rms_norm.rms_norm(x, weight, epsilon, residual)
    y, stream = _norm(x, weight, epsilon, residual)
    return y, x if residual is None else stream
