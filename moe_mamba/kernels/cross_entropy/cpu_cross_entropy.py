"""Cross entropy in C++ (``csrc/cross_entropy.cpp``): two passes over logits for the loss, one for their gradient.

Whoever needs the logits no more has all three while a token's lie in the nearest cache.
"""

import ctypes

import torch
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.cross_entropy import IGNORED, Reduce
from moe_mamba.kernels.cross_entropy.function import CrossEntropy, define_parts, losses_of, with_gradient
from moe_mamba.kernels.extension import TYPES, Strided, fill, library
from moe_mamba.kernels.launch import unit_stride

PARTS = ("largest", "total", "predicted")


class _CrossEntropy(ctypes.Structure):
    """``CrossEntropy`` in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "rows", "type", "threads")),
        *((name, Strided) for name in ("logits", "gradient")),
        *((name, ctypes.c_void_p) for name in ("local", "largest", "total", "predicted")),
        *((name, ctypes.c_void_p) for name in ("log_sum", "incoming", "counts")),
    )


def _statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    made = _empty(logits)
    _call("cross_entropy_statistics", logits, {"local": local.contiguous(), **dict(zip(PARTS, made, strict=True))})
    return made


def _gradient(logits: Tensor, local: Tensor, log_sum: Tensor, incoming: Tensor) -> Tensor:
    gradient = logits.new_empty(logits.shape)
    given = {"local": local, "log_sum": log_sum, "incoming": incoming.to(log_sum.dtype)}
    numbers = {name: tensor.contiguous() for name, tensor in given.items()}
    _call("cross_entropy_gradient", logits, {**numbers, "gradient": gradient[None]})
    return gradient


def _in_place(logits: Tensor, local: Tensor, counts: Tensor, largest: Tensor, total: Tensor, predicted: Tensor) -> None:
    numbers = {"local": local.contiguous(), "counts": counts.contiguous()}
    _call("cross_entropy_in_place", logits, {**numbers, "largest": largest, "total": total, "predicted": predicted})


def _empty(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``PARTS``, to be written."""
    work = torch.promote_types(logits.dtype, torch.float32)
    largest, total, predicted = (logits.new_empty(logits.shape[0], dtype=work) for _ in PARTS)
    return largest, total, predicted


def _call(function: str, logits: Tensor, tensors: dict[str, Tensor]) -> None:
    """Call C++ with a ``CrossEntropy`` for these tensors, which live until it returns."""
    rows = unit_stride(logits)
    call = _CrossEntropy(*rows.shape, TYPES[rows.dtype], torch.get_num_threads())
    getattr(library(), function)(fill(call, {**tensors, "logits": rows[None]}))


statistics, gradient = define_parts("cpu", _statistics, _gradient, "CPU")
in_place = operators.define(
    "cross_entropy_cpu_in_place(Tensor(a!) logits, Tensor local, Tensor counts, "
    "Tensor(b!) largest, Tensor(c!) total, Tensor(d!) predicted) -> ()",
    _in_place,
    lambda logits, local, counts, largest, total, predicted: None,
    "CPU",
    is_constant=True,
)


def cross_entropy(logits: Tensor, targets: Tensor, first: int, reduce: Reduce | None) -> Tensor:
    """See ``moe_mamba.kernels.cross_entropy``."""
    return CrossEntropy.apply(logits, targets, first, reduce, statistics, gradient)


def cross_entropy_with_gradient(
    logits: Tensor, targets: Tensor, first: int, reduce: Reduce | None
) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.cross_entropy``; the gradient of a whole vocabulary takes the place of its logits."""
    if reduce is not None or logits.stride(-1) != 1:
        return with_gradient(logits, targets, first, reduce, statistics, gradient)
    local, parts = targets - first, _empty(logits)
    in_place(logits, local, targets != IGNORED, *parts)
    return losses_of(parts, targets, local, logits.shape[1], None)[0], logits
