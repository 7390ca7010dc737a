"""Routing in Triton: a counting sort, and the gathers before and after the experts, all of them without atomics.

The sort takes four small kernels over blocks of choices: how often each expert occurs in a block; from that, what the
blocks before it hold of each expert; where each expert's slots begin; and each choice's slot, from its rank among its
block's choices of the same expert. The sums are gathers by ``slot``: a program owns a block of tokens.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.compilation import Specimen
from moe_mamba.kernels.launch import ceil_divide, next_power_of_2, on_device, unit_stride
from moe_mamba.kernels.routing.operator import define_combine, define_gather

CHOICES = 256  # of a block of the sort
EXPERTS = 32  # that one program of the sort counts
PEERS = 8  # choices of its block that a choice is compared with at once
BLOCKS = 64  # whose counts are added up at once
ELEMENTS = 4096  # of a program's tile of rows: 32 a thread, in loads of 16 bytes
WIDEST = 1024  # columns of a tile
TALLEST = 64  # rows of a tile: each takes registers for its addresses


@triton.jit
def _load_choices(chosen, block, tokens, choices, stride_token, stride_choice, SIZE: tl.constexpr):
    """The experts of a block of choices in order of choice, then of token; -1 past the end."""
    place = block * SIZE + tl.arange(0, SIZE)
    token = place % tokens
    inside = place < choices
    expert = tl.load(chosen + token * stride_token + (place // tokens) * stride_choice, mask=inside, other=-1)
    return place, token, inside, expert.to(tl.int32)


@triton.jit
def _count_kernel(
    chosen, counts, tokens, choices, experts, stride_token, stride_choice, SIZE: tl.constexpr, EXPERTS: tl.constexpr
):
    """How often a block of choices names each expert, to counts (blocks, experts)."""
    block = tl.program_id(0).to(tl.int64)
    _, _, _, expert = _load_choices(chosen, block, tokens, choices, stride_token, stride_choice, SIZE)
    names = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    count = tl.sum((expert[:, None] == names[None, :]).to(tl.int32), 0)  # (EXPERTS,)
    tl.store(counts + block * experts + names, count, mask=names < experts)


@triton.jit
def _prefix_kernel(counts, assigned, blocks, experts, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr):
    """Turn counts (blocks, experts) into what the blocks before hold, in place; assigned (experts,): the sums."""
    names = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    before = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        place = counts + block[:, None].to(tl.int64) * experts + names[None, :]
        mask = (block < blocks)[:, None] & (names < experts)[None, :]
        count = tl.load(place, mask=mask, other=0)  # (BLOCKS, EXPERTS)
        tl.store(place, before[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        before += tl.sum(count, 0)
    tl.store(assigned + names, before.to(tl.int64), mask=names < experts)


@triton.jit
def _begin_kernel(assigned, counts, begins, dropped, experts, capacity, PADDED: tl.constexpr):
    """Slots of each expert, where they begin, and how many choices find none; capacity 0: there is no limit."""
    names = tl.arange(0, PADDED)
    mask = names < experts
    count = tl.load(assigned + names, mask=mask, other=0)
    room = count
    if capacity > 0:
        room = tl.where(mask, capacity, 0).to(tl.int64)
    tl.store(counts + names, room, mask=mask)
    tl.store(begins + names, tl.cumsum(room, 0) - room, mask=mask)
    tl.store(dropped, tl.sum(tl.maximum(count - room, 0), 0))


@triton.jit
def _place_kernel(
    chosen, before, assigned, counts, begins, token_out, slot_out, tokens, choices, k, experts, rows, capacity,
    stride_token, stride_choice, SIZE: tl.constexpr, PEERS: tl.constexpr,
):  # fmt: skip
    """Give each choice of a block its slot, and each slot its token; then name tokens in the empty slots."""
    block = tl.program_id(0).to(tl.int64)
    place, token, inside, expert = _load_choices(chosen, block, tokens, choices, stride_token, stride_choice, SIZE)
    rank = tl.load(before + block * experts + expert, mask=inside, other=0)
    for first in range(0, SIZE, PEERS):  # those of the block that come before it
        peers, _, _, other = _load_choices(
            chosen, block * (SIZE // PEERS) + first // PEERS, tokens, choices, stride_token, stride_choice, PEERS
        )
        same = (expert[:, None] == other[None, :]) & (peers[None, :] < place[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    kept = inside & (rank < tl.load(counts + expert, mask=inside, other=0))
    slot = tl.load(begins + expert, mask=inside, other=0) + rank
    tl.store(slot_out + token * k + place // tokens, tl.where(kept, slot, -1), mask=inside)
    tl.store(token_out + slot, token, mask=kept)
    if capacity > 0:
        owner = place // capacity
        filled = tl.load(assigned + owner, mask=place < rows, other=0)
        tl.store(token_out + place, token, mask=(place < rows) & (place % capacity >= filled))


@triton.jit
def _gather_kernel(x, token, out, rows, d, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Each out[r] = x[token[r]]: a block of rows by a block of columns."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (column < d)[None, :]
    source = tl.load(token + row, mask=row < rows, other=0)
    values = tl.load(x + source[:, None] * stride + column[None, :], mask=mask)
    tl.store(out + row[:, None] * d + column[None, :], values, mask=mask)


@triton.jit
def _sum_kernel(
    rows, weight, slot, out, tokens, k, d, stride, WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr
):
    """Each out[t] = sum over a token's slots s of (weight[s]) rows[s]: a block of tokens by a block of columns."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for choice in range(k):
        row = tl.load(slot + token * k + choice, mask=token < tokens, other=-1)
        mask = (row >= 0)[:, None] & (column < d)[None, :]
        values = tl.load(rows + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            values *= tl.load(weight + row, mask=row >= 0, other=0.0).to(tl.float32)[:, None]
        total += values
    mask = (token < tokens)[:, None] & (column < d)[None, :]
    tl.store(out + token[:, None] * d + column[None, :], total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _spread_kernel(
    dy, rows, weight, token, drows, dweight, count, d, stride_dy, stride_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Each drows[r] = weight[r] dy[token[r]] and dweight[r] = the product of rows[r] and dy[token[r]]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < count
    source = tl.load(token + row, mask=inside, other=0)
    share = tl.load(weight + row, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, d, WIDTH):
        column = first + tl.arange(0, WIDTH)
        mask = inside[:, None] & (column < d)[None, :]
        gradient = tl.load(dy + source[:, None] * stride_dy + column[None, :], mask=mask, other=0.0).to(tl.float32)
        values = tl.load(rows + row[:, None] * stride_rows + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += gradient * values
        scaled = (share[:, None] * gradient).to(drows.dtype.element_ty)
        tl.store(drows + row[:, None] * d + column[None, :], scaled, mask=mask)
    tl.store(dweight + row, tl.sum(total, 1).to(dweight.dtype.element_ty), mask=inside)


def _sort(chosen: Tensor, experts: int, capacity: int | None) -> tuple[Tensor, ...]:
    outputs = token, slot, counts, assigned, dropped = _sort_fake(chosen, experts, capacity)
    tokens, k = chosen.shape
    choices, rows = tokens * k, len(token)
    blocks, tiles = ceil_divide(choices, CHOICES), ceil_divide(experts, EXPERTS)
    before, begins = chosen.new_empty(blocks, experts, dtype=torch.int32), chosen.new_empty(experts)
    with on_device(chosen):
        where = tokens, choices
        _count_kernel[(blocks, tiles)](chosen, before, *where, experts, *chosen.stride(), CHOICES, EXPERTS)
        _prefix_kernel[(tiles,)](before, assigned, blocks, experts, BLOCKS, EXPERTS)
        padded = next_power_of_2(experts)
        _begin_kernel[(1,)](assigned, counts, begins, dropped, experts, capacity or 0, padded)
        _place_kernel[(max(blocks, ceil_divide(rows, CHOICES)),)](
            chosen, before, assigned, counts, begins, token, slot, *where, k, experts, rows, capacity or 0,
            *chosen.stride(), CHOICES, PEERS,
        )  # fmt: skip
    return outputs


def _sort_fake(chosen: Tensor, experts: int, capacity: int | None) -> tuple[Tensor, ...]:
    """Room for the fields of ``Order``."""
    rows = chosen.shape[0] * chosen.shape[1] if capacity is None else experts * capacity
    counts, assigned = chosen.new_empty(experts), chosen.new_empty(experts)
    return chosen.new_empty(rows), chosen.new_empty(chosen.shape), counts, assigned, chosen.new_empty(())


def _gather(x: Tensor, token: Tensor) -> Tensor:
    x, (height, width) = unit_stride(x), _tile(x.shape[1])
    rows, d = len(token), x.shape[1]
    out = x.new_empty(rows, d)
    with on_device(x):
        grid = ceil_divide(rows, height), ceil_divide(d, width)
        _gather_kernel[grid](x, token.contiguous(), out, rows, d, x.stride(0), height, width)
    return out


def _spread(gradient: Tensor, rows: Tensor, weight: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    rows, gradient, weight, token = unit_stride(rows), unit_stride(gradient), weight.contiguous(), token.contiguous()
    (count, d), (height, width) = rows.shape, _tile(rows.shape[1])
    drows, dweight = rows.new_empty(count, d), weight.new_empty(count)
    with on_device(rows):
        _spread_kernel[(ceil_divide(count, height),)](
            gradient, rows, weight, token, drows, dweight, count, d, gradient.stride(0), rows.stride(0),
            height, width,
        )  # fmt: skip
    return drows, dweight


def _sum(rows: Tensor, weight: Tensor | None, slot: Tensor) -> Tensor:
    """The sum over each token's slots of its (weighted) rows, (tokens, d) in the dtype of ``rows`` (rows, d)."""
    rows, slot, (height, width) = unit_stride(rows), slot.contiguous(), _tile(rows.shape[1])
    weight = None if weight is None else weight.contiguous()
    (tokens, k), d = slot.shape, rows.shape[1]
    out = rows.new_empty(tokens, d)
    with on_device(rows):
        grid = ceil_divide(tokens, height), ceil_divide(d, width)
        _sum_kernel[grid](
            rows, rows if weight is None else weight, slot, out, tokens, k, d, rows.stride(0), weight is not None,
            height, width,
        )  # fmt: skip
    return out


def _tile(d: int) -> tuple[int, int]:
    """Rows and columns of a program's tile."""
    width = min(next_power_of_2(d), WIDEST)
    return min(ELEMENTS // width, TALLEST), width


sort_by_expert = operators.define(
    "sort_by_expert_triton(Tensor chosen, SymInt experts, SymInt? capacity) -> "
    "(Tensor token, Tensor slot, Tensor counts, Tensor assigned, Tensor dropped)",
    _sort,
    _sort_fake,
)
"""See ``moe_mamba.kernels.routing``: the fields of its ``Order``."""
gather_rows = define_gather("triton", _gather, _sum)
"""See ``moe_mamba.kernels.routing``; any row stride."""
combine_rows = define_combine("triton", _sum, _spread)
"""See ``moe_mamba.kernels.routing``; computes in fp32, any row stride."""


def specimens() -> list[Specimen]:
    """The kernels at 32,768 tokens of 512 or 2,048 columns in bf16, top-2 among 32 experts with a capacity."""
    sort = {"chosen": "*i64", "tokens": "i32", "choices": "i32", "experts": "i32", "stride_token": "i32"}
    whole = {"assigned": "*i64", "counts": "*i64", "begins": "*i64", "experts": "i32", "capacity": "i32"}
    placed = {"before": "*i32", "token_out": "*i64", "slot_out": "*i64", "k": "i32", "rows": "i32"}
    block = {"stride_choice": 1, "SIZE": CHOICES}
    made = [
        Specimen("routing count", _count_kernel, sort | {"counts": "*i32"}, block | {"EXPERTS": EXPERTS}),
        Specimen(
            "routing prefix",
            _prefix_kernel,
            {"counts": "*i32", "assigned": "*i64", "blocks": "i32", "experts": "i32"},
            {"BLOCKS": BLOCKS, "EXPERTS": EXPERTS},
        ),
        Specimen("routing begin", _begin_kernel, whole | {"dropped": "*i64"}, {"PADDED": 32}),
        Specimen("routing place", _place_kernel, sort | whole | placed, block | {"PEERS": PEERS}),
    ]
    for d in (512, 2048):
        height, width = _tile(d)
        wide = {
            "x": "*bf16",
            "out": "*bf16",
            "token": "*i64",
            "slot": "*i64",
            "rows": "i32",
            "tokens": "i32",
            "k": "i32",
        }
        back = {"dy": "*bf16", "rows": "*bf16", "weight": "*fp32", "token": "*i64", "drows": "*bf16", "count": "i32"}
        # strides as constants: at run time Triton knows that they are multiples of 16, and so loads vectors
        fixed = {"d": d, "stride": d, "WIDTH": width, "ROWS": height, "TOKENS": height}
        fixed |= {"stride_dy": d, "stride_rows": d}
        made += [
            Specimen(f"routing gather {d}", _gather_kernel, wide, fixed),
            Specimen(
                f"routing combine {d}",
                _sum_kernel,
                wide | {"rows": "*bf16", "weight": "*fp32"},
                fixed | {"WEIGHTED": True},
            ),
            Specimen(
                f"routing gather backward {d}",
                _sum_kernel,
                wide | {"rows": "*bf16", "weight": "*bf16"},
                fixed | {"WEIGHTED": False},
            ),
            Specimen(f"routing combine backward {d}", _spread_kernel, back | {"dweight": "*fp32"}, fixed),
        ]
    return made
