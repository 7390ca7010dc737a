"""Many matrix products of different heights in one call: what a mixture of experts computes."""

import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels.backends import choose
from moe_mamba.kernels.validation import require_dimensions, require_same_dtype, require_shapes

__all__ = ["grouped_matmul"]


def grouped_matmul(
    x: Tensor, weight: Tensor, counts: Tensor, capacity: int | None = None, backend: str = "auto"
) -> Tensor:
    """Multiply each group's rows by the group's matrix.

    Args:
        x: (rows, in), sorted by group.
        weight: (groups, in, out), dtype of x.
        counts: (groups) integers on the device of x: rows of each group, 0 included. They sum to ``rows``,
            which is not looked at, because that would wait for an accelerator.
        capacity: rows of every group, where all have as many: then no number is read from the device, whichever it is.
        backend: ``auto``, or one of ``BACKENDS["grouped_matmul"]``.

    Returns:
        (rows, out) in the dtype of x.

    Raises:
        UserError: shapes or dtypes that disagree, or a back end that does not exist.
    """
    require_dimensions("grouped_matmul", "x", x, "rows in")
    require_dimensions("grouped_matmul", "weight", weight, "groups in out")
    groups, _, out = weight.shape
    require_shapes("grouped_matmul", (("weight", weight, (groups, x.shape[1], out)), ("counts", counts, (groups,))))
    require_same_dtype("grouped_matmul", x.dtype, (("weight", weight),))
    if counts.dtype not in (torch.int32, torch.int64):
        raise UserError(f"grouped_matmul: counts is {counts.dtype}, and must be torch.int32 or torch.int64")
    if capacity is not None and len(x) != groups * capacity:
        raise UserError(f"grouped_matmul: x has {len(x)} rows, and must have groups x capacity = {groups * capacity}")
    _, function = choose("grouped_matmul", x.device.type, x.dtype, backend)
    return function(x, weight, counts, capacity)
