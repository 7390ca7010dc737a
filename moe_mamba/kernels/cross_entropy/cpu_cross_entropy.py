"""Cross entropy in C++ (``csrc/cross_entropy.cpp``): two passes over logits for the loss, one for their gradient."""

import ctypes

import torch
from torch import Tensor

from moe_mamba.kernels.cross_entropy import Reduce
from moe_mamba.kernels.cross_entropy.function import CrossEntropy, define_parts
from moe_mamba.kernels.extension import TYPES, Strided, fill, library
from moe_mamba.kernels.launch import unit_stride


class _CrossEntropy(ctypes.Structure):
    """``CrossEntropy`` in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "type", "threads")),
        *((name, Strided) for name in ("logits", "gradient")),
        *((name, ctypes.c_void_p) for name in ("local", "largest", "total", "predicted", "log_sum", "incoming")),
    )


def _statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    work = torch.promote_types(logits.dtype, torch.float32)
    made = {name: logits.new_empty(logits.shape[0], dtype=work) for name in ("largest", "total", "predicted")}
    _call("cross_entropy_statistics", logits, {"local": local.contiguous(), **made})
    return made["largest"], made["total"], made["predicted"]


def _gradient(logits: Tensor, local: Tensor, log_sum: Tensor, incoming: Tensor) -> Tensor:
    gradient = logits.new_empty(logits.shape)
    given = {"local": local, "log_sum": log_sum, "incoming": incoming.to(log_sum.dtype)}
    numbers = {name: tensor.contiguous() for name, tensor in given.items()}
    _call("cross_entropy_gradient", logits, {**numbers, "gradient": gradient[None]})
    return gradient


def _call(function: str, logits: Tensor, tensors: dict[str, Tensor]) -> None:
    """Call C++ with a ``CrossEntropy`` for these tensors, which live until it returns."""
    rows = unit_stride(logits)
    call = _CrossEntropy(*rows.shape, TYPES[rows.dtype], torch.get_num_threads())
    getattr(library(), function)(fill(call, {**tensors, "logits": rows[None]}))


statistics, gradient = define_parts("cpu", _statistics, _gradient, "CPU")


def cross_entropy(logits: Tensor, targets: Tensor, first: int, reduce: Reduce | None) -> Tensor:
    """See ``moe_mamba.kernels.cross_entropy``."""
    return CrossEntropy.apply(logits, targets, first, reduce, statistics, gradient)
