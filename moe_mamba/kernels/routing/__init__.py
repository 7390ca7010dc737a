"""From tokens to rows sorted by expert, and back: what stands around a mixture's grouped products.

``sort_by_expert`` counts and sorts the choices, ``gather_rows`` lays the tokens out in that order, and
``combine_rows`` sums the experts' weighted outputs of each token. No shape depends on the data, so an accelerator is
never waited for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels.backends import choose
from moe_mamba.kernels.validation import require_dimensions, require_shapes

__all__ = ["Order", "combine_rows", "gather_rows", "sort_by_expert"]


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


def sort_by_expert(chosen: Tensor, experts: int, capacity: int | None = None, backend: str = "auto") -> Order:
    """Give each choice a slot of its expert, by order of position, all first choices before second ones.

    Args:
        chosen: (tokens, k) int64: experts of each token, best first, each from 0 to ``experts`` - 1 (not looked at).
        experts: how many there are.
        capacity: slots of each expert; None: as many as are chosen.
        backend: ``auto``, ``reference``, ``torch`` or ``triton``.

    Returns:
        The order: tokens x k slots without a capacity, experts x capacity with one.

    Raises:
        UserError: a wrong shape, dtype or number, or a back end that does not exist.
    """
    require_dimensions("sort_by_expert", "chosen", chosen, "tokens k")
    _require_integers("sort_by_expert", (("chosen", chosen),))
    if experts < 1 or (capacity is not None and capacity < 1):
        name, number = ("experts", experts) if experts < 1 else ("capacity", capacity)
        raise UserError(f"sort_by_expert: {name} is {number}, and must be 1 or more")
    if chosen.numel() == 0:
        raise UserError(f"sort_by_expert: chosen has shape {tuple(chosen.shape)}, and must hold a choice")
    # The table's dtypes are those of floats; there are none here.
    _, function = choose("sort_by_expert", chosen.device.type, torch.float32, backend)
    return Order(*function(chosen, experts, capacity))


def gather_rows(x: Tensor, token: Tensor, slot: Tensor, backend: str = "auto") -> Tensor:
    """Lay the tokens out in their slots: row r is x[token[r]].

    Args:
        x: (tokens, d).
        token: (rows,) int64, as in ``Order``.
        slot: (tokens, k) int64, as in ``Order``: the gradient of a token is the sum over its slots, so that nothing
            comes back from an empty slot.
        backend: ``auto``, ``reference``, ``torch`` or ``triton``.

    Returns:
        (rows, d) in the dtype of x.

    Raises:
        UserError: shapes or dtypes that disagree, or a back end that does not exist.
    """
    require_dimensions("gather_rows", "x", x, "tokens d")
    _require_order("gather_rows", token, slot, len(x))
    _, function = choose("gather_rows", x.device.type, x.dtype, backend)
    return function(x, token, slot)


def combine_rows(rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor, backend: str = "auto") -> Tensor:
    """Sum the weighted rows of each token: y[t] = sum over its slots s of weight[s] rows[s].

    Args:
        rows: (rows, d), an expert's output in each slot.
        weight: (rows,) floats, 0 in an empty slot; the sum is in their dtype (fp32), or in that of ``rows`` if wider.
        token: (rows,) int64, as in ``Order``.
        slot: (tokens, k) int64, as in ``Order``.
        backend: ``auto``, ``reference``, ``torch`` or ``triton``.

    Returns:
        (tokens, d) in the dtype of ``rows``; zeros for a token that has no slot.

    Raises:
        UserError: shapes or dtypes that disagree, or a back end that does not exist.
    """
    require_dimensions("combine_rows", "rows", rows, "rows d")
    require_shapes("combine_rows", (("weight", weight, (len(rows),)), ("token", token, (len(rows),))))
    if not weight.is_floating_point():
        raise UserError(f"combine_rows: weight is {weight.dtype}, and must be of floats, such as torch.float32")
    _require_order("combine_rows", token, slot)
    _, function = choose("combine_rows", rows.device.type, rows.dtype, backend)
    return function(rows, weight, token, slot)


def _require_order(operation: str, token: Tensor, slot: Tensor, tokens: int | None = None) -> None:
    require_dimensions(operation, "token", token, "rows")
    require_dimensions(operation, "slot", slot, "tokens k")
    if tokens is not None:
        require_shapes(operation, (("slot", slot, (tokens, slot.shape[1])),))
    _require_integers(operation, (("token", token), ("slot", slot)))


def _require_integers(operation: str, arguments: tuple[tuple[str, Tensor], ...]) -> None:
    for name, tensor in arguments:
        if tensor.dtype != torch.int64:
            raise UserError(f"{operation}: {name} is {tensor.dtype}, and must be torch.int64")
