# SPDX-License-Identifier: Apache-2.0
"""MoEMambaForCausalLM: a language model of Mamba, attention and mixtures of experts, for Transformers.

Assembled from the source of the package moe_mamba by tools/assemble_hf.py: change it there, not here. Where a docstring
names one of its modules, more stands there; nothing of it is needed.
"""

import difflib
import functools
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial, wraps
from itertools import islice, pairwise
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils import logging

from .configuration_moe_mamba import SHARDS_TENSORS, MoEConfig, MoEMambaConfig, StackConfig

ModelConfig = StackConfig  # what the layers read

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


# From moe_mamba/hf/shell/grouped.py:
# Experts' products in plain torch: as many rows each as the router sent, or, with a capacity, all alike.
#
# How many rows an expert has is known only on the device, so what traces a graph (compile, export) sees one operator
# where there is no capacity, and not a loop.


def plain_grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, capacity: int | None) -> Tensor:
    """See ``moe_mamba.kernels.grouped_matmul``."""
    if capacity is not None:
        return torch.bmm(x.unflatten(0, (len(weight), capacity)), weight).flatten(0, 1)
    if torch.compiler.is_compiling():
        return torch.ops.moe_mamba_plain.grouped_product(x, weight, counts)
    return _products(x, weight, counts)


def _products(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each group's rows times its matrix: (rows, in), (groups, in, out), (groups,) -> (rows, out)."""
    parts = x.split(counts.tolist())
    return torch.cat([rows @ matrix for rows, matrix in zip(parts, weight, strict=True)])


def _outer(x: Tensor, gradient: Tensor, counts: Tensor) -> Tensor:
    """The gradient of the matrices: (rows, in), (rows, out), (groups,) -> (groups, in, out)."""
    parts = zip(x.split(counts.tolist()), gradient.split(counts.tolist()), strict=True)
    return torch.stack([rows.t() @ part for rows, part in parts])


def _product_shape(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _outer_shape(x: Tensor, gradient: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], x.shape[1], gradient.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, counts = ctx.saved_tensors
    operators = torch.ops.moe_mamba_plain
    x_gradient = operators.grouped_product(gradient, weight.transpose(1, 2), counts)
    return x_gradient, operators.grouped_outer(x, gradient, counts), None


def _register() -> None:
    """Make the operators once per process: code of several folders may be loaded, and a second making breaks both."""
    if hasattr(torch.ops.moe_mamba_plain, "grouped_outer"):
        return
    product, outer = "moe_mamba_plain::grouped_product", "moe_mamba_plain::grouped_outer"
    torch.library.define(product, "(Tensor x, Tensor weight, Tensor counts) -> Tensor")
    torch.library.define(outer, "(Tensor x, Tensor gradient, Tensor counts) -> Tensor")
    torch.library.impl(product, "default", _products)
    torch.library.impl(outer, "default", _outer)
    torch.library.register_fake(product, _product_shape)
    torch.library.register_fake(outer, _outer_shape)
    torch.library.register_autograd(product, _gradients, setup_context=_keep)


_register()


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


def _final_state(x: Tensor, document_starts: Tensor | None, initial_state: Tensor) -> Tensor:
    """The last width - 1 inputs, (batch, width - 1, channels), zeros before the last start."""
    reach = initial_state.shape[1]
    if document_starts is None and x.shape[1] >= reach:
        return x[:, x.shape[1] - reach :].clone()  # not a view, which would keep the whole of x
    tail = torch.cat((initial_state, x[:, max(0, x.shape[1] - reach) :]), 1)
    tail = tail[:, tail.shape[1] - reach :]
    if document_starts is None or reach == 0:
        return tail
    started = torch.cat((document_starts.new_zeros(document_starts.shape[0], reach), document_starts), 1)[:, -reach:]
    # a start at a later position hides an input: starts after it, counted from the end
    later = started.flip(1).cumsum(1).flip(1) - started.long()
    return tail.masked_fill((later > 0)[..., None], 0)


# From moe_mamba/kernels/causal_conv/reference.py:
# The convolution written down: a loop over taps, plain autograd. It defines what the other back ends must give.


def plain_causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, document_starts: Tensor | None, initial_state: Tensor
) -> Tensor:
    """See ``moe_mamba.kernels.causal_conv``, less its final state; computes in fp64 for fp64 inputs, else in fp32."""
    work = torch.promote_types(x.dtype, torch.float32)
    length, width = x.shape[1], weight.shape[1]
    past = torch.cat((initial_state, x), 1).to(work)  # (batch, width - 1 + length, channels)
    out = bias.to(work).expand(x.shape)
    # True: a start lies between tap and present
    hidden = None if document_starts is None else torch.zeros_like(document_starts)
    for back in range(width):
        tap = past[:, width - 1 - back : width - 1 - back + length]
        if document_starts is not None and hidden is not None:
            tap = tap.masked_fill(hidden[..., None], 0)
            hidden = hidden | F.pad(document_starts, (back, 0))[:, :length]
        out = out + tap * weight[:, width - 1 - back].to(work)
    return F.silu(out).to(x.dtype)


# From moe_mamba/kernels/causal_conv/torch_conv.py:
# The convolution as shifted multiply-adds with its own backward, which keeps nothing but the inputs.


@torch.no_grad()
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
    document_starts: Tensor | None
    initial_state: Tensor | None


# From moe_mamba/kernels/selective_scan/chunked_scan.py:
# The recurrence in torch's own operations, in about 2 sqrt(length) steps in the place of length ones.
#
# The length is split into sqrt(length) chunks that advance side by side. A first pass finds what each chunk adds to the
# state that enters it; those are carried from chunk to chunk; a second pass starts every chunk from its own entering
# state and reads. Nothing but plain operations, so it is differentiable, and what traces a graph sees all of it; the
# graph grows with the square root of the length, which must be known when it is traced.


def plain_selective_scan(operands: Operands) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.selective_scan``; computes in fp64 for fp64 inputs, else in fp32."""
    x, delta, A, B, C, D, z, delta_bias, document_starts, initial_state = operands
    dtype, work = x.dtype, torch.promote_types(x.dtype, torch.float32)
    batch, length, _ = x.shape
    size = 1
    while size * size < length:  # comparisons: a traced length is bounded by them, and need not be one number
        size += 1
    x, A, B, C, D = (tensor.to(work) for tensor in (x, A, B, C, D))
    step = F.softplus(delta.to(work) if delta_bias is None else delta.to(work) + delta_bias.to(work))

    def chunks(tensor: Tensor) -> Tensor:
        """(batch, length, ...) as (batch, chunks, size, ...); a step of zero behind the end leaves the state alone."""
        padding = (0, 0) * (tensor.dim() - 2) + (0, -length % size)
        return F.pad(tensor, padding).unflatten(1, (-1, size))

    steps, entering, B, C = (chunks(tensor) for tensor in (step, step * x, B, C))
    resets = None if document_starts is None else chunks(document_starts)

    def advance(h: Tensor, t: int) -> Tensor:
        """The states (batch, chunks, d_inner, d_state) after the chunks' tokens number ``t``."""
        if resets is not None:  # select, because 0 x NaN is NaN
            h = h.masked_fill(resets[:, :, t, None, None], 0)
        return torch.exp(steps[:, :, t, :, None] * A) * h + entering[:, :, t, :, None] * B[:, :, t, None]

    added = x.new_zeros(batch, steps.shape[1], *A.shape)
    for t in range(size):
        added = advance(added, t)
    decay = torch.exp(steps.sum(2)[..., None] * A)
    carried = [x.new_zeros(batch, *A.shape) if initial_state is None else initial_state.to(work)]
    for chunk in range(steps.shape[1]):
        passed = decay[:, chunk] * carried[-1]
        if resets is not None:
            passed = passed.masked_fill(resets[:, chunk].any(1)[:, None, None], 0)
        carried.append(passed + added[:, chunk])
    h, read = torch.stack(carried[:-1], 1), []
    for t in range(size):
        h = advance(h, t)
        read.append((h @ C[:, :, t, :, None])[..., 0])  # (batch, chunks, d_inner)
    y = torch.stack(read, 2).flatten(1, 2)[:, :length] + D * x
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(dtype), carried[-1]


# From moe_mamba/kernels/selective_scan/torch_scan.py:
# The recurrence in plain torch with its own backward: the back end that trains on CPUs.


@torch.no_grad()
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


# From moe_mamba/model/precision.py:
# What has a precision of its own, whatever an autocast around the model says.


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function whose operations name their dtypes outside of autocast, which would cast their products.

    Args:
        function: one of its positional arguments is a tensor, which says the type of the device.
    """

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(value.device.type for value in args if isinstance(value, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


# From moe_mamba/hf/shell/kernels.py:
# The operations with the signatures of ``moe_mamba.kernels``: that package's where it is installed, else plain torch.
#
# The plain ones compute what the reference versions define; ``backend`` is not looked at. What traces a graph (compile,
# export) gets the package's as operators: what was exported with them runs only beside the package. Under autocast an
# operation computes as it would without: its inputs have the dtype that the products before it gave them, and experts'
# products are cast here.


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
        document_starts: Tensor | None = None,
        initial_state: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.causal_conv``."""
        if initial_state is None:
            initial_state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
        y = plain_causal_conv(x, weight, bias, document_starts, initial_state)
        return y, _final_state(x, document_starts, initial_state)

    @staticmethod
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
        document_starts: Tensor | None = None,
        initial_state: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.selective_scan``."""
        return plain_selective_scan(Operands(x, delta, A, B, C, D, z, delta_bias, document_starts, initial_state))

    @staticmethod
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


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Torch's own: what quantises a model or adapts it knows this one."""
    return functional.linear(x, weight, bias)


def build_linear(in_features: int, out_features: int, bias: bool = False, kernels: str = "auto") -> nn.Linear:
    """Torch's own layer, which such libraries look for."""
    return nn.Linear(in_features, out_features, bias=bias)


try:
    from moe_mamba import kernels as operations
except ImportError:
    operations = Plain  # type: ignore[assignment]


def _operation(name: str) -> Callable[..., Any]:
    """The operation of this name, from ``operations``."""

    @without_autocast
    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(operations, name)(*args, **kwargs)

    return run


def grouped_matmul(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The experts' products, which autocast casts as it does a linear layer's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    return _grouped_matmul(x, weight, *args, **kwargs)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None, backend: str = "auto") -> Any:
    """The norm of the stream and its update, which autocast gives in another dtype than the stream's."""
    return _rms_norm(x, weight, epsilon, None if residual is None else residual.to(x.dtype), backend)


activation = _operation("activation")
causal_conv, causal_conv_step = _operation("causal_conv"), _operation("causal_conv_step")
cross_entropy = _operation("cross_entropy")
sort_by_expert = _operation("sort_by_expert")
gather_rows, combine_rows = _operation("gather_rows"), _operation("combine_rows")
selective_scan, selective_scan_step = _operation("selective_scan"), _operation("selective_scan_step")
_grouped_matmul, _rms_norm = _operation("grouped_matmul"), _operation("rms_norm")


# From moe_mamba/model/initialize.py:
# Every weight a pure function of (seed, its logical name, expert index).


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
    """Normal of std sqrt(0.1 / fan_in), truncated at two of them (Switch Transformer, section 2.4)."""
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
        residual: it writes to the residual stream; by default it then starts smaller by sqrt(model.updates), so that
            the stream's variance does not grow with depth (GPT-2, section 2.3).
    """
    if config.initialization == "authors":
        return truncated_normal(fan_in)
    return uniform(fan_in, 1.0 / math.sqrt(config.updates) if residual else 1.0)


def embedding_weight(config: ModelConfig) -> Initializer:
    """How the embedding starts; the authors' counts a fan-in of one."""
    return truncated_normal(1) if config.initialization == "authors" else normal(0.02)


def head_weight(config: ModelConfig) -> Initializer:
    """How the head starts."""
    return truncated_normal(config.d_model) if config.initialization == "authors" else normal(0.02)


# From moe_mamba/model/sequences.py:
# What goes with the flat residual stream to every layer: its sequences, and what a caller wants to see of the pass.


@dataclass(frozen=True)
class Recording:
    """Intermediate results that a caller asked for, appended layer by layer; a None list is not asked for.

    Attributes:
        streams: the residual stream (batch, length, d_model) before each layer.
        attentions: (batch, heads, length, past + length) weights of each attention layer; asking for them makes
            attention compute them, which takes memory by the square of the length.
        router_logits: (tokens, experts) of each router, in the dtype of its weight.
    """

    streams: list[Tensor] | None = None
    attentions: list[Tensor] | None = None
    router_logits: list[Tensor] | None = None


@dataclass(frozen=True)
class Sequences:
    """The shape that goes with a residual stream of (tokens, d_model), tokens = batch x length.

    Attributes:
        batch: sequences in the stream.
        length: tokens per sequence.
        document_starts: (batch, length) bool, True where a document starts and nothing before may be seen;
            None: a sequence is one document that may go on from a state passed in.
        recording: what the pass shall keep; by default nothing.
    """

    batch: int
    length: int
    document_starts: Tensor | None = None
    recording: Recording = field(default_factory=Recording)

    @property
    def tokens(self) -> int:
        """Tokens in the stream."""
        return self.batch * self.length

    def to(self, device: torch.device, non_blocking: bool = False) -> "Sequences":
        """The same with its tensor on another device."""
        if self.document_starts is None:
            return self
        return replace(self, document_starts=self.document_starts.to(device, non_blocking=non_blocking))


# From moe_mamba/model/norm.py:
# Normalisation over the last axis, in fp32 whatever the input's dtype, of the stream and what is added to it.


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 2019): ``x / sqrt(mean(x^2) + epsilon) * weight``."""

    fp32_names = ("weight",)

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

    fp32_names = ("weight", "bias")

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


def build_norm(config: ModelConfig, kernels: str = "auto") -> RMSNorm | LayerNorm:
    """Build the norm over ``d_model`` that the config names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_epsilon, kernels)
    return LayerNorm(config.d_model, config.norm_epsilon)


