"""The three operations written down, plain loops and plain autograd. They define what the other back ends must give."""

import torch
from torch import Tensor


def sort_by_expert(chosen: Tensor, experts: int, capacity: int | None) -> tuple[Tensor, ...]:
    """See ``moe_mamba.kernels.routing``: the fields of its ``Order``."""
    tokens, k = chosen.shape
    taken: list[list[tuple[int, int]]] = [[] for _ in range(experts)]  # of each expert: (token, choice)
    for choice in range(k):
        for token in range(tokens):
            taken[int(chosen[token, choice])].append((token, choice))
    slot = torch.full((tokens, k), -1)
    named: list[int] = []
    for pairs in taken:
        start, room = len(named), len(pairs) if capacity is None else capacity
        for token, choice in pairs[:room]:
            slot[token, choice] = len(named)
            named.append(token)
        named += [place % tokens for place in range(len(named), start + room)]
    assigned = torch.tensor([len(pairs) for pairs in taken])
    counts = assigned if capacity is None else torch.full_like(assigned, capacity)
    made = torch.tensor(named), slot, counts, assigned, (assigned - counts).clamp(min=0).sum()
    return tuple(tensor.to(chosen.device) for tensor in made)


def gather_rows(x: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    """See ``moe_mamba.kernels.routing``."""
    filled = torch.isin(torch.arange(len(token), device=x.device), slot)
    return torch.where(filled[:, None], x[token], x.detach()[token])


def combine_rows(rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor) -> Tensor:
    """See ``moe_mamba.kernels.routing``."""
    weighted = rows * weight[:, None]  # (rows, d)
    return weighted.new_zeros(len(slot), rows.shape[1]).index_add(0, token, weighted).to(rows.dtype)
