"""Cross entropy in Triton: a program reads its token's logits once forward, block by block, with a running maximum."""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mamba.kernels.compilation import Specimen
from moe_mamba.kernels.cross_entropy import Reduce
from moe_mamba.kernels.cross_entropy.function import CrossEntropy, define_parts, with_gradient
from moe_mamba.kernels.launch import ceil_divide, next_power_of_2, on_device, unit_stride

BLOCK = 4096  # logits that a program holds at once
WARPS = 8  # 16 logits a lane: two loads of 16 bytes in bf16


@triton.jit
def _statistics_kernel(logits, local, largest, total, predicted, logits_row, rows, BLOCK: tl.constexpr):
    """Logits (tokens, rows), row stride logits_row; local (tokens); writes largest, total, predicted (tokens)."""
    token = tl.program_id(0).to(tl.int64)
    logits += token * logits_row
    top = tl.full((), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, rows, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        value = tl.load(logits + columns, mask=columns < rows, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(value))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # infinity less infinity would be NaN
        sums = sums * tl.exp(top - shift) + tl.exp(value - shift)
        top = new_top
    place = tl.load(local + token)
    is_inside = (place >= 0) & (place < rows)
    tl.store(largest + token, top)
    tl.store(total + token, tl.sum(sums))
    tl.store(predicted + token, tl.load(logits + place, mask=is_inside, other=0).to(tl.float32))


@triton.jit
def _gradient_kernel(logits, local, log_sum, incoming, gradient, logits_row, rows, BLOCK: tl.constexpr):
    """Logits, gradient (tokens, rows), row strides logits_row, rows; local, log_sum, incoming (tokens)."""
    blocks = tl.cdiv(rows, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(incoming + token)
    value = tl.load(logits + token * logits_row + columns, mask=columns < rows, other=0).to(tl.float32)
    log = tl.load(log_sum + token)
    share = tl.exp(value - log) - tl.where(columns == tl.load(local + token), 1.0, 0.0)
    share = tl.where(log == float("inf"), 0.0, share * factor)  # the token does not count
    tl.store(gradient + token * rows + columns, share.to(gradient.dtype.element_ty), mask=columns < rows)


def _statistics(logits: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = unit_stride(logits)
    tokens, rows = logits.shape
    largest, total, predicted = (logits.new_empty(tokens, dtype=torch.float32) for _ in range(3))
    block = min(BLOCK, next_power_of_2(rows))
    if tokens:
        with on_device(logits):
            _statistics_kernel[(tokens,)](
                logits, local, largest, total, predicted, logits.stride(0), rows, BLOCK=block, num_warps=_warps(block)
            )
    return largest, total, predicted


def _gradient(logits: Tensor, local: Tensor, log_sum: Tensor, incoming: Tensor) -> Tensor:
    logits = unit_stride(logits)
    tokens, rows = logits.shape
    gradient = logits.new_empty(tokens, rows)
    block = min(BLOCK, next_power_of_2(rows))
    if tokens:
        with on_device(logits):
            _gradient_kernel[(tokens * ceil_divide(rows, block),)](
                logits, local, log_sum, incoming, gradient, logits.stride(0), rows, BLOCK=block, num_warps=_warps(block)
            )
    return gradient


def _warps(block: int) -> int:
    return max(1, block * WARPS // BLOCK)


statistics, gradient = define_parts("triton", _statistics, _gradient)


def cross_entropy(logits: Tensor, targets: Tensor, first: int, reduce: Reduce | None) -> Tensor:
    """See ``moe_mamba.kernels.cross_entropy``."""
    return CrossEntropy.apply(logits, targets, first, reduce, statistics, gradient)


def cross_entropy_with_gradient(
    logits: Tensor, targets: Tensor, first: int, reduce: Reduce | None
) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.cross_entropy``; the gradient is new memory."""
    return with_gradient(logits, targets, first, reduce, statistics, gradient)


def specimens() -> list[Specimen]:
    """The kernels for GPT-2's vocabulary, padded to 50,304, in bf16; strides constant, as a launch knows of them."""
    tokens = {name: "*fp32" for name in ("largest", "total", "predicted", "log_sum", "incoming")}
    types = {"logits": "*bf16", "gradient": "*bf16", "local": "*i64"} | tokens
    constants = {"logits_row": 50304, "rows": 50304, "BLOCK": BLOCK}
    made = []
    for name, kernel in (("forward", _statistics_kernel), ("backward", _gradient_kernel)):
        named = {one: kind for one, kind in types.items() if one in kernel.arg_names}
        made.append(Specimen(f"cross_entropy {name}", kernel, named, constants, warps=WARPS))
    return made