# From moe_mamba/model/mixers/routing.py:
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
        capacity: rows of every expert, where all have as many; None: only ``counts`` knows.
    """

    token: Tensor
    weight: Tensor
    slot: Tensor
    counts: Tensor
    assigned: Tensor
    dropped: Tensor
    capacity: int | None = None

    def unweighted(self) -> Tensor:
        """(rows,): 1 in the place of ``weight``, and 0 in a slot that stayed empty."""
        if self.capacity is None:
            return torch.ones_like(self.weight)
        rows = len(self.token)
        place = torch.where(self.slot < 0, rows, self.slot).view(-1)
        return self.weight.new_zeros(rows + 1).index_fill(0, place, 1.0)[:rows]


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

    def divided_by(self, count: int) -> "RouterStatistics":
        """An even share of all sums."""
        return RouterStatistics(**{field.name: getattr(self, field.name) / count for field in fields(self)})


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
        kernels: back end, as in ``run.kernels``.
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
        kernels: back end, as in ``run.kernels``.
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
    """A bias-free linear map to one logit an expert, in its weight's dtype: fp32, whatever the model computes in.

    Args:
        width: of its input.
        moe: how it routes.
        kernels: back end, as in ``run.kernels``.

    Attributes:
        reduce: turns this rank's part of the logits' sums into the logits; a layout that shards the router's input puts
            another function in the place of this one.
        ranks: how many route the same tokens; each answers for its share of them in the statistics.
    """

    balance_bias: Tensor

    def __init__(self, width: int, moe: MoEConfig, kernels: str = "auto") -> None:
        super().__init__()
        self.config = moe
        self.kernels = kernels
        self.reduce: Callable[[Tensor], Tensor] = unchanged
        self.ranks = 1
        self.weight = nn.Parameter(torch.empty(moe.experts, width))
        if moe.balance == "bias":
            self.register_buffer("balance_bias", torch.zeros(moe.experts))
        self.fp32_names = ("weight", "balance_bias") if moe.balance == "bias" else ("weight",)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters and buffers start."""
        weight = {"weight": truncated_normal(self.weight.shape[1])}
        return weight | {"balance_bias": zeros} if self.config.balance == "bias" else weight

    def forward(self, x: Tensor, sequences: Sequences) -> tuple[Routing, RouterStatistics]:
        """Route ``x`` (tokens, width)."""
        logits = self.logits(x)
        if sequences.recording.router_logits is not None:
            sequences.recording.router_logits.append(logits)
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
        return routing, statistics if self.ranks == 1 else statistics.divided_by(self.ranks)

    @without_autocast
    def logits(self, x: Tensor) -> Tensor:
        """One logit an expert for each token of ``x`` (tokens, width), (tokens, experts)."""
        return self.reduce(functional.linear(x.to(self.weight.dtype), self.weight))

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each token, best first, and their weights, both (tokens, top_k).

        The balancing bias (DeepSeek-V3, section 2.1.2) moves only the choice, never a weight.
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
        return slots(factor, self.config, tokens)


def slots(factor: float, moe: MoEConfig, tokens: int) -> int:
    """Of an expert, of ``tokens`` tokens that are routed together."""
    return min(max(math.floor(factor * moe.top_k * tokens / moe.experts), 1), tokens)


def unchanged(tensor: Tensor) -> Tensor:
    """What stands where some layouts put a collective."""
    return tensor


# From moe_mamba/model/mixers/dispatch.py:
# From a router's decision to rows for the experts of this device, and from their outputs back to tokens.
#
# The dispatcher is an object of its own: another one is all that spreading experts over devices changes.


@dataclass(frozen=True)
class Dispatch:
    """A router's decision, and what it means for this device; it serves any number of products.

    Attributes:
        routing: of this device's tokens.
        counts: (experts of this device,) int64, rows of each.
        capacity: rows of every expert of this device, where all have as many; None: only ``counts`` knows.
        travel: how rows come to other devices; None: none do.
    """

    routing: Routing
    counts: Tensor
    capacity: int | None
    travel: Any = None


