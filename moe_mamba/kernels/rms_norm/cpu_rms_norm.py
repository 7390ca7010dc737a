"""The norm of bf16 rows in C++ (``csrc/rms_norm.cpp``): one pass over memory each way, where torch makes many."""

import ctypes

import torch
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.extension import library
from moe_mamba.kernels.launch import dense, unit_stride
from moe_mamba.kernels.rms_norm import torch_rms_norm
from moe_mamba.kernels.rms_norm.operator import define_norm, new_outputs


class _Norm(ctypes.Structure):
    """``Norm`` in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "d", "threads", "x_stride", "residual_stride")),
        ("epsilon", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "y", "stream", "scale")),
    )


class _NormGradient(ctypes.Structure):
    """``NormGradient`` in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "d", "threads")),
        *((name, ctypes.c_int64) for name in ("stream_stride", "y_stride", "incoming_stride")),
        *((name, ctypes.c_void_p) for name in ("stream", "y_gradient", "stream_gradient", "weight", "scale")),
        *((name, ctypes.c_void_p) for name in ("x_gradient", "weight_gradient")),
    )


def _normalize(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None, y: Tensor, stream: Tensor, scale: Tensor | None
) -> None:
    """Write y, the stream where there is a residual, and the scale where there is room for it."""
    if y.numel() == 0:
        return
    weight, rows = dense(weight, torch.float32), _rows(x)
    others = rows if residual is None else _rows(residual)
    norm = _Norm(
        rows.shape[0], rows.shape[1], torch.get_num_threads(), rows.stride(0), others.stride(0), epsilon,
        rows.data_ptr(), None if residual is None else others.data_ptr(), weight.data_ptr(), y.data_ptr(),
        None if residual is None else stream.data_ptr(), None if scale is None else scale.data_ptr(),
    )  # fmt: skip
    library().rms_norm(ctypes.byref(norm))


def _rows(tensor: Tensor) -> Tensor:
    """As (rows, d), whose channels lie side by side."""
    return unit_stride(tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1]))


def _run(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    y, stream = _fake(x, weight, epsilon, residual)
    _normalize(x, weight, epsilon, residual, y, stream, None)
    return y, stream


def _fake(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def _forward(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, ...]:
    outputs = new_outputs(x, weight, epsilon, residual)
    _normalize(x, weight, epsilon, residual, *outputs)
    return outputs


def _backward(
    y_gradient: Tensor, stream_gradient: Tensor | None, stream: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    made, weight_gradient = stream.new_empty(stream.shape), scale.new_zeros(weight.shape)
    if made.numel() > 0:
        rows, incoming, wide = _rows(stream), _rows(y_gradient), dense(weight, torch.float32)
        further = incoming if stream_gradient is None else _rows(stream_gradient)
        norm = _NormGradient(
            rows.shape[0], rows.shape[1], torch.get_num_threads(),
            rows.stride(0), incoming.stride(0), further.stride(0), rows.data_ptr(), incoming.data_ptr(),
            None if stream_gradient is None else further.data_ptr(), wide.data_ptr(), scale.data_ptr(),
            made.data_ptr(), weight_gradient.data_ptr(),
        )  # fmt: skip
        library().rms_norm_backward(ctypes.byref(norm))
    return made, weight_gradient.to(weight.dtype)


_norm = operators.define(
    "rms_norm_cpu(Tensor x, Tensor weight, float epsilon, Tensor? residual) -> (Tensor y, Tensor stream)",
    _run,
    _fake,
    "CPU",
    is_constant=True,
)
_trained = define_norm("rms_norm_cpu_trained", _forward, _backward)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.rms_norm``; what is not bf16 is torch's."""
    if x.dtype != torch.bfloat16:
        return torch_rms_norm.rms_norm(x, weight, epsilon, residual)
    if torch.is_grad_enabled():
        return _trained(x, weight, epsilon, residual)
    y, stream = _norm(x, weight, epsilon, residual)
    return y, x if residual is None else stream
