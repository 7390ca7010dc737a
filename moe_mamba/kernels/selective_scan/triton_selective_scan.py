"""The scan in Triton, forward and backward: fused with softplus, D skip and gate, one pass over memory each way.

A program is one warp, which walks the time steps of 32 channels of a batch row with their states in registers, so that
what limits it is exponentials and memory. It keeps one state in 32 for the backward pass. Where batch x channels gives
a GPU too few programs, the length is split into segments (``triton_segments``). Nothing is added up atomically:
programs write partial sums, which torch adds up, so that results are the same in every run.
"""

# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_mamba.kernels.compilation import Specimen
from moe_mamba.kernels.launch import ceil_divide, multiprocessors, next_power_of_2, on_device, unit_stride
from moe_mamba.kernels.selective_scan import triton_backward, triton_forward, triton_segments
from moe_mamba.kernels.selective_scan.intervals import BLOCK, INTERVAL
from moe_mamba.kernels.selective_scan.operator import define_scan, new_states
from moe_mamba.kernels.selective_scan.triton_backward import backward_kernel
from moe_mamba.kernels.selective_scan.triton_forward import forward_kernel
from moe_mamba.kernels.selective_scan.triton_step import selective_scan_step, step_specimen

__all__ = ["selective_scan", "selective_scan_step", "specimens"]

SEGMENTS: int | None = None  # number of segments that the length is split into; None: as many as fill the GPU
RESIDENT = 8  # programs of the backward pass that a multiprocessor holds at once, by their registers
SHORTEST = 128  # time steps of a segment: its states are handed on through memory
STATES_OF_A_WARP = 16  # that fit into its registers


