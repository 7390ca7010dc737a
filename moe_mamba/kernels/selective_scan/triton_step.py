"""One token of many sequences: reads and writes each state once."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from torch import Tensor

from moe_mamba.kernels.compilation import Specimen
from moe_mamba.kernels.launch import ceil_divide, next_power_of_2, on_device, unit_stride
from moe_mamba.kernels.selective_scan.operator import define_step
from moe_mamba.kernels.selective_scan.triton_tiles import LOG2E, step_sizes

BLOCK = 32  # channels of a program, which has all their states


@triton.jit
def step_kernel(x, delta, A, B, C, D, z, delta_bias, state, y, new_state, x_row, delta_row, B_row, C_row, z_row,
                A_channel, A_state, state_row, state_channel, state_state,
                CHANNELS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """x, delta, z, y (batch, CHANNELS); B, C (batch, STATES); state and new_state (batch, CHANNELS, STATES)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    inside, is_state = c < CHANNELS, n < STATES
    tile = inside[:, None] & is_state[None, :]
    x_t = tl.load(x + row * x_row + c, mask=inside, other=0).to(tl.float32)
    delta_t = tl.load(delta + row * delta_row + c, mask=inside, other=0).to(tl.float32)
    if delta_bias is not None:
        delta_t += tl.load(delta_bias + c, mask=inside, other=0).to(tl.float32)
    delta_t = step_sizes((delta_t,), 0.0, 1, 1, False)[0]
    a = tl.load(A + c[:, None] * A_channel + n[None, :] * A_state, mask=tile, other=0).to(tl.float32)
    b_t = tl.load(B + row * B_row + n, mask=is_state, other=0).to(tl.float32)
    c_t = tl.load(C + row * C_row + n, mask=is_state, other=0).to(tl.float32)
    before = state + row * state_row + c[:, None] * state_channel + n[None, :] * state_state
    h = tl.load(before, mask=tile, other=0).to(tl.float32)  # (BLOCK, N)
    h = tl.exp2(delta_t[:, None] * (a * LOG2E)) * h + (delta_t * x_t)[:, None] * b_t[None, :]
    tl.store(new_state + (row * CHANNELS + c[:, None]) * STATES + n[None, :], h, mask=tile)
    out = tl.sum(h * c_t[None, :], 1) + tl.load(D + c, mask=inside, other=0).to(tl.float32) * x_t
    if z is not None:
        gate = tl.load(z + row * z_row + c, mask=inside, other=0).to(tl.float32)
        out *= gate / (1 + tl.exp2(gate * -LOG2E))
    tl.store(y + row * CHANNELS + c, out.to(y.dtype.element_ty), mask=inside)


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
    (batch, channels), states = x.shape, A.shape[1]
    x, delta, B, C, D = (unit_stride(tensor) for tensor in (x, delta, B, C, D))
    z, delta_bias = (None if tensor is None else unit_stride(tensor) for tensor in (z, delta_bias))
    y, new_state = x.new_empty(x.shape), state.new_empty(state.shape)
    with on_device(x):
        step_kernel[(batch, ceil_divide(channels, BLOCK))](
            x, delta, A, B, C, D, z, delta_bias, state, y, new_state, x.stride(0), delta.stride(0), B.stride(0),
            C.stride(0), 0 if z is None else z.stride(0), A.stride(0), A.stride(1), *state.stride(),
            CHANNELS=channels, STATES=states, N=next_power_of_2(states), BLOCK=BLOCK,
        )  # fmt: skip
    return y, new_state


def _fake(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None,
          delta_bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), state.new_empty(state.shape)


selective_scan_step = define_step("selective_scan_step_triton", _step, _fake)
"""See ``moe_mamba.kernels.selective_scan_step``; without a backward pass."""


def step_specimen() -> Specimen:
    """At 1,536 channels and 16 states, from bf16."""
    narrow = {name: "*bf16" for name in ("x", "delta", "B", "C", "z", "y")}
    wide = {name: "*fp32" for name in ("A", "D", "delta_bias", "state", "new_state")}
    rows = ("x_row", "delta_row", "B_row", "C_row", "z_row", "A_channel", "state_row", "state_channel")
    constants = {"CHANNELS": 1536, "STATES": 16, "N": 16, "BLOCK": BLOCK, "A_state": 1, "state_state": 1}
    return Specimen(
        "selective_scan step_kernel", step_kernel, narrow | wide | {name: "i64" for name in rows}, constants
    )
