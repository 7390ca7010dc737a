"""Experts' products of bf16 on a CPU, one after the other, each of a number of rows that comes again.

Torch's grouped product multiplies as many rows as each expert has. On processors that multiply bf16, oneDNN then makes
code for nearly every product of a step, which takes longer than all of them: ``products.window`` says more.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_mamba.kernels.products import Product, multiplies_bf16, window


def for_groups(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """Each group that has rows, and which rows it has."""
    first = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            yield group, slice(first, first + count)
        first += count


def product_by_group(x: Tensor, weight: Tensor, counts: Tensor, product: Product) -> Tensor:
    """(rows, in) sorted by group, (groups, in, out), (groups) -> (rows, out)."""
    y = x.new_empty(len(x), weight.shape[2])
    for group, rows in for_groups(counts):
        product_of_rows(x, rows, weight[group], y, product)
    return y


def product_of_rows(x: Tensor, rows: slice, matrix: Tensor, y: Tensor, product: Product) -> None:
    """Write a group's rows of ``y``, and anything to some rows behind them, whose group comes next."""
    first, count = rows.start, rows.stop - rows.start
    size = window(count) if multiplies_bf16() else count
    if first + size <= len(x):
        product(x[first : first + size], matrix, out=y[first : first + size])
    else:
        y[rows] = product(_with_zeros(x[rows], size), matrix)[:count]


def weight_gradient_by_group(gradient: Tensor, x: Tensor, counts: Tensor, product: Product) -> Tensor:
    """(rows, out), (rows, in), (groups) -> (groups, in, out)."""
    made = x.new_empty(len(counts), x.shape[1], gradient.shape[1])
    for group in (counts == 0).nonzero().flatten().tolist():  # a mask would be a pass over all of it
        made[group].zero_()
    for group, rows in for_groups(counts):
        some, incoming = x[rows], gradient[rows]
        transposed = some.t()
        if multiplies_bf16():
            size = window(len(some))
            incoming = _with_zeros(incoming, size)
            # oneDNN is quicker by more than this copy takes where its first operand has rows without gaps.
            transposed = _with_zeros(some, size).t().contiguous()
        product(transposed, incoming, out=made[group])
    return made


def _with_zeros(rows: Tensor, size: int) -> Tensor:
    """(rows, n) -> (size, n), with zeros at the end."""
    return torch.cat([rows, rows.new_zeros(size - len(rows), rows.shape[1])]) if size > len(rows) else rows
