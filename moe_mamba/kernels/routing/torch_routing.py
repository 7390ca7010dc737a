"""Routing with torch's own operations: a stable sort, gathers, and bags of rows for the sums, none of them by atomics.

``embedding_bag`` is the one operation of torch that gathers, weighs and sums rows in a single pass, on several threads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mamba.kernels.routing.operator import define_combine, define_gather

# Beyond so many choices per token (expert choice: one for each expert, nearly all empty) a CPU adds up what there is.
MOST_CHOICES = 8


def sort_by_expert(chosen: Tensor, experts: int, capacity: int | None) -> tuple[Tensor, ...]:
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


def _spread(gradient: Tensor, rows: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    gradient = gradient.to(torch.promote_types(rows.dtype, weight.dtype)).index_select(0, token)  # (rows, d)
    weight_gradient = (rows * gradient).sum(1)
    return gradient.mul_(weight[:, None]).to(rows.dtype), weight_gradient.to(weight.dtype)


def _sum(rows: Tensor, weight: Tensor | None, slot: Tensor) -> Tensor:
    """The sum over each token's slots of its (weighted) rows, (tokens, d) in the dtype of ``rows`` (rows, d)."""
    work = torch.promote_types(rows.dtype, torch.float32 if weight is None else weight.dtype)
    count, (tokens, k) = len(rows), slot.shape
    place = torch.where(slot < 0, count, slot)  # one row more, of zeros
    if k > MOST_CHOICES and rows.device.type == "cpu":
        name = torch.arange(tokens, device=slot.device)[:, None].expand(tokens, k).reshape(-1)
        token = slot.new_full((count + 1,), tokens).scatter_(0, place.view(-1), name)[:count]
        values = rows.to(work) if weight is None else rows * weight[:, None]
        return values.new_zeros(tokens + 1, rows.shape[1]).index_add_(0, token, values)[:tokens].to(rows.dtype)
    padded = rows.new_empty(count + 1, rows.shape[1], dtype=work)
    padded[:count] = rows
    padded[count] = 0
    shares = None if weight is None else F.pad(weight.to(work), (0, 1))[place]  # (tokens, k)
    return F.embedding_bag(place, padded, mode="sum", per_sample_weights=shares).to(rows.dtype)


_gather_operator = define_gather("torch", lambda x, token: x.index_select(0, token), _sum)
_combine_operator = define_combine("torch", _sum, _spread)


def gather_rows(x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    """See ``moe_mamba.kernels.routing``."""
    if not torch.is_grad_enabled():  # a token of generation is too short for what an operator costs
        return x.index_select(0, token)
    return _gather_operator(x, token, slot)


def combine_rows(rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    """See ``moe_mamba.kernels.routing``."""
    if not torch.is_grad_enabled():
        return _sum(rows, weight, slot)
    return _combine_operator(rows, weight, token, slot)
