"""What the kernels of the scan share: numerics, loads of several time steps, and tiles of states.

A tile of states is (d_state, channels), in memory too. Triton gives each lane of a warp one channel with all of its
states, so that sums over states stay within a lane, where it finds channels dense in memory and not aligned: the
kernels add ``zero`` to every pointer to a tile, an argument that is 0, but which Triton is told not to look at. Loads
of a vector of states that all lanes need go through shared memory if they have at least as many elements as a warp has
lanes, and in fp32, which is why B and C lie side by side in one tensor bc, in fp32: a hundredth of what x takes.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_steps(pointer, stride: tl.constexpr, index, bound: tl.constexpr, left, STEPS: tl.constexpr,
               RAGGED: tl.constexpr):  # fmt: skip
    """A tuple of the vectors of several time steps in fp32.

    Only where the shapes are RAGGED are there zeros, from ``bound`` of ``index`` and from time step ``left``.
    """
    loaded = ()
    for i in tl.static_range(STEPS):
        if RAGGED:
            vector = tl.load(pointer + i * stride, mask=index < tl.where(i < left, bound, 0), other=0)
        else:
            vector = tl.load(pointer + i * stride)
        loaded += (vector.to(tl.float32),)
    return loaded


@triton.jit
def load_steps_again(pointer, stride: tl.constexpr, index, bound: tl.constexpr, left, STEPS: tl.constexpr,
                     RAGGED: tl.constexpr):  # fmt: skip
    """The same for what has been loaded before; told apart, or the first load's values stay in registers till here."""
    loaded = ()
    for i in tl.static_range(STEPS):
        if RAGGED:
            mask = index < tl.where(i < left, bound, 0)
            vector = tl.load(pointer + i * stride, mask=mask, other=0, eviction_policy="evict_last")
        else:
            vector = tl.load(pointer + i * stride, eviction_policy="evict_last")
        loaded += (vector.to(tl.float32),)
    return loaded


@triton.jit
def load_resets(starts, left, STEPS: tl.constexpr, RAGGED: tl.constexpr):
    """For each of several time steps whether a document starts at it; zeros where there are no starts."""
    loaded = ()
    for i in tl.static_range(STEPS):
        if starts is None:
            loaded += (0,)
        elif RAGGED:
            loaded += (tl.load(starts + i, mask=i < left, other=0),)
        else:
            loaded += (tl.load(starts + i),)
    return loaded


@triton.jit
def step_sizes(raw, bias, left, STEPS: tl.constexpr, RAGGED: tl.constexpr):
    """softplus(delta + bias) of several time steps; 0, which leaves the state as it is, from time step ``left``.

    Right to fp32 rounding relative to the result, however small that is: log1p(t) / t on [0, 1] is a polynomial, of
    least largest relative error (3e-8).
    """
    made = ()
    for i in tl.static_range(STEPS):
        value = raw[i] + bias
        t = tl.exp2(tl.abs(value) * -LOG2E)
        ratio = 0.00523269573 * t - 0.0295052515
        ratio = ratio * t + 0.0782259858
        ratio = ratio * t - 0.1366325
        ratio = ratio * t + 0.191060096
        ratio = ratio * t - 0.248429833
        ratio = ratio * t + 0.33319097
        ratio = ratio * t - 0.499994932
        ratio = ratio * t + 0.99999997
        value = tl.maximum(value, 0.0) + t * ratio
        if RAGGED:
            value = tl.where(i < left, value, 0.0)
        made += (value,)
    return made


@triton.jit
def place(length, segment_length, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a program works: its channels, its batch row, its segment's first time step and number of steps.

    The grid is (blocks of channels x batch, segments).
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    channels = block * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1).to(tl.int64) * segment_length
    left = tl.minimum(length - first, segment_length).to(tl.int32)
    return channels, block, row, first, left


@triton.jit
def both(STATES: tl.constexpr, N: tl.constexpr):
    """Where the states of B and then of C lie in bc, (2 N), and the number of each state."""
    state = tl.arange(0, 2 * N) % N
    return tl.arange(0, 2 * N) // N * STATES + state, state


@triton.jit
def over_channels(first, second, N: tl.constexpr, BLOCK: tl.constexpr):
    """Sums over the channels of two tiles (N, BLOCK), as (2 N): a lane adds up a row's channels by halves.

    A plain ``tl.sum`` would pass each row through the warp five times.
    """
    rows = tl.reshape(tl.permute(tl.join(first, second), (2, 0, 1)), (2 * N, BLOCK))
    for halving in tl.static_range(5):
        left, right = tl.split(tl.reshape(rows, (2 * N, BLOCK // 2 ** (halving + 1), 2)))
        rows = left + right
    return tl.reshape(rows, (2 * N,))