@dataclass(frozen=True)
class _Launch:
    """How the kernels are launched on operands of one shape.

    Attributes:
        batch: rows.
        length: time steps.
        channels: d_inner.
        states: d_state.
        segments: that the length is split into.
        segment_length: time steps of each but the last, a multiple of INTERVAL.
    """

    batch: int
    length: int
    channels: int
    states: int
    segments: int
    segment_length: int

    @classmethod
    def of(cls, x: Tensor, A: Tensor) -> "_Launch":
        """For these operands, in as many segments as their GPU has room for."""
        batch, length, channels = x.shape
        programs = batch * ceil_divide(channels, BLOCK)
        segments = SEGMENTS
        if segments is None:
            segments = 1
            if count := multiprocessors(x):
                room = RESIDENT * count
                segments = max(1, min(room // programs, length // SHORTEST))
        segment_length = ceil_divide(ceil_divide(length, segments), INTERVAL) * INTERVAL
        return cls(batch, length, channels, A.shape[1], ceil_divide(length, segment_length), segment_length)

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return ceil_divide(self.channels, BLOCK)

    @property
    def grid(self) -> tuple[int, int]:
        """Of every kernel but the one that carries over segments."""
        return self.blocks * self.batch, self.segments

    def options(self, steps: int | None = None) -> dict[str, Any]:
        """Constants and the number of warps; ``steps`` is the kernel's STEPS, if it has them."""
        padded = max(next_power_of_2(self.states), 4)
        uneven = self.channels % BLOCK or self.states != padded or (steps is not None and self.length % steps)
        constants = {"CHANNELS": self.channels, "STATES": self.states, "N": padded, "BLOCK": BLOCK}
        if steps is not None:
            constants["STEPS"] = steps
        warps = max(1, padded // STATES_OF_A_WARP)
        return {**constants, "RAGGED": bool(uneven), "num_warps": warps, "num_stages": 1}

    def new(self, like: Tensor, *shape: int) -> Tensor:
        """Room for fp32 values on the device of ``like``."""
        return like.new_empty(shape, dtype=torch.float32)


def _outputs(x: Tensor, A: Tensor, is_trained: bool, segments: int) -> tuple[Tensor, ...]:
    """Room for y, the final state, and what is kept: one state in INTERVAL, and with segments their sums of steps."""
    state = new_states(x, A)
    batch, length, channels = x.shape
    kept = state.new_empty(batch, ceil_divide(length, INTERVAL), *state.shape[1:]) if is_trained else state.new_empty(0)
    totals = state.new_empty(batch, segments, channels) if segments > 1 else state.new_empty(0)
    return x.new_empty(x.shape), state.transpose(1, 2), kept, totals


def _fake(x: Tensor, delta: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _outputs(x, A, others[-1], _Launch.of(x, A).segments)


def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    document_starts: Tensor | None,
    initial_state: Tensor | None,
    is_trained: bool,
) -> tuple[Tensor, ...]:
    launch = _Launch.of(x, A)
    outputs = y, final_state, kept, totals = _outputs(x, A, is_trained, launch.segments)
    x, delta, A, bc, D, z, delta_bias, starts = _inputs(x, delta, A, B, C, D, z, delta_bias, document_starts)
    before = _channels_last(initial_state)
    with on_device(x):
        if launch.segments > 1:
            before = _carry_states(launch, x, delta, A, bc, delta_bias, starts, before, totals)
        forward_kernel[launch.grid](
            x, delta, A, bc, D, z, delta_bias, starts, before, y, kept if is_trained else None,
            final_state.transpose(1, 2), launch.length, launch.segment_length,
            x.stride(0), delta.stride(0), _stride(z, 0), 0, x.stride(1), delta.stride(1),
            _stride(z, 1),
            **launch.options(triton_forward.STEPS), INTERVAL=INTERVAL,
        )  # fmt: skip
    return outputs


def _backward(y_gradient: Tensor, final_gradient: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *operands, kept, totals = given
    A_dtype, B_dtype, D_dtype, bias = operands[2].dtype, operands[3].dtype, operands[5].dtype, operands[7]
    launch = _Launch.of(operands[0], operands[2])
    x, delta, A, bc, D, z, delta_bias, starts = _inputs(*operands)
    batch, length, channels, states = launch.batch, launch.length, launch.channels, launch.states
    segments, options = launch.segments, launch.options(triton_backward.STEPS)
    y_gradient = unit_stride(y_gradient)
    gradients = [x.new_empty(x.shape), x.new_empty(x.shape), None if z is None else x.new_empty(x.shape)]
    bc_partial = launch.new(x, launch.blocks, batch, length, 2 * states)
    A_partial = launch.new(x, batch, segments, states, channels)
    D_partial, bias_partial = (launch.new(x, batch, segments, channels) for _ in range(2))
    initial_gradient = launch.new(x, batch, states, channels)
    chunks = INTERVAL // triton_backward.STEPS
    scratch = launch.new(x, launch.grid[0] * segments, chunks, options["N"], BLOCK)
    with on_device(x):
        after = final_gradient.transpose(1, 2).contiguous()
        if segments > 1:
            after = _carry_gradients(launch, delta, A, bc, z, delta_bias, starts, y_gradient, totals, after)
        backward_kernel[launch.grid](
            x, delta, A, bc, D, z, delta_bias, starts, kept, y_gradient, after, scratch, *gradients, bc_partial,
            A_partial, D_partial, bias_partial, initial_gradient, length, launch.segment_length, x.stride(0),
            delta.stride(0), _stride(z, 0), y_gradient.stride(0), 0,
            x.stride(1), delta.stride(1), _stride(z, 1),
            y_gradient.stride(1), **options, INTERVAL=INTERVAL,
        )  # fmt: skip
    B_gradient, C_gradient = bc_partial.sum(0).to(B_dtype).split(states, -1)
    return (
        gradients[0],
        gradients[1],
        A_partial.sum((0, 1)).t().to(A_dtype),
        B_gradient.contiguous(),
        C_gradient.contiguous(),
        D_partial.sum((0, 1)).to(D_dtype),
        x.new_empty(0) if gradients[2] is None else gradients[2],
        x.new_empty(0) if bias is None else bias_partial.sum((0, 1)).to(bias.dtype),
        initial_gradient.transpose(1, 2),
    )


def _inputs(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    document_starts: Tensor | None,
) -> tuple[Any, ...]:
    """The operands as the kernels take them: A (d_state, d_inner) and B beside C in fp32, starts as bytes."""
    return (
        unit_stride(x),
        unit_stride(delta),
        A.float().t().contiguous(),
        torch.cat((B, C), -1).float(),  # (batch, length, 2 d_state)
        D.contiguous(),
        None if z is None else unit_stride(z),
        None if delta_bias is None else delta_bias.contiguous(),
        None if document_starts is None else document_starts.contiguous().view(torch.uint8),
    )


def _carry_states(
    launch: _Launch,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    bc: Tensor,
    delta_bias: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    totals: Tensor,
) -> Tensor:
    """The state before each segment (batch, segments, d_state, d_inner); writes the segments' sums of step sizes."""
    ends = launch.new(x, launch.batch, launch.segments, launch.states, launch.channels)
    triton_segments.states_from_zero_kernel[launch.grid](
        x, delta, A, bc, delta_bias, starts, ends, totals, launch.length, launch.segment_length, x.stride(0),
        delta.stride(0), 0, x.stride(1), delta.stride(1),
        **launch.options(triton_forward.STEPS),
    )  # fmt: skip
    return _carry(launch, A, ends, totals, initial_state, False)


def _carry_gradients(
    launch: _Launch,
    delta: Tensor,
    A: Tensor,
    bc: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    starts: Tensor | None,
    y_gradient: Tensor,
    totals: Tensor,
    final_gradient: Tensor,
) -> Tensor:
    """The gradient of the state after each segment, (batch, segments, d_state, d_inner)."""
    ends = launch.new(delta, launch.batch, launch.segments, launch.states, launch.channels)
    triton_segments.gradients_from_zero_kernel[launch.grid](
        delta, A, bc, z, delta_bias, starts, y_gradient, ends, launch.length, launch.segment_length,
        delta.stride(0), _stride(z, 0), y_gradient.stride(0), 0,
        delta.stride(1), _stride(z, 1), y_gradient.stride(1), **launch.options(triton_forward.STEPS),
    )  # fmt: skip
    return _carry(launch, A, ends, totals, final_gradient, True)


def _carry(launch: _Launch, A: Tensor, ends: Tensor, totals: Tensor, outer: Tensor | None, backwards: bool) -> Tensor:
    carried = torch.empty_like(ends)
    triton_segments.carry_kernel[(launch.grid[0],)](
        A, ends, totals, outer, carried, launch.segments, 0, **launch.options(), BACKWARDS=backwards,
    )  # fmt: skip
    return carried


def _channels_last(state: Tensor | None) -> Tensor | None:
    """(batch, d_inner, d_state) as (batch, d_state, d_inner) in memory."""
    return None if state is None else state.transpose(1, 2).contiguous()


def _stride(tensor: Tensor | None, dimension: int) -> int:
    return 0 if tensor is None else tensor.stride(dimension)


selective_scan = define_scan("selective_scan_triton", _forward, _backward, _fake)
"""See ``moe_mamba.kernels.selective_scan``; computes in fp32, d_state up to 256.

Keeps its inputs and (batch, ceil(length / 32), d_state, d_inner) states for the backward pass.
"""


def specimens() -> list[Specimen]:
    """Every kernel at 1,536 channels and 16 states, from bf16, where x and z are halves of one projection."""
    wide = "A D delta_bias initial_state kept final_state after scratch bc bc_partial A_partial D_partial bias_partial"
    wide += " initial_gradient ends totals outer carried"
    narrow = "x delta z y y_gradient x_gradient delta_gradient z_gradient"
    rows = "x_row delta_row z_row y_row"
    numbers = "length segment_length segments zero"
    types = {name: "*fp32" for name in wide.split()} | {name: "*bf16" for name in narrow.split()}
    types |= {name: "i64" for name in rows.split()} | {name: "i32" for name in numbers.split()}
    steps = {"X_STEP": 3072, "DELTA_STEP": 1536, "Z_STEP": 3072, "Y_STEP": 1536, "INTERVAL": INTERVAL}
    launch = _Launch(32, 1024, 1536, 16, 1, 1024)
    made = []
    for kernel, count, starts in (
        (forward_kernel, triton_forward.STEPS, None),
        (forward_kernel, triton_forward.STEPS, "*u8"),
        (backward_kernel, triton_backward.STEPS, None),
        (backward_kernel, triton_backward.STEPS, "*u8"),
        (triton_segments.states_from_zero_kernel, triton_forward.STEPS, "*u8"),
        (triton_segments.gradients_from_zero_kernel, triton_forward.STEPS, "*u8"),
        (triton_segments.carry_kernel, None, None),
    ):
        constants = {**launch.options(count), **steps, "BACKWARDS": False, "starts": None}
        known = types if starts is None else {**types, "starts": starts}
        used = {name: known[name] for name in kernel.arg_names if name in known}
        name = f"selective_scan {kernel.__name__}" + (" with starts" if starts else "")
        made.append(Specimen(name, kernel, used, constants, constants["num_warps"]))
    return [*made, step_specimen()]
