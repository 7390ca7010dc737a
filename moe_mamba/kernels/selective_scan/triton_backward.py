"""The backward pass over a segment of the length: states are computed again, from those that the forward pass kept.

An interval's states are first scanned forward from the kept one, writing that before every few steps into a scratch
that stays in the cache; then the time steps are walked backwards, the few at a time whose states fit into registers.

Notation: w[t] = exp(delta[t] A) h[t-1], the part of the state h[t] that comes from before; g[t] is the gradient of
h[t], and p[t] = exp(delta[t] A) g[t] what of it reaches h[t-1].
"""

# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from moe_mamba.kernels.selective_scan.triton_tiles import (
    LN2,
    LOG2E,
    both,
    load_resets,
    load_steps,
    load_steps_again,
    over_channels,
    place,
    step_sizes,
)

STEPS = 4  # time steps whose states are in registers at once


@triton.jit
def _scan_interval(h, kept_states, x, delta, bc, starts, a, bias, first, chunks, left, c, state,
                   X_STEP: tl.constexpr, DELTA_STEP: tl.constexpr,
                   CHANNELS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr,
                   BLOCK: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """Write the state before each chunk of an interval, which starts with h, into kept_states (chunks, N, BLOCK)."""
    n = tl.arange(0, N)[:, None]
    tl.store(kept_states[None, :] + n * BLOCK, h)
    for chunk in range(chunks - 1):
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
            b_t = tl.split(tl.trans(tl.reshape(bcs[i], (2, N))))[0]
            h = tl.exp2(deltas[i][None, :] * a) * h + (deltas[i] * xs[i])[None, :] * b_t[:, None]
        kept_states += N * BLOCK
        tl.store(kept_states[None, :] + n * BLOCK, h)
    tl.debug_barrier()  # what is written is read by the same program


@triton.jit
def _states_of_chunk(h, xs, deltas, bcs, resets, starts, a, N: tl.constexpr, STEPS: tl.constexpr):
    """The tuple of w of each step of a chunk that starts with h."""
    passed = ()
    for i in tl.static_range(STEPS):
        if starts is not None:
            h = tl.where(resets[i] != 0, 0.0, h)
        w = tl.exp2(deltas[i][None, :] * a) * h
        b_t = tl.split(tl.trans(tl.reshape(bcs[i], (2, N))))[0]
        h = w + (deltas[i] * xs[i])[None, :] * b_t[:, None]
        passed += (w,)
    return passed


@triton.jit(do_not_specialize=["zero"])
def backward_kernel(x, delta, A, bc, D, z, delta_bias, starts, kept, y_gradient, after, scratch,
                    x_gradient, delta_gradient, z_gradient, bc_partial, A_partial, D_partial, bias_partial,
                    initial_gradient, length, segment_length, x_row, delta_row, z_row, y_row, zero,
                    X_STEP: tl.constexpr, DELTA_STEP: tl.constexpr, Z_STEP: tl.constexpr,
                    Y_STEP: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, N: tl.constexpr,
                    BLOCK: tl.constexpr, STEPS: tl.constexpr, INTERVAL: tl.constexpr,
                    RAGGED: tl.constexpr):  # fmt: skip
    """Write the gradients of one segment's steps, and its part of the gradients that are sums over steps.

    x, delta, z, y_gradient and the gradients of the first three are (batch, length, CHANNELS), bc is (batch, length,
    2 STATES). kept (batch, intervals, STATES, CHANNELS) holds the states that the forward pass kept, and ``after`` the
    gradient of the state after each segment, (batch, segments, STATES, CHANNELS). bc_partial (blocks of
    channels, batch, length, 2 STATES) has the gradients of B and of C, A_partial is (batch, segments, STATES,
    CHANNELS), D_partial and bias_partial (batch, segments, CHANNELS), and initial_gradient (batch, STATES, CHANNELS) is
    that of the state before the first segment. scratch has room for (programs, INTERVAL / STEPS, N, BLOCK) states, and
    ``zero`` is 0: see triton_tiles. A is (STATES, CHANNELS).
    """
    c, block, row, first, left = place(length, segment_length, CHANNELS, BLOCK)
    inside = c < CHANNELS
    n = tl.arange(0, N)[:, None]
    tile = inside[None, :] & (n < STATES)
    a = tl.load((A + c + zero)[None, :] + n * CHANNELS, mask=tile, other=0).to(tl.float32) * LOG2E  # (N, BLOCK)
    skip = tl.load(D + c, mask=inside, other=0).to(tl.float32)
    bias = 0.0
    if delta_bias is not None:
        bias = tl.load(delta_bias + c, mask=inside, other=0).to(tl.float32)
    after += (row * tl.num_programs(1) + tl.program_id(1)) * STATES * CHANNELS + c + zero
    p = tl.load(after[None, :] + n * CHANNELS, mask=tile, other=0).to(tl.float32)
    A_sum = tl.zeros((N, BLOCK), tl.float32)
    D_sum = tl.zeros((BLOCK,), tl.float32)
    bias_sum = tl.zeros((BLOCK,), tl.float32)

    x += row * x_row + c
    delta += row * delta_row + c
    y_gradient += row * y_row + c
    place_of_state, state = both(STATES, N)
    bc += row * length * 2 * STATES + place_of_state
    if z is not None:
        z += row * z_row + c
    if starts is not None:
        starts += row * length
    written = row * length * CHANNELS + c
    rows = tl.num_programs(0) // ((CHANNELS + BLOCK - 1) // BLOCK)
    bc_partial += (block * rows + row) * length * 2 * STATES + place_of_state
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    scratch += program * (INTERVAL // STEPS) * N * BLOCK + tl.arange(0, BLOCK) + zero
    kept += row * tl.cdiv(length, INTERVAL) * STATES * CHANNELS + c + zero

    intervals = tl.cdiv(left, INTERVAL)
    for interval_turn in range(intervals):
        interval = intervals - 1 - interval_turn
        begin = first + interval * INTERVAL
        chunks = tl.cdiv(tl.minimum(left - interval * INTERVAL, INTERVAL), STEPS)
        h = tl.load((kept + begin // INTERVAL * STATES * CHANNELS)[None, :] + n * CHANNELS, mask=tile, other=0).to(
            tl.float32
        )
        _scan_interval(h, scratch, x, delta, bc, starts, a, bias, begin, chunks, left - interval * INTERVAL, c, state,
                       X_STEP, DELTA_STEP, CHANNELS, STATES, N, BLOCK, STEPS, RAGGED)  # fmt: skip
        for turn in range(chunks):
            chunk = chunks - 1 - turn
            at = begin + chunk * STEPS
            rest = left - interval * INTERVAL - chunk * STEPS
            xs = load_steps(x + at * X_STEP, X_STEP, c, CHANNELS, rest, STEPS, RAGGED)
            raw = load_steps(delta + at * DELTA_STEP, DELTA_STEP, c, CHANNELS, rest, STEPS, RAGGED)
            bcs = load_steps(bc + at * 2 * STATES, 2 * STATES, state, STATES, rest, STEPS, RAGGED)
            given = load_steps(y_gradient + at * Y_STEP, Y_STEP, c, CHANNELS, rest, STEPS, RAGGED)
            if z is not None:
                gates = load_steps(z + at * Z_STEP, Z_STEP, c, CHANNELS, rest, STEPS, RAGGED)
            resets = load_resets(starts if starts is None else starts + at, rest, STEPS, RAGGED)
            deltas = step_sizes(raw, bias, rest, STEPS, RAGGED)
            h = tl.load((scratch + chunk * N * BLOCK)[None, :] + n * BLOCK)
            passed = _states_of_chunk(h, xs, deltas, bcs, resets, starts, a, N, STEPS)
            bcs = load_steps_again(bc + at * 2 * STATES, 2 * STATES, state, STATES, rest, STEPS, RAGGED)
            place_in_partial = bc_partial + at * 2 * STATES
            place_in_y = written + at * CHANNELS
            for i in tl.static_range(STEPS - 1, -1, -1):
                valid, is_there = inside, state < STATES
                if RAGGED:
                    valid = c < tl.where(i < rest, CHANNELS, 0)
                    is_there = state < tl.where(i < rest, STATES, 0)
                b_t, c_t = tl.split(tl.trans(tl.reshape(bcs[i], (2, N))))
                entering = (deltas[i] * xs[i])[None, :]
                h = passed[i] + entering * b_t[:, None]
                read = given[i]  # gradient of C h + D x, after the gate is taken off
                if z is not None:
                    gate = 1 / (1 + tl.exp2(gates[i] * -LOG2E))
                    slope = gate * (1 + gates[i] * (1 - gate))
                    ungated = tl.sum(h * c_t[:, None], 0) + skip * xs[i]
                    slope = (read * ungated * slope).to(z_gradient.dtype.element_ty)
                    tl.store(z_gradient + place_in_y + i * CHANNELS, slope, mask=valid)
                    read *= gates[i] * gate
                D_sum += read * xs[i]
                g = p + read[None, :] * c_t[:, None]
                partial = over_channels(g * entering, h * read[None, :], N, BLOCK)
                tl.store(place_in_partial + i * 2 * STATES, partial, mask=is_there)
                enter = tl.sum(g * b_t[:, None], 0)  # gradient of delta x
                exponent = g * passed[i]  # gradient of delta A
                A_sum += exponent * deltas[i][None, :]
                # Twice and half, which no compiler takes off: the decays are computed again, not kept in registers.
                decay = tl.exp2((deltas[i] * 2.0 * 0.5)[None, :] * a)
                p = decay * g
                if starts is not None:
                    p = tl.where(resets[i] != 0, 0.0, p)
                change = tl.sum(exponent * a, 0) * LN2 + enter * xs[i]
                change *= 1 / (1 + tl.exp2((raw[i] + bias) * -LOG2E))
                if RAGGED:
                    change = tl.where(i < rest, change, 0.0)
                bias_sum += change
                change = change.to(delta_gradient.dtype.element_ty)
                tl.store(delta_gradient + place_in_y + i * CHANNELS, change, mask=valid)
                change = (enter * deltas[i] + read * skip).to(x_gradient.dtype.element_ty)
                tl.store(x_gradient + place_in_y + i * CHANNELS, change, mask=valid)
        tl.debug_barrier()  # before the next interval writes there

    segment = row * tl.num_programs(1) + tl.program_id(1)
    A_partial += segment * STATES * CHANNELS + c + zero
    tl.store(A_partial[None, :] + n * CHANNELS, A_sum, mask=tile)
    tl.store(D_partial + segment * CHANNELS + c, D_sum, mask=inside)
    tl.store(bias_partial + segment * CHANNELS + c, bias_sum, mask=inside)
    if tl.program_id(1) == 0:
        before = initial_gradient + row * STATES * CHANNELS + c + zero
        tl.store(before[None, :] + n * CHANNELS, p, mask=tile)
