"""The norm in Triton: a row lies in the registers of one program, and is read and written once.

The backward pass gives each program several rows in turn, over which it sums the gradient of the weight; torch adds the
programs' sums up, always in the same order.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from moe_mamba.kernels.compilation import Specimen
from moe_mamba.kernels.launch import ceil_divide, next_power_of_2, on_device, unit_stride
from moe_mamba.kernels.rms_norm.operator import define_norm, new_outputs

SUMS = (
    1024  # programs of the backward pass at most: enough to fill a GPU, few beside the rows, to keep their sums cheap
)


@triton.jit
def _forward_kernel(x, weight, residual, y, stream, scale, x_row, residual_row, d, epsilon,
                    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """X, residual (rows, d), row strides x_row, residual_row; weight (d); writes y, stream (rows, d), scale (rows)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    value = tl.load(x + row * x_row + columns, mask=inside, other=0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + row * residual_row + columns, mask=inside, other=0).to(tl.float32)
        rounded = value.to(stream.dtype.element_ty)  # what is normalised is what the stream holds
        tl.store(stream + row * d + columns, rounded, mask=inside)
        value = rounded.to(tl.float32)
    one_over_rms = 1 / tl.sqrt(tl.sum(value * value) / d + epsilon)
    tl.store(scale + row, one_over_rms)
    out = value * one_over_rms * tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * d + columns, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(stream, weight, scale, y_gradient, stream_gradient, gradient, sums, rows, count, stream_row,
                     y_row, stream_gradient_row, d, HAS_STREAM_GRADIENT: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """Stream and its gradient, y_gradient (rows, d), strides *_row; writes gradient (rows, d), sums (programs, d)."""
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    factor = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0) * count
    for step in range(0, tl.minimum(count, rows - first)):
        row = (first + step).to(tl.int64)
        one_over_rms = tl.load(scale + row)
        normal = tl.load(stream + row * stream_row + columns, mask=inside, other=0).to(tl.float32) * one_over_rms
        incoming = tl.load(y_gradient + row * y_row + columns, mask=inside, other=0).to(tl.float32)
        total += incoming * normal
        incoming *= factor
        change = (incoming - normal * (tl.sum(incoming * normal) / d)) * one_over_rms
        if HAS_STREAM_GRADIENT:
            add = tl.load(stream_gradient + row * stream_gradient_row + columns, mask=inside, other=0)
            change += add.to(tl.float32)
        tl.store(gradient + row * d + columns, change.to(gradient.dtype.element_ty), mask=inside)
    tl.store(sums + tl.program_id(0).to(tl.int64) * d + columns, total, mask=inside)


def _forward(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, ...]:
    outputs = y, stream, scale = new_outputs(x, weight, epsilon, residual)
    rows, weight = _rows(x), weight.contiguous()
    count, d = rows.shape
    added = rows if residual is None else _rows(residual)
    block = next_power_of_2(d)
    if count:
        with on_device(x):
            _forward_kernel[(count,)](
                rows, weight, added, y, stream, scale, rows.stride(0), added.stride(0), d, epsilon,
                HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
    return outputs


def _backward(
    y_gradient: Tensor, stream_gradient: Tensor | None, stream: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    gradient = stream.new_empty(stream.shape)
    stream, given, weight = _rows(stream), _rows(y_gradient), weight.contiguous()
    rows, d = stream.shape
    added = given if stream_gradient is None else _rows(stream_gradient)
    count = ceil_divide(rows, SUMS)
    programs = ceil_divide(rows, count) if rows else 0
    sums = scale.new_empty(programs, d)
    block = next_power_of_2(d)
    if rows:
        with on_device(stream):
            _backward_kernel[(programs,)](
                stream, weight, scale, given, added, gradient, sums, rows, count, stream.stride(0), given.stride(0),
                0 if stream_gradient is None else added.stride(0), d,
                HAS_STREAM_GRADIENT=stream_gradient is not None, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
    return gradient, sums.sum(0).to(weight.dtype)


def _rows(tensor: Tensor) -> Tensor:
    """As (rows, d), each row dense; copied only where that cannot be a view."""
    return unit_stride(tensor.reshape(-1, tensor.shape[-1]))


def _warps(block: int) -> int:
    """16 elements a lane, which is two loads of 16 bytes in bf16; at least one warp, at most 32."""
    return min(max(block // 512, 1), 32)


rms_norm = define_norm("rms_norm_triton", _forward, _backward)
"""See ``moe_mamba.kernels.rms_norm``; d up to 16,384, computes in fp32."""


def specimens() -> list[Specimen]:
    """The kernels at 768 and 4,096 columns in bf16, with a residual; strides constant, as a launch knows of them."""
    forward = {name: "*bf16" for name in ("x", "residual", "y", "stream")}
    forward |= {"weight": "*fp32", "scale": "*fp32", "epsilon": "fp32"}
    backward = {name: "*bf16" for name in ("stream", "y_gradient", "stream_gradient", "gradient")}
    backward |= {"weight": "*fp32", "scale": "*fp32", "sums": "*fp32", "rows": "i32", "count": "i32"}
    made = []
    for d in (768, 4096):
        block = next_power_of_2(d)
        strides = {name: d for name in ("x_row", "residual_row", "stream_row", "y_row", "stream_gradient_row", "d")}
        constants = strides | {"BLOCK": block, "HAS_RESIDUAL": True, "HAS_STREAM_GRADIENT": True}
        made.append(Specimen(f"rms_norm forward {d}", _forward_kernel, forward, constants, warps=_warps(block)))
        made.append(Specimen(f"rms_norm backward {d}", _backward_kernel, backward, constants, warps=_warps(block)))
    return made
