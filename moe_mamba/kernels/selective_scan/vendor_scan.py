"""The CUDA scan of Mamba's authors, package mamba-ssm, behind our signature: a choice, never picked by ``auto``.

Their layout is (batch, channels, length), so every operand is copied once. Their backward pass adds by atomics: its
results vary from run to run in the last bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels.selective_scan.operands import Operands

FIX = "choose --run.kernels=auto"


@torch.compiler.disable
def selective_scan(operands: Operands) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.selective_scan``; states in fp32.

    Raises:
        UserError: for starts and initial_state, which their kernel does not know, and in the backward pass for a
            gradient of the final state; where deterministic results are asked for; or where the package does not load.
    """
    x, delta, A, B, C, D, z, delta_bias, document_starts, initial_state = operands
    for name, argument in (("document_starts", document_starts), ("initial_state", initial_state)):
        if argument is not None:
            raise UserError(f"selective_scan: mamba-ssm's kernel (kernels=vendor) does not take {name}: {FIX}")
    if torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled():
        raise UserError(
            f"selective_scan: mamba-ssm's gradients (kernels=vendor) vary from run to run, and train.deterministic "
            f"forbids that: {FIX}"
        )
    y, final_state = _their_scan()(
        *(_channels_first(tensor) for tensor in (x, delta)),
        A.float(),
        *(_channels_first(tensor) for tensor in (B, C)),
        D.float(),
        z=None if z is None else _channels_first(z),
        delta_bias=None if delta_bias is None else delta_bias.float(),
        delta_softplus=True,
        return_last_state=True,
    )
    return y.transpose(1, 2), _WithoutGradient.apply(final_state)


def _channels_first(tensor: Tensor) -> Tensor:
    """(batch, length, channels) -> (batch, channels, length), dense along the length."""
    return tensor.transpose(1, 2).contiguous()


def _their_scan() -> Callable[..., Any]:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise UserError(f"mamba-ssm is installed but does not load ({error}): {FIX}") from error
    return selective_scan_fn


class _WithoutGradient(torch.autograd.Function):
    """The final state, whose gradient their backward pass would drop silently."""

    @staticmethod
    def forward(ctx: Any, final_state: Tensor) -> Tensor:
        return final_state.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise UserError(
            f"selective_scan: mamba-ssm's kernel (kernels=vendor) has no gradient of the final state: {FIX}"
        )
