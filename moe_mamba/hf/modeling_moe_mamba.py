# SPDX-License-Identifier: Apache-2.0
"""MoEMambaForCausalLM: a language model of Mamba, attention and mixtures of experts, for Transformers.

Assembled from the source of the package moe_mamba by tools/assemble_hf.py: change it there, not here. Where a docstring
names one of its modules, more stands there; nothing of it is needed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.utils import logging

from .configuration_moe_mamba import MoEConfig, MoEMambaConfig

ModelConfig = MoEMambaConfig  # it has all that the model reads

# From moe_mamba/kernels/routing/__init__.py:
# From tokens to rows sorted by expert, and back: what stands around a mixture's grouped products.


@dataclass(frozen=True)
class Order:
    """Where each choice of an expert goes.

    Attributes:
        token: (rows,) int64: the row of the stream in each slot; empty slots name tokens in turn.
        slot: (tokens, k) int64: the slot of each choice; -1: the expert had no room.
        counts: (experts,) int64: slots of each expert, empty ones included.
        assigned: (experts,) int64: choices of each expert, dropped ones included.
        dropped: () int64: choices that no slot was left for.
    """

    token: Tensor
    slot: Tensor
    counts: Tensor
    assigned: Tensor
    dropped: Tensor


# From moe_mamba/kernels/routing/torch_routing.py:
# Routing with torch's own operations: a stable sort, gathers, and bags of rows for the sums, none of them by atomics.


def plain_sort_by_expert(chosen: Tensor, experts: int, capacity: int | None) -> tuple[Tensor, ...]:
    """See ``moe_mamba.kernels.routing``: the fields of its ``Order``."""
    tokens, k = chosen.shape
    expert = chosen.t().reshape(-1)  # (k * tokens,)
    order = expert.argsort(stable=True)
    # unlike bincount, this does not wait for a GPU
    assigned = expert.new_zeros(experts).scatter_add_(0, expert, torch.ones_like(expert))
    place = torch.arange(len(order), device=order.device)
    if capacity is None:
        slot = torch.empty_like(order).scatter_(0, order, place)
        return order % tokens, slot.view(k, tokens).t().contiguous(), assigned, assigned, assigned.new_zeros(())
    expert = expert[order]
    rank = place - (assigned.cumsum(0) - assigned)[expert]
    kept, place = rank < capacity, expert * capacity + rank
    slot = torch.empty_like(order).scatter_(0, order, torch.where(kept, place, -1))
    rest = experts * capacity  # one slot more, for all that is dropped
    # Empty slots name tokens in turn: were it always the same one, its row would be read by all at once.
    token = torch.arange(rest + 1, device=order.device) % tokens
    token = token.scatter_(0, torch.where(kept, place, rest), order % tokens)[:rest]
    dropped = (assigned - capacity).clamp(min=0).sum()
    return token, slot.view(k, tokens).t().contiguous(), torch.full_like(assigned, capacity), assigned, dropped


# From moe_mamba/kernels/routing/reference.py:
# The three operations written down, plain loops and plain autograd. They define what the other back ends must give.


def plain_gather_rows(x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    """See ``moe_mamba.kernels.routing``."""
    filled = torch.isin(torch.arange(len(token), device=x.device), slot)
    return torch.where(filled[:, None], x[token], x.detach()[token])


def plain_combine_rows(rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    """See ``moe_mamba.kernels.routing``."""
    weighted = rows * weight[:, None]  # (rows, d)
    return weighted.new_zeros(len(slot), rows.shape[1]).index_add(0, token, weighted).to(rows.dtype)


# From moe_mamba/kernels/grouped_matmul/reference.py:
# A loop over groups, any dtype, plain autograd. It defines what the other back ends must give.


def plain_grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, capacity: int | None) -> Tensor:
    """See ``moe_mamba.kernels.grouped_matmul``."""
    parts = x.split(counts.tolist() if capacity is None else capacity)
    return torch.cat([rows @ matrix for rows, matrix in zip(parts, weight, strict=True)])


# From moe_mamba/kernels/activation/torch_activation.py:
# The activations in torch, with autograd's gradients.


def plain_activation(hidden: Tensor, kind: str) -> Tensor:
    """See ``moe_mamba.kernels.activation``."""
    if kind == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return functional.silu(gate) * up
    if kind == "gelu":
        return functional.gelu(hidden)
    hidden = functional.relu(hidden)
    return hidden.square() if kind == "squared_relu" else hidden


# From moe_mamba/kernels/rms_norm/reference.py:
# The norm written down, plain autograd. It defines what the other back ends must give.


def plain_rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.rms_norm``."""
    stream = x if residual is None else residual + x
    wide = stream.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * scale * weight).to(x.dtype), stream


# From moe_mamba/kernels/cross_entropy/__init__.py:
# Cross entropy of each token from logits that may be a part of the vocabulary's, never held in fp32 as a whole.


IGNORED = -100
"""The target of a token that does not count, as in torch."""

Reduce = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(largest, total, predicted) of a part of the vocabulary -> of the whole; (tokens) each."""


# From moe_mamba/kernels/cross_entropy/reference.py:
# Cross entropy written down, plain autograd. It defines what the other back ends must give.


def plain_cross_entropy(logits: Tensor, targets: Tensor, first: int, reduce: Reduce | None) -> Tensor:
    """See ``moe_mamba.kernels.cross_entropy``; with ``reduce``, which autograd cannot see through, torch's version."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    local = targets - first
    is_outside = (local < 0) | (local >= logits.shape[1])
    predicted = wide.gather(1, local.masked_fill(is_outside, 0)[:, None])[:, 0].masked_fill(is_outside, torch.nan)
    return (wide.logsumexp(1) - predicted).masked_fill(targets == IGNORED, 0)


# From moe_mamba/kernels/causal_conv/__init__.py:
# Mamba's short convolution: depthwise, causal, with SiLU (arXiv 2312.00752, section 3.4 and figure 3).


def _final_state(x: Tensor, starts: Tensor | None, initial_state: Tensor) -> Tensor:
    """The last width - 1 inputs, (batch, width - 1, channels), zeros before the last start."""
    reach = initial_state.shape[1]
    if starts is None and x.shape[1] >= reach:
        return x[:, x.shape[1] - reach :].clone()  # not a view, which would keep the whole of x
    tail = torch.cat((initial_state, x[:, max(0, x.shape[1] - reach) :]), 1)
    tail = tail[:, tail.shape[1] - reach :]
    if starts is None or reach == 0:
        return tail
    started = torch.cat((starts.new_zeros(starts.shape[0], reach), starts), 1)[:, -reach:]
    # a start at a later position hides an input: starts after it, counted from the end
    later = started.flip(1).cumsum(1).flip(1) - started.long()
    return tail.masked_fill((later > 0)[..., None], 0)


# From moe_mamba/kernels/causal_conv/reference.py:
# The convolution written down: a loop over taps, plain autograd. It defines what the other back ends must give.


def plain_causal_conv(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, initial_state: Tensor) -> Tensor:
    """See ``moe_mamba.kernels.causal_conv``, less its final state; computes in fp64 for fp64 inputs, else in fp32."""
    work = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[1], weight.shape[1]
    past = torch.cat((initial_state, x), 1).to(work)  # (batch, width - 1 + length, channels)
    out = bias.to(work).expand(x.shape)
    hidden = None if starts is None else torch.zeros_like(starts)  # True: a start lies between tap and present
    for back in range(width):
        tap = past[:, width - 1 - back : width - 1 - back + length]
        if starts is not None and hidden is not None:
            tap = tap.masked_fill(hidden[..., None], 0)
            hidden = hidden | F.pad(starts, (back, 0))[:, :length]
        out = out + tap * weight[:, width - 1 - back].to(work)
    return F.silu(out).to(x.dtype)


# From moe_mamba/kernels/causal_conv/torch_conv.py:
# The convolution as shifted multiply-adds with its own backward, which keeps nothing but the inputs.


