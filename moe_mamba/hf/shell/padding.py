"""How new tokens are read: which of them are text, where documents start, and in which order a state shall see them.

A state cannot skip a token that stands between others. So where padding does not stand before a row's first token,
the tokens of a row change places: padding first, text after it, each in order. Then a document start at the first
token hides what is before; a row that goes on from a cache waits until its padding has passed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_mamba.hf.shell.cache import StateCache

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
