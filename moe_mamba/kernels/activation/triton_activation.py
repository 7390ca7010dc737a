"""The activations in Triton: one pass forward, one backward, and nothing kept but the input."""

# mypy: disable-error-code="no-untyped-def"

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.activation import KINDS
from moe_mamba.kernels.compilation import Specimen
from moe_mamba.kernels.launch import ceil_divide, next_power_of_2, on_device, unit_stride

BLOCK = 1024  # columns of a program: 8 a lane of its four warps, which is one load of 16 bytes in bf16
SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
DENSITY_AT_0: tl.constexpr = tl.constexpr(0.3989422804014327)  # of the normal distribution, 1 / sqrt(2 pi)


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """Row, and columns of it, that the program works on."""
    blocks = tl.cdiv(width, BLOCK)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), columns


@triton.jit
def _forward_kernel(hidden, out, hidden_row, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Hidden (rows, width), for swiglu (rows, 2 width), row stride hidden_row; writes out (rows, width)."""
    row, columns = _place(width, BLOCK)
    inside = columns < width
    hidden += row * hidden_row + columns
    value = tl.load(hidden, mask=inside, other=0).to(tl.float32)
    if KIND == "swiglu":
        up = tl.load(hidden + width, mask=inside, other=0).to(tl.float32)
        result = value / (1 + tl.exp(-value)) * up
    elif KIND == "gelu":
        result = value * 0.5 * (1 + tl.erf(value * SQRT_HALF))
    else:
        result = tl.where(value <= 0, 0.0, value)  # keeps NaN
        if KIND == "squared_relu":
            result *= result
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(hidden, incoming, gradient, hidden_row, incoming_row, width,
                     KIND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Hidden as forward, incoming (rows, width), row strides hidden_row, incoming_row; writes gradient like hidden."""
    row, columns = _place(width, BLOCK)
    inside = columns < width
    hidden += row * hidden_row + columns
    value = tl.load(hidden, mask=inside, other=0).to(tl.float32)
    given = tl.load(incoming + row * incoming_row + columns, mask=inside, other=0).to(tl.float32)
    if KIND == "swiglu":
        up = tl.load(hidden + width, mask=inside, other=0).to(tl.float32)
        share = 1 / (1 + tl.exp(-value))
        gradient += row * 2 * width + columns
        tl.store(gradient + width, (given * value * share).to(gradient.dtype.element_ty), mask=inside)
        result = given * up * share * (1 + value * (1 - share))
    else:
        gradient += row * width + columns
        if KIND == "gelu":
            density = DENSITY_AT_0 * tl.exp(-0.5 * value * value)
            result = given * (0.5 * (1 + tl.erf(value * SQRT_HALF)) + value * density)
        else:
            slope = 2 * value if KIND == "squared_relu" else 1.0
            result = tl.where(value <= 0, 0.0, given * slope)
    tl.store(gradient, result.to(gradient.dtype.element_ty), mask=inside)


def _forward(hidden: Tensor, kind: str) -> Tensor:
    out, rows = _fake(hidden, kind), _rows(hidden)
    width = out.shape[-1]
    block = min(BLOCK, next_power_of_2(width))
    if out.numel():
        with on_device(hidden):
            _forward_kernel[(rows.shape[0] * ceil_divide(width, block),)](
                rows, out, rows.stride(0), width, KIND=kind, BLOCK=block
            )
    return out


def _fake(hidden: Tensor, kind: str) -> Tensor:
    width = hidden.shape[-1] // 2 if kind == "swiglu" else hidden.shape[-1]
    return hidden.new_empty(*hidden.shape[:-1], width)


def _backward(incoming: Tensor, hidden: Tensor, kind: str) -> Tensor:
    gradient, rows, incoming = hidden.new_empty(hidden.shape), _rows(hidden), _rows(incoming)
    width = incoming.shape[1]
    block = min(BLOCK, next_power_of_2(width))
    if incoming.numel():
        with on_device(rows):
            _backward_kernel[(rows.shape[0] * ceil_divide(width, block),)](
                rows, incoming, gradient, rows.stride(0), incoming.stride(0), width, KIND=kind, BLOCK=block
            )
    return gradient


def _keep(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    hidden, ctx.kind = inputs
    ctx.save_for_backward(hidden)


def _gradients(ctx: Any, incoming: Tensor) -> tuple[Tensor, None]:
    return _gradient_of(incoming, *ctx.saved_tensors, ctx.kind), None


def _rows(tensor: Tensor) -> Tensor:
    """As (rows, columns), each row dense; copied only where that cannot be a view."""
    return unit_stride(
        tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.new_empty(0, tensor.shape[-1])
    )


activation = operators.define("activation_triton(Tensor hidden, str kind) -> Tensor", _forward, _fake)
"""See ``moe_mamba.kernels.activation``; computes in fp32."""
_gradient_of = operators.define(
    "activation_triton_backward(Tensor incoming, Tensor hidden, str kind) -> Tensor",
    _backward,
    lambda incoming, hidden, kind: hidden.new_empty(hidden.shape),
)
operators.differentiate(activation, _keep, _gradients, _gradient_of)


def specimens() -> list[Specimen]:
    """The kernels for experts of 1,536 in bf16; strides constant, as a launch knows of them."""
    made = []
    for kind in KINDS:
        hidden_row = 3072 if kind == "swiglu" else 1536
        constants = {"hidden_row": hidden_row, "width": 1536, "KIND": kind, "BLOCK": BLOCK}
        types = {"hidden": "*bf16", "out": "*bf16"}
        made.append(Specimen(f"activation {kind} forward", _forward_kernel, types, constants))
        types = {"hidden": "*bf16", "incoming": "*bf16", "gradient": "*bf16"}
        made.append(
            Specimen(f"activation {kind} backward", _backward_kernel, types, constants | {"incoming_row": 1536})
        )
    return made