def plain_causal_conv_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.causal_conv_step``; computes in fp64 for fp64 inputs, else in fp32."""
    work = torch.promote_types(x.dtype, torch.float32)
    window = torch.cat((state, x[:, None]), 1)  # (batch, width, channels)
    out = torch.addcmul(bias.to(work), window[:, 0].to(work), weight[:, 0].to(work))
    for place in range(1, weight.shape[1]):
        out.addcmul_(window[:, place].to(work), weight[:, place].to(work))
    return F.silu(out).to(x.dtype), window[:, 1:]


# From moe_mamba/kernels/selective_scan/operands.py:
# What every back end of the scan is given.


class Operands(NamedTuple):
    """Arguments of ``moe_mamba.kernels.selective_scan``, checked; shapes and meaning stand there."""

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor | None
    delta_bias: Tensor | None
    starts: Tensor | None
    initial_state: Tensor | None


# From moe_mamba/kernels/selective_scan/reference.py:
# The recurrence written down: a loop over time, plain autograd. It defines what the other back ends must give.


def plain_selective_scan(operands: Operands) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.selective_scan``; computes in fp64 for fp64 inputs, else in fp32."""
    x, delta, A, B, C, D, z, delta_bias, starts, initial_state = operands
    work = torch.promote_types(x.dtype, torch.float32)
    dtype = x.dtype
    x, A, B, C, D = (tensor.to(work) for tensor in (x, A, B, C, D))
    step = delta.to(work) if delta_bias is None else delta.to(work) + delta_bias.to(work)
    step = F.softplus(step)  # (batch, length, d_inner)
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(work)
    read = []
    for t, (x_t, step_t, B_t, C_t) in enumerate(zip(*(v.unbind(1) for v in (x, step, B, C)), strict=True)):
        if starts is not None:  # select, because 0 x NaN is NaN
            h = h.masked_fill(starts[:, t, None, None], 0)
        decay = torch.exp(step_t[..., None] * A)  # (batch, d_inner, d_state)
        h = decay * h + (step_t * x_t)[..., None] * B_t[:, None]
        read.append((h @ C_t[..., None])[..., 0])  # (batch, d_inner)
    y = torch.stack(read, 1) + D * x  # (batch, length, d_inner)
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(dtype), h


# From moe_mamba/kernels/selective_scan/torch_scan.py:
# The recurrence in plain torch with its own backward: the back end that trains on CPUs.


