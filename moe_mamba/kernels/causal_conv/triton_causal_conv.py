"""The convolution in Triton: one warp a program rolls the inputs of its channels through registers.

A program owns ``BLOCK`` channels (four a lane) and a chunk of positions, and walks along them with the last width - 1
inputs in registers: x is read once but for the width - 1 rows before each chunk, y is written once. A start empties the
registers, which hides the inputs before it by selection. The backward pass walks the same way: it recomputes the
convolution, and holds the gradients of the last width - 1 inputs until every tap has added to them. Gradients of filter
and bias are sums over a program's chunk, and torch adds the chunks up, always in the same order.
"""

# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
# ruff: noqa: RUF005  (Triton's tuples are joined by +)

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mamba.kernels.causal_conv.operator import define_conv, define_step
from moe_mamba.kernels.compilation import Specimen
from moe_mamba.kernels.launch import ceil_divide, next_power_of_2, on_device, unit_stride

BLOCK = 128  # channels of a program: 4 a lane of its one warp, loads of 8 bytes in bf16
UNROLL = 4  # rows whose loads are issued together, to hide the latency of memory
FORWARD_ROWS, BACKWARD_ROWS = 32, 128  # positions of a program: more mean fewer rows read twice, and fewer partial sums
SMALLEST_ROWS = 16
PROGRAMS = 4096  # about the warps that fill a large GPU; chunks get shorter until there are as many


@triton.jit
def _load(base, row, stride, columns, channels, is_there):
    """A row, zeros where it is not there; not ``mask & is_there``, which Triton's interpreter gets wrong."""
    mask = columns < tl.where(is_there, channels, 0)
    return tl.load(base + row.to(tl.int64) * stride + columns, mask=mask, other=0)