class Dispatcher(Protocol):
    """Brings rows to the experts of this device, and their outputs back."""

    def plan(self, routing: Routing) -> Dispatch:
        """Find out which rows come to this device."""

    def send(self, x: Tensor, dispatch: Dispatch) -> Callable[[], Tensor]:
        """Send ``x`` (tokens, width); what is returned waits for this device's rows (rows, width), sorted by expert."""

    def combine(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Sum the outputs of a token's experts by weight, (tokens, width); zero for one without any."""

    def combine_unweighted(self, outputs: Sequence[Tensor], dispatch: Dispatch) -> list[Tensor]:
        """As ``combine``, but the outputs as they are, of several products of the same rows."""


class LocalDispatcher:
    """All experts are on this device; ``kernels`` names the back end of its gather and its sum."""

    def __init__(self, kernels: str) -> None:
        self._kernels = kernels

    def plan(self, routing: Routing) -> Dispatch:
        """All rows stay."""
        return Dispatch(routing, routing.counts, routing.capacity)

    def send(self, x: Tensor, dispatch: Dispatch) -> Callable[[], Tensor]:
        """Gather the tokens in the order of the experts."""
        rows = gather_rows(x, dispatch.routing.token, dispatch.routing.slot, backend=self._kernels)
        return lambda: rows

    def combine(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Sum the outputs; the sum over a token's experts is in the weights' dtype (fp32)."""
        routing = dispatch.routing
        return combine_rows(rows, routing.weight, routing.token, routing.slot, backend=self._kernels)

    def combine_unweighted(self, outputs: Sequence[Tensor], dispatch: Dispatch) -> list[Tensor]:
        """Sum the outputs; where each token has one row, nothing is summed: they are put in the tokens' order."""
        routing = dispatch.routing
        token, slot = routing.token, routing.slot
        if routing.capacity is None and slot.shape[1] == 1:
            return [Permutation.apply(rows, slot.view(-1), token) for rows in outputs]
        weight = routing.unweighted()
        return [combine_rows(rows, weight, token, slot, backend=self._kernels) for rows in outputs]


class Permutation(torch.autograd.Function):
    """Rows in another order; the gradient is gathered by the inverse, where autograd would scatter and add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        """Row r is rows[order[r]]."""
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of only the rows."""
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


# From moe_mamba/model/mixers/base.py:
# What a mixer is, and what it declares: all that others ask about a kind of layer, so that nobody else knows it.
#
# A new kind is one file with one subclass, and its line in the registry (``model/mixers/__init__.py``).


Statistics = dict[str, RouterStatistics]
"""Name of a router inside the module that is asked -> what it measured."""


@dataclass(frozen=True)
class State:
    """What a mixer keeps between passes: a dataclass of tensors; those with axes have a row for each sequence first."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The state with every tensor changed."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: None if value is None else function(value) for name, value in values.items()}
        return replace(self, **changed)

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The state with every tensor changed that has a row for each sequence of the batch."""
        return self.map(lambda tensor: function(tensor) if tensor.dim() else tensor)

    def to(self, device: torch.device, non_blocking: bool = False) -> Any:
        """The state on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def kept_where(self, waits: Tensor, new: Any, tokens: int) -> Any:
        """The state after a pass over ``tokens`` tokens per row, but as it was for the rows that wait (batch,) bool."""
        pairs = {name: (getattr(self, name), value) for name, value in vars(new).items()}
        kept: dict[str, Any] = {name: choose_rows(waits, old, now.to(old.dtype)) for name, (old, now) in pairs.items()}
        return replace(new, **kept)


def choose_rows(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Rows of ``one`` where ``rows`` (batch,) bool says so, else of ``other``; both (batch, ...)."""
    return torch.where(rows.view(-1, *[1] * (other.dim() - 1)), one, other)


class Mixer(nn.Module):
    """The part of a layer that mixes tokens or channels; a layer adds its norm and the residual stream.

    Attributes:
        letter: its letter in ``model.pattern``.
        title: its name for people.
        settings: keys of the configuration that say how it is built, as people want to see them.
        fp32_names: own parameters and buffers that stay fp32 in a bf16 model: small, and sensitive to rounding.
        logical_names: an attribute of its own -> what checkpoints and initial weights call it, where that is another
            name; see ``model/names.py``.
        not_matrices: own parameters of two axes that are no matrices: neither decayed nor part of a product.
        gathers_tokens: under tensor parallelism it reads the tokens of all ranks; else each rank's own.
        routes: it has routed experts.
        begins: ``start`` sends tokens on their way, so that others should compute before it ends.
    """

    letter: ClassVar[str]
    title: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()
    fp32_names: tuple[str, ...] = ()
    logical_names: ClassVar[Mapping[str, str]] = {}
    not_matrices: ClassVar[tuple[str, ...]] = ()
    gathers_tokens: ClassVar[bool] = True
    routes: ClassVar[bool] = False
    begins: ClassVar[bool] = False

    @classmethod
    def serves(cls, moe: MoEConfig, number: int) -> bool:
        """Whether a variant of a kind of layer takes the place of the ``number``-th such layer, counted from 1."""
        return False

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "Mixer":
        """The mixer of a layer; ``kernels``: as ``run.kernels``."""
        raise NotImplementedError

    @classmethod
    def check(cls, config: ModelConfig, moe: MoEConfig) -> None:
        """Refuse a configuration that no such layer can be built from.

        Raises:
            ValueError: one line: the keys, what is wrong, and the fix.
        """

    @classmethod
    def looks_ahead(cls, config: ModelConfig, moe: MoEConfig) -> bool:
        """Whether a token's output depends on later tokens, so that the model cannot generate."""
        return False

    def initial_state(
        self, batch: int, dtype: torch.dtype, device: torch.device | str, room: int | None = None
    ) -> State | None:
        """The state before any token; None: the mixer keeps nothing.

        Args:
            batch: sequences.
            dtype: of the activations.
            device: of the state.
            room: tokens that may come; None: any number.
        """
        return None

    def forward(self, x: Tensor, sequences: Sequences, state: Any = None) -> tuple[Tensor, Statistics, State | None]:
        """Map ``x`` (tokens, d_model); returns (y (tokens, d_model), statistics of its routers, new state)."""
        raise NotImplementedError

    def start(self, x: Tensor, sequences: Sequences, state: Any = None) -> Callable[[], tuple[Any, ...]]:
        """Begin a pass, and return what ends it with what ``forward`` returns.

        In a layer of several mixers all begin before any ends: what travels between devices is on its way meanwhile.
        """
        return partial(self, x, sequences, state)


# From moe_mamba/model/mixers/inner_experts.py:
# Experts that stand in the place of a projection: of one matrix each, or of two with an activation between them.


class LinearExperts(nn.Module):
    """Stacked experts of one matrix each, weight (experts, in, out), which starts as the one of Mamba's projection."""

    is_stacked = True  # each expert's slice has a generator of its own, see initialize.py

    def __init__(self, experts: int, width: int, out: int, scale: float, kernels: str) -> None:
        super().__init__()
        self.fan_in, self.scale, self.kernels = width, scale, kernels
        self.weight = nn.Parameter(torch.empty(experts, width, out))

    def initializers(self) -> dict[str, Initializer]:
        """How one expert starts."""
        return {"weight": uniform(self.fan_in, self.scale)}

    def forward(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Map ``rows`` (rows, in), sorted by expert, each by its own, to (rows, out)."""
        return grouped_matmul(rows, self.weight, dispatch.counts, dispatch.capacity, self.kernels)


class SwitchExperts(nn.Module):
    """Stacked experts of two matrices each, with the model's activation between them.

    Attributes:
        reduce: turns this rank's part of all hidden units' inputs into the inputs of its own hidden units, where a
            layout shards what experts read.
        gather: turns this rank's hidden units into those of all, where a layout shards what experts write.
    """

    is_stacked = True

    def __init__(
        self, config: ModelConfig, experts: int, sizes: tuple[int, int, int], writes_to_stream: bool, kernels: str
    ) -> None:
        super().__init__()
        width, hidden, out = sizes
        self.config, self.writes_to_stream, self.kernels = config, writes_to_stream, kernels
        self.reduce: Callable[[Tensor], Tensor] = unchanged
        self.gather: Callable[[Tensor], Tensor] = unchanged
        self.in_proj = nn.Parameter(torch.empty(experts, width, input_width(config.activation, hidden)))
        self.out_proj = nn.Parameter(torch.empty(experts, hidden, out))
        self.fan_ins = width, hidden

    def initializers(self) -> dict[str, Initializer]:
        """How one expert's parameters start: as those of the layers ``E``."""
        width, hidden = self.fan_ins
        return {
            "in_proj": matrix(self.config, width),
            "out_proj": matrix(self.config, hidden, residual=self.writes_to_stream),
        }

    def forward(self, rows: Tensor, dispatch: Dispatch) -> Tensor:
        """Map ``rows`` (rows, in), sorted by expert, each by its own, to (rows, out)."""
        counts, capacity, kernels = dispatch.counts, dispatch.capacity, self.kernels
        hidden = self.reduce(grouped_matmul(rows, self.in_proj, counts, capacity, kernels))  # (rows, input width)
        hidden = self.gather(activation(hidden, self.config.activation, kernels))  # (rows, hidden)
        return grouped_matmul(hidden, self.out_proj, counts, capacity, kernels)


# From moe_mamba/model/mixers/mamba.py:
# The Mamba-1 mixer (Gu and Dao, arXiv 2312.00752, section 3.4), with Jamba's norms on request (arXiv 2403.19887).
#
# Symbols, the paper's name first:
#
#     D   d_model    width of the residual stream             Delta  delta   step size of a channel at a token
#     E   expand     d_inner = E x D channels, by default     A      A       decay of a channel's states, negative
#     N   d_state    states of a channel                      B      B       what of the input enters the states
#     R   dt_rank    rank of delta's projection               C      C       what of the states is read
#     x   x          input of a channel, after convolution    h      scan    the states
#     z   z          gate, beside x
#
# Parameters have the names of the library mamba-ssm.


SMALLEST_DELTA, LARGEST_DELTA, DELTA_FLOOR = 1e-3, 1e-1, 1e-4  # at the start of training


@dataclass(frozen=True)
class MambaState(State):
    """What the mixer keeps between passes; its size does not depend on the tokens seen.

    Attributes:
        conv: (batch, d_conv - 1, d_inner), the last inputs of the convolution, in the dtype of the activations.
        scan: (batch, d_inner, d_state), fp32 (fp64 in an fp64 model).
    """

    conv: Tensor
    scan: Tensor


class DepthwiseConv(nn.Module):
    """A causal convolution of each channel by itself, then SiLU: weight (channels, width) and bias (channels)."""

    def __init__(self, channels: int, width: int, kernels: str) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(
        self, x: Tensor, document_starts: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve whole sequences, or one more token of each; returns (y, new state), in the dtype of ``x``.

        Args:
            x: (batch, length, channels); one more token, after ``state``: (batch, channels).
            document_starts: (batch, length) bool, see ``Sequences``.
            state: (batch, width - 1, channels), the inputs before; None: zeros.
        """
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if x.dim() == 2:
            assert state is not None, "one more token goes on from a state"
            return causal_conv_step(x, weight, bias, state.to(x.dtype), self.kernels)
        return causal_conv(x, weight, bias, document_starts, None if state is None else state.to(x.dtype), self.kernels)


class StepProjection(nn.Module):
    """From delta's low rank to channels: weight (d_inner, dt_rank), bias (d_inner).

    The bias is not added: it stays fp32, and the scan adds it before its softplus. So this is no ``nn.Linear``, which
    quantisation and adapters would put another module with another sum in the place of.
    """

    fp32_names = ("bias",)

    def __init__(self, dt_rank: int, d_inner: int, kernels: str) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(d_inner, dt_rank))
        self.bias = nn.Parameter(torch.empty(d_inner))

    def forward(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``dt`` (..., dt_rank) to (..., d_inner), in its dtype; beside it the bias (d_inner)."""
        # A view, since what shards or offloads a module's weights may take them back when this returns.
        return linear(dt, self.weight.to(dt.dtype), backend=self.kernels), self.bias.view_as(self.bias)


class Projected(NamedTuple):
    """What a mixer's input was projected to: x and z of figure 3, each (tokens, d_inner)."""

    x: Tensor
    z: Tensor


class Mamba(Mixer):
    """The mixer: two projections in, a short convolution, the selective scan, a gate, a projection out."""

    letter, title = "M", "Mamba"
    settings = ("d_state", "d_conv", "resolved_d_inner", "resolved_dt_rank", "selective", "mamba_norms")
    not_matrices = ("A_log",)

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.fp32_names = ("A_log", "D") if config.selective else ("A_log", "D", "dt_B_C")
        d_inner, d_state, dt_rank = config.resolved_d_inner, config.d_state, config.resolved_dt_rank
        self.in_proj = build_linear(config.d_model, 2 * d_inner, kernels=kernels)
        self.conv1d = DepthwiseConv(d_inner, config.d_conv, kernels)
        if config.selective:
            self.x_proj = build_linear(d_inner, dt_rank + 2 * d_state, kernels=kernels)
        else:
            self.dt_B_C = nn.Parameter(torch.empty(dt_rank + 2 * d_state))  # the same for every token
        self.dt_proj = StepProjection(dt_rank, d_inner, kernels)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.out_proj = build_linear(d_inner, config.d_model, kernels=kernels)
        if config.mamba_norms:
            self.dt_norm = RMSNorm(dt_rank, config.norm_epsilon, kernels)
            self.B_norm = RMSNorm(d_state, config.norm_epsilon, kernels)
            self.C_norm = RMSNorm(d_state, config.norm_epsilon, kernels)

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "Mamba":
        """See ``Mixer``."""
        return cls(config, kernels)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters start: as in mamba-ssm, whatever ``model.initialization`` says.

        By default ``out_proj`` is smaller by sqrt(layers), as that library's language model has it; the authors of
        MoE-Mamba took the bare mixer, without.
        """
        config = self.config
        return {
            "in_proj.weight": uniform(config.d_model),
            "conv1d.weight": uniform(config.d_conv),
            "conv1d.bias": uniform(config.d_conv),
            **(
                {"x_proj.weight": uniform(config.resolved_d_inner)} if config.selective else {"dt_B_C": self._constants}
            ),
            "dt_proj.weight": uniform(config.resolved_dt_rank),
            "dt_proj.bias": _delta_bias,
            "A_log": _A_log,
            "D": ones,
            "out_proj.weight": uniform(config.resolved_d_inner, out_scale(config)),
        }

    def initial_state(
        self,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        room: int | None = None,
    ) -> MambaState:
        """Return the state before any token; ``dtype`` is the activations'. Its size is the same for any ``room``."""
        channels = len(self.D)  # d_inner, or a shard of it
        wide = torch.promote_types(dtype, torch.float32)
        return MambaState(
            torch.zeros(batch, self.config.d_conv - 1, channels, dtype=dtype, device=device),
            torch.zeros(batch, channels, self.config.d_state, dtype=wide, device=device),
        )

    def forward(
        self, x: Tensor, sequences: Sequences, state: MambaState | None = None
    ) -> tuple[Tensor, Statistics, MambaState | None]:
        """Mix each token of ``x`` (tokens, d_model) with its document so far; returns (y, statistics, new state)."""
        projected = self.project(x, sequences)
        new_state: MambaState | None
        if state is not None and sequences.length == 1 and sequences.document_starts is None:
            y, new_state = self._step(projected.x, projected.z, state)
        else:
            shape = sequences.batch, sequences.length, -1
            y, new_state = self._pass(
                projected.x.view(shape), projected.z.view(shape), sequences.document_starts, state
            )
            y = y.reshape(sequences.tokens, -1)
        y, statistics = self.project_back(y, projected, sequences)
        return y, statistics, new_state

    def project(self, u: Tensor, sequences: Sequences) -> Any:
        """From the mixer's input (tokens, d_model) to x and z, each (tokens, d_inner); see ``Projected``."""
        return Projected(*self.in_proj(u).chunk(2, dim=-1))

    def project_back(self, y: Tensor, projected: Any, sequences: Sequences) -> tuple[Tensor, Statistics]:
        """From channels (tokens, d_inner) to (tokens, d_model), with the statistics of the mixer's routers."""
        return self.out_proj(y), {}

    def _pass(
        self, x: Tensor, z: Tensor, document_starts: Tensor | None, state: MambaState | None
    ) -> tuple[Tensor, MambaState | None]:
        """Convolution and scan of whole sequences; x and z (batch, length, d_inner)."""
        conv, scan = (None, None) if state is None else (state.conv, state.scan)
        x, conv = self.conv1d(x, document_starts, conv)
        delta, bias, B, C = self._select(x)
        A = -torch.exp(self.A_log)  # (d_inner, d_state); section 3.6
        kernels = self.kernels
        if kernels == "vendor" and state is not None:
            kernels = "auto"  # the vendor's scan serves only training: it starts from zeros
        y, scan = selective_scan(
            x, delta, A, B, C, self.D, z, bias, document_starts, scan, kernels
        )  # equations 2a, 2b and 4, and the gate
        return y, None if state is None else MambaState(conv, scan)

    def _step(self, x: Tensor, z: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """What ``_pass`` computes of one more token; x and z (batch, d_inner)."""
        x, conv = self.conv1d(x, None, state.conv)  # (batch, d_inner)
        delta, bias, B, C = self._select(x)
        A = -torch.exp(self.A_log)
        y, scan = selective_scan_step(x, delta, A, B, C, self.D, z, bias, state.scan, self.kernels)
        return y, MambaState(conv, scan)

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What makes the scan selective: delta, B and C from the input (algorithm 2, section 3.6).

        Without ``model.selective`` they are learned constants: the scan is linear and time-invariant, which is a long
        convolution (algorithm 1; here B and C are shared among channels).

        Args:
            x: (..., d_inner).

        Returns:
            delta before its bias and softplus (..., d_inner); that bias (d_inner); B and C (..., d_state).
        """
        d_state = self.config.d_state
        made = self.x_proj(x) if self.config.selective else self.dt_B_C.to(x.dtype).expand(*x.shape[:-1], -1)
        dt, B, C = made.split((self.config.resolved_dt_rank, d_state, d_state), dim=-1)
        if self.config.mamba_norms:
            (dt, _), (B, _), (C, _) = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        return *self.dt_proj(dt), B, C

    def _constants(self, weight: Tensor, generator: Generator) -> None:
        """As S4D starts (Gu et al., arXiv 2206.11893): delta is only its bias, B is one, C standard normal."""
        dt, B, C = weight.split((self.config.resolved_dt_rank, self.config.d_state, self.config.d_state))
        dt.zero_()
        B.fill_(1.0)
        C.normal_(generator=generator)


def out_scale(config: ModelConfig) -> float:
    """How much smaller than others the projection to the stream starts."""
    return 1.0 if config.initialization == "authors" else 1 / math.sqrt(config.updates)


def _A_log(weight: Tensor, generator: Generator) -> None:
    """S4D-real (section 3.6): A[n] = -n for n from 1."""
    weight.copy_(torch.arange(1, weight.shape[1] + 1, dtype=torch.float32).log().expand_as(weight))


def _delta_bias(weight: Tensor, generator: Generator) -> None:
    """The inverse of softplus of a delta that is log-uniform in [0.001, 0.1] (section 3.6)."""
    weight.uniform_(math.log(SMALLEST_DELTA), math.log(LARGEST_DELTA), generator=generator)
    delta = weight.exp().clamp_(min=DELTA_FLOOR)
    weight.copy_(delta + torch.log(-torch.expm1(-delta)))


# From moe_mamba/model/mixers/attention.py:
# Causal attention (Vaswani et al., 2017) with rotary positions or none, and grouped key and value heads.
#
# Over all of a document so far, or over a sliding window of it.
#
# Symbols: b batch, l length (new tokens), p past tokens in a state, h query heads, g key and value heads, e width of
# a head.


@dataclass(frozen=True)
class AttentionState(State):
    """What attention keeps between passes: it grows by the tokens seen, to at most ``model.sliding_window`` - 1.

    Or it has room for a fixed number of tokens, none of which it leaves behind.

    Attributes:
        key: (batch, kv_heads, past, head_dim), already rotated.
        value: (batch, kv_heads, past, head_dim).
        start: (batch,) int64: place among the past tokens where the current document starts; below 0 where that is a
            token that the window has left behind.
        seen: () int64, how many of the places hold a token, the first ones; None: all do.
    """

    key: Tensor
    value: Tensor
    start: Tensor
    seen: Tensor | None = None

    @property
    def past(self) -> int | Tensor:
        """Tokens that are kept."""
        return self.key.shape[2] if self.seen is None else self.seen

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with those of new tokens behind them; where there is room, in place and without gradient.

        Args:
            key: (batch, kv_heads, new, head_dim).
            value: (batch, kv_heads, new, head_dim).
        """
        if self.seen is None and not self.key.shape[2]:
            return key, value  # of this rank's heads, where they are sharded
        if self.seen is None:
            return torch.cat((self.key.to(key.dtype), key), dim=2), torch.cat(
                (self.value.to(value.dtype), value), dim=2
            )
        place = torch.arange(key.shape[2], device=key.device) + self.seen
        self.key.index_copy_(2, place, key.detach().to(self.key.dtype))
        self.value.index_copy_(2, place, value.detach().to(self.value.dtype))
        return self.key, self.value

    def kept_where(self, waits: Tensor, new: Any, tokens: int) -> Any:
        """See ``State``: keys and values of rows that wait move behind the places that the tokens took."""
        if new.seen is None:  # the last of what it was, where a window keeps no more of it
            kept, length = new.key.shape[2], self.key.shape[2]
            source = (torch.arange(kept, device=waits.device) + length - kept).clamp(min=0)
            key, value = (
                choose_rows(waits, was[:, :, source], now)
                for was, now in ((self.key, new.key), (self.value, new.value))
            )
            return replace(new, key=key, value=value, start=torch.where(waits, self.start + kept - length, new.start))
        place = torch.arange(new.key.shape[2], device=waits.device)
        moved = torch.where((place >= tokens) & (place < new.seen), place - tokens, place)
        source = torch.where(waits[:, None], moved, place)[:, None, :, None].expand_as(new.key)
        key, value = new.key.gather(2, source), new.value.gather(2, source)
        return replace(new, key=key, value=value, start=torch.where(waits, self.start + tokens, new.start))


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


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention (Vaswani et al., 2017, eq. 1) written down, which gives its weights too.

    Args:
        query: (b, h, l, e).
        key: (b, g, p, e), g a divisor of h.
        value: (b, g, p, e).
        mask: (b or 1, 1, l, p) bool, True where a query sees a key; None: causal, l = p.

    Returns:
        (b, h, l, e), and the weights (b, h, l, p), both in the dtype of the query; the softmax is fp32 at least.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (kept.to(query.dtype).repeat_interleave(groups, dim=1) for kept in (key, value))
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    score = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5  # (b, h, l, p)
    wide = torch.promote_types(query.dtype, torch.float32)
    weight = score.to(wide).masked_fill(~mask, -torch.inf).softmax(dim=-1).to(query.dtype)
    return weight @ value, weight


class Attention(Mixer):
    """Attention over the documents of each sequence, or over a window of them; projections named as in Llama."""

    letter, title = "*", "attention"
    settings = (
        *("heads", "resolved_kv_heads", "resolved_head_dim", "sliding_window", "attention_bias"),
        *("positions", "rope_base", "rope_type"),
    )

    def __init__(self, config: ModelConfig, kernels: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.head_dim, bias = config.resolved_head_dim, config.attention_bias
        width, kv_width = config.heads * self.head_dim, config.resolved_kv_heads * self.head_dim
        self.q_proj = build_linear(config.d_model, width, bias, kernels)
        self.k_proj = build_linear(config.d_model, kv_width, bias, kernels)
        self.v_proj = build_linear(config.d_model, kv_width, bias, kernels)
        self.o_proj = build_linear(width, config.d_model, bias, kernels)

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "Attention":
        """See ``Mixer``."""
        return cls(config, kernels)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's parameters start."""
        inputs = ("q_proj", "k_proj", "v_proj")
        fills = {f"{name}.weight": matrix(self.config, self.config.d_model) for name in inputs}
        fills["o_proj.weight"] = matrix(self.config, self.config.heads * self.head_dim, residual=True)
        if self.config.attention_bias:
            fills |= {f"{name}.bias": zeros for name in (*inputs, "o_proj")}
        return fills

    def initial_state(
        self,
        batch: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        room: int | None = None,
    ) -> AttentionState:
        """Return the state before any token.

        Args:
            batch: sequences.
            dtype: of the activations.
            device: of the state.
            room: tokens that may come; None: any number, and the state grows.
        """
        shape = (batch, self.config.resolved_kv_heads, room or 0, self.head_dim)
        key, value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        seen = None if room is None else torch.zeros((), dtype=torch.int64, device=device)
        return AttentionState(key, value, torch.zeros(batch, dtype=torch.int64, device=device), seen)

    def forward(
        self, x: Tensor, sequences: Sequences, state: AttentionState | None = None
    ) -> tuple[Tensor, Statistics, AttentionState | None]:
        """Attend from each token of ``x`` (tokens, d_model) to its document so far; returns (y, {}, new state)."""
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
            key, value = state.extended(key, value)  # (b, g, p + l, e)
        if state is not None or sequences.document_starts is not None or sequences.length > window:
            mask = self._mask(place, start, key.shape[2])
        if sequences.recording.attentions is not None:
            y, weight = attend(query, key, value, mask)
            sequences.recording.attentions.append(weight)
        else:
            y = functional.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
            )  # (b, h, l, e)
        if state is not None:
            last = start[:, -1].expand(sequences.batch)
            seen = None if state.seen is None else state.seen + sequences.length
            state = self._kept(key, value, last) if seen is None else AttentionState(key, value, last, seen)
        return self.o_proj(y.transpose(1, 2).reshape(sequences.tokens, -1)), {}, state

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
        place = torch.arange(sequences.length, device=device) + (0 if state is None else state.past)
        first = torch.zeros(1, 1, dtype=torch.int64, device=device) if state is None else state.start[:, None]
        if sequences.document_starts is None:
            return place, first.expand(-1, sequences.length)
        return place, torch.where(sequences.document_starts, place, first).cummax(dim=1).values

    @classmethod
    def check(cls, config: ModelConfig, moe: MoEConfig) -> None:
        """Refuse heads that do not divide, and rotary positions of an odd width or with a scaling that does nothing.

        Raises:
            ValueError: see ``Mixer``.
        """
        if config.head_dim is None and config.d_model % config.heads:
            raise ValueError(
                f"model.d_model={config.d_model} is not divisible by model.heads={config.heads}: "
                "change one of them, or set model.head_dim"
            )
        if config.heads % config.resolved_kv_heads:
            raise ValueError(
                f"model.heads={config.heads} is not divisible by model.kv_heads={config.kv_heads}: change one of them"
            )
        if config.positions == "rope" and config.resolved_head_dim % 2:
            width = "model.d_model / model.heads" if config.head_dim is None else "model.head_dim"
            raise ValueError(
                f"{width} = {config.resolved_head_dim} is odd: "
                "rotary positions need an even one, or set model.positions=none"
            )
        if config.rope_type != "default" and config.positions != "rope":
            raise ValueError(
                f"model.rope_type={config.rope_type} with model.positions={config.positions}, which has no rotary "
                "frequencies: set model.rope_type=default, or model.positions=rope"
            )
        if config.rope_type == "default" and config.rope_factor != 1:
            raise ValueError(
                f"model.rope_factor={config.rope_factor:g} with model.rope_type=default, which scales nothing: "
                "set model.rope_type=linear or llama3"
            )
        if config.rope_type == "llama3" and config.rope_low_freq_factor >= config.rope_high_freq_factor:
            raise ValueError(
                f"model.rope_low_freq_factor={config.rope_low_freq_factor:g} is not below "
                f"model.rope_high_freq_factor={config.rope_high_freq_factor:g}: change one of them"
            )


# From moe_mamba/model/mixers/feed_forward.py:
# Feed-forward layers.


def input_width(activation: str, width: int) -> int:
    """Columns of the input projection for a hidden width: SwiGLU has a gate beside the values."""
    return 2 * width if activation == "swiglu" else width


class FeedForward(Mixer):
    """Two matrices, with biases or without, and an activation between them."""

    letter, title = "-", "feed-forward"
    settings = ("resolved_d_ff", "activation", "mlp_bias")

    def __init__(
        self, config: ModelConfig, width: int | None = None, bias: bool = False, kernels: str = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.width = width or config.resolved_d_ff
        self.in_proj = build_linear(config.d_model, input_width(config.activation, self.width), bias, kernels)
        self.out_proj = build_linear(self.width, config.d_model, bias, kernels)

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "FeedForward":
        """See ``Mixer``."""
        return cls(config, bias=config.mlp_bias, kernels=kernels)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's parameters start."""
        fills = {
            "in_proj.weight": matrix(self.config, self.config.d_model),
            "out_proj.weight": matrix(self.config, self.width, residual=True),
        }
        if self.in_proj.bias is not None:
            fills |= {"in_proj.bias": zeros, "out_proj.bias": zeros}
        return fills

    def forward(self, x: Tensor, sequences: Sequences, state: None = None) -> tuple[Tensor, Statistics, None]:
        """Map ``x`` (tokens, d_model) token by token; returns (y, {}, None)."""
        hidden = activation(self.in_proj(x), self.config.activation, self.kernels)  # (tokens, width)
        return self.out_proj(hidden), {}, None


# From moe_mamba/model/mixers/moe.py:
# Mixture of experts: route -> dispatch -> experts -> combine.


class Experts(nn.Module):
    """Stacked experts: two bias-free matrices each, with an activation between them."""

    is_stacked = True  # each expert's slice has a generator of its own, see initialize.py

    def __init__(self, config: ModelConfig, experts: int, width: int, kernels: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
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
        kernels = self.kernels
        hidden = grouped_matmul(rows, self.in_proj, counts, capacity, kernels)  # (rows, input width)
        hidden = activation(hidden, self.config.activation, kernels)  # (rows, width)
        return grouped_matmul(hidden, self.out_proj, counts, capacity, kernels)  # (rows, d_model)


class MoE(Mixer):
    """A mixture-of-experts layer: routed experts, and shared ones that see every token."""

    letter, title = "E", "mixture of experts"
    settings = ("activation",)
    gathers_tokens = False  # routers and experts work on each rank's own tokens
    routes = True
    begins = True

    def __init__(self, config: ModelConfig, moe: MoEConfig, kernels: str = "auto") -> None:
        super().__init__()
        width = moe.d_expert or config.resolved_d_ff
        self.router = Router(config.d_model, moe, kernels)
        self.experts = Experts(config, moe.experts, width, kernels)
        shared = moe.shared_experts
        self.shared = FeedForward(config, shared * width, kernels=kernels) if shared else None
        self.dispatcher: Dispatcher = LocalDispatcher(kernels)

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "MoE":
        """See ``Mixer``."""
        return cls(config, moe, kernels)

    @classmethod
    def looks_ahead(cls, config: ModelConfig, moe: MoEConfig) -> bool:
        """Experts that choose their tokens choose among later ones, too."""
        return moe.router == "expert_choice"

    def forward(self, x: Tensor, sequences: Sequences, state: None = None) -> tuple[Tensor, Statistics, None]:
        """Map ``x`` (tokens, d_model); a token that every expert dropped gets zero, so it rides the residual."""
        return self.start(x, sequences)()

    def start(
        self, x: Tensor, sequences: Sequences, state: None = None
    ) -> Callable[[], tuple[Tensor, Statistics, None]]:
        """See ``Mixer``: what begins is the tokens' way to their experts."""
        return partial(self._finish, self.start_routed(x, sequences), x, sequences)

    def _finish(
        self, finish_routed: Callable[[], tuple[Tensor, RouterStatistics]], x: Tensor, sequences: Sequences
    ) -> tuple[Tensor, Statistics, None]:
        y, statistics = finish_routed()
        if self.shared is not None:
            y = y + self.shared(x, sequences)[0]
        return y, {"router": statistics}, None

    def start_routed(self, x: Tensor, sequences: Sequences) -> Callable[[], tuple[Tensor, RouterStatistics]]:
        """Begin the routed experts' part of the output, (tokens, d_model)."""
        routing, statistics = self.router(x, sequences)
        dispatch = self.dispatcher.plan(routing)
        return partial(self._finish_routed, self.dispatcher.send(x, dispatch), dispatch, statistics)

    def _finish_routed(
        self, receive: Callable[[], Tensor], dispatch: Dispatch, statistics: RouterStatistics
    ) -> tuple[Tensor, RouterStatistics]:
        rows = self.experts(receive(), dispatch.counts, capacity=dispatch.capacity)
        return self.dispatcher.combine(rows, dispatch), statistics


# From moe_mamba/model/mixers/routed_mamba.py:
# Mamba with experts inside: projections of the mixer are mixtures, each token's by the experts that a router gave it.
#
# Two designs. With a router for each projection it is the inner MoE of MoE-Mamba's second version (arXiv 2401.04081v2).
# With one router for all of them it is Routing Mamba (Zhan et al., arXiv 2506.18145, where routing is shared): for a
# token with input u, the router's shares p = softmax(W_r u) and their largest k, the set K,
#
#     x = sum over K of W_conv,i u        z = sum over K of W_gate,i u        y = sum over K of p_i W_out,i s
#
# where s is what convolution, scan and gate make of x and z. These, x_proj and dt_proj are common to all experts. An
# expert of Routing Mamba is one matrix (``moe.inner.expert=linear``); the authors of MoE-Mamba have two with an
# activation between them (``switch``).
#
# A mixer has no residual stream inside: a token for which an expert has no room gets zero from that projection.


ENTRIES = ("conv", "gate")  # the halves of in_proj, in their order
PROJECTIONS = (*ENTRIES, "out")


class RoutedProjected(NamedTuple):
    """As ``Projected``, with what the way out needs: a shared router's decision, and the statistics so far."""

    x: Tensor
    z: Tensor
    dispatch: Dispatch | None
    statistics: Statistics


class RoutedMamba(Mamba):
    """Mamba whose projections named by ``moe.inner.projections`` are mixtures of experts.

    Attributes:
        reduce: turns this rank's part of the output's sums into the output, where a layout shards the channels and
            ``out`` is routed; else ``out_proj`` does it.
    """

    title = "Mamba with experts inside"
    routes = True

    def __init__(self, config: ModelConfig, moe: MoEConfig, kernels: str = "auto") -> None:
        super().__init__(config, kernels)
        self.inner, self.routing = moe.inner, moe.inner_routing
        self.dispatcher: Dispatcher = LocalDispatcher(kernels)
        self.reduce: Callable[[Tensor], Tensor] = unchanged
        plain = [name for name in ENTRIES if name not in self.inner.projections]
        width = len(plain) * config.resolved_d_inner
        self.in_proj = build_linear(config.d_model, width, kernels=kernels) if plain else None  # type: ignore[assignment]
        if "out" in self.inner.projections:
            self.out_proj = None  # type: ignore[assignment]
        if self.inner.router == "shared":
            self.router = Router(config.d_model, self.routing, kernels)
        for name in PROJECTIONS:
            if name in self.inner.projections:
                width = config.resolved_d_inner if name == "out" else config.d_model
                if self.inner.router == "own":
                    self.add_module(f"{name}_router", Router(width, self.routing, kernels))
                self.add_module(f"{name}_experts", self._experts(name, width))

    def _experts(self, name: str, width: int) -> nn.Module:
        config, moe = self.config, self.routing
        out = config.d_model if name == "out" else config.resolved_d_inner
        if self.inner.expert == "linear":
            scale = out_scale(config) if name == "out" else 1.0
            return LinearExperts(moe.experts, width, out, scale, self.kernels)
        sizes = width, moe.d_expert or config.resolved_d_ff, out
        return SwitchExperts(config, moe.experts, sizes, name == "out", self.kernels)

    @classmethod
    def serves(cls, moe: MoEConfig, number: int) -> bool:
        """See ``Mixer``."""
        return bool(moe.inner.projections) and number % moe.inner.every == 0

    @classmethod
    def build(cls, config: ModelConfig, moe: MoEConfig, kernels: str) -> "RoutedMamba":
        """See ``Mixer``."""
        return cls(config, moe, kernels)

    def initializers(self) -> dict[str, Initializer]:
        """Those of Mamba's parameters that are left."""
        own = dict(self.named_parameters())
        return {name: fill for name, fill in super().initializers().items() if name in own}

    def project(self, u: Tensor, sequences: Sequences) -> RoutedProjected:
        """See ``Mamba``; rows are on their way while what is not routed is computed."""
        routed: list[str] = [name for name in ENTRIES if name in self.inner.projections]
        is_shared = self.inner.router == "shared"
        statistics: Statistics = {}
        dispatches: list[tuple[list[str], Dispatch, Callable[[], Tensor]]] = []
        for names, router in [(routed, "router")] if is_shared else [([name], f"{name}_router") for name in routed]:
            routing, statistics[router] = self.get_submodule(router)(u, sequences)
            dispatch = self.dispatcher.plan(routing)
            dispatches.append((names, dispatch, self.dispatcher.send(u, dispatch) if names else lambda: u))
        parts: dict[str, Tensor] = {}
        if self.in_proj is not None:
            plain = [name for name in ENTRIES if name not in routed]
            parts |= zip(plain, self.in_proj(u).chunk(len(plain), dim=-1), strict=True)
        for names, dispatch, receive in dispatches:
            rows = receive()
            made = [self.get_submodule(f"{name}_experts")(rows, dispatch) for name in names]
            if is_shared:
                made = self.dispatcher.combine_unweighted(made, dispatch)
            else:
                made = [self.dispatcher.combine(made[0], dispatch)]
            parts |= zip(names, made, strict=True)
        return RoutedProjected(parts["conv"], parts["gate"], dispatches[0][1] if is_shared else None, statistics)

    def project_back(self, y: Tensor, projected: Any, sequences: Sequences) -> tuple[Tensor, Statistics]:
        """See ``Mamba``."""
        _, _, dispatch, statistics = projected
        if self.out_proj is not None:
            return self.out_proj(y), statistics
        if dispatch is None:
            routing, measured = self.get_submodule("out_router")(y, sequences)
            statistics = statistics | {"out_router": measured}
            dispatch = self.dispatcher.plan(routing)
        rows = self.get_submodule("out_experts")(self.dispatcher.send(y, dispatch)(), dispatch)
        return self.reduce(self.dispatcher.combine(rows, dispatch)), statistics


# From moe_mamba/model/mixers/__init__.py:
# The kinds of layers, one file each. The registry: a letter of ``model.pattern`` -> its class, and its variants.


MIXERS: dict[str, type[Mixer]] = {mixer.letter: mixer for mixer in (Mamba, Attention, FeedForward, MoE)}
VARIANTS: tuple[type[Mixer], ...] = (RoutedMamba,)


def choose_mixer(letter: str, moe: MoEConfig, number: int) -> type[Mixer]:
    """The class of the ``number``-th layer of this letter, counted from 1: the letter's, or a variant of it."""
    variants = (mixer for mixer in VARIANTS if mixer.letter == letter and mixer.serves(moe, number))
    return next(variants, MIXERS[letter])


# From moe_mamba/model/pattern.py:
# The pattern, parsed: what ``model.pattern`` and ``model.repeat`` say, as a list of layers.


MOST_LAYERS = 4096  # letters, parentheses among them; beyond what has been trained, and planned within seconds


@dataclass(frozen=True)
class LayerSpec:
    """A layer of the residual stack.

    Attributes:
        mixers: the kinds that read its normalised input, and whose outputs are added to the residual stream.
    """

    mixers: tuple[type[Mixer], ...]


def layer_specs(config: ModelConfig, moe: MoEConfig) -> list[LayerSpec]:
    """Every layer of the model, in order.

    Raises:
        ValueError: the pattern is empty or too long, has a letter that stands for nothing, or parentheses that make no
            layer.
    """
    if not config.pattern:
        raise ValueError("model.pattern is empty: give one letter per layer, such as ME")
    for letter in config.pattern:
        if letter not in MIXERS and letter not in "()":
            known = ", ".join(f"{key} {mixer.title}" for key, mixer in MIXERS.items())
            raise ValueError(
                f"model.pattern={config.pattern}: unknown letter {letter!r}: choose among {known}, with parentheses "
                "around those that read one input"
            )
    if not re.fullmatch(r"([^()]|\([^()]{2,}\))*", config.pattern):
        raise ValueError(
            f"model.pattern={config.pattern}: parentheses stand around the two or more letters that read one input: "
            "write (ME), or no parentheses"
        )
    if (count := len(config.pattern) * config.repeat) > MOST_LAYERS:
        raise ValueError(
            f"model.pattern has {len(config.pattern):,} letters, {count:,} with model.repeat={config.repeat:,}: "
            f"a model has at most {MOST_LAYERS:,}: lower model.repeat, or shorten the pattern"
        )
    seen: Counter[str] = Counter()

    def mixer(letter: str) -> type[Mixer]:
        seen[letter] += 1
        return choose_mixer(letter, moe, seen[letter])

    return [LayerSpec(tuple(map(mixer, letters))) for letters in config.layers]


def kinds(config: ModelConfig, moe: MoEConfig) -> list[type[Mixer]]:
    """The kinds of mixers that the model has, each once, in order of appearance."""
    return list(dict.fromkeys(mixer for spec in layer_specs(config, moe) for mixer in spec.mixers))


def has(config: ModelConfig, mixer: type[Mixer]) -> bool:
    """Whether some layer of the model has this kind's letter."""
    return mixer.letter in config.pattern


def check_pattern(config: ModelConfig, moe: MoEConfig) -> None:
    """Refuse a configuration of which no model can be built.

    Raises:
        ValueError: as ``layer_specs``, or as a mixer's ``check``, or no layer has what is asked for.
    """
    for mixer in kinds(config, moe):
        mixer.check(config, moe)
    inner = moe.inner
    if inner.projections and not set(VARIANTS) & set(kinds(config, moe)):
        own = {variant.letter for variant in VARIANTS}
        layers = sum(letter in own for letters in config.layers for letter in letters)
        raise ValueError(
            f"moe.inner.projections={','.join(inner.projections)} and moe.inner.every={inner.every} with "
            f"model.pattern={config.pattern}: none of its {layers} Mamba layers would have experts inside: lower "
            "moe.inner.every, add M to the pattern, or leave moe.inner.projections out"
        )


def has_experts(config: ModelConfig, moe: MoEConfig) -> bool:
    """Whether some layer has routed experts."""
    return any(mixer.routes for mixer in kinds(config, moe))


def looks_ahead(config: ModelConfig, moe: MoEConfig) -> bool:
    """Whether some layer looks at later tokens, so that the model cannot generate."""
    return any(mixer.looks_ahead(config, moe) for mixer in kinds(config, moe))


# From moe_mamba/model/loss.py:
# The loss: a sum and a count, so that micro-steps and devices add up to the mean over a whole batch.


def cross_entropy_sum(
    logits: Tensor, targets: Tensor, *, first: int = 0, reduce: Reduce | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Sum the cross entropy over the targets that count.

    Args:
        logits: (..., vocab), any float dtype; of a sharded vocabulary, a part of its rows.
        targets: (...) int64, of the whole vocabulary; -100 is not counted.
        first: number of the first row that the logits have.
        reduce: combines the parts of a sharded vocabulary, see ``kernels.cross_entropy``.
        backend: see ``kernels.cross_entropy``.

    Returns:
        The sum in nats, () in fp32 (float64 for float64 logits), and how many targets count, () int64.
    """
    losses = cross_entropy(logits.flatten(0, -2), targets.flatten(), first, reduce, backend)  # (tokens,)
    return losses.sum(), (targets != IGNORED).sum()


# From moe_mamba/model/layer.py:
# A layer of the residual stack, and the pass through all of them.


class ParallelMixers(nn.ModuleList):
    """Mixers that read one input; their outputs are added.

    Attributes:
        gather: gives those mixers that need all ranks' tokens their input.
        reduce: turns the sum of these mixers' outputs into the output of this rank's tokens. A layout that shards
            layers puts other functions in the place of these two, so that what is common to the mixers travels once.
    """

    def __init__(self, mixers: Iterable[Mixer]) -> None:
        super().__init__(mixers)
        self.gather: Callable[[Tensor], Tensor] = unchanged
        self.reduce: Callable[[Tensor], Tensor] = unchanged

    def forward(
        self, x: Tensor, sequences: Sequences, states: Sequence[State | None]
    ) -> tuple[Tensor, Statistics, list[State | None]]:
        """Map ``x`` (tokens, d_model); returns (y, statistics, new states), the latter one a mixer."""
        mixers: list[Mixer] = list(self)  # type: ignore[arg-type]
        whole = self.gather(x) if any(mixer.gathers_tokens for mixer in mixers) else x
        started = [
            mixer.start(whole if mixer.gathers_tokens else x, sequences, state)
            for mixer, state in zip(mixers, states, strict=True)
        ]
        # Those with tokens on their way end last.
        order = sorted(range(len(mixers)), key=lambda place: mixers[place].begins)
        ended = {place: started[place]() for place in order}
        done = [ended[place] for place in range(len(mixers))]
        together = [y for mixer, (y, _, _) in zip(mixers, done, strict=True) if mixer.gathers_tokens]
        outputs = [y for mixer, (y, _, _) in zip(mixers, done, strict=True) if not mixer.gathers_tokens]
        if together:
            outputs.append(self.reduce(_total(together)))
        statistics = {f"{place}.{name}": router for place, one in enumerate(done) for name, router in one[1].items()}
        return _total(outputs), statistics, [state for _, _, state in done]


class Layer(nn.Module):
    """Norm and mixer. What the mixer adds to the residual stream is added by the next norm, in one pass with it."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, moe: MoEConfig, kernels: str = "auto") -> None:
        super().__init__()
        built = [mixer.build(config, moe, kernels) for mixer in spec.mixers]
        self.norm = build_norm(config, kernels)
        self.mixer = built[0] if len(built) == 1 else ParallelMixers(built)

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """What reads the layer's normalised input."""
        return tuple(self.mixer) if isinstance(self.mixer, ParallelMixers) else (self.mixer,)  # type: ignore[arg-type]

    def forward(
        self, stream: Tensor, update: Tensor | None, sequences: Sequences, states: Sequence[State | None]
    ) -> tuple[Tensor, Tensor, Statistics, list[State | None]]:
        """Mix ``stream`` + ``update``, both (tokens, d_model); returns (that sum, update, statistics, new states).

        States, before and after, are one a mixer.
        """
        normalised, stream = self.norm(stream, update)
        if isinstance(self.mixer, ParallelMixers):
            update, statistics, new_states = self.mixer(normalised, sequences, states)
        else:
            update, statistics, new_state = self.mixer(normalised, sequences, states[0])
            new_states = [new_state]
        return stream, update, {f"mixer.{name}": measured for name, measured in statistics.items()}, new_states


def run_layers(
    layers: Iterable[Callable],
    stream: Tensor,
    sequences: Sequences,
    states: Sequence[State | None] | None = None,
    recompute: bool = False,
    merge: bool = False,
) -> tuple[Tensor, Statistics, list[State | None] | None]:
    """Run the layers over embedded tokens.

    Args:
        layers: ``Layer`` modules.
        stream: (tokens, d_model).
        sequences: how the tokens are divided into sequences, and what of the pass is recorded.
        states: of each mixer, from ``initial_states`` or an earlier pass; None: start anew, and keep no states.
        recompute: keep only each layer's input, and compute the rest again in the backward pass; without states.
        merge: hand one tensor from layer to layer in the place of a stream and its update, as who keeps it wants.

    Returns:
        The stream after the last layer (tokens, d_model), the statistics of each router by its full name
        (``layers.1.mixer.router``), and the new states.
    """
    update: Tensor | None = None  # of the last layer, not yet in the stream
    statistics: Statistics = {}
    new_states: list[State | None] = []
    streams, left = sequences.recording.streams, iter(states or ())
    for index, layer in enumerate(layers):
        count = len(layer.mixers)  # type: ignore[attr-defined]
        if streams is not None or recompute or merge:  # the sum: recorded, or the one tensor that is kept per layer
            stream, update = _sum(stream, update), None
        if streams is not None:
            streams.append(stream.view(sequences.batch, sequences.length, -1))
            stream = streams[-1].flatten(0, 1)  # so that what is recorded takes part in the graph
        if recompute:  # nothing in a layer is random, so no random state is kept
            stream, update, measured, _ = checkpoint(
                layer, stream, None, sequences, [None] * count, use_reentrant=False, preserve_rng_state=False
            )
        else:
            own = [None] * count if states is None else list(islice(left, count))
            stream, update, measured, own = layer(stream, update, sequences, own)
            new_states += own
        statistics.update({f"layers.{index}.{name}": router for name, router in measured.items()})
    return _sum(stream, update), statistics, new_states if states is not None else None


def initial_states(
    layers: Iterable[nn.Module], batch: int, dtype: torch.dtype, device: torch.device, room: int | None = None
) -> list[State | None]:
    """Each mixer's state before any token, layer by layer.

    Args:
        layers: ``Layer`` modules.
        batch: sequences.
        dtype: of the activations; what a scan keeps is fp32 at least.
        device: of the states.
        room: tokens that may come; None: any number, and attention's states grow.
    """
    mixers = (mixer for layer in layers for mixer in layer.mixers)  # type: ignore[union-attr]
    return [mixer.initial_state(batch, dtype, device, room) for mixer in mixers]  # type: ignore[union-attr]


def fp32_parameter_names(model: nn.Module) -> set[str]:
    """Parameters, and balance biases, that stay fp32 in a bf16 model: what each module declares of its own."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name in getattr(module, "fp32_names", ())
    }


def _total(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _sum(stream: Tensor, update: Tensor | None) -> Tensor:
    return stream if update is None else stream + update


# From moe_mamba/hf/shell/cache.py:
# What layers keep between passes, as Transformers hands it on.


CACHE = "cache" if "cache" in {field.name for field in fields(MoeCausalLMOutputWithPast)} else "past_key_values"
"""What this version of Transformers calls a cache: ``cache`` since 5.24, ``past_key_values`` before."""


class StateCache(Cache):
    """What the layers keep between passes: Mamba's states of constant size, and attention's keys and values.

    Attributes:
        states: one for each layer, None for feed-forward layers and experts; empty before the first pass.
        seen: tokens seen, padding included.
        visible: (batch, tokens) bool, which of them were no padding; None: all were text.
        max_cache_len: tokens that it has room for; None: any number.
    """

    max_cache_len: int | None = None
    is_compileable = False
    is_croppable = False  # a state cannot forget its last tokens
    is_linear: Any = (False,)  # all([]) is True, and Transformers then reads again what was seen

    def __init__(self) -> None:
        Cache.__init__(self, layers=[])
        self.states: list[State | None] = []
        self.seen: Any = 0
        self.visible: Tensor | None = None

    def __len__(self) -> int:
        """How many mixers it has states of, those that keep nothing included; in most models each is a layer."""
        return len(self.states)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(layers={len(self.states)}, tokens={int(self.seen)})"

    @property
    def is_empty(self) -> bool:
        """Whether no token was seen."""
        return self.seen == 0

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens seen, padding included; the same for every layer."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that it has room for; -1 where they are not limited."""
        return -1 if self.max_cache_len is None else self.max_cache_len

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether any token was seen."""
        return not self.is_empty

    @property
    def batch_size(self) -> int:
        """Sequences that it has states of; -1 where it cannot say."""
        rows = [tensor.shape[0] for tensor in self.tensors() if tensor.dim()]
        return rows[0] if rows else -1

    def tensors(self) -> list[Tensor]:
        """Everything that is kept."""
        values = [getattr(state, field.name) for state in self.states if state is not None for field in fields(state)]
        return [value for value in values if value is not None]

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.seen, self.visible = [], 0, None

    def crop(self, *tokens: int) -> None:
        """Refuse: see ``is_croppable``.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__}.crop: a state cannot forget its last tokens; keep a copy.deepcopy from before"
        )

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
        self.keep([state and state.map_rows(function) for state in self.states])
        if self.visible is not None:
            self.visible = function(self.visible)

    def keep(self, states: list[State | None]) -> None:
        """Take a pass's new states."""
        self.states = states

    def count(self, batch: int, length: int, visible: Tensor | None) -> None:
        """Count new tokens; ``visible`` (batch, length) bool says which are text, None: all."""
        if visible is not None or self.visible is not None:
            device = (self.visible if visible is None else visible).device  # type: ignore[union-attr]
            if self.visible is None:
                self.visible = torch.ones(batch, self.seen, dtype=torch.bool, device=device)
            if visible is None:
                visible = torch.ones(batch, length, dtype=torch.bool, device=device)
            self.visible = torch.cat((self.visible, visible), dim=1)
        self.seen += length


class MoEMambaCache(StateCache, DynamicCache):
    """A cache for any number of tokens. A new one is empty, and fits any batch; a pass changes it and returns it."""


class MoEMambaStaticCache(StateCache, StaticCache):
    """A cache with room for a number of tokens, none of whose tensors ever moves or grows: for compiled steps.

    Args:
        max_cache_len: tokens that it has room for.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        super().__init__()
        self.max_cache_len = max_cache_len
        self._is_empty = True

    @property
    def is_empty(self) -> bool:
        """Whether no token was seen; known without a look at the device."""
        return self._is_empty

    def reset(self) -> None:
        """Forget everything, in place."""
        self.visible, self._is_empty = None, True
        for tensor in (*self.tensors(), *([] if isinstance(self.seen, int) else [self.seen])):
            tensor.zero_()

    def keep(self, states: list[State | None]) -> None:
        """Take new states, in the tensors that it has where they are as large; no gradient flows through them."""
        if self.states:
            self.states = [_written(old, new) for old, new in zip(self.states, states, strict=True)]
        else:
            self.states = [state and state.map(lambda tensor: tensor.detach().clone()) for state in states]

    def count(self, batch: int, length: int, visible: Tensor | None) -> None:
        """Count new tokens; ``visible`` (batch, length) bool says which are text, None: all."""
        if isinstance(self.seen, int):
            device = next(iter(self.tensors()), torch.empty(0)).device
            self.seen = torch.tensor(0, device=device)
            if not torch.compiler.is_compiling():
                for tensor in (self.seen, *self.tensors()):
                    torch._dynamo.mark_static_address(tensor)
        if visible is not None:
            if self.visible is None:
                self.visible = torch.ones(batch, self.max_cache_len or 0, dtype=torch.bool, device=visible.device)
            place = torch.arange(length, device=visible.device) + self.seen.to(visible.device)
            self.visible.index_copy_(1, place, visible)
        self.seen.add_(length)
        self._is_empty = False


def _written(old: State | None, new: State | None) -> State | None:
    """``new``, in the tensors of ``old`` where they are as large."""
    if old is None or new is None:
        return new

    def write(target: Tensor | None, value: Tensor | None) -> Tensor | None:
        if target is None or value is None or target is value or target.shape != value.shape:
            return value
        return target.copy_(value.detach())

    values: dict[str, Any] = {
        field.name: write(getattr(old, field.name), getattr(new, field.name)) for field in fields(new)
    }
    return replace(new, **values)


# From moe_mamba/hf/shell/padding.py:
# How new tokens are read: which of them are text, where documents start, and in which order a state shall see them.
#
# A state cannot skip a token that stands between others. So where padding does not stand before a row's first token,
# the tokens of a row change places: padding first, text after it, each in order. Then a document start at the first
# token hides what is before; a row that goes on from a cache waits until its padding has passed.


BINARY = "attention_mask must hold 1 for text and 0 for padding, and nothing else"
BEGIN = (
    "position_ids begin after 0 without a cache: they go on from tokens whose state is not here; pass the cache of "
    "those tokens, or positions from 0"
)
UNCOMPILED = "run this pass without compiling it"
POSITIONS = "position_ids must rise by one per token, or begin again at 0 where a document starts"


@dataclass(frozen=True)
class Reading:
    """How the new tokens are read.

    Attributes:
        document_starts: (batch, length) bool, where a document starts, in the order of ``order``; None: nowhere.
        visible: (batch, length) bool, which tokens are text, as given; None: all.
        order: (batch, length) int64, the place that each token read comes from; None: as they stand.
        places: (batch, length) int64, where in that order the result for each token as given stands; padding behind
            a text has the result for the text's last token.
        waiting: (batch,) int64, tokens of padding before a row goes on from its state; None: no row waits.
    """

    document_starts: Tensor | None = None
    visible: Tensor | None = None
    order: Tensor | None = None
    places: Tensor | None = None
    waiting: Tensor | None = None


def read(
    batch: int,
    length: int,
    cache: StateCache | None,
    mask: Tensor | None,
    position_ids: Tensor | None,
    document_starts: Tensor | None,
) -> Reading:
    """Find out how new tokens are read.

    Args:
        batch: sequences.
        length: new tokens of each.
        cache: what the states have seen; None: nothing.
        mask: (batch, tokens seen + length), or as wide as the cache has room: 0 on padding; None: all is text.
        position_ids: (batch or 1, length); where one is 0 a document starts. None: they follow from the mask.
        document_starts: (batch, length) bool, further document starts.

    Raises:
        ValueError: masks or positions of another shape, a mask that hides what the states have read, positions that
            skip tokens or go on from tokens that are not here.
    """
    is_traced = torch.compiler.is_compiling()
    if is_traced and length == 1 and cache is not None and not cache.is_empty:
        _check_step(cache, mask, position_ids)
        return Reading()
    past = 0 if cache is None or cache.is_empty else int(cache.seen)
    new = None if mask is None else _new_columns(mask, batch, length, cache, past)
    if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch)):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, and must be ({batch}, {length})")
    if position_ids is not None and position_ids.shape[1] != length:
        raise ValueError(
            f"position_ids has {position_ids.shape[1]} columns for {length} new tokens: give one per token"
        )
    if position_ids is not None:
        position_ids = position_ids.expand(batch, -1)
    if is_traced:
        return _traced(new, position_ids, document_starts, cache, mask)
    if mask is not None and new is not None:
        new = _checked(mask, new, cache, past)
    restarts = document_starts
    if position_ids is not None:
        restarts = _either(restarts, _restarts(position_ids, new, past))
    if new is None:
        unread = (
            None if cache is None or cache.visible is None else ~cache.visible[:, :past].any(1)
        )  # only padding so far
        if unread is not None and unread.any():
            restarts = _either(restarts, nn.functional.pad(unread[:, None], (0, length - 1)))
        return Reading(_starts(restarts, past))
    return _around_padding(new, restarts, cache, past)


def _new_columns(mask: Tensor, batch: int, length: int, cache: StateCache | None, past: int) -> Tensor:
    """The mask's columns of the new tokens, (batch, length) bool."""
    room = None if cache is None else cache.max_cache_len
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (past + length, room):
        hint = f"the {past} tokens of the cache before the {length} new ones"
        if not past and mask.dim() == 2 and mask.shape[1] > length:
            hint = "a longer one goes on from earlier tokens, whose cache must be passed as well"
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, and must be ({batch}, {past + length}), "
            f"a row for each sequence: {hint}"
        )
    return mask[:, past : past + length].bool()


def _checked(mask: Tensor, new: Tensor, cache: StateCache | None, past: int) -> Tensor | None:
    """The new columns; None where all of them are text, and there was some in every row if there was any token.

    Raises:
        ValueError: the mask tells otherwise of tokens that the states have read.
    """
    before = None if cache is None or cache.visible is None else cache.visible[:, :past]
    seen = mask[:, :past].bool()
    changed = (~seen if before is None else seen ^ before.to(seen.device)).any()
    begun = new.new_ones(()) if before is None else before.any(1).all()
    flags = torch.stack((_is_binary(mask).to(new.device), changed, new.all() & begun))
    is_binary, is_changed, is_plain = flags.tolist()  # one wait for the device
    if not is_binary:
        raise ValueError(BINARY)
    if is_changed:
        raise ValueError(
            "attention_mask contradicts tokens that the cache has read: a state cannot forget a token, "
            "so pass the whole text again with the mask that you mean"
        )
    return None if is_plain else new


def _around_padding(new: Tensor, restarts: Tensor | None, cache: StateCache | None, past: int) -> Reading:
    """How rows with padding are read, among the new tokens or before them; ``new`` (batch, length) bool."""
    batch = len(new)
    begun = torch.zeros(batch, dtype=torch.bool, device=new.device)
    if past and cache is not None:
        begun = ~begun if cache.visible is None else cache.visible[:, :past].any(1).to(new.device)
    first = new & (new.cumsum(1) == 1) & ~begun[:, None]
    document_starts = _either(None if restarts is None else restarts & new, first)
    padding = ~new
    behind_text = padding & (new.cumsum(1) > 0)
    held_up = (padding & begun[:, None]).any()
    # Padding that ends a row is seen by no token; only the state that is kept would have read it.
    harms = behind_text if cache is not None else new & (behind_text.cumsum(1) > 0)
    needs_order, waits = torch.stack((harms.any() | held_up, held_up)).tolist()
    if not needs_order:
        return Reading(_starts(document_starts, past), new)
    order, places = _padding_first(new)
    waiting = torch.where(begun, padding.sum(1), 0) if waits else None
    return Reading(_starts(document_starts.gather(1, order), past), new, order, places, waiting)


def _restarts(positions: Tensor, new: Tensor | None, past: int) -> Tensor:
    """Where positions (batch, length) begin again at 0, (batch, length) bool.

    Raises:
        ValueError: they skip tokens, or begin after tokens that were not read.
    """
    visible = torch.ones_like(positions, dtype=torch.bool) if new is None else new
    restarts = visible & (positions == 0)
    place = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    first = visible & (visible.cumsum(1) == 1)
    since = torch.where(restarts | first, place, 0).cummax(1).values  # where the run of positions began
    offset = positions - visible.cumsum(1)
    # Beside padding the mask says where a text goes on, and what Transformers counts behind padding is not looked at.
    skips = visible.all() & (offset != offset.gather(1, since)).any()
    goes_on = (first & (positions != 0)).any()
    are_skipped, go_on = torch.stack((skips, goes_on)).tolist()
    if go_on and not past:
        raise ValueError(BEGIN)
    if are_skipped:
        raise ValueError(POSITIONS)
    return restarts


def _is_binary(mask: Tensor) -> Tensor:
    """Whether a mask holds 0 and 1 only, () bool."""
    return ((mask == 0) | (mask == 1)).all()


def _traced(
    new: Tensor | None,
    positions: Tensor | None,
    document_starts: Tensor | None,
    cache: StateCache | None,
    mask: Tensor | None,
) -> Reading:
    """As ``read``, without a look at any value: what would be refused raises a RuntimeError when the graph runs."""
    goes_on = cache is not None and not cache.is_empty
    if positions is not None:
        is_start = positions == 0
        rises = positions[:, 1:] == positions[:, :-1] + 1
        if new is None:  # beside padding the mask says where a text goes on
            torch._assert_async((rises | is_start[:, 1:]).all(), POSITIONS)
        if not goes_on and new is None:
            torch._assert_async(is_start[:, 0].all(), BEGIN)
        document_starts = _either(document_starts, is_start)
    if new is None or mask is None:
        return Reading(document_starts)
    torch._assert_async(_is_binary(mask), BINARY)
    if goes_on:
        torch._assert_async(new.all(), f"a compiled pass goes on from a cache without padding: {UNCOMPILED}")
        return Reading(document_starts)
    first = new & (new.cumsum(1) == 1)
    document_starts = _either(None if document_starts is None else document_starts & new, first)
    order, places = _padding_first(new)
    return Reading(document_starts.gather(1, order), new, order, places)


def _check_step(cache: StateCache, mask: Tensor | None, positions: Tensor | None) -> None:
    """Let a compiled step for one token raise a RuntimeError where that token is padding, or begins a document."""
    if positions is not None:
        no_start = (positions != 0).all()
        torch._assert_async(no_start, f"a compiled step for one token begins no document: {UNCOMPILED}")
    if mask is not None:
        column = torch.as_tensor(cache.seen, device=mask.device).clamp(max=mask.shape[1] - 1).view(1)
        is_text = (mask.index_select(1, column) == 1).all()
        torch._assert_async(is_text, f"a compiled step for one token reads no padding: {UNCOMPILED}")


def _padding_first(new: Tensor) -> tuple[Tensor, Tensor]:
    """``order`` and ``places`` of a ``Reading`` for tokens of which ``new`` (batch, length) bool are text."""
    order = new.int().argsort(dim=1, stable=True)
    places = ((~new).sum(1, keepdim=True) + new.cumsum(1) - 1).clamp(min=0)
    return order, places


def _starts(document_starts: Tensor | None, past: int) -> Tensor | None:
    """Starts that say something: nothing is before the first place; None where there are none."""
    if document_starts is None:
        return None
    if past == 0:
        document_starts = document_starts.clone()
        document_starts[:, 0] = False
    return document_starts if document_starts.any() else None


def _either(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one | other


def packed_document_starts(
    embedded: Tensor,
    seq_idx: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
) -> Tensor | None:
    """Where documents start by what packing collators give, (batch, length) bool; None: nothing is said.

    Args:
        embedded: (batch, length, d_model).
        seq_idx: (batch, length), the number of each token's document.
        cu_seq_lens_q: (documents + 1,), where the documents of the one row start and the last ends.
        cu_seq_lens_k: the same.
        max_length_q: length of the longest document, which follows.
        max_length_k: the same.

    Raises:
        ValueError: other shapes, or bounds that differ.
    """
    document_starts = None
    if seq_idx is not None:
        if seq_idx.shape != embedded.shape[:2]:
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, and must be {tuple(embedded.shape[:2])}")
        document_starts = nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    bounds = cu_seq_lens_q
    if bounds is None and cu_seq_lens_k is None:
        return document_starts
    if bounds is None or cu_seq_lens_k is None or not torch.equal(bounds, cu_seq_lens_k) or embedded.shape[0] != 1:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be the same, of the documents of one row")
    ends = [int(bounds[0]), int(bounds[-1])] if bounds.numel() > 1 else []
    if ends != [0, embedded.shape[1]] or bool((bounds[1:] < bounds[:-1]).any()):
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the {embedded.shape[1]} tokens of the row, where each document starts"
        )
    by_bounds = torch.zeros(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
    by_bounds[0, bounds[1:-1].long()] = True
    return _either(document_starts, by_bounds)


# From moe_mamba/hf/shell/order.py:
# Tokens in another order than they were given, and rows that wait until their padding has passed (see padding.py).


def run_with_waiting(
    run: Any, stream: Tensor, document_starts: Tensor | None, states: list[State | None], waiting: Tensor
) -> tuple[Tensor, Statistics, list[State | None]]:
    """A pass in parts, so that a row's state is as it was when the row's padding has passed.

    Args:
        run: ``run_layers`` of the model's layers.
        stream: (batch, length, d_model), padding first in each row.
        document_starts: (batch, length) bool, or None.
        states: of each layer, before the tokens.
        waiting: (batch,) tokens of padding of the rows that go on from a state.
    """
    batch, length, _ = stream.shape
    bounds = sorted({0, length, *waiting.tolist()})
    streams, statistics = [], []
    for first, end in pairwise(bounds):
        part = None if document_starts is None else document_starts[:, first:end]
        mixed, measured, new_states = run(
            stream[:, first:end].flatten(0, 1), Sequences(batch, end - first, part), states
        )
        waits = waiting >= end
        states = [old and old.kept_where(waits, new, end - first) for old, new in zip(states, new_states, strict=True)]
        streams.append(mixed.view(batch, end - first, -1))
        statistics.append(measured)
    return torch.cat(streams, 1).flatten(0, 1), _summed(statistics), states


def _summed(parts: list[Statistics]) -> Statistics:
    """Statistics of each router over the parts of a pass."""
    summed = {}
    for name in parts[0]:
        values = zip(*(vars(part[name]).values() for part in parts), strict=True)
        summed[name] = RouterStatistics(*(sum(value[1:], value[0]) for value in values))
    return summed


def reordered(tensor: Tensor, places: Tensor | None) -> Tensor:
    """(batch, length, ...) from other places of each row, (batch, length) int64; None: as they stand."""
    return tensor if places is None else tensor.gather(1, places[..., None].expand_as(tensor))


def reordered_rows(rows: Tensor, places: Tensor | None) -> Tensor:
    """(batch x length, ...) from other places of each row of the batch, (batch, length) int64; None: as they stand."""
    return rows if places is None else reordered(rows.unflatten(0, places.shape), places).flatten(0, 1)


def reordered_attention(weight: Tensor, places: Tensor | None) -> Tensor:
    """(batch, heads, length, past + length) weights, queries and new keys from other places of each row."""
    if places is None:
        return weight
    past = weight.shape[3] - places.shape[1]
    keys = torch.cat((torch.arange(past, device=places.device).expand(len(places), -1), places + past), dim=1)
    weight = weight.gather(2, places[:, None, :, None].expand_as(weight))
    return weight.gather(3, keys[:, None, None].expand_as(weight))


# From moe_mamba/hf/shell/experts.py:
# Experts' products by a function of Transformers' own, where ``experts_implementation`` asks for one.


try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError:  # Transformers 4
    ALL_EXPERTS_FUNCTIONS = {}  # type: ignore[assignment]

EXPERTS_IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
"""Eager is the class's own way, by this package's kernels where it is installed."""


class MoEMambaExperts(Experts):
    """Stacked experts as Transformers' functions see them: under their names for weights and activation.

    Such a function gets rows that are sorted by expert, with one expert each and weight 1: capacity, dropped tokens and
    experts' choice are the router's and the dispatcher's, whoever computes the products.
    """

    has_bias = has_post_expert_norm = _is_expert_parallel = False
    is_transposed = is_concatenated = True  # weights are (experts, in, out), gates stand before values

    def __init__(self, whole: Experts) -> None:
        nn.Module.__init__(self)  # takes over the weights
        self.config, self.kernels = whole.config, whole.kernels
        self.in_proj, self.out_proj = whole.in_proj, whole.out_proj
        self.num_experts = len(whole.in_proj)
        self.has_gate = whole.config.activation == "swiglu"

    @property
    def gate_up_proj(self) -> Tensor:
        """(experts, d_model, input width): gates and values, or values alone."""
        return self.in_proj

    up_proj = gate_up_proj

    @property
    def down_proj(self) -> Tensor:
        """(experts, width, d_model)."""
        return self.out_proj

    def act_fn(self, hidden: Tensor) -> Tensor:
        """The activation of (rows, input width), gates among them: (rows, width)."""
        return activation(hidden, self.config.activation, self.kernels)

    _apply_gate = act_fn

    def forward(self, rows: Tensor, counts: Tensor, capacity: int | None = None) -> Tensor:
        """See ``Experts.forward``."""
        implementation = self.config._experts_implementation  # type: ignore[attr-defined]  # StackConfig's
        if implementation in (None, "eager"):
            return super().forward(rows, counts, capacity)
        place = torch.arange(len(rows), device=rows.device)
        expert = torch.bucketize(place, counts.cumsum(0), right=True)[:, None]  # (rows, 1)
        return ALL_EXPERTS_FUNCTIONS[implementation](self, rows, expert, rows.new_ones(len(rows), 1))


# From moe_mamba/hf/shell/pretrained.py:
# How Transformers fills, loads, shrinks and spreads the models.


class MoEMambaLayer(GradientCheckpointingLayer, Layer):
    """A layer whose activations Transformers can let go and have computed again, and whose experts it may compute."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, moe: MoEConfig) -> None:
        super().__init__(spec, config, moe)
        for mixer in self.mixers:
            for name, experts in mixer.named_children():
                if isinstance(experts, Experts):
                    setattr(mixer, name, MoEMambaExperts(experts))


class MoEMambaPreTrainedModel(PreTrainedModel):
    """How Transformers fills, loads, shrinks and spreads the models."""

    config_class = MoEMambaConfig
    base_model_prefix = "model"
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    _is_stateful = True
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _no_split_modules = ["MoEMambaLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    def post_init(self) -> None:
        """Fill the weights, and name what stays fp32 in a model of 16 bits."""
        super().post_init()
        names = fp32_parameter_names(self)
        self._keep_in_fp32_modules_strict = names
        for name in names:
            tensor = self.get_parameter_or_buffer(name)
            tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))

    def get_parameter_or_buffer(self, target: str) -> Tensor:
        """The parameter or buffer of this name."""
        owner, _, name = target.rpartition(".")
        return getattr(self.get_submodule(owner), name)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Fill what no checkpoint has filled, from torch's random numbers, as the trainer's models start."""
        for model in self.modules():
            if isinstance(model, MoEMambaPreTrainedModel):
                vars(model)["_fills"] = _fills(model)
        try:
            super().initialize_weights()
        finally:
            for model in self.modules():
                vars(model).pop("_fills", None)  # functions of functions cannot be pickled

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fill what a module itself owns; what a vocabulary gains is filled by who enlarges it."""
        for name, fill in getattr(self, "_fills", {}).get(module, {}).items():
            tensor = getattr(module, name)
            if not getattr(tensor, "_is_hf_initialized", False):
                fill(tensor, None)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Eager and sdpa, which attention asks for at each pass."""
        return True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """What experts ask for at each pass."""
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """The way that experts are computed: the class's own, unless another is asked for.

        Raises:
            ValueError: a way that the class does not know, or a model without layers ``E``: experts inside Mamba are
                computed in the class's own way.
        """
        wanted = "eager" if requested_experts is None else requested_experts
        if wanted not in EXPERTS_IMPLEMENTATIONS:
            raise ValueError(f"experts_implementation={wanted}: MoEMamba has {', '.join(EXPERTS_IMPLEMENTATIONS)}")
        if wanted != "eager" and not has(self.config.stack, MoE):
            raise ValueError(
                f"experts_implementation={wanted}: a model of pattern {self.config.pattern} has no experts of "
                "layers E: leave it out"
            )
        return wanted

    def _set_gradient_checkpointing(  # type: ignore[override]  # older ones know fewer arguments
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """Let layers compute again; without reentrance, which would lose the gradient of the routers' losses."""
        if getattr(gradient_checkpointing_func, "func", checkpoint) is not checkpoint:
            raise ValueError("gradient checkpointing recomputes layers and does not offload: leave out offload")
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in a layer is random
        super()._set_gradient_checkpointing(enable, again, **kwargs)


def _fills(model: nn.Module) -> dict[nn.Module, dict[str, Initializer]]:
    """Module -> name of a tensor of its own -> what fills it; some modules tell of their children's."""
    found: dict[nn.Module, dict[str, Initializer]] = {}
    for module in model.modules():
        for name, fill in getattr(module, "initializers", dict)().items():
            owner, _, own = name.rpartition(".")
            found.setdefault(module.get_submodule(owner), {})[own] = fill
    return found


# From moe_mamba/hf/shell/backbone.py:
# The model without a head: embedding, layers, norm.


logger = logging.get_logger(__name__)


@dataclass
class MoEMambaModelOutput(MoeModelOutputWithPast):
    """What a pass gives.

    Args:
        router_statistics: of each router by its name, beside ``router_logits``.
    """

    router_statistics: Statistics | None = None


DOCUMENTS = {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
"""Keywords that packing collators give."""


def _check_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Refuse inputs that are no batch of texts."""
    given, name, axes = input_ids, "input_ids", "(batch, length)"
    if inputs_embeds is not None:
        given, name, axes = inputs_embeds, "inputs_embeds", "(batch, length, d_model)"
    assert given is not None
    if given.dim() != axes.count(",") + 1 or 0 in given.shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, and must be {axes}, with at least one token")


def _nearest(keyword: str) -> str:
    """A hint at what may be meant by a keyword that is unknown."""
    known = [*inspect.signature(MoEMambaModel.forward).parameters, "labels", "logits_to_keep", "shift_labels"]
    near = difflib.get_close_matches(keyword, known, 1)
    return f": did you mean {near[0]}?" if near else ""


class MoEMambaModel(MoEMambaPreTrainedModel):
    """The residual stack without a head.

    Padding is not seen, wherever it stands in a row. Rotary positions count a document's own tokens.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        stack = config.stack
        moe = config.routing
        self.embedding = nn.Embedding(stack.vocab_size, stack.d_model)
        check_pattern(stack, moe)
        self.looks_ahead, self.has_experts = looks_ahead(stack, moe), has_experts(stack, moe)
        self.layers = nn.ModuleList(MoEMambaLayer(spec, stack, moe) for spec in layer_specs(stack, moe))
        routers = {name: module for name, module in self.named_modules() if isinstance(module, Router)}
        self.balanced = {name for name, router in routers.items() if router.config.balance == "loss"}
        self.final_norm = build_norm(stack) if stack.final_norm else None
        self.gradient_checkpointing = False
        if operations is Plain:
            logger.warning_once(
                "MoEMamba runs without its kernels, as the package moe_mamba is not installed: prompts and training "
                "take about twice as long on a CPU, and many times as long on a GPU. Install moe_mamba to have them."
            )
        self.post_init()

    def initializers(self) -> dict[str, Initializer]:
        """How the embedding starts."""
        return {"embedding.weight": embedding_weight(self.config.stack)}

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        vars(value)["_is_hf_initialized"] = True
        self.embedding = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: StateCache | None = None,
        **documents: Any,
    ) -> MoEMambaModelOutput | tuple:
        """Read tokens.

        Args:
            input_ids: (batch, length) int64; or else ``inputs_embeds``.
            attention_mask: (batch, tokens of the cache + length), 0 on padding. Experts see padding as they see tokens:
                it counts in the routers' losses, and in capacities.
            position_ids: (batch or 1, length), rising by one; where they begin again at 0 a document starts, which
                sees nothing before it.
            cache: from an earlier pass, or a new one. ``past_key_values`` is its older name.
            inputs_embeds: (batch, length, d_model).
            use_cache: return a cache; by default in evaluation, if ``config.use_cache`` says so.
            output_attentions: return the weights of each attention layer, (batch, heads, length, past + length).
            output_hidden_states: return the stream before each layer, and after the final norm.
            output_router_logits: return (batch x length, experts) for each router, in fp32, in the order that they
                route.
            return_dict: False: a tuple.
            past_key_values: see ``cache``.
            documents: what packing collators give: ``seq_idx`` (batch, length), the number of each token's document;
                ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (documents + 1,), where those of the one row start and the
                last ends; ``max_length_q`` and ``max_length_k``, which follow from them.

        Raises:
            TypeError: a keyword that is none of these.
            ValueError: both inputs or none, tokens outside the vocabulary (on a CPU), both names of a cache, a mask or
                positions that do not fit, a cache with expert choice, of another class, of another batch or without
                room, tokens that go on from others whose cache is missing.
        """
        if unknown := documents.keys() - DOCUMENTS:
            raise TypeError(f"forward() got an unexpected keyword argument {min(unknown)!r}{_nearest(min(unknown))}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        _check_shape(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self._embedded(input_ids)
        cache = self._cache(cache, past_key_values, use_cache)
        config, length = self.config, inputs_embeds.shape[1]
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        wants_streams = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_routers = config.output_router_logits if output_router_logits is None else output_router_logits
        recording = Recording(
            streams=[] if wants_streams else None,
            attentions=[] if wants_attentions or config._attn_implementation == "eager" else None,
            router_logits=[] if wants_routers else None,
        )
        document_starts = packed_document_starts(inputs_embeds, **documents)
        reading = read(inputs_embeds.shape[0], length, cache, attention_mask, position_ids, document_starts)
        if self.looks_ahead and (reading.document_starts is not None or reading.visible is not None):
            raise ValueError(
                "moe.router=expert_choice: experts choose among all tokens of a row, so padding and packed documents "
                "would change each other's results: give texts of one length, one in each row"
            )
        stream, statistics = self._mix(inputs_embeds, cache, reading, recording)  # (batch, length, d_model)
        if self.final_norm is not None:
            stream, _ = self.final_norm(stream)
        recorded: dict[str, Any] = {CACHE: cache}
        if wants_streams:
            recorded["hidden_states"] = (*(reordered(one, reading.places) for one in recording.streams or []), stream)
        if wants_attentions:
            weights = recording.attentions or []
            recorded["attentions"] = tuple(reordered_attention(weight, reading.places) for weight in weights)
        if wants_routers:
            logits = recording.router_logits or []
            recorded["router_logits"] = tuple(reordered_rows(one, reading.places) for one in logits)
            recorded["router_statistics"] = statistics
        output = MoEMambaModelOutput(last_hidden_state=stream, **recorded)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _embedded(self, input_ids: Any) -> Tensor:
        """Embeddings of tokens. A CPU notices one outside the vocabulary; on a GPU the kernel's own assertion fails."""
        try:
            return self.embedding(input_ids)
        except IndexError as error:
            size = self.config.vocab_size
            outside = input_ids[(input_ids < 0) | (input_ids >= size)]
            if not len(outside):
                raise
            raise ValueError(f"input_ids has {int(outside[0])}, and must have tokens from 0 to {size - 1}") from error

    def _cache(self, given: StateCache | None, older: StateCache | None, use_cache: bool | None) -> StateCache | None:
        """The cache that this pass fills, or None."""
        if given is not None and older is not None:
            raise ValueError("cache and past_key_values are two names for the same thing: pass only one")
        given = older if given is None else given
        if given is not None or use_cache:
            self.check_that_it_generates()
        if given is not None and not isinstance(given, StateCache):
            raise ValueError(f"the cache is a {type(given).__name__}: pass a MoEMambaCache, or None for a new one")
        if given is not None and use_cache is False:
            raise ValueError("a cache was passed with use_cache=False: leave out one of them")
        if self._computes_again() and (given is not None or use_cache):
            if given is not None and not given.is_empty:
                raise ValueError(
                    "gradient checkpointing cannot continue from a cache: disable it, or pass the whole text"
                )
            logger.warning_once("MoEMamba: gradient checkpointing keeps no cache in training: use_cache=False")
            return None
        if given is not None:
            return given
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not self.looks_ahead
        return MoEMambaCache() if use_cache else None

    def _computes_again(self) -> bool:
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def check_that_it_generates(self) -> None:
        """Refuse what has no cache.

        Raises:
            ValueError: the experts choose their tokens.
        """
        if self.looks_ahead:
            raise ValueError(
                "moe.router=expert_choice looks ahead at later tokens, so it has no cache and cannot generate: "
                "pass use_cache=False to forward, or train with moe.router=switch or top_k"
            )

    def _mix(
        self, embedded: Tensor, cache: StateCache | None, reading: Reading, recording: Recording
    ) -> tuple[Tensor, Statistics]:
        """Run the layers over ``embedded`` (batch, length, d_model) from the cache's states; fills the cache."""
        batch, length, _ = embedded.shape
        states = None if cache is None else self._states(cache, embedded)
        document_starts = reading.document_starts
        is_step = length == 1 and cache is not None and not cache.is_empty
        if document_starts is None and is_step and torch.is_grad_enabled():
            # The step for one token has no gradient; a pass has.
            document_starts = torch.zeros(batch, 1, dtype=torch.bool, device=embedded.device)
        stream = reordered(embedded, reading.order)
        run = partial(run_layers, self.layers, merge=self._computes_again())
        if reading.waiting is not None and states is not None:
            if recording != Recording():
                raise ValueError("there is padding after cached text: no layer's results can be recorded")
            stream, statistics, states = run_with_waiting(run, stream, document_starts, states, reading.waiting)
        else:
            sequences = Sequences(batch, length, document_starts, recording)
            stream, statistics, states = run(stream.flatten(0, 1), sequences, states)
        if cache is not None and states is not None:
            cache.keep(states)
            cache.count(batch, length, reading.visible)
        return reordered(stream.view(embedded.shape), reading.places), statistics

    def _states(self, cache: StateCache, embedded: Tensor) -> list[State | None]:
        """The cache's states, or those before any token. All are zeros: quantised or offloaded weights make none."""
        batch, length, _ = embedded.shape
        if cache.batch_size not in (-1, batch):
            raise ValueError(
                f"the cache has states of {cache.batch_size} sequences, and the batch has {batch}: "
                "see its batch_repeat_interleave"
            )
        room = cache.max_cache_len
        if torch.compiler.is_compiling() and cache.states:
            if room is not None:
                full = f"the cache has room for {room} tokens, and there are more: make it larger"
                torch._assert_async(torch.as_tensor(cache.seen) + length <= room, full)
            return cache.states
        if room is not None and not torch.compiler.is_compiling() and int(cache.seen) + length > room:
            raise ValueError(
                f"the cache has room for {room} tokens, holds {int(cache.seen)} and gets {length} more: make it larger"
            )
        return cache.states or initial_states(self.layers, batch, embedded.dtype, embedded.device, room)


# From moe_mamba/hf/shell/causal_lm.py:
# The language model with its head and loss, and what Transformers' ``generate`` asks of it.


OLDER_NAMES = {r"^model\.head\.": "lm_head."}
"""Tensors of folders that were exported before the head had its own place -> their names here."""


class MoEMambaForCausalLM(MoEMambaPreTrainedModel, GenerationMixin):
    """The model with a head that predicts the token after each one, for generation and training.

    Padding is not seen, wherever it stands in a row. Rotary positions count a document's own tokens.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"} if SHARDS_TENSORS else None
    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = MoEMambaModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def initializers(self) -> dict[str, Initializer]:
        """How the head starts; a tied one is the embedding's weight."""
        stack = self.config.stack
        return {} if stack.tied_head else {"lm_head.weight": head_weight(stack)}

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head; with ``config.tied_head`` its weight is the embedding's."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in its place."""
        vars(new_embeddings)["_is_hf_initialized"] = True
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        past_key_values: StateCache | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple:
        """Predict the token after each one.

        Args:
            input_ids: see ``MoEMambaModel.forward``, as for all that is not named here.
            attention_mask: mask the labels of padding as well.
            position_ids: see there.
            cache: see there.
            inputs_embeds: see there.
            labels: (batch, length), the tokens themselves (they are shifted in here); -100 is not counted.
            use_cache: see there.
            output_attentions: see there.
            output_hidden_states: see there.
            output_router_logits: return them, and add the routers' losses, with the weights that the trainer gives
                them, to the loss.
            return_dict: False: a tuple.
            logits_to_keep: logits of only so many last tokens, or of these places; 0: of all. Not with labels.
            num_items_in_batch: divides the loss, in the place of the number of labels that count, as in the Trainer.
            past_key_values: see there.
            kwargs: ``shift_labels`` (batch, length), the token after each one, in the place of ``labels``: where a
                text is spread over devices, the first token of the next part is its last label. (Not an argument of
                its own: Transformers' Trainer would ask every batch for it.) The rest: see there.

        Returns:
            ``aux_loss`` is what was added for the routers.

        Raises:
            TypeError: as ``MoEMambaModel.forward``.
            ValueError: as there.
        """
        targets = kwargs.pop("shift_labels", None)
        wants_routers = self.config.output_router_logits if output_router_logits is None else output_router_logits
        read = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=wants_routers,
            return_dict=True,
            past_key_values=past_key_values,
            **kwargs,
        )
        stream = read.last_hidden_state
        self._check_labels(labels, "labels", stream)
        self._check_labels(targets, "shift_labels", stream)
        if targets is None and labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if targets is None:
            stream = stream[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else stream[:, logits_to_keep]
        logits = self.lm_head(stream)  # (batch, length, vocab)
        loss, auxiliary = self._loss(logits, targets, num_items_in_batch, read.router_statistics or {})
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=auxiliary,
            logits=logits,
            hidden_states=read.hidden_states,
            attentions=read.attentions,
            router_logits=read.router_logits,
            **{CACHE: getattr(read, CACHE)},
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _check_labels(self, labels: Tensor | None, name: str, stream: Tensor) -> None:
        """Refuse labels of another shape than the tokens', or outside the vocabulary; -100 is not counted."""
        if labels is None:
            return
        if labels.shape != stream.shape[:2]:
            raise ValueError(f"{name} has shape {tuple(labels.shape)}, and must be {tuple(stream.shape[:2])}")
        size = self.config.vocab_size
        inside = ((labels >= 0) & (labels < size)) | (labels == -100)
        torch._assert_async(inside.all(), f"{name} must be -100, or tokens from 0 to {size - 1}")

    def _loss(
        self,
        logits: Tensor,
        targets: Tensor | None,
        items: int | Tensor | None,
        statistics: Statistics,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss, and the part of it that is the routers'; None for what was not asked for.

        As in training, the balance loss is the mean over the routers that have one, the z-loss over all.
        """
        moe, auxiliary, loss = self.config.moe, None, None
        share: float | Tensor = 1.0
        if targets is not None:
            loss, count = cross_entropy_sum(logits, targets.to(logits.device))
            items = count if items is None else torch.as_tensor(items, device=loss.device)
            # Micro-steps are added up: each has its share of the batch in the routers' losses, too.
            loss, share = loss / items, count / items
        if statistics:
            z = torch.stack([z_loss(router).to(logits.device) for router in statistics.values()]).mean()
            auxiliary = share * moe["z_loss_weight"] * z
            balanced = [router for name, router in statistics.items() if name in self.model.balanced]
            if balanced:
                balance = torch.stack([balance_loss(router).to(logits.device) for router in balanced]).mean()
                auxiliary = auxiliary + share * moe["balance_weight"] * balance
            if loss is not None:
                loss = loss + auxiliary
        return loss, auxiliary

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **kwargs: Any) -> Any:
        """As in any model of Transformers; the head of older folders is found under its older name."""
        return super().from_pretrained(*args, key_mapping=OLDER_NAMES | (key_mapping or {}), **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What ``generate`` gives to a pass."""
        new = kwargs.get("next_sequence_length")  # of the text, what the cache has not read
        if new is not None and new <= 0:
            length = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
            raise ValueError(
                f"the text has {length} tokens, and the cache has read {length - new}: pass the whole text, what the "
                "cache has read and at least one token more"
            )
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        inputs.pop("cache_position", None)  # the cache counts for itself
        inputs.pop("token_type_ids", None)
        return inputs

    def _prepare_attention_mask_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """The mask that Transformers guesses from pad tokens, but those that stand inside a text: they are text."""
        mask = super()._prepare_attention_mask_for_generation(*args, **kwargs)
        after_first, before_last = mask.cumsum(-1) > 0, mask.flip(-1).cumsum(-1).flip(-1) > 0
        return (after_first & before_last).to(mask.dtype)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in any model of Transformers; a cache may have either name, whatever the library's version calls it.

        Raises:
            ValueError: both names are given.
        """
        given = [kwargs.pop(name) for name in ("cache", "past_key_values") if kwargs.get(name) is not None]
        if len(given) > 1:
            raise ValueError("cache and past_key_values are two names for the same thing: pass only one")
        if given:
            kwargs[CACHE] = given[0]
        return super().generate(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """No mask of four dimensions for a cache with room: layers make what they need of the one they get."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if attention_mask is None or cache is None or cache.max_cache_len is None:
            return attention_mask
        # As wide as the room, so that every step has the same shapes.
        return nn.functional.pad(attention_mask, (0, max(0, cache.max_cache_len - attention_mask.shape[1])))

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Give ``generate`` the one kind of cache that fits."""
        self.model.check_that_it_generates()
        if batch_size > 1 and self.config.moe["evaluation_capacity"] is not None and self.model.has_experts:
            capacity = self.config.moe["evaluation_capacity"]
            raise ValueError(
                f"moe.evaluation_capacity={capacity:g} lets the texts of a batch displace each other's tokens: "
                "generate one at a time"
            )
        wanted = generation_config.cache_implementation
        given = model_kwargs.get("cache", model_kwargs.get("past_key_values"))
        if wanted not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation={wanted}: a MoEMambaCache is only dynamic or static")
        if given is not None:
            if wanted is not None:
                raise ValueError(f"cache_implementation={wanted} was passed with a cache: pass only one")
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = MoEMambaCache()
            if wanted == "static":
                # As large as any before, so that a compiled step fits again.
                asked = getattr(generation_config, "max_cache_len", None) or 0
                self._room = max(max_cache_length, asked, getattr(self, "_room", 0))
                model_kwargs[CACHE] = MoEMambaStaticCache(self._room)


MoEMambaForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # save_pretrained writes this file, too


# From moe_mamba/hf/shell/classification.py:
# The model with a score for each class of a text: classifiers, and reward models.


class MoEMambaForSequenceClassification(MoEMambaPreTrainedModel):
    """The model with a linear map from a text's last token to ``config.num_labels`` scores."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MoEMambaModel(config)
        self.score = nn.Linear(config.d_model, config.num_labels, bias=False)
        self.post_init()

    def initializers(self) -> dict[str, Initializer]:
        """How the scores start."""
        return {"score.weight": normal(0.02)}

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: StateCache | None = None,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Score each text by its last token.

        Args:
            input_ids: see ``MoEMambaModel.forward``, as for all that is not named here.
            attention_mask: says which token is a text's last one; without it, the last that is no
                ``config.pad_token_id``.
            position_ids: see there.
            cache: see there.
            inputs_embeds: see there.
            labels: (batch,) classes or values, or (batch, labels) of several: see ``config.problem_type``.
            use_cache: see there.
            output_attentions: see there.
            output_hidden_states: see there.
            output_router_logits: see there; they are not returned here, as the output has no place for them.
            return_dict: False: a tuple.
            past_key_values: see there.

        Returns:
            ``logits`` (batch, labels).

        Raises:
            ValueError: as ``MoEMambaModel.forward``, and several texts without a mask or a pad token.
        """
        read = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_dict=True,
            past_key_values=past_key_values,
        )
        stream = read.last_hidden_state  # (batch, length, d_model)
        last = self._last_tokens(stream, input_ids, attention_mask)
        logits = self.score(stream)[torch.arange(len(stream), device=stream.device), last]
        loss = None
        if labels is not None:
            loss = self._loss(logits, labels.to(logits.device))
        output = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=read.hidden_states,
            attentions=read.attentions,
            **{CACHE: getattr(read, CACHE)},
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _last_tokens(self, stream: Tensor, input_ids: Tensor | None, mask: Tensor | None) -> Tensor:
        """The place of each text's last token, (batch,)."""
        batch, length, _ = stream.shape
        pad = self.config.pad_token_id
        if mask is not None:
            visible = mask[:, -length:].bool()
        elif input_ids is not None and pad is not None:
            visible = input_ids != pad
        elif batch == 1:
            return torch.full((1,), length - 1, device=stream.device)
        else:
            raise ValueError(
                "several texts need an attention_mask, or a config.pad_token_id, to know their last tokens"
            )
        place = torch.arange(length, device=stream.device)
        return (place * visible.to(stream.device)).argmax(-1)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean square, cross entropy, or binary cross entropy, as ``config.problem_type`` or the labels say."""
        kind = self.config.problem_type
        if kind is None:
            is_class = labels.dtype in (torch.int64, torch.int32)
            if self.num_labels == 1:
                kind = "regression"
            else:
                kind = "single_label_classification" if is_class else "multi_label_classification"
            self.config.problem_type = kind
        if kind == "regression":
            return nn.functional.mse_loss(logits.squeeze(), labels.squeeze().to(logits.dtype))
        if kind == "single_label_classification":
            return nn.functional.cross_entropy(logits.view(-1, self.num_labels), labels.view(-1))
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


MoEMambaModel.register_for_auto_class("AutoModel")  # save_pretrained writes this file, too
MoEMambaForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")


__all__ = [
    "MoEMambaCache",
    "MoEMambaForCausalLM",
    "MoEMambaForSequenceClassification",
    "MoEMambaModel",
    "MoEMambaPreTrainedModel",
    "MoEMambaStaticCache",
]