def plain_selective_scan_step(
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


# From moe_mamba/hf/shell/kernels.py:
# The operations with the signatures of ``moe_mamba.kernels``: that package's where it is installed, else plain torch.
#
# The plain ones are the reference versions, which define what every faster one must give; ``backend`` is not looked at.


class Plain:
    """Each operation in torch's own functions."""

    @staticmethod
    def activation(hidden: Tensor, kind: str, backend: str = "auto") -> Tensor:
        """See ``moe_mamba.kernels.activation``."""
        return plain_activation(hidden, kind)

    @staticmethod
    def causal_conv(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        starts: Tensor | None = None,
        initial_state: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.causal_conv``."""
        if initial_state is None:
            initial_state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
        return plain_causal_conv(x, weight, bias, starts, initial_state), _final_state(x, starts, initial_state)

    @staticmethod
    @torch.no_grad()
    def causal_conv_step(
        x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.causal_conv_step``."""
        return plain_causal_conv_step(x, weight, bias, state)

    @staticmethod
    def cross_entropy(
        logits: Tensor, targets: Tensor, first: int = 0, reduce: Reduce | None = None, backend: str = "auto"
    ) -> Tensor:
        """See ``moe_mamba.kernels.cross_entropy``."""
        return plain_cross_entropy(logits, targets, first, reduce)

    @staticmethod
    def grouped_matmul(
        x: Tensor, weight: Tensor, counts: Tensor, capacity: int | None = None, backend: str = "auto"
    ) -> Tensor:
        """See ``moe_mamba.kernels.grouped_matmul``."""
        return plain_grouped_matmul(x, weight, counts, capacity)

    @staticmethod
    def rms_norm(
        x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.rms_norm``."""
        return plain_rms_norm(x, weight, epsilon, residual)

    @staticmethod
    def sort_by_expert(chosen: Tensor, experts: int, capacity: int | None = None, backend: str = "auto") -> Order:
        """See ``moe_mamba.kernels.sort_by_expert``."""
        return Order(*plain_sort_by_expert(chosen, experts, capacity))

    @staticmethod
    def gather_rows(x: Tensor, token: Tensor, slot: Tensor, backend: str = "auto") -> Tensor:
        """See ``moe_mamba.kernels.gather_rows``."""
        return plain_gather_rows(x, token, slot)

    @staticmethod
    def combine_rows(rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor, backend: str = "auto") -> Tensor:
        """See ``moe_mamba.kernels.combine_rows``."""
        return plain_combine_rows(rows, weight, token, slot)

    @staticmethod
    def selective_scan(
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        starts: Tensor | None = None,
        initial_state: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.selective_scan``."""
        return plain_selective_scan(Operands(x, delta, A, B, C, D, z, delta_bias, starts, initial_state))

    @staticmethod
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
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.selective_scan_step``."""
        return plain_selective_scan_step(x, delta, A, B, C, D, z, delta_bias, state)


try:
    from moe_mamba import kernels as operations
except ImportError:
    operations = Plain  # type: ignore[assignment]

activation = operations.activation
causal_conv, causal_conv_step = operations.causal_conv, operations.causal_conv_step
cross_entropy = operations.cross_entropy
grouped_matmul = operations.grouped_matmul
rms_norm = operations.rms_norm
sort_by_expert, gather_rows, combine_rows = operations.sort_by_expert, operations.gather_rows, operations.combine_rows
selective_scan, selective_scan_step = operations.selective_scan, operations.selective_scan_step


# From moe_mamba/model/initialize.py:
# Every weight a pure function of (seed, its full name, expert index).


Initializer = Callable[[Tensor, Generator], None]


def ones(weight: Tensor, generator: Generator) -> None:
    """Fill with ones."""
    weight.fill_(1.0)


def zeros(weight: Tensor, generator: Generator) -> None:
    """Fill with zeros."""
    weight.zero_()


def normal(std: float) -> Initializer:
    """Normal of mean 0 and the given standard deviation."""

    def fill(weight: Tensor, generator: Generator) -> None:
        weight.normal_(0.0, std, generator=generator)

    return fill


def truncated_normal(fan_in: int) -> Initializer:
    """Normal of std sqrt(0.1 / fan_in), cut at two of them (Switch Transformer, section 2.4)."""
    std = math.sqrt(0.1 / fan_in)

    def fill(weight: Tensor, generator: Generator) -> None:
        nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std, generator=generator)

    return fill


def uniform(fan_in: int, scale: float = 1.0) -> Initializer:
    """Uniform in ±scale / sqrt(fan_in), so of std scale / sqrt(3 fan_in): what torch's Linear starts with."""
    bound = scale / math.sqrt(fan_in)

    def fill(weight: Tensor, generator: Generator) -> None:
        weight.uniform_(-bound, bound, generator=generator)

    return fill


def matrix(config: ModelConfig, fan_in: int, residual: bool = False) -> Initializer:
    """How a matrix of attention, feed-forward or an expert starts.

    Args:
        config: says which initialisation; ``authors`` is the truncated normal of the paper's code for all.
        fan_in: inputs of the matrix.
        residual: it writes to the residual stream; by default it then starts smaller by sqrt(layers), so that
            the stream's variance does not grow with depth (GPT-2, section 2.3).
    """
    if config.initialization == "authors":
        return truncated_normal(fan_in)
    return uniform(fan_in, 1.0 / math.sqrt(len(config.layers)) if residual else 1.0)


# From moe_mamba/model/sequences.py:
# How the flat residual stream is cut into sequences, and where documents start in them.


@dataclass(frozen=True)
class Sequences:
    """The shape that goes with a residual stream of (tokens, d_model), tokens = batch x length.

    Attributes:
        batch: sequences in the stream.
        length: tokens a sequence.
        starts: (batch, length) bool, True where a document starts and nothing before may be seen;
            None: a sequence is one document that may go on from a state passed in.
    """

    batch: int
    length: int
    starts: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens in the stream."""
        return self.batch * self.length


# From moe_mamba/model/norm.py:
# Normalisation over the last axis, in fp32 whatever the input's dtype, of the stream and what is added to it.


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 2019): ``x / sqrt(mean(x^2) + epsilon) * weight``."""

    def __init__(self, d: int, epsilon: float, kernels: str = "auto") -> None:
        super().__init__()
        self.epsilon = epsilon
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add ``update`` to ``x`` (..., d), in one pass with the norm; returns (normalised sum, sum) in x's dtype."""
        return rms_norm(x, self.weight, self.epsilon, residual=update, backend=self.kernels)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters start."""
        return {"weight": ones}


class LayerNorm(nn.Module):
    """Layer norm (Ba et al., 2016) with weight and bias, as in torch."""

    def __init__(self, d: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add ``update`` to ``x`` (..., d), and normalise; returns (normalised sum, sum) in x's dtype."""
        total = x if update is None else x + update
        wide = total.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        y = functional.layer_norm(wide, weight.shape, weight, bias, self.epsilon)
        return y.to(x.dtype), total

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters start."""
        return {"weight": ones, "bias": zeros}


def build_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """Build the norm over ``d_model`` that the config names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_epsilon, config.kernels)
    return LayerNorm(config.d_model, config.norm_epsilon)


# From moe_mamba/model/attention.py:
# Causal attention (Vaswani et al., 2017) with rotary positions or none, and grouped key and value heads.
#
# Over all of a document so far, or over a sliding window of it.
#
# Symbols: b batch, l length (new tokens), p past tokens in a state, h query heads, g key and value heads, e width of
# a head.


@dataclass(frozen=True)
class AttentionState:
    """What attention keeps between passes: it grows by the tokens seen, to at most ``model.sliding_window`` - 1.

    Attributes:
        key: (batch, kv_heads, past, head_dim), already rotated.
        value: (batch, kv_heads, past, head_dim).
        start: (batch,) int64: place among the past tokens where the current document starts; below 0 where that is a
            token that the window has left behind.
    """

    key: Tensor
    value: Tensor
    start: Tensor


def rotary_frequencies(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Angles that each pair of a head's channels turns by from token to token (Su et al., 2021, section 3.2.2).

    ``linear`` slows all of them (position interpolation; Chen et al., arXiv 2306.15595, section 2.3). ``llama3`` slows
    those that turn at most ``rope_low_freq_factor`` times in the original context, leaves those that turn at least
    ``rope_high_freq_factor`` times, and blends the two by the number of turns in between (Llama 3.1; ``apply_scaling``
    of Meta's reference implementation in llama-models).

    Args:
        config: has base, width of a head, and scaling.
        dtype: of the result.
        device: of the result.

    Returns:
        (head_dim / 2,), radians: ``base ** (-2 i / head_dim)``, scaled.
    """
    half = config.resolved_head_dim // 2
    frequency = config.rope_base ** -(torch.arange(half, dtype=dtype, device=device) / half)
    if config.rope_type == "default":
        return frequency
    if config.rope_type == "linear":
        return frequency / config.rope_factor
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_length * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # share of the frequency that is left as it is
    return frequency * (kept + (1 - kept) / config.rope_factor)


def rotate(x: Tensor, positions: Tensor, frequency: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021, eq. 34), pairs half a head apart as in GPT-NeoX and Llama.

    Args:
        x: (b, heads, l, e), e even.
        positions: (b or 1, l) integers: tokens since the document's start.
        frequency: (e / 2,), from ``rotary_frequencies``; its dtype is that of the angles and the products.

    Returns:
        ``x`` rotated, in its dtype.
    """
    angle = (positions.to(frequency.dtype)[:, :, None] * frequency)[:, None]  # (b or 1, 1, l, e / 2)
    cosine, sine = angle.cos(), angle.sin()
    first, second = x.to(frequency.dtype).chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Attention over the documents of each sequence, or over a window of them; projections named as in Llama."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim, bias = config.resolved_head_dim, config.attention_bias
        width, kv_width = config.heads * self.head_dim, config.resolved_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, width, bias=bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.d_model, bias=bias)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's parameters start."""
        inputs = ("q_proj", "k_proj", "v_proj")
        fills = {f"{name}.weight": matrix(self.config, self.config.d_model) for name in inputs}
        fills["o_proj.weight"] = matrix(self.config, self.config.heads * self.head_dim, residual=True)
        if self.config.attention_bias:
            fills |= {f"{name}.bias": zeros for name in (*inputs, "o_proj")}
        return fills

    def initial_state(self, batch: int) -> AttentionState:
        """Return the state before any token."""
        weight = self.k_proj.weight
        empty = weight.new_zeros(batch, self.config.resolved_kv_heads, 0, self.head_dim)
        return AttentionState(empty, empty, torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def forward(
        self, x: Tensor, sequences: Sequences, state: AttentionState | None = None
    ) -> tuple[Tensor, None, AttentionState | None]:
        """Attend from each token of ``x`` (tokens, d_model) to its document so far; returns (y, None, new state)."""
        query, key, value = (
            projection(x).view(sequences.batch, sequences.length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (b, h, l, e), (b, g, l, e), (b, g, l, e)
        place, start = self._places(sequences, state, x.device)  # (l,), (b or 1, l)
        if self.config.positions == "rope":
            wide = torch.promote_types(query.dtype, torch.float32)
            frequency = rotary_frequencies(self.config, wide, x.device)
            query, key = rotate(query, place - start, frequency), rotate(key, place - start, frequency)
        mask, window = None, self.config.sliding_window or sequences.length
        if state is not None:
            key = torch.cat((state.key, key), dim=2)  # (b, g, p + l, e)
            value = torch.cat((state.value, value), dim=2)
        if state is not None or sequences.starts is not None or sequences.length > window:
            mask = self._mask(place, start, key.shape[2])
        y = functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
        )  # (b, h, l, e)
        if state is not None:
            state = self._kept(key, value, start[:, -1].expand(sequences.batch))
        return self.o_proj(y.transpose(1, 2).reshape(sequences.tokens, -1)), None, state

    def _mask(self, place: Tensor, start: Tensor, seen: int) -> Tensor:
        """Which of ``seen`` tokens, past ones first, each new one attends to, (b or 1, 1, l, seen) bool.

        None before its document; with a window of W, itself and the W - 1 tokens before it (Mistral 7B; Jiang et al.,
        arXiv 2310.06825, section 2).
        """
        window = self.config.sliding_window
        first = start if window is None else start.maximum(place - window + 1)  # (b or 1, l)
        other = torch.arange(seen, device=place.device)
        return ((other <= place[:, None]) & (other >= first[..., None]))[:, None]

    def _kept(self, key: Tensor, value: Tensor, start: Tensor) -> AttentionState:
        """What tokens to come may attend to of keys and values (b, g, p + l, e); ``start`` (b,) is among them."""
        window = self.config.sliding_window
        dropped = 0 if window is None else max(0, key.shape[2] - window + 1)
        if dropped:  # copies, so that what is dropped lets go of its memory
            key, value = key[:, :, dropped:].clone(), value[:, :, dropped:].clone()
        return AttentionState(key, value, start - dropped)

    def _places(
        self, sequences: Sequences, state: AttentionState | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Where each new token stands, past ones counted (l,), and where its document starts (b or 1, l)."""
        past = 0 if state is None else state.key.shape[2]
        place = torch.arange(past, past + sequences.length, device=device)
        first = torch.zeros(1, 1, dtype=torch.int64, device=device) if state is None else state.start[:, None]
        if sequences.starts is None:
            return place, first.expand(-1, sequences.length)
        return place, torch.where(sequences.starts, place, first).cummax(dim=1).values


# From moe_mamba/model/feed_forward.py:
# Feed-forward layers.


def input_width(activation: str, width: int) -> int:
    """Columns of the input projection for a hidden width: SwiGLU has a gate beside the values."""
    return 2 * width if activation == "swiglu" else width


class FeedForward(nn.Module):
    """Two matrices, with biases or without, and an activation between them."""

    def __init__(self, config: ModelConfig, width: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.config = config
        self.width = width or config.resolved_d_ff
        self.in_proj = nn.Linear(config.d_model, input_width(config.activation, self.width), bias=bias)
        self.out_proj = nn.Linear(self.width, config.d_model, bias=bias)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's parameters start."""
        fills = {
            "in_proj.weight": matrix(self.config, self.config.d_model),
            "out_proj.weight": matrix(self.config, self.width, residual=True),
        }
        if self.in_proj.bias is not None:
            fills |= {"in_proj.bias": zeros, "out_proj.bias": zeros}
        return fills

    def forward(self, x: Tensor, sequences: Sequences, state: None = None) -> tuple[Tensor, None, None]:
        """Map ``x`` (tokens, d_model) token by token; returns (y, None, None) as every mixer does."""
        hidden = activation(self.in_proj(x), self.config.activation, self.config.kernels)  # (tokens, width)
        return self.out_proj(hidden), None, None


# From moe_mamba/model/routing.py:
# Which expert sees which token, and with which weight.
#
# A router gives scores to every pair of token and expert, from logits in fp32. Then either each token takes its best
# experts (Switch, Fedus et al., 2021; top-k, Shazeer et al., 2017), with a capacity or without one, or each expert
# takes its best tokens (expert choice, Zhou et al., 2022). The result lists rows sorted by expert, which is what a
# dispatcher and a grouped matmul want. No shape depends on the data, so a GPU is never waited for.


@dataclass(frozen=True)
class Routing:
    """What the experts shall work on: rows sorted by expert.

    Attributes:
        token: (rows,) int64: the row of the stream that goes to the expert.
        weight: (rows,): what the expert's output is multiplied by; 0 in a slot that stayed empty.
        slot: (tokens, choices) int64: the row of each choice, -1 where the expert had no room; for expert choice,
            (tokens, experts), -1 where the expert did not take the token.
        counts: (experts,) int64: rows of each expert, empty slots included.
        assigned: (experts,) int64: assignments of each expert, counted before any is dropped.
        dropped: () assignments that no expert had room for; for expert choice, tokens that no expert took.
        capacity: rows of every expert, where all have as many; None: ``counts`` alone knows.
    """

    token: Tensor
    weight: Tensor
    slot: Tensor
    counts: Tensor
    assigned: Tensor
    dropped: Tensor
    capacity: int | None = None


@dataclass(frozen=True)
class RouterStatistics:
    """Sums over the tokens of one layer of a micro-step; fp32 (float64 in a float64 model).

    Attributes:
        probability: (experts,) sum of each expert's share of a token's scores; carries the gradient.
        assigned: (experts,) assignments, counted before any is dropped.
        dropped: () as in ``Routing``.
        z: () sum of the squared log-sum-exp of the logits; carries the gradient.
        entropy: () sum of the entropy of a token's shares, in nats.
        tokens: () how many tokens.
    """

    probability: Tensor
    assigned: Tensor
    dropped: Tensor
    z: Tensor
    entropy: Tensor
    tokens: Tensor


def balance_loss(statistics: RouterStatistics) -> Tensor:
    """Switch Transformer's load-balancing loss, eq. 4, without its weight: 1 when the load is even."""
    mean = statistics.probability / statistics.tokens
    share = statistics.assigned / statistics.assigned.sum()
    return len(share) * (mean * share).sum()


def z_loss(statistics: RouterStatistics) -> Tensor:
    """ST-MoE's router z-loss (Zoph et al., 2022, eq. 5), without its weight."""
    return statistics.z / statistics.tokens


def route_dropless(chosen: Tensor, weight: Tensor, experts: int, kernels: str = "auto") -> Routing:
    """Give every token to all the experts that it chose.

    Args:
        chosen: (tokens, top_k) int64: experts of each token, best first.
        weight: (tokens, top_k).
        experts: how many there are.
        kernels: back end, as in ``model.kernels``.
    """
    order = sort_by_expert(chosen, experts, backend=kernels)
    return _routing(order, weight, None)


def route_by_capacity(chosen: Tensor, weight: Tensor, experts: int, capacity: int, kernels: str = "auto") -> Routing:
    """Fill ``capacity`` slots of each expert by order of position, all first choices before second ones.

    Args:
        chosen: (tokens, top_k) int64: experts of each token, best first.
        weight: (tokens, top_k).
        experts: how many there are.
        capacity: slots of each expert. One that stays empty has weight 0 and the number of some token.
        kernels: back end, as in ``model.kernels``.
    """
    order = sort_by_expert(chosen, experts, capacity, backend=kernels)
    return _routing(order, weight, capacity)


def _routing(order: Order, weight: Tensor, capacity: int | None) -> Routing:
    """Lay out the weights (tokens, top_k) as the rows are; what is dropped goes to one row more."""
    rows = len(order.token)
    place = torch.where(order.slot < 0, rows, order.slot).view(-1)
    weight = weight.new_zeros(rows + 1).scatter(0, place, weight.reshape(-1))[:rows]
    return Routing(order.token, weight, order.slot, order.counts, order.assigned, order.dropped, capacity)


def route_expert_choice(scores: Tensor, sequences: Sequences, capacity: int) -> Routing:
    """Let every expert take the ``capacity`` tokens of each sequence with the highest scores, (tokens, experts)."""
    batch, length, experts = sequences.batch, sequences.length, scores.shape[1]
    weight, place = scores.view(batch, length, experts).permute(2, 0, 1).topk(capacity)  # (experts, batch, capacity)
    token = (place + length * torch.arange(batch, device=place.device)[:, None]).reshape(-1)
    row = torch.arange(len(token), device=token.device)
    slot = token.new_full((sequences.tokens * experts,), -1)
    slot = slot.scatter_(0, token * experts + row // (batch * capacity), row).view(-1, experts)
    counts = torch.full((experts,), batch * capacity, device=token.device)
    dropped = (slot < 0).all(1).sum()
    return Routing(token, weight.reshape(-1), slot, counts, counts, dropped, batch * capacity)


class Router(nn.Module):
    """A bias-free linear map to one logit an expert, in its weight's dtype: fp32, whatever the model computes in."""

    balance_bias: Tensor

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.config = moe
        self.kernels = config.kernels
        self.weight = nn.Parameter(torch.empty(moe.experts, config.d_model))
        if moe.balance == "bias":
            self.register_buffer("balance_bias", torch.zeros(moe.experts))

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters and buffers start."""
        weight = {"weight": truncated_normal(self.weight.shape[1])}
        return weight | {"balance_bias": zeros} if self.config.balance == "bias" else weight

    def forward(self, x: Tensor, sequences: Sequences) -> tuple[Routing, RouterStatistics]:
        """Route the stream ``x`` (tokens, d_model)."""
        logits = self.logits(x)
        if self.config.scores == "softmax":
            scores = share = logits.softmax(dim=-1)
        else:
            scores = logits.sigmoid()
            share = scores / scores.sum(-1, keepdim=True)
        if self.config.router == "expert_choice":
            capacity = self._capacity(sequences.length)
            assert capacity is not None, "expert choice without a capacity is refused by the config"
            routing = route_expert_choice(scores, sequences, capacity)
        else:
            routing = self._route(*self._choose(scores))
        statistics = RouterStatistics(
            probability=share.sum(0),
            assigned=routing.assigned.to(share.dtype),
            dropped=routing.dropped.to(share.dtype),
            z=logits.logsumexp(-1).square().sum(),
            entropy=torch.special.entr(share.detach()).sum(),
            tokens=torch.full((), len(x), dtype=share.dtype, device=x.device),
        )
        return routing, statistics

    def logits(self, x: Tensor) -> Tensor:
        """One logit an expert for each token of ``x`` (tokens, d_model), (tokens, experts)."""
        return functional.linear(x.to(self.weight.dtype), self.weight)

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each token, best first, and their weights, both (tokens, top_k).

        The balancing bias (DeepSeek-V3, section 2.1.2) moves the choice alone, never a weight.
        """
        ranking = scores.detach()
        if self.config.balance == "bias":
            ranking = ranking + self.balance_bias
        chosen = ranking.topk(self.config.top_k).indices
        weight = scores.gather(1, chosen)
        if self.config.renormalize:
            weight = weight / weight.sum(-1, keepdim=True)
        return chosen, weight

    def _route(self, chosen: Tensor, weight: Tensor) -> Routing:
        capacity = self._capacity(len(chosen))
        if capacity is None:
            return route_dropless(chosen, weight, self.config.experts, self.kernels)
        return route_by_capacity(chosen, weight, self.config.experts, capacity, self.kernels)

    def _capacity(self, tokens: int) -> int | None:
        """Slots an expert has for ``tokens`` tokens; None: as many as needed (evaluation, unless told otherwise)."""
        factor = self.config.capacity_factor
        if not self.training and (self.config.router != "expert_choice" or self.config.evaluation_capacity):
            factor = self.config.evaluation_capacity
        if factor is None:
            return None
        return min(max(math.floor(factor * self.config.top_k * tokens / self.config.experts), 1), tokens)


# From moe_mamba/model/moe.py:
# Mixture of experts: route -> dispatch -> experts -> combine.
#
# The dispatcher is an object of its own: another one is all that spreading experts over devices changes.


class Dispatcher(Protocol):
    """Brings rows to the experts of this device, and their outputs back."""

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Any]:
        """Turn ``x`` (tokens, d_model) into (rows sorted by expert, rows of each expert, what combine needs).

        Where the routing has a capacity, all experts have as many rows.
        """

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Sum the weighted outputs of a token's experts, (tokens, d_model); zero for a token without any."""


class LocalDispatcher:
    """All experts are on this device; ``kernels`` names the back end of its gather and its sum."""

    def __init__(self, kernels: str) -> None:
        self._kernels = kernels

    def dispatch(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Any]:
        """Gather the tokens in the order of the experts."""
        return gather_rows(x, routing.token, routing.slot, backend=self._kernels), routing.counts, routing

    def combine(self, rows: Tensor, handle: Any) -> Tensor:
        """Sum the weighted outputs; the sum over a token's experts is in the weights' dtype (fp32)."""
        return combine_rows(rows, handle.weight, handle.token, handle.slot, backend=self._kernels)


class Experts(nn.Module):
    """Stacked experts: two bias-free matrices each, with an activation between them."""

    is_stacked = True  # each expert's slice has a generator of its own, see initialize.py

    def __init__(self, config: ModelConfig, experts: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Parameter(torch.empty(experts, config.d_model, input_width(config.activation, width)))
        self.out_proj = nn.Parameter(torch.empty(experts, width, config.d_model))

    def initializers(self) -> dict[str, Initializer]:
        """How one expert's parameters start."""
        return {
            "in_proj": matrix(self.config, self.in_proj.shape[1]),
            "out_proj": matrix(self.config, self.out_proj.shape[1], residual=True),
        }

    def forward(self, rows: Tensor, counts: Tensor, capacity: int | None = None) -> Tensor:
        """Map ``rows`` (rows, d_model), sorted by expert, each by its own.

        Args:
            rows: (rows, d_model), sorted by expert.
            counts: (experts,) rows of each expert.
            capacity: rows of every expert, where all have as many.
        """
        kernels = self.config.kernels
        hidden = grouped_matmul(rows, self.in_proj, counts, capacity, kernels)  # (rows, input width)
        hidden = activation(hidden, self.config.activation, kernels)  # (rows, width)
        return grouped_matmul(hidden, self.out_proj, counts, capacity, kernels)  # (rows, d_model)


class MoE(nn.Module):
    """A mixture-of-experts layer: routed experts, and shared ones that see every token."""

    def __init__(self, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        width = moe.d_expert or config.resolved_d_ff
        self.router = Router(config, moe)
        self.experts = Experts(config, moe.experts, width)
        self.shared = FeedForward(config, moe.shared_experts * width) if moe.shared_experts else None
        self.dispatcher: Dispatcher = LocalDispatcher(config.kernels)

    def forward(self, x: Tensor, sequences: Sequences, state: None = None) -> tuple[Tensor, RouterStatistics, None]:
        """Map ``x`` (tokens, d_model); a token that every expert dropped gets zero, so it rides the residual."""
        y, statistics = self.routed(x, sequences)
        if self.shared is not None:
            y = y + self.shared(x, sequences)[0]
        return y, statistics, None

    def routed(self, x: Tensor, sequences: Sequences) -> tuple[Tensor, RouterStatistics]:
        """Give the routed experts' part of the output, (tokens, d_model)."""
        routing, statistics = self.router(x, sequences)
        rows, counts, handle = self.dispatcher.dispatch(x, routing)
        capacity = None if routing.capacity is None else len(rows) // len(counts)
        return self.dispatcher.combine(self.experts(rows, counts, capacity), handle), statistics


# From moe_mamba/model/mamba.py:
# The Mamba-1 mixer (Gu and Dao, arXiv 2312.00752, section 3.4), with Jamba's norms on request (arXiv 2403.19887).
#
# Symbols, the paper's name first:
#
#     D   d_model    width of the residual stream             Delta  delta   step size of a channel at a token
#     E   expand     d_inner = expand x d_model channels      A      A       decay of a channel's states, negative
#     N   d_state    states of a channel                      B      B       what of the input enters the states
#     R   dt_rank    rank of delta's projection               C      C       what of the states is read
#     x   x          input of a channel, after convolution    h      scan    the states
#     z   z          gate, beside x
#
# Parameters have the names of the library mamba-ssm.


SMALLEST_DELTA, LARGEST_DELTA, DELTA_FLOOR = 1e-3, 1e-1, 1e-4  # at the start of training


@dataclass(frozen=True)
class MambaState:
    """What the mixer keeps between passes; its size does not depend on the tokens seen.

    Attributes:
        conv: (batch, d_conv - 1, d_inner), the last inputs of the convolution, in the dtype of the weights.
        scan: (batch, d_inner, d_state), fp32 (fp64 in an fp64 model).
    """

    conv: Tensor
    scan: Tensor


class DepthwiseConv(nn.Module):
    """The weights of a convolution of each channel by itself: weight (channels, width) and bias (channels)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))


class Mamba(nn.Module):
    """The mixer: two projections in, a short convolution, the selective scan, a gate, a projection out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d_inner, d_state, dt_rank = config.d_inner, config.d_state, config.resolved_dt_rank
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)
        self.conv1d = DepthwiseConv(d_inner, config.d_conv)
        if config.selective:
            self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        else:
            self.dt_B_C = nn.Parameter(torch.empty(dt_rank + 2 * d_state))  # the same for every token
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)
        if config.mamba_norms:
            self.dt_norm = RMSNorm(dt_rank, config.norm_epsilon, config.kernels)
            self.B_norm = RMSNorm(d_state, config.norm_epsilon, config.kernels)
            self.C_norm = RMSNorm(d_state, config.norm_epsilon, config.kernels)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters start: as in mamba-ssm, whatever ``model.initialization`` says.

        By default ``out_proj`` is smaller by sqrt(layers), as that library's language model has it; the authors of
        MoE-Mamba took the bare mixer, without.
        """
        config = self.config
        shrink = 1.0 if config.initialization == "authors" else 1 / math.sqrt(len(config.layers))
        return {
            "in_proj.weight": uniform(config.d_model),
            "conv1d.weight": uniform(config.d_conv),
            "conv1d.bias": uniform(config.d_conv),
            **({"x_proj.weight": uniform(config.d_inner)} if config.selective else {"dt_B_C": self._constants}),
            "dt_proj.weight": uniform(config.resolved_dt_rank),
            "dt_proj.bias": _delta_bias,
            "A_log": _A_log,
            "D": ones,
            "out_proj.weight": uniform(config.d_inner, shrink),
        }

    def initial_state(self, batch: int) -> MambaState:
        """Return the state before any token."""
        config, weight = self.config, self.in_proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return MambaState(
            weight.new_zeros(batch, config.d_conv - 1, config.d_inner),
            weight.new_zeros(batch, config.d_inner, config.d_state, dtype=wide),
        )

    def forward(
        self, x: Tensor, sequences: Sequences, state: MambaState | None = None
    ) -> tuple[Tensor, None, MambaState | None]:
        """Mix each token of ``x`` (tokens, d_model) with its document so far; returns (y, None, new state)."""
        projected = self.in_proj(x)  # (tokens, 2 d_inner): x and z of figure 3
        if state is not None and sequences.length == 1 and sequences.starts is None:
            x, z = projected.chunk(2, dim=-1)
            y, new_state = self._step(x, z, state)
            return self.out_proj(y), None, new_state
        x, z = projected.view(sequences.batch, sequences.length, -1).chunk(2, dim=-1)
        y, passed_state = self._pass(x, z, sequences.starts, state)
        return self.out_proj(y.reshape(sequences.tokens, -1)), None, passed_state

    def _pass(
        self, x: Tensor, z: Tensor, starts: Tensor | None, state: MambaState | None
    ) -> tuple[Tensor, MambaState | None]:
        """Convolution and scan of whole sequences; x and z (batch, length, d_inner)."""
        weight, bias = self._convolution(x.dtype)
        before = (None, None) if state is None else (state.conv, state.scan)
        x, conv_state = causal_conv(x, weight, bias, starts, before[0], self.config.kernels)
        delta, B, C = self._select(x)
        A = -torch.exp(self.A_log)  # (d_inner, d_state); section 3.6
        kernels = self.config.kernels
        if kernels == "vendor" and state is not None:
            kernels = "auto"  # the vendor's scan trains alone: it starts from zeros
        y, scan_state = selective_scan(
            x, delta, A, B, C, self.D, z, self.dt_proj.bias, starts, before[1], kernels
        )  # equations 2a, 2b and 4, and the gate
        return y, None if state is None else MambaState(conv_state, scan_state)

    def _step(self, x: Tensor, z: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """What ``_pass`` computes of one more token; x and z (batch, d_inner)."""
        weight, bias = self._convolution(x.dtype)
        x, conv_state = causal_conv_step(x, weight, bias, state.conv, self.config.kernels)  # (batch, d_inner)
        delta, B, C = self._select(x)
        A = -torch.exp(self.A_log)
        y, scan_state = selective_scan_step(
            x, delta, A, B, C, self.D, z, self.dt_proj.bias, state.scan, self.config.kernels
        )
        return y, MambaState(conv_state, scan_state)

    def _convolution(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.conv1d.weight.to(dtype), self.conv1d.bias.to(dtype)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What makes the scan selective: delta, B and C from the input (algorithm 2, section 3.6).

        Without ``model.selective`` they are learned constants: the scan is linear and time-invariant, which is a long
        convolution (algorithm 1; here B and C are shared among channels).

        Args:
            x: (..., d_inner).

        Returns:
            delta before its bias and softplus (..., d_inner); B and C (..., d_state).
        """
        d_state = self.config.d_state
        made = self.x_proj(x) if self.config.selective else self.dt_B_C.to(x.dtype).expand(*x.shape[:-1], -1)
        dt, B, C = made.split((self.config.resolved_dt_rank, d_state, d_state), dim=-1)
        if self.config.mamba_norms:
            (dt, _), (B, _), (C, _) = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        return functional.linear(dt, self.dt_proj.weight.to(dt.dtype)), B, C

    def _constants(self, weight: Tensor, generator: Generator) -> None:
        """As S4D starts (Gu et al., arXiv 2206.11893): delta is its bias alone, B is one, C standard normal."""
        dt, B, C = weight.split((self.config.resolved_dt_rank, self.config.d_state, self.config.d_state))
        dt.zero_()
        B.fill_(1.0)
        C.normal_(generator=generator)


def _A_log(weight: Tensor, generator: Generator) -> None:
    """S4D-real (section 3.6): A[n] = -n for n from 1."""
    weight.copy_(torch.arange(1, weight.shape[1] + 1, dtype=torch.float32).log().expand_as(weight))


def _delta_bias(weight: Tensor, generator: Generator) -> None:
    """The inverse of softplus of a delta that is log-uniform in [0.001, 0.1] (section 3.6)."""
    weight.uniform_(math.log(SMALLEST_DELTA), math.log(LARGEST_DELTA), generator=generator)
    delta = weight.exp().clamp_(min=DELTA_FLOOR)
    weight.copy_(delta + torch.log(-torch.expm1(-delta)))


# From moe_mamba/model/loss.py:
# The loss: a sum and a count, so that micro-steps and devices add up to the mean over a whole batch.


def cross_entropy_sum(
    logits: Tensor, targets: Tensor, *, first: int = 0, reduce: Reduce | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sum the cross entropy over the targets that count.

    Args:
        logits: (..., vocab), any float dtype; of a cut vocabulary, a part of its rows.
        targets: (...) int64, of the whole vocabulary; -100 is not counted.
        first: number of the first row that the logits have.
        reduce: combines the parts of a cut vocabulary, see ``kernels.cross_entropy``.
        backend: see ``kernels.cross_entropy``.

    Returns:
        The sum in nats, () in fp32 (float64 for float64 logits), and how many targets count, () int64.
    """
    losses = cross_entropy(logits.flatten(0, -2), targets.flatten(), first, reduce, backend)  # (tokens,)
    return losses.sum(), (targets != IGNORED).sum()


# From moe_mamba/model/language_model.py:
# The whole model: embedding -> layers -> norm -> head, and what it counts about itself.


State = MambaState | AttentionState | None
"""What a layer keeps between passes; feed-forward layers and experts keep nothing."""


def build_mixer(letter: str, config: ModelConfig, moe: MoEConfig) -> nn.Module:
    """Build what a letter of the pattern stands for."""
    if letter == "M":
        return Mamba(config)
    if letter == "*":
        return Attention(config)
    if letter == "-":
        return FeedForward(config, bias=config.mlp_bias)
    return MoE(config, moe)


class Layer(nn.Module):
    """Norm and mixer. What the mixer adds to the residual stream is added by the next norm, in one pass with it."""

    def __init__(self, letter: str, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.norm = build_norm(config)
        self.mixer = build_mixer(letter, config, moe)

    def forward(
        self, stream: Tensor, update: Tensor | None, sequences: Sequences, state: State = None
    ) -> tuple[Tensor, Tensor, RouterStatistics | None, State]:
        """Mix ``stream`` + ``update``, both (tokens, d_model); returns (that sum, update, statistics, new state)."""
        normalised, stream = self.norm(stream, update)
        update, statistics, state = self.mixer(normalised, sequences, state)
        return stream, update, statistics, state


class LanguageModel(nn.Module):
    """A decoder of layers named by ``model.pattern``.

    Its weights are whatever memory held until ``initialize`` or a checkpoint fills them.

    Attributes:
        recompute: in training keep only each layer's input, and compute the rest again in the backward pass.
    """

    def __init__(self, model: ModelConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.config = model
        self.moe_config = moe
        self.recompute = False
        self.embedding = nn.Embedding(model.vocab_size, model.d_model)
        self.layers = nn.ModuleList(Layer(letter, model, moe) for letter in model.layers)
        self.final_norm = build_norm(model) if model.final_norm else None
        self.head = None if model.tied_head else nn.Linear(model.d_model, model.vocab_size, bias=False)

    def initializers(self) -> dict[str, Initializer]:
        """How embedding and head start; the authors' embedding counts a fan-in of one."""
        authors = self.config.initialization == "authors"
        fill = {"embedding.weight": truncated_normal(1) if authors else normal(0.02)}
        if self.head is not None:
            fill["head.weight"] = truncated_normal(self.config.d_model) if authors else normal(0.02)
        return fill

    def initial_states(self, batch: int) -> list[State]:
        """Return each layer's state before any token, for ``batch`` sequences."""
        mixers = (layer.mixer for layer in self.layers)
        return [mixer.initial_state(batch) if isinstance(mixer, Mamba | Attention) else None for mixer in mixers]

    def mix(
        self, stream: Tensor, sequences: Sequences, states: Sequence[State] | None = None
    ) -> tuple[Tensor, list[RouterStatistics], list[State] | None]:
        """Run the layers over embedded tokens (tokens, d_model); returns the stream, statistics and new states."""
        update: Tensor | None = None  # of the last layer, not yet in the stream
        statistics: list[RouterStatistics] = []
        new_states: list[State] = []
        for index, layer in enumerate(self.layers):
            if self.recompute and self.training:
                # The sum, so that one tensor is kept a layer; nothing in a layer is random, so no random state is.
                stream, update, measured, _ = checkpoint(
                    layer, _sum(stream, update), None, sequences, use_reentrant=False, preserve_rng_state=False
                )
            else:
                state = states[index] if states is not None else None
                stream, update, measured, state = layer(stream, update, sequences, state)
                new_states.append(state)
            if measured is not None:
                statistics.append(measured)
        return _sum(stream, update), statistics, new_states if states is not None else None

    def routers(self) -> list[Router]:
        """Routers of the layers of experts, in the order of a pass's statistics."""
        return [mixer.router for mixer in self._mixers(MoE)]

    def fp32_parameter_names(self) -> set[str]:
        """Parameters, and balance biases, that stay fp32 in a bf16 model: small, and sensitive to rounding."""
        names: set[str] = set()
        for prefix, module in self.named_modules():
            local: list[str] = []
            if isinstance(module, RMSNorm | LayerNorm | Router):
                local = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
            elif isinstance(module, Mamba):
                local = ["A_log", "D", "dt_proj.bias"] + ["dt_B_C"] * (not self.config.selective)
            names.update(f"{prefix}.{name}" for name in local)
        return names

    def _mixers(self, kind: type) -> list:
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, kind)]


def _sum(stream: Tensor, update: Tensor | None) -> Tensor:
    return stream if update is None else stream + update


# From moe_mamba/hf/shell/cache.py:
# What layers keep between passes, as Transformers hands it on.


class MoEMambaCache(Cache):
    """What the layers keep between passes: Mamba's states of constant size, keys and values of attention alone.

    A new one is empty, and fits any batch. A pass changes it in place and returns it.

    Attributes:
        states: one for each layer, None for feed-forward layers and experts; empty before the first pass.
        length: tokens seen, padding included.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[State] = []
        self.length = 0

    def __len__(self) -> int:
        """How many layers it has states of, those that keep nothing included."""
        return len(self.states)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self.states)}, length={self.length})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included; the same for every layer."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, as the tokens that may come are not limited."""
        return -1

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether any token was seen."""
        return self.length > 0

    @property
    def batch_size(self) -> int:
        """Sequences that it has states of; -1 where it cannot say."""
        tensors = self.tensors()
        return tensors[0].shape[0] if tensors else -1

    @property
    def is_croppable(self) -> bool:
        """No: a state cannot forget its last tokens."""
        return False

    def tensors(self) -> list[Tensor]:
        """Everything that is kept."""
        return [getattr(state, field.name) for state in self.states if state is not None for field in fields(state)]

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.length = [], 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: see ``is_croppable``.

        Raises:
            ValueError: always.
        """
        raise ValueError("MoEMambaCache.crop: a state cannot forget its last tokens; keep a copy.deepcopy from before")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the states of the beams that live on."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the states of these rows of the batch."""
        self._change(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch, copies side by side."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def _change(self, function: Callable[[Tensor], Tensor]) -> None:
        self.states = [state if state is None else map_state(state, function) for state in self.states]


def map_state(state: MambaState | AttentionState, function: Callable[[Tensor], Tensor]) -> Any:
    """A layer's state with every tensor changed."""
    return type(state)(**{field.name: function(getattr(state, field.name)) for field in fields(state)})


def _state_to(state: MambaState | AttentionState, device: Any, non_blocking: bool = False) -> Any:
    return map_state(state, lambda tensor: tensor.to(device, non_blocking=non_blocking))


def _sequences_to(sequences: Sequences, device: Any, non_blocking: bool = False) -> Sequences:
    starts = sequences.starts
    return sequences if starts is None else replace(sequences, starts=starts.to(device, non_blocking=non_blocking))


# With a device map accelerate brings a layer's inputs to the layer's device: tensors, and what has a method `to`.
for _class, _to in ((MambaState, _state_to), (AttentionState, _state_to), (Sequences, _sequences_to)):
    setattr(_class, "to", _to)  # noqa: B010


# From moe_mamba/hf/shell/modeling.py:
# What Transformers asks of a language model that generates, around the trainer's own ``LanguageModel``.


logger = logging.get_logger(__name__)


class MoEMambaPreTrainedModel(PreTrainedModel):
    """How Transformers fills, loads and spreads the model."""

    config_class = MoEMambaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fill what no checkpoint has filled, from torch's random numbers, as the trainer's models start."""
        for module in self.modules():
            initializers: Any = getattr(module, "initializers", dict)
            tensors = dict(module.named_parameters()) | dict(module.named_buffers())
            for name, fill in initializers().items():
                if not getattr(tensors[name], "_is_hf_initialized", False):
                    fill(tensors[name], None)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Turn ``LanguageModel.recompute`` on or off; it chooses the arguments of ``checkpoint`` itself."""
        if every_n_layers != 1 or getattr(gradient_checkpointing_func, "func", checkpoint) is not checkpoint:
            raise ValueError("gradient checkpointing recomputes every layer, without offload: leave out both options")
        self.gradient_checkpointing = self.model.recompute = enable


class MoEMambaForCausalLM(MoEMambaPreTrainedModel, GenerationMixin):
    """A language model of Mamba, attention, feed-forward layers and experts, as ``config.pattern`` names them.

    Padding on the left is not seen: each row starts at its first token that the mask shows, and rotary positions count
    from there. Padding on the right is never seen, since nothing looks ahead; mask its labels.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        moe: Any = MoEConfig(**config.moe)
        self.model = LanguageModel(config, moe)
        if self.model.head is None:  # the embedding's weight, as Transformers ties it
            self.model.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._keep_in_fp32_modules_strict = {f"model.{name}" for name in self.model.fp32_parameter_names()}
        for name in self._keep_in_fp32_modules_strict:
            tensor = self.get_parameter_or_buffer(name)
            tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
        for layer in self.model.layers:
            if isinstance(layer.mixer, Mamba):
                layer.mixer.register_forward_pre_hook(_bring_weights)
                layer.mixer.register_forward_hook(_return_weights)
        if operations is Plain:
            logger.warning_once(
                "MoEMamba runs without its kernels, as the package moe_mamba is not installed: prompts and training "
                "take about twice as long on a CPU, and many times as long on a GPU. Install moe_mamba to have them."
            )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head; with ``config.tied_head`` its weight is the embedding's."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in its place."""
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MoEMambaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """Predict the token after each one.

        Args:
            input_ids: (batch, length) int64; or else ``inputs_embeds``.
            attention_mask: (batch, tokens of the cache + length), 0 on padding, which must be left or right of the
                text. Experts see padding as they see tokens: it counts in the router's losses, and in capacities.
            position_ids: not looked at, positions follow from the mask.
            past_key_values: from an earlier pass, or a new one.
            inputs_embeds: (batch, length, d_model).
            labels: (batch, length), the tokens themselves (they are shifted in here); -100 is not counted.
            use_cache: return a cache; by default in evaluation, if ``config.use_cache`` says so.
            output_router_logits: return them, and add the router's losses, with the weights that the trainer gives
                them, to the loss.
            output_hidden_states: return the stream before each layer, and after the last.
            return_dict: False: a tuple.
            logits_to_keep: logits of so many last tokens alone, or of these places; 0: of all. Not with ``labels``.
            num_items_in_batch: divides the loss, in the place of the number of labels that count, as in the Trainer.
            kwargs: not looked at.

        Returns:
            ``aux_loss`` is what was added for the routers, ``router_logits`` (batch x length, experts) for each layer
            of experts, in fp32.

        Raises:
            ValueError: both inputs or none, a mask of another shape, a cache with expert choice, of another class or of
                another batch.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.model.embedding(input_ids)
        cache = self._cache(past_key_values, use_cache)
        config = self.config
        wants_routers = config.output_router_logits if output_router_logits is None else output_router_logits
        wants_stream = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        router_logits: list[Tensor] = []
        hidden_states: list[Tensor] = []
        with (
            _without_autocast(inputs_embeds.device.type),
            _recorded_logits(self.model.routers(), router_logits) if wants_routers else nullcontext(),
            _recorded_stream(self.model.layers, hidden_states, inputs_embeds.shape) if wants_stream else nullcontext(),
        ):
            stream, statistics = self._mix(inputs_embeds, attention_mask, cache)  # (batch, length, d_model)
            if wants_stream:
                hidden_states.append(stream)
            if labels is None:
                stream = stream[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else stream[:, logits_to_keep]
            logits = self._logits(stream)  # (batch, length, vocab)
            loss, auxiliary = self._loss(logits, labels, num_items_in_batch, statistics if wants_routers else [])
        recorded: Any = (
            tuple(router_logits) if wants_routers else None,
            tuple(hidden_states) if wants_stream else None,
        )
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=auxiliary,
            logits=logits,
            past_key_values=cache,
            router_logits=recorded[0],
            hidden_states=recorded[1],
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _cache(self, given: MoEMambaCache | None, use_cache: bool | None) -> MoEMambaCache | None:
        """The cache that this pass fills, or None."""
        if given is not None or use_cache:
            self._check_that_it_generates()
        if given is not None and not isinstance(given, MoEMambaCache):
            raise ValueError(
                f"past_key_values is a {type(given).__name__}: pass a MoEMambaCache, or None for a new one"
            )
        if self.training and self.gradient_checkpointing and (given is not None or use_cache):
            raise ValueError("gradient checkpointing keeps no cache in training: pass use_cache=False")
        if given is not None:
            if use_cache is False:
                raise ValueError("past_key_values with use_cache=False: leave out one of them")
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not self._looks_ahead()
        return MoEMambaCache() if use_cache else None

    def _looks_ahead(self) -> bool:
        return "E" in self.config.layers and self.config.moe["router"] == "expert_choice"

    def _check_that_it_generates(self) -> None:
        if self._looks_ahead():
            raise ValueError(
                "moe.router=expert_choice looks ahead at later tokens, so it has no cache and cannot generate: "
                "pass use_cache=False to forward, or train with moe.router=switch or top_k"
            )

    def _mix(
        self, embedded: Tensor, mask: Tensor | None, cache: MoEMambaCache | None
    ) -> tuple[Tensor, list[RouterStatistics]]:
        """Run the layers over ``embedded`` (batch, length, d_model) from the cache's states; fills the cache."""
        batch, length, _ = embedded.shape
        past = 0 if cache is None else cache.length
        if cache is not None and cache.batch_size not in (-1, batch):
            raise ValueError(
                f"past_key_values has states of {cache.batch_size} sequences, and the batch has {batch}: "
                "see its batch_repeat_interleave"
            )
        starts = None if mask is None else _starts(mask, batch, past, length)
        if starts is None and length == 1 and past and torch.is_grad_enabled():
            # The step for one token has no gradient; a pass has.
            starts = torch.zeros(batch, 1, dtype=torch.bool, device=embedded.device)
        states = None
        if cache is not None:
            states = cache.states or self._empty_states(batch, embedded.device)
        stream, statistics, states = self.model.mix(embedded.flatten(0, 1), Sequences(batch, length, starts), states)
        if cache is not None and states is not None:
            cache.states, cache.length = states, past + length
        return stream.view(embedded.shape), statistics

    def _empty_states(self, batch: int, device: torch.device) -> list[State]:
        """States before any token. All are zeros, which weights that lie on a disk could not make."""
        states = self.model.initial_states(batch)
        return [state and map_state(state, partial(torch.zeros_like, device=device)) for state in states]

    def _logits(self, stream: Tensor) -> Tensor:
        if self.model.final_norm is not None:
            stream, _ = self.model.final_norm(stream)
        return self.model.head(stream)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        items: int | Tensor | None,
        statistics: list[RouterStatistics],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss, and the part of it that is the routers'; None for what was not asked for."""
        moe, auxiliary, loss = self.model.moe_config, None, None
        share: float | Tensor = 1.0
        if labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).to(logits.device)
            loss, count = cross_entropy_sum(logits, targets, backend=self.config.kernels)
            items = count if items is None else torch.as_tensor(items, device=loss.device)
            # Micro-steps are added up: each has its share of the batch in the routers' losses, too.
            loss, share = loss / items, count / items
        if statistics:
            balance, z = (
                torch.stack([function(layer).to(logits.device) for layer in statistics]).mean()
                for function in (balance_loss, z_loss)
            )
            auxiliary = share * moe.z_loss_weight * z
            if moe.balance == "loss":
                auxiliary = auxiliary + share * moe.balance_weight * balance
            if loss is not None:
                loss = loss + auxiliary
        return loss, auxiliary

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> Any:
        """Give ``generate`` the one cache that there is."""
        self._check_that_it_generates()
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={wanted}: a MoEMambaCache is the only one that fits, leave it out")
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MoEMambaCache()


def _starts(mask: Tensor, batch: int, past: int, length: int) -> Tensor | None:
    """Where a row's text starts among the new tokens, (batch, length) bool; None: nowhere after the first place.

    Raises:
        ValueError: a mask of another shape, or with padding between tokens.
    """
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < past + length:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, and must be ({batch}, {past + length}): "
            f"a row for each sequence, the {past} tokens of the cache before the {length} new ones"
        )
    mask = mask[:, : past + length].bool()
    begins = mask & ~nn.functional.pad(mask, (1, -1))
    starts = begins[:, past:].clone()
    if past == 0:
        starts[:, 0] = False  # nothing is before it
    if not starts.any():
        return None
    if (begins.sum(1) > 1).any():
        raise ValueError(
            "attention_mask has padding between tokens, which a state cannot skip: pad on the left, or on the right "
            "alone; without a mask, generate takes every pad_token_id in the text for padding"
        )
    return starts


def _bring_weights(mixer: Mamba, args: Any) -> None:
    """Load what a device map left on a CPU or disk: accelerate does so where a module is called, and these are not."""
    for child, hook in _hooked(mixer):
        hook.pre_forward(child)


def _return_weights(mixer: Mamba, args: Any, output: Any) -> None:
    for child, hook in _hooked(mixer):
        hook.post_forward(child, None)


def _hooked(mixer: Mamba) -> list[tuple[nn.Module, Any]]:
    children = (mixer.conv1d, mixer.dt_proj)
    return [(child, child._hf_hook) for child in children if hasattr(child, "_hf_hook")]


@contextmanager
def _recorded_logits(routers: Sequence[Router], logits: list[Tensor]) -> Iterator[None]:
    """Keep what the routers' linear maps give."""

    def record(router: Router, x: Tensor) -> Tensor:
        logits.append(Router.logits(router, x))
        return logits[-1]

    for router in routers:
        router.logits = partial(record, router)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for router in routers:
            del router.logits


@contextmanager
def _recorded_stream(layers: nn.ModuleList, kept: list[Tensor], shape: torch.Size) -> Iterator[None]:
    """Keep the stream before each layer, its predecessor's update added."""

    def record(layer: nn.Module, args: tuple) -> None:
        stream, update = args[:2]
        kept.append((stream if update is None else stream + update).view(shape))

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_autocast(device: str) -> Any:
    """Leave autocast: every operation here names the dtype that it computes in."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    logger.warning_once(
        "MoEMamba leaves autocast and computes in the dtype of its weights: load it with dtype=torch.bfloat16 for bf16."
    )
    return torch.autocast(device, enabled=False)


MoEMambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # save_pretrained writes this file, too


__all__ = ["MoEMambaCache", "MoEMambaForCausalLM", "MoEMambaPreTrainedModel"]
