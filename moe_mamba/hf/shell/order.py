"""Tokens in another order than they were given, and rows that wait until their padding has passed (see padding.py)."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moe_mamba.model.mixers.base import State, Statistics
from moe_mamba.model.mixers.routing import RouterStatistics
from moe_mamba.model.sequences import Sequences


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