@triton.jit
def _store(base, row, value, columns, channels, is_there):
    mask = columns < tl.where(is_there, channels, 0)
    tl.store(base + row.to(tl.int64) * channels + columns, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _filter(weight, bias, columns, channels, WIDTH: tl.constexpr):
    """The taps of each channel, the present first, and its bias."""
    inside = columns < channels
    taps = ()
    for back in tl.static_range(WIDTH):
        tap = tl.load(weight + columns * WIDTH + (WIDTH - 1 - back), mask=inside, other=0)
        taps = taps + (tap.to(tl.float32),)
    return taps, tl.load(bias + columns, mask=inside, other=0).to(tl.float32)


@triton.jit
def _start(starts, row, length):
    return tl.load(starts + row, mask=(row >= 0) & (row < length), other=0) != 0


@triton.jit
def _past(x, state, starts, first, length, x_row, state_row, columns, channels,
          WIDTH: tl.constexpr, HAS_STARTS: tl.constexpr):  # fmt: skip
    """The width - 1 inputs before a position, the nearest first, as that position's predecessor sees them."""
    past = ()
    for back in tl.static_range(1, WIDTH):
        row = first - back  # the initial state holds what lies before position 0
        here = _load(x, row, x_row, columns, channels, row >= 0)
        before = _load(state, row + WIDTH - 1, state_row, columns, channels, row < 0)
        past = past + (tl.where(row < 0, before, here).to(tl.float32),)
    if HAS_STARTS:
        seen = ()
        is_hidden = _start(starts, first, length) & False
        for back in tl.static_range(1, WIDTH):
            seen = seen + (tl.where(is_hidden, 0.0, past[back - 1]),)
            is_hidden = is_hidden | _start(starts, first - back, length)
        past = seen
    return past


@triton.jit
def _hide(past, is_start, COUNT: tl.constexpr):
    """The past as a position sees it: nothing, where it is a start."""
    seen = ()
    for back in tl.static_range(COUNT):
        seen = seen + (tl.where(is_start, 0.0, past[back]),)
    return seen


@triton.jit
def _convolve(now, past, taps, bias, WIDTH: tl.constexpr):
    out = bias + taps[0] * now
    for back in tl.static_range(1, WIDTH):
        out += taps[back] * past[back - 1]
    return out


@triton.jit
def _place(length, channels, rows, BLOCK: tl.constexpr):
    """Which batch row, chunk of positions and channels the program works on; channels lie next to each other."""
    blocks, chunks = tl.cdiv(channels, BLOCK), tl.cdiv(length, rows)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    piece = tl.program_id(0) // blocks
    return (piece // chunks).to(tl.int64), (piece % chunks) * rows, piece.to(tl.int64), columns


@triton.jit
def _forward_kernel(x, weight, bias, starts, state, y, length, channels, rows, x_batch, x_row, state_batch, state_row,
                    WIDTH: tl.constexpr, HAS_STARTS: tl.constexpr, UNROLL: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    batch, first, _, columns = _place(length, channels, rows, BLOCK)
    x += batch * x_batch
    state += batch * state_batch
    starts += batch * length
    y += batch * length * channels
    taps, add = _filter(weight, bias, columns, channels, WIDTH)
    past = _past(x, state, starts, first, length, x_row, state_row, columns, channels, WIDTH, HAS_STARTS)
    for begin in range(first, first + rows, UNROLL):
        ahead = ()
        for step in tl.static_range(UNROLL):
            row = begin + step
            ahead = ahead + (_load(x, row, x_row, columns, channels, row < length),)
        for step in tl.static_range(UNROLL):
            row = begin + step
            now = ahead[step].to(tl.float32)
            if HAS_STARTS:
                past = _hide(past, _start(starts, row, length), WIDTH - 1)
            out = _convolve(now, past, taps, add, WIDTH)
            out = out / (1 + tl.exp(-out))
            _store(y, row, out, columns, channels, row < length)
            past = (now,) + past[: WIDTH - 2]


@triton.jit
def _backward_row(now, gradient, past, owed, hidden, taps, add, is_start,
                  WIDTH: tl.constexpr, HAS_STARTS: tl.constexpr):  # fmt: skip
    """One position of the walk backward.

    ``owed`` is the gradient so far of each of the width - 1 inputs before it, the nearest first, and ``hidden`` says
    between which of them and the previous position a start lies. The farthest is complete now: it comes last of what
    is given back as the new ``owed``. The gradient of the convolution before SiLU, and the past as the position sees
    it, are what the filter's gradient is made of.
    """
    if HAS_STARTS:
        past = _hide(past, is_start, WIDTH - 1)
        shifted = (is_start,)
        for back in tl.static_range(1, WIDTH - 1):
            shifted = shifted + (is_start | hidden[back - 1],)
        hidden = shifted
    out = _convolve(now, past, taps, add, WIDTH)
    gate = 1 / (1 + tl.exp(-out))
    gradient = gradient * gate * (1 + out * (1 - gate))
    given = (taps[0] * gradient,)
    for back in tl.static_range(1, WIDTH):
        part = taps[back] * gradient
        if HAS_STARTS:
            part = tl.where(hidden[back - 1], 0.0, part)
        given = given + (owed[back - 1] + part,)
    return gradient, past, given, hidden


@triton.jit
def _store_gradient(x_gradient, state_gradient, value, row, first, length, columns, channels,
                    WIDTH: tl.constexpr):  # fmt: skip
    """Write the gradient of the input at a position, unless it is the chunk's before; before 0 it is the state's."""
    _store(x_gradient, row, value, columns, channels, (row >= first) & (row < length))
    _store(state_gradient, row + WIDTH - 1, value, columns, channels, row < 0)


@triton.jit
def _backward_kernel(x, weight, bias, starts, state, y_gradient, x_gradient, state_gradient, sums_out,
                     length, channels, rows, x_batch, x_row, state_batch, state_row, y_batch, y_row,
                     WIDTH: tl.constexpr, HAS_STARTS: tl.constexpr, UNROLL: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    batch, first, piece, columns = _place(length, channels, rows, BLOCK)
    x += batch * x_batch
    y_gradient += batch * y_batch
    state += batch * state_batch
    starts += batch * length
    x_gradient += batch * length * channels
    state_gradient += batch * (WIDTH - 1) * channels
    taps, add = _filter(weight, bias, columns, channels, WIDTH)
    past = _past(x, state, starts, first, length, x_row, state_row, columns, channels, WIDTH, HAS_STARTS)
    zero = tl.zeros((BLOCK,), tl.float32)
    owed, hidden, sums = (), (), (zero, zero)  # of bias and present tap
    for _ in tl.static_range(1, WIDTH):
        owed, hidden, sums = owed + (zero,), hidden + (first < 0,), sums + (zero,)
    for begin in range(first, first + rows, UNROLL):
        ahead = ()
        for step in tl.static_range(UNROLL):
            row = begin + step
            now = _load(x, row, x_row, columns, channels, row < length)
            ahead = ahead + (now, _load(y_gradient, row, y_row, columns, channels, row < length))
        for step in tl.static_range(UNROLL):
            row = begin + step
            now, gradient = ahead[2 * step].to(tl.float32), ahead[2 * step + 1].to(tl.float32)
            is_start = _start(starts, row, length) if HAS_STARTS else False
            gradient, past, given, hidden = _backward_row(
                now, gradient, past, owed, hidden, taps, add, is_start, WIDTH, HAS_STARTS
            )
            new_sums = (sums[0] + gradient, sums[1] + gradient * now)
            for back in tl.static_range(1, WIDTH):
                new_sums = new_sums + (sums[back + 1] + gradient * past[back - 1],)
            _store_gradient(x_gradient, state_gradient, given[WIDTH - 1], row - (WIDTH - 1), first, length, columns,
                            channels, WIDTH)  # fmt: skip
            past, owed, sums = (now,) + past[: WIDTH - 2], given[: WIDTH - 1], new_sums
    for step in tl.static_range(WIDTH - 1):  # the next chunk's first positions owe to this one's last
        row = first + rows + step
        now = _load(x, row, x_row, columns, channels, row < length).to(tl.float32)
        gradient = _load(y_gradient, row, y_row, columns, channels, row < length).to(tl.float32)
        is_start = _start(starts, row, length) if HAS_STARTS else False
        gradient, past, given, hidden = _backward_row(
            now, gradient, past, owed, hidden, taps, add, is_start, WIDTH, HAS_STARTS
        )
        _store_gradient(x_gradient, state_gradient, given[WIDTH - 1], row - (WIDTH - 1), first, length, columns,
                        channels, WIDTH)  # fmt: skip
        past, owed = (now,) + past[: WIDTH - 2], given[: WIDTH - 1]
    sums_out += piece * (WIDTH + 1) * channels + columns
    for place in tl.static_range(WIDTH + 1):
        tl.store(sums_out + place * channels, sums[place], mask=columns < channels)


@triton.jit
def _step_kernel(x, weight, bias, state, y, new_state, channels, x_row, state_batch, state_row,
                 WIDTH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    batch, _, _, columns = _place(1, channels, 1, BLOCK)
    inside = columns < channels
    state += batch * state_batch + columns
    new_state += batch * (WIDTH - 1) * channels + columns
    taps, out = _filter(weight, bias, columns, channels, WIDTH)
    now = tl.load(x + batch * x_row + columns, mask=inside, other=0)
    out += taps[0] * now.to(tl.float32)
    for back in tl.static_range(1, WIDTH):
        tap = tl.load(state + (WIDTH - 1 - back) * state_row, mask=inside, other=0)
        out += taps[back] * tap.to(tl.float32)
        if back < WIDTH - 1:
            tl.store(new_state + (WIDTH - 2 - back) * channels, tap, mask=inside)
    tl.store(new_state + (WIDTH - 2) * channels, now, mask=inside)
    tl.store(y + batch * channels + columns, (out / (1 + tl.exp(-out))).to(y.dtype.element_ty), mask=inside)


def _step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape
    width = weight.shape[1]
    x, state = unit_stride(x), unit_stride(state)
    y, new_state = x.new_empty(batch, channels), x.new_empty(batch, width - 1, channels)
    block = min(BLOCK, next_power_of_2(channels))
    with on_device(x):
        _step_kernel[(batch * ceil_divide(channels, block),)](
            x, weight.contiguous(), bias.contiguous(), state, y, new_state, channels, x.stride(0), *state.stride()[:2],
            WIDTH=width, BLOCK=block, num_warps=1,
        )  # fmt: skip
    return y, new_state


def _inputs(
    x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor
) -> tuple[Tensor, ...]:
    """The operands as the kernels take them; without starts something else in their place, which is not read."""
    x = unit_stride(x)
    starts = x if document_starts is None else document_starts.contiguous()
    return x, weight.contiguous(), bias.contiguous(), starts, unit_stride(initial_state)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor) -> Tensor:
    x, weight, bias, starts, state = _inputs(x, weight, bias, document_starts, initial_state)
    _, length, channels = x.shape
    y = x.new_empty(x.shape)
    programs, rows, block = _grid(x, FORWARD_ROWS)
    with on_device(x):
        _forward_kernel[(programs,)](
            x, weight, bias, starts, state, y, length, channels, rows, *x.stride()[:2], *state.stride()[:2],
            WIDTH=weight.shape[1], HAS_STARTS=document_starts is not None, UNROLL=UNROLL, BLOCK=block, num_warps=1,
        )  # fmt: skip
    return y


def _backward(
    y_gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor
) -> tuple[Tensor, ...]:
    x, weight, bias, starts, state = _inputs(x, weight, bias, document_starts, initial_state)
    y_gradient = unit_stride(y_gradient)
    (batch, length, channels), width = x.shape, weight.shape[1]
    x_gradient, state_gradient = x.new_empty(x.shape), x.new_empty(state.shape)
    programs, rows, block = _grid(x, BACKWARD_ROWS)
    sums = x.new_empty(batch * ceil_divide(length, rows), width + 1, channels, dtype=torch.float32)
    with on_device(x):
        _backward_kernel[(programs,)](
            x, weight, bias, starts, state, y_gradient, x_gradient, state_gradient, sums,
            length, channels, rows, *x.stride()[:2], *state.stride()[:2], *y_gradient.stride()[:2],
            WIDTH=width, HAS_STARTS=document_starts is not None, UNROLL=UNROLL, BLOCK=block, num_warps=1,
        )  # fmt: skip
    total = sums.sum(0)  # (width + 1, channels): bias, then the taps, the present first
    weight_gradient = total[1:].flip(0).t().to(weight.dtype)
    return x_gradient, weight_gradient, total[0].to(bias.dtype), state_gradient


def _grid(x: Tensor, rows: int) -> tuple[int, int, int]:
    """Programs, positions of each (fewer than ``rows`` where those would not fill a GPU), and channels of each."""
    batch, length, channels = x.shape
    block = min(BLOCK, next_power_of_2(channels))
    columns = ceil_divide(channels, block)
    rows = min(rows, UNROLL * ceil_divide(length, UNROLL))
    while rows > SMALLEST_ROWS and batch * columns * ceil_divide(length, rows) < PROGRAMS:
        rows = UNROLL * ceil_divide(rows // 2, UNROLL)
    return batch * columns * ceil_divide(length, rows), rows, block


causal_conv = define_conv("causal_conv_triton", _forward, _backward)
"""See ``moe_mamba.kernels.causal_conv``, less its final state; widths 2 to 4, computes in fp32."""
causal_conv_step = define_step("causal_conv_step_triton", _step)
"""See ``moe_mamba.kernels.causal_conv_step``."""


def specimens() -> list[Specimen]:
    """The kernels at width 4 and 1,536 channels in bf16, x half of a projection, with starts (which take more).

    Strides are constants here: a launch knows of them, too, that they divide by 16, and so vectorizes its loads.
    """
    types = {name: "*bf16" for name in ("x", "weight", "bias", "state")} | {"starts": "*i1"}
    types |= {"length": "i32", "rows": "i32"}
    constants = {"channels": 1536, "x_batch": 1024 * 3072, "x_row": 3072, "state_batch": 3 * 1536, "state_row": 1536}
    constants |= {"WIDTH": 4, "HAS_STARTS": True, "UNROLL": UNROLL, "BLOCK": BLOCK}
    gradients = {name: "*bf16" for name in ("y_gradient", "x_gradient", "state_gradient")} | {"sums_out": "*fp32"}
    y_strides = {"y_batch": 1024 * 1536, "y_row": 1536}
    made = [
        Specimen("causal_conv forward", _forward_kernel, types | {"y": "*bf16"}, constants, warps=1),
        Specimen("causal_conv backward", _backward_kernel, types | gradients, constants | y_strides, warps=1),
    ]
    types = {name: "*bf16" for name in ("x", "weight", "bias", "state", "y", "new_state")}
    constants = {"channels": 1536, "x_row": 3072, "state_batch": 3 * 1536, "state_row": 1536, "WIDTH": 4}
    return [*made, Specimen("causal_conv step", _step_kernel, types, constants | {"BLOCK": BLOCK}, warps=1)]
