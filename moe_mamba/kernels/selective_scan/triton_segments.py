"""Carries states over segments of the length, where batch x channels is too small to fill a GPU.

The state after a segment is linear in the state h before it: D h + e, where e is the state that the segment ends with
from a state of zero, and D = exp(A x the sum of the segment's step sizes), or 0 if a document starts inside. The
gradient that is handed backwards is linear in the same way, with the same D. So all segments are scanned from zero at
once, a small kernel carries over them, and the real passes then start each segment from its own state.
"""

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


@triton.jit(do_not_specialize=["zero"])
def states_from_zero_kernel(x, delta, A, bc, delta_bias, starts, ends, totals, length, segment_length,
                            x_row, delta_row, zero,
                            X_STEP: tl.constexpr, DELTA_STEP: tl.constexpr,
                            CHANNELS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
                            STEPS: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """Write each segment's end state from zero, ends (batch, segments, STATES, CHANNELS), and its sum of step sizes.

    A is (STATES, CHANNELS). The sums, totals (batch, segments, CHANNELS), are -1 where a document starts inside the
    segment.
    """
    c, _, row, first, left = place(length, segment_length, CHANNELS, BLOCK)
    inside = c < CHANNELS
    n = tl.arange(0, N)[:, None]
    tile = inside[None, :] & (n < STATES)
    a = tl.load((A + c + zero)[None, :] + n * CHANNELS, mask=tile, other=0).to(tl.float32) * LOG2E  # (N, BLOCK)
    bias = 0.0
    if delta_bias is not None:
        bias = tl.load(delta_bias + c, mask=inside, other=0).to(tl.float32)
    x += row * x_row + c
    delta += row * delta_row + c
    place_of_state, state = both(STATES, N)
    bc += row * length * 2 * STATES + place_of_state
    if starts is not None:
        starts += row * length

    h = tl.zeros((N, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    has_start = 0
    for chunk in range(tl.cdiv(left, STEPS)):
        at = first + chunk * STEPS
        rest = left - chunk * STEPS
        xs = load_steps(x + at * X_STEP, X_STEP, c, CHANNELS, rest, STEPS, RAGGED)
        raw = load_steps(delta + at * DELTA_STEP, DELTA_STEP, c, CHANNELS, rest, STEPS, RAGGED)
        bcs = load_steps(bc + at * 2 * STATES, 2 * STATES, state, STATES, rest, STEPS, RAGGED)
        resets = load_resets(starts if starts is None else starts + at, rest, STEPS, RAGGED)
        deltas = step_sizes(raw, bias, rest, STEPS, RAGGED)
        for i in tl.static_range(STEPS):
            if starts is not None:
                h = tl.where(resets[i] != 0, 0.0, h)
                has_start = tl.where(resets[i] != 0, 1, has_start)
            b_t = tl.split(tl.trans(tl.reshape(bcs[i], (2, N))))[0]
            h = tl.exp2(deltas[i][None, :] * a) * h + (deltas[i] * xs[i])[None, :] * b_t[:, None]
            total += deltas[i]

    segment = row * tl.num_programs(1) + tl.program_id(1)
    ends += segment * STATES * CHANNELS + c + zero
    tl.store(ends[None, :] + n * CHANNELS, h, mask=tile)
    tl.store(totals + segment * CHANNELS + c, tl.where(has_start != 0, -1.0, total), mask=inside)


@triton.jit(do_not_specialize=["zero"])
def gradients_from_zero_kernel(delta, A, bc, z, delta_bias, starts, y_gradient, ends, length, segment_length,
                               delta_row, z_row, y_row, zero,
                               DELTA_STEP: tl.constexpr, Z_STEP: tl.constexpr,
                               Y_STEP: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr,
                               BLOCK: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """Write the gradient of the state before each segment, where that of the state after it is zero, into ends."""
    c, _, row, first, left = place(length, segment_length, CHANNELS, BLOCK)
    inside = c < CHANNELS
    n = tl.arange(0, N)[:, None]
    tile = inside[None, :] & (n < STATES)
    a = tl.load((A + c + zero)[None, :] + n * CHANNELS, mask=tile, other=0).to(tl.float32) * LOG2E  # (N, BLOCK)
    bias = 0.0
    if delta_bias is not None:
        bias = tl.load(delta_bias + c, mask=inside, other=0).to(tl.float32)
    delta += row * delta_row + c
    y_gradient += row * y_row + c
    place_of_state, state = both(STATES, N)
    bc += row * length * 2 * STATES + place_of_state
    if z is not None:
        z += row * z_row + c
    if starts is not None:
        starts += row * length

    p = tl.zeros((N, BLOCK), tl.float32)
    chunks = tl.cdiv(left, STEPS)
    for turn in range(chunks):
        chunk = chunks - 1 - turn
        at = first + chunk * STEPS
        rest = left - chunk * STEPS
        raw = load_steps(delta + at * DELTA_STEP, DELTA_STEP, c, CHANNELS, rest, STEPS, RAGGED)
        given = load_steps(y_gradient + at * Y_STEP, Y_STEP, c, CHANNELS, rest, STEPS, RAGGED)
        bcs = load_steps(bc + at * 2 * STATES, 2 * STATES, state, STATES, rest, STEPS, RAGGED)
        if z is not None:
            gates = load_steps(z + at * Z_STEP, Z_STEP, c, CHANNELS, rest, STEPS, RAGGED)
        resets = load_resets(starts if starts is None else starts + at, rest, STEPS, RAGGED)
        deltas = step_sizes(raw, bias, rest, STEPS, RAGGED)
        for i in tl.static_range(STEPS - 1, -1, -1):
            read = given[i]  # gradient of C h
            if z is not None:
                read *= gates[i] / (1 + tl.exp2(gates[i] * -LOG2E))
            c_t = tl.split(tl.trans(tl.reshape(bcs[i], (2, N))))[1]
            p = tl.exp2(deltas[i][None, :] * a) * (p + read[None, :] * c_t[:, None])
            if starts is not None:
                p = tl.where(resets[i] != 0, 0.0, p)

    ends += (row * tl.num_programs(1) + tl.program_id(1)) * STATES * CHANNELS + c + zero
    tl.store(ends[None, :] + n * CHANNELS, p, mask=tile)


@triton.jit(do_not_specialize=["zero"])
def carry_kernel(A, ends, totals, outer, carried, segments, zero,
                 CHANNELS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
                 BACKWARDS: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """Write what enters each segment into carried (batch, segments, STATES, CHANNELS).

    ``outer``, or zero where it is None, enters the first segment, or, going BACKWARDS, the last one.
    """
    c, _, row, _, _ = place(1, 1, CHANNELS, BLOCK)
    inside = c < CHANNELS
    n = tl.arange(0, N)[:, None]
    tile = inside[None, :] & (n < STATES)
    a = tl.load((A + c + zero)[None, :] + n * CHANNELS, mask=tile, other=0).to(tl.float32) * LOG2E  # (N, BLOCK)
    h = tl.zeros((N, BLOCK), tl.float32)
    if outer is not None:
        h = tl.load((outer + row * STATES * CHANNELS + c + zero)[None, :] + n * CHANNELS, mask=tile, other=0).to(
            tl.float32
        )
    for turn in range(segments):
        segment = row * segments + (segments - 1 - turn if BACKWARDS else turn)
        offset = segment * STATES * CHANNELS + c + zero
        tl.store((carried + offset)[None, :] + n * CHANNELS, h, mask=tile)
        total = tl.load(totals + segment * CHANNELS + c, mask=inside, other=0)[None, :]
        h = tl.where(total < 0, 0.0, tl.exp2(total * a) * h)  # select, because 0 x NaN is NaN
        h += tl.load((ends + offset)[None, :] + n * CHANNELS, mask=tile, other=0)
