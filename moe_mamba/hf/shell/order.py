"""Tokens in another order than they were given, and rows that wait until their padding has passed (see padding.py)."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moe_mamba.model.layer import State
from moe_mamba.model.mixers.attention import AttentionState
from moe_mamba.model.mixers.routing import RouterStatistics
from moe_mamba.model.sequences import Sequences


def run_with_waiting(
    run: Any, stream: Tensor, starts: Tensor | None, states: list[State], waiting: Tensor
) -> tuple[Tensor, list[RouterStatistics], list[State]]:
    """A pass in parts, so that a row's state is as it was when the row's padding has passed.

    Args:
        run: ``run_layers`` of the model's layers.
        stream: (batch, length, d_model), padding first in each row.
        starts: (batch, length) bool, or None.
        states: of each layer, before the tokens.
        waiting: (batch,) tokens of padding of the rows that go on from a state.
    """
    batch, length, _ = stream.shape
    bounds = sorted({0, length, *waiting.tolist()})
    streams, statistics = [], []
    for first, end in pairwise(bounds):
        part = None if starts is None else starts[:, first:end]
        mixed, measured, new_states = run(
            stream[:, first:end].flatten(0, 1), Sequences(batch, end - first, part), states
        )
        states = [_held(old, new, waiting >= end, end - first) for old, new in zip(states, new_states, strict=True)]
        streams.append(mixed.view(batch, end - first, -1))
        statistics += measured
    return torch.cat(streams, 1).flatten(0, 1), _summed(statistics, len(bounds) - 1), states


def _held(old: State, new: State, waits: Tensor, tokens: int) -> State:
    """``new``, but what it was for rows that wait (batch,) bool; attention's move behind the padding's."""
    if new is None or old is None:
        return None
    if not isinstance(new, AttentionState):
        pairs = {name: (getattr(old, name), getattr(new, name)) for name in vars(new)}
        return replace(new, **{name: _where(waits, was, now.to(was.dtype)) for name, (was, now) in pairs.items()})
    assert isinstance(old, AttentionState)
    if new.seen is None:  # the last of what it was, where a window keeps no more of it
        kept, length = new.key.shape[2], old.key.shape[2]
        source = (torch.arange(kept, device=waits.device) + length - kept).clamp(min=0)
        key, value = (
            _where(waits, was[:, :, source], now) for was, now in ((old.key, new.key), (old.value, new.value))
        )
        return replace(new, key=key, value=value, start=torch.where(waits, old.start + kept - length, new.start))
    place = torch.arange(new.key.shape[2], device=waits.device)
    moved = torch.where((place >= tokens) & (place < new.seen), place - tokens, place)
    source = torch.where(waits[:, None], moved, place)[:, None, :, None].expand_as(new.key)
    key, value = new.key.gather(2, source), new.value.gather(2, source)
    return replace(new, key=key, value=value, start=torch.where(waits, old.start + tokens, new.start))


def _where(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (other.dim() - 1)), one, other)


def _summed(statistics: list[RouterStatistics], parts: int) -> list[RouterStatistics]:
    """Statistics of each router over the parts of a pass, which stand part by part."""
    routers = len(statistics) // parts
    return [
        RouterStatistics(
            *(sum(values) for values in zip(*(vars(one).values() for one in statistics[r::routers]), strict=True))
        )
        for r in range(routers)
    ]


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
