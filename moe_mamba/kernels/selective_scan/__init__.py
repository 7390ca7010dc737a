"""The selective scan, Mamba-1's recurrence (arXiv 2312.00752, algorithm 2, equations 2a, 2b and 4).

With delta = softplus(delta + delta_bias):

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] x[t]      (states: batch x d_inner x d_state)
    y[t] = (C[t] . h[t] + D x[t]) * silu(z[t])
"""

import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels.backends import choose
from moe_mamba.kernels.selective_scan.operands import Operands
from moe_mamba.kernels.validation import (
    require_bool,
    require_dimensions,
    require_entries,
    require_one_device,
    require_same_dtype,
    require_shapes,
    require_wide_dtype,
)

__all__ = ["selective_scan", "selective_scan_step"]


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    document_starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over whole sequences, differentiable in every float tensor (arXiv 2312.00752, section 3.2).

    Args:
        x: (batch, length, d_inner), the input of each channel.
        delta: (batch, length, d_inner), step sizes before bias and softplus; dtype of x.
        A: (d_inner, d_state), negative; dtype of x or fp32, as D, delta_bias and initial_state.
        B: (batch, length, d_state), what of the input enters the state; dtype of x.
        C: (batch, length, d_state), what of the state is read; dtype of x.
        D: (d_inner), weight of the input in the output.
        z: (batch, length, d_inner) gate, dtype of x; None: no gate.
        delta_bias: (d_inner), added to delta before softplus; None: nothing.
        document_starts: (batch, length) bool; nothing before a True position is seen at it or after it.
            True at position 0 discards initial_state.
        initial_state: (batch, d_inner, d_state), the state before position 0; None: zeros.
        backend: ``auto``, ``reference``, ``torch``, ``cpu`` (C++), ``triton`` (GPUs) or ``vendor`` (mamba-ssm).

    Returns:
        y (batch, length, d_inner) in the dtype of x, and the state after the last position
        (batch, d_inner, d_state) in fp32 (fp64 for fp64 inputs).

    Raises:
        UserError: shapes or dtypes that disagree, or a back end that does not exist or does not take the operands.
    """
    require_dimensions("selective_scan", "x", x, "batch length d_inner")
    require_dimensions("selective_scan", "A", A, "d_inner d_state")
    batch, length, d_inner = x.shape
    d_state = A.shape[1]
    require_shapes(
        "selective_scan",
        (
            ("delta", delta, (batch, length, d_inner)),
            ("A", A, (d_inner, d_state)),
            ("B", B, (batch, length, d_state)),
            ("C", C, (batch, length, d_state)),
            ("D", D, (d_inner,)),
            ("z", z, (batch, length, d_inner)),
            ("delta_bias", delta_bias, (d_inner,)),
            ("document_starts", document_starts, (batch, length)),
            ("initial_state", initial_state, (batch, d_inner, d_state)),
        ),
    )
    narrow = (("delta", delta), ("B", B), ("C", C), ("z", z))
    wide = (("A", A), ("D", D), ("delta_bias", delta_bias), ("initial_state", initial_state))
    require_same_dtype("selective_scan", x.dtype, narrow)
    require_wide_dtype("selective_scan", x.dtype, wide)
    require_bool("selective_scan", "document_starts", document_starts)
    require_one_device("selective_scan", x, (*narrow, *wide, ("document_starts", document_starts)))
    require_entries("selective_scan", "x", x)
    _, function = choose("selective_scan", x.device.type, x.dtype, backend, d_state)
    return function(Operands(x, delta, A, B, C, D, z, delta_bias, document_starts, initial_state))


def selective_scan_step(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence, for generation: what ``selective_scan`` computes at one position; no gradient flows.

    Args:
        x: (batch, d_inner).
        delta: (batch, d_inner), step sizes before bias and softplus; dtype of x.
        A: (d_inner, d_state), negative; dtype of x or fp32, as D and delta_bias.
        B: (batch, d_state), what of the input enters the state; dtype of x.
        C: (batch, d_state), what of the state is read; dtype of x.
        D: (d_inner), weight of the input in the output.
        z: (batch, d_inner) gate, dtype of x; None: no gate.
        delta_bias: (d_inner), added to delta before softplus; None: nothing.
        state: (batch, d_inner, d_state) before this token, fp32 (fp64 for fp64 inputs). It is not changed.
        backend: ``auto``, ``torch`` or ``triton``.

    Returns:
        y (batch, d_inner) in the dtype of x, and the state after this token in the dtype of ``state``.

    Raises:
        UserError: shapes or dtypes that disagree, or a back end that does not exist or does not take the operands.
    """
    require_dimensions("selective_scan_step", "x", x, "batch d_inner")
    require_dimensions("selective_scan_step", "A", A, "d_inner d_state")
    batch, d_inner = x.shape
    d_state = A.shape[1]
    require_shapes(
        "selective_scan_step",
        (
            ("delta", delta, (batch, d_inner)),
            ("A", A, (d_inner, d_state)),
            ("B", B, (batch, d_state)),
            ("C", C, (batch, d_state)),
            ("D", D, (d_inner,)),
            ("z", z, (batch, d_inner)),
            ("delta_bias", delta_bias, (d_inner,)),
            ("state", state, (batch, d_inner, d_state)),
        ),
    )
    narrow = (("delta", delta), ("B", B), ("C", C), ("z", z))
    wide = (("A", A), ("D", D), ("delta_bias", delta_bias))
    require_same_dtype("selective_scan_step", x.dtype, narrow)
    require_wide_dtype("selective_scan_step", x.dtype, wide)
    work = torch.promote_types(x.dtype, torch.float32)
    if state.dtype != work:
        raise UserError(f"selective_scan_step: state is {state.dtype}, and must be {work} beside {x.dtype} inputs")
    require_one_device("selective_scan_step", x, (*narrow, *wide, ("state", state)))
    require_entries("selective_scan_step", "x", x)
    _, function = choose("selective_scan_step", x.device.type, x.dtype, backend, d_state)
    return function(x, delta, A, B, C, D, z, delta_bias, state)
