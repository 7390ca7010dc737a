"""Root mean square norm (Zhang and Sennrich, arXiv 1910.07467, equation 4), fused with the residual sum before it.

stream = x + residual;  y = stream / sqrt(mean(stream^2) + epsilon) * weight
"""

import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels.backends import choose
from moe_mamba.kernels.validation import require_same_dtype, require_shapes

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Add ``x`` to the residual stream, and normalise the sum over its last axis; in fp32, in fp64 for fp64.

    Args:
        x: (..., d).
        weight: (d), dtype of x or fp32.
        epsilon: added to the mean square.
        residual: (..., d), dtype of x; None: zeros.
        backend: ``auto``, or one of ``BACKENDS["rms_norm"]``; ``triton`` takes d up to 16,384.

    Returns:
        y (..., d), and the new residual stream (..., d), x itself without a residual; both in the dtype of x.

    Raises:
        UserError: shapes or dtypes that disagree, or a back end that does not exist.
    """
    if x.dim() == 0:
        raise UserError("rms_norm: x is a single number, and must be (..., d)")
    d = x.shape[-1]
    require_shapes("rms_norm", (("weight", weight, (d,)), ("residual", residual, tuple(x.shape))))
    require_same_dtype("rms_norm", x.dtype, (("residual", residual),))
    if weight.dtype not in (x.dtype, torch.float32):
        raise UserError(f"rms_norm: weight is {weight.dtype}, and must be {x.dtype} like x, or torch.float32")
    _, function = choose("rms_norm", x.device.type, x.dtype, backend, weight.shape[0])
    return function(x, weight, epsilon, residual)
