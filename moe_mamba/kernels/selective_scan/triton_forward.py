"""The forward pass over a segment of the length: states in registers, a loop over time, one warp a program."""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from moe_mamba.kernels.selective_scan.triton_tiles import (
    LOG2E,
    both,
    load_resets,
    load_steps,
    place,
    step_sizes,
)

STEPS = 8  # time steps whose loads are under way at once


@triton.jit(do_not_specialize=["zero"])
def forward_kernel(x, delta, A, bc, D, z, delta_bias, starts, initial_state, y, kept, final_state,
                   length, segment_length, x_row, delta_row, z_row, zero,
                   X_STEP: tl.constexpr, DELTA_STEP: tl.constexpr, Z_STEP: tl.constexpr,
                   CHANNELS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
                   STEPS: tl.constexpr, INTERVAL: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """Write y, the state before every INTERVAL steps into kept, and the state after the last segment.

    x, delta, z and y are (batch, length, CHANNELS), bc is (batch, length, 2 STATES), kept (batch, intervals, STATES,
    CHANNELS) or None, final_state (batch, STATES, CHANNELS). initial_state is the state before each segment,
    (batch, segments, STATES, CHANNELS) or None. A is (STATES,
    CHANNELS), and ``zero`` is 0: see triton_tiles.
    """
    c, _, row, first, left = place(length, segment_length, CHANNELS, BLOCK)
    inside = c < CHANNELS
    n = tl.arange(0, N)[:, None]
    tile = inside[None, :] & (n < STATES)
    a = tl.load((A + c + zero)[None, :] + n * CHANNELS, mask=tile, other=0).to(tl.float32) * LOG2E  # (N, BLOCK)
    skip = tl.load(D + c, mask=inside, other=0).to(tl.float32)
    bias = 0.0
    if delta_bias is not None:
        bias = tl.load(delta_bias + c, mask=inside, other=0).to(tl.float32)
    h = tl.zeros((N, BLOCK), tl.float32)
    if initial_state is not None:
        before = initial_state + (row * tl.num_programs(1) + tl.program_id(1)) * STATES * CHANNELS + c + zero
        h = tl.load(before[None, :] + n * CHANNELS, mask=tile, other=0).to(tl.float32)

    x += row * x_row + c
    delta += row * delta_row + c
    y += row * length * CHANNELS + c
    place_of_state, state = both(STATES, N)
    bc += row * length * 2 * STATES + place_of_state
    if z is not None:
        z += row * z_row + c
    if starts is not None:
        starts += row * length
    if kept is not None:
        kept += (row * tl.cdiv(length, INTERVAL) + first // INTERVAL) * STATES * CHANNELS + c + zero

    for chunk in range(tl.cdiv(left, STEPS)):
        at = first + chunk * STEPS
        rest = left - chunk * STEPS
        if kept is not None:  # noqa: SIM102
            if chunk % (INTERVAL // STEPS) == 0:
                tl.store(kept[None, :] + n * CHANNELS, h, mask=tile)
                kept += STATES * CHANNELS
        xs = load_steps(x + at * X_STEP, X_STEP, c, CHANNELS, rest, STEPS, RAGGED)
        raw = load_steps(delta + at * DELTA_STEP, DELTA_STEP, c, CHANNELS, rest, STEPS, RAGGED)
        bcs = load_steps(bc + at * 2 * STATES, 2 * STATES, state, STATES, rest, STEPS, RAGGED)
        if z is not None:
            gates = load_steps(z + at * Z_STEP, Z_STEP, c, CHANNELS, rest, STEPS, RAGGED)
        resets = load_resets(starts if starts is None else starts + at, rest, STEPS, RAGGED)
        written = y + at * CHANNELS
        deltas = step_sizes(raw, bias, rest, STEPS, RAGGED)
        for i in tl.static_range(STEPS):
            if starts is not None:
                h = tl.where(resets[i] != 0, 0.0, h)  # select, because 0 x NaN is NaN
            b_t, c_t = tl.split(tl.trans(tl.reshape(bcs[i], (2, N))))
            h = tl.exp2(deltas[i][None, :] * a) * h + (deltas[i] * xs[i])[None, :] * b_t[:, None]
            out = tl.sum(h * c_t[:, None], 0) + skip * xs[i]
            if z is not None:
                out *= gates[i] / (1 + tl.exp2(gates[i] * -LOG2E))
            valid = inside
            if RAGGED:
                valid = c < tl.where(i < rest, CHANNELS, 0)
            tl.store(written + i * CHANNELS, out.to(y.dtype.element_ty), mask=valid)

    if tl.program_id(1) == tl.num_programs(1) - 1:
        after = final_state + row * STATES * CHANNELS + c + zero
        tl.store(after[None, :] + n * CHANNELS, h, mask=tile)
