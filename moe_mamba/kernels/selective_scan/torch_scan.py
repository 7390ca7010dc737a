"""The recurrence in plain torch with its own backward: the back end that trains on CPUs.

What makes it fast, each measured on a CPU:

- States lie as (rows, time, d_state, d_inner), channels innermost: every operation of a time step is one vectorized
  pass, and the sums over states and over channels are batched matrix products.
- Batch rows are worked on in blocks and time in chunks of 16 steps, so that what a chunk needs stays in the cache.
- ``exp2`` with A scaled by log2(e) takes a quarter of the time of ``exp``; a sum over channels as row vector times
  transposed matrix takes a tenth of the time of matrix times column vector.
- The forward pass keeps one state in 16; the backward pass computes the states between again.

Notation of the backward pass: g[t] is the gradient of the state after step t, and p[t] = exp(delta[t] A) g[t] what of
it reaches the state before step t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mamba.kernels.selective_scan.intervals import CHUNK
from moe_mamba.kernels.selective_scan.operator import define_scan, new_states

BLOCK = 32768  # elements of the states of one time step that a thread works on at once


@torch.no_grad()
def selective_scan_step(
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
    """See ``moe_mamba.kernels.selective_scan_step``; computes in the dtype of the state."""
    work = state.dtype
    step = delta.to(work)
    if delta_bias is not None:
        step = step + delta_bias
    step = F.softplus(step)  # (batch, d_inner)
    entering = (step * x)[..., None] * B.to(work)[:, None]  # (batch, d_inner, d_state)
    new_state = torch.exp(step[..., None] * A) * state + entering
    y = torch.einsum("bdn,bn->bd", new_state, C.to(work)) + D * x
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(x.dtype), new_state


@dataclass
class _Block:
    """The operands of a block of batch rows, and room for the states of one chunk of time.

    x, delta, z (rows, length, d_inner) and B, C (rows, length, d_state) are in the caller's dtype, the rest in the one
    that is computed in. ``decay`` is A log2(e) as (d_state, d_inner); ``resets`` has for each time step the mask
    (rows, 1, 1) of the rows that start anew at it, or None where no row does.
    """

    x: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    decay: Tensor
    D: Tensor
    delta_bias: Tensor | None
    resets: Sequence[Tensor | None]

    def __post_init__(self) -> None:
        rows, length, _ = self.x.shape
        self.dtype = self.decay.dtype
        shape = (rows, min(CHUNK, length), *self.decay.shape)
        self.decays, self.states = self.decay.new_empty(shape), self.decay.new_empty(shape)

    @property
    def chunks(self) -> list[slice]:
        """The time steps of each chunk."""
        length = self.x.shape[1]
        return [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]

    def run(self, steps: slice, before: Tensor) -> "_Chunk":
        """Advance the state over a chunk, from ``before`` (rows, d_state, d_inner).

        The states returned are overwritten by the next chunk.
        """
        x, B, C = (tensor[:, steps].to(self.dtype) for tensor in (self.x, self.B, self.C))
        raw = self.delta[:, steps].to(self.dtype)
        if self.delta_bias is not None:
            raw = raw + self.delta_bias
        delta = F.softplus(raw)  # (rows, steps, d_inner)
        entering = delta * x
        decays, states = self.decays[:, : x.shape[1]], self.states[:, : x.shape[1]]
        torch.mul(delta[:, :, None], self.decay, out=decays).exp2_()
        torch.mul(entering[:, :, None], B[..., None], out=states)
        h = before
        for decay, state, reset in zip(decays.unbind(1), states.unbind(1), self.resets[steps], strict=True):
            if reset is not None:
                h = h.masked_fill(reset, 0)  # select, because 0 x NaN is NaN
            h = state.addcmul_(decay, h)
        return _Chunk(x, raw, delta, entering, B, C, decays, states)

    def read(self, chunk: "_Chunk") -> Tensor:
        """C h + D x of a chunk, (rows, steps, d_inner)."""
        return _over_states(chunk.C, chunk.states).addcmul_(self.D, chunk.x)


@dataclass
class _Chunk:
    """A chunk of time in the dtype computed in; states and their decays are (rows, steps, d_state, d_inner)."""

    x: Tensor
    raw: Tensor  # delta before softplus
    delta: Tensor
    entering: Tensor  # delta x
    B: Tensor
    C: Tensor
    decays: Tensor  # exp(delta A)
    states: Tensor

    def gradient_of_states(
        self, read_gradient: Tensor, after: Tensor, resets: Sequence[Tensor | None], out: Tensor
    ) -> Tensor:
        """Run the recurrence backwards: write g into ``out`` and p over ``decays``.

        Args:
            read_gradient: (rows, steps, d_inner), gradient of C h.
            after: (rows, d_state, d_inner), p of the step after this chunk.
            resets: masks of the chunk's steps.
            out: (rows, steps, d_state, d_inner).

        Returns:
            p of the chunk's first step, in memory of its own.
        """
        steps = zip(
            self.decays.unbind(1),
            out.unbind(1),
            self.C[..., None].unbind(1),
            read_gradient[:, :, None].unbind(1),
            resets,
            strict=True,
        )
        p = after
        for decay, g, C, gradient, reset in reversed(list(steps)):
            torch.addcmul(p, C, gradient, out=g)
            p = torch.mul(decay, g, out=decay)
            if reset is not None:
                p = p.masked_fill(reset, 0)
        return p.clone()

    def gradient_of_exponent(self, before: Tensor, resets: Sequence[Tensor | None]) -> Tensor:
        """Gradient of delta A, p[t] h[t-1], written over ``decays``, where p lies."""
        self.decays[:, 1:].mul_(self.states[:, :-1])
        self.decays[:, 0].mul_(before)
        for exponent, reset in zip(self.decays.unbind(1), resets, strict=True):
            if reset is not None:
                exponent.masked_fill_(reset, 0)
        return self.decays


class _Gradients:
    """Where the gradients of all operands are gathered, in the dtype computed in but for x, delta, B, C and z."""

    def __init__(self, x: Tensor, B: Tensor, z: Tensor | None, decay: Tensor) -> None:
        self.x, self.delta = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
        self.B, self.C = (torch.empty_like(B, memory_format=torch.contiguous_format) for _ in range(2))
        self.z = None if z is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        self.A = torch.zeros_like(decay)  # (d_state, d_inner)
        self.D, self.delta_bias = decay.new_zeros(decay.shape[1]), decay.new_zeros(decay.shape[1])
        self.initial_state = decay.new_empty(x.shape[0], *decay.shape)


def _outputs(x: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    """Room for y, the final state, what is kept (batch, ceil(length / 16), d_state, d_inner), and nothing."""
    state = new_states(x, A)
    kept = state.new_empty(x.shape[0], -(-x.shape[1] // CHUNK), *state.shape[1:])
    return x.new_empty(x.shape), state.transpose(1, 2), kept, x.new_empty(0)


def _fake(x: Tensor, delta: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _outputs(x, A)


def _forward(x: Tensor, delta: Tensor, A: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *others, initial_state, _ = given
    outputs = y, final_state, kept, _ = _outputs(x, A)
    final, dtype = final_state.transpose(1, 2), kept.dtype
    for rows, block in _blocks(x, delta, A, *others):
        if initial_state is None:
            h = final.new_zeros(final[rows].shape)
        else:
            h = initial_state[rows].transpose(1, 2).to(dtype)
        for i, steps in enumerate(block.chunks):
            kept[rows, i] = h
            chunk = block.run(steps, kept[rows, i])
            read = block.read(chunk)
            y[rows, steps] = read if block.z is None else read.mul_(F.silu(block.z[:, steps].to(dtype)))
            h = chunk.states[:, -1]
        final[rows] = h
    return outputs


def _backward(y_gradient: Tensor, final_gradient: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *operands, kept, _ = given
    x, _, A, B, _, D, z, delta_bias, _ = operands
    blocks = _blocks(*operands)
    gradients = _Gradients(x, B, z, blocks[0][1].decay)
    for rows, block in blocks:
        _backward_block(rows, block, kept[rows], y_gradient[rows], final_gradient[rows], gradients)
    return (
        gradients.x,
        gradients.delta,
        gradients.A.t().to(A.dtype),
        gradients.B,
        gradients.C,
        gradients.D.to(D.dtype),
        x.new_empty(0) if gradients.z is None else gradients.z,
        x.new_empty(0) if delta_bias is None else gradients.delta_bias.to(delta_bias.dtype),
        gradients.initial_state.transpose(1, 2),
    )


def _backward_block(
    rows: slice, block: _Block, kept: Tensor, y_gradient: Tensor, final_gradient: Tensor, gradients: _Gradients
) -> None:
    """Add a block of batch rows to ``gradients``; kept is (rows, chunks, d_state, d_inner)."""
    states_gradient = torch.empty_like(block.states)
    A_gradient = torch.zeros_like(kept[:, 0])
    p = final_gradient.transpose(1, 2).contiguous()
    for i, steps in reversed(list(enumerate(block.chunks))):
        resets, before = block.resets[steps], kept[:, i]
        chunk = block.run(steps, before)
        read_gradient = y_gradient[:, steps].to(block.dtype)  # (rows, steps, d_inner)
        if block.z is not None and gradients.z is not None:
            z = block.z[:, steps].to(block.dtype)
            gate = torch.sigmoid(z)
            slope = torch.addcmul(gate, gate * z, 1 - gate)  # of silu
            gradients.z[rows, steps] = slope.mul_(block.read(chunk)).mul_(read_gradient)
            read_gradient = gate.mul_(z).mul_(read_gradient)
        gradients.C[rows, steps] = _over_channels(read_gradient, chunk.states)
        g = states_gradient[:, : chunk.x.shape[1]]
        p = chunk.gradient_of_states(read_gradient, p, resets, g)
        gradients.B[rows, steps] = _over_channels(chunk.entering, g)
        entering_gradient = _over_states(chunk.B, g)

        exponent_gradient = chunk.gradient_of_exponent(before, resets)
        for exponent, delta in zip(exponent_gradient.unbind(1), chunk.delta[:, :, None].unbind(1), strict=True):
            A_gradient.addcmul_(exponent, delta)
        # the exponent is delta A, and A = ln(2) decay; bmm is slow with an expanded tensor, so ln(2) is filled in
        ln2 = torch.full_like(chunk.B, math.log(2))
        through_decay = _over_states(ln2, exponent_gradient.mul_(block.decay))
        raw_gradient = through_decay.addcmul_(entering_gradient, chunk.x).mul_(torch.sigmoid(chunk.raw))
        gradients.delta[rows, steps] = raw_gradient
        gradients.delta_bias += raw_gradient.sum((0, 1))
        gradients.D += (read_gradient * chunk.x).sum((0, 1))
        gradients.x[rows, steps] = entering_gradient.mul_(chunk.delta).addcmul_(read_gradient, block.D)
    gradients.A += A_gradient.sum(0)
    gradients.initial_state[rows] = p


def _blocks(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    document_starts: Tensor | None,
) -> list[tuple[slice, _Block]]:
    """Split the batch into blocks: all rows on an accelerator, as many as the cache likes on a CPU."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    batch, length, _ = x.shape
    decay = (A.to(dtype).t() * math.log2(math.e)).contiguous()
    D = D.to(dtype)
    delta_bias = None if delta_bias is None else delta_bias.to(dtype)
    at: list[Tensor | None] = [None] * length
    if document_starts is not None:
        at = [
            document_starts[:, t, None, None] if any_start else None
            for t, any_start in enumerate(document_starts.any(0).tolist())
        ]
    count = batch if x.device.type != "cpu" else max(1, round(BLOCK * torch.get_num_threads() / A.numel()))
    blocks = []
    for first in range(0, batch, count):
        rows = slice(first, first + count)
        resets = [None if mask is None else mask[rows] for mask in at]
        gate = None if z is None else z[rows]
        blocks.append((rows, _Block(x[rows], delta[rows], B[rows], C[rows], gate, decay, D, delta_bias, resets)))
    return blocks


def _over_states(weight: Tensor, states: Tensor) -> Tensor:
    """Sum over d_state: (rows, steps, d_state), (rows, steps, d_state, d_inner) -> (rows, steps, d_inner)."""
    rows, steps, d_state, d_inner = states.shape
    total = torch.bmm(weight.reshape(-1, 1, d_state), states.reshape(-1, d_state, d_inner))
    return total.view(rows, steps, d_inner)


def _over_channels(weight: Tensor, states: Tensor) -> Tensor:
    """Sum over d_inner: (rows, steps, d_inner), (rows, steps, d_state, d_inner) -> (rows, steps, d_state)."""
    rows, steps, d_state, d_inner = states.shape
    total = torch.bmm(weight.reshape(-1, 1, d_inner), states.reshape(-1, d_state, d_inner).transpose(1, 2))
    return total.view(rows, steps, d_state)


selective_scan = define_scan("selective_scan_torch", _forward, _backward, _fake)
"""See ``moe_mamba.kernels.selective_scan``; computes in fp64 for fp64 inputs, else in fp32.

Keeps its inputs and (batch, ceil(length / 16), d_state, d_inner) states for the backward pass. An operator, since what
traces it would unroll the loop over time.
"""
