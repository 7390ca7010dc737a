"""The CUDA scan of Mamba's authors, package mamba-ssm, behind our signature: a choice, never picked by ``auto``.

Their layout is (batch, channels, length), so every operand is copied once. Their backward pass adds by atomics: its
results vary from run to run in the last bits. What its forward pass keeps for it differs between versions, so our
backward operator runs that again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels import operators
from moe_mamba.kernels.selective_scan.operands import Operands

FIX = "choose --run.kernels=auto"


def selective_scan(operands: Operands) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.selective_scan``; states in fp32.

    Raises:
        UserError: for starts and initial_state, which their kernel does not know, and in the backward pass for a
            gradient of the final state; where deterministic results are asked for; or where the package does not load.
    """
    for name in ("document_starts", "initial_state"):
        if getattr(operands, name) is not None:
            raise UserError(f"selective_scan: mamba-ssm's kernel (kernels=vendor) does not take {name}: {FIX}")
    if torch.is_grad_enabled() and torch.are_deterministic_algorithms_enabled():
        raise UserError(
            f"selective_scan: mamba-ssm's gradients (kernels=vendor) vary from run to run, and train.deterministic "
            f"forbids that: {FIX}"
        )
    return _scan(*operands[:8])


def _forward(*operands: Tensor | None) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        y, final_state = _call(_theirs(*operands))
    return y.transpose(1, 2).contiguous(), final_state.clone(memory_format=torch.contiguous_format)


def _forward_fake(x: Tensor, delta: Tensor, A: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], *A.shape, dtype=torch.float32)


def _backward(y_gradient: Tensor, *operands: Tensor | None) -> list[Tensor]:
    theirs = [None if one is None else one.detach().requires_grad_() for one in _theirs(*operands)]
    with torch.enable_grad():
        y, _ = _call(theirs)
    made = torch.autograd.grad(y, [one for one in theirs if one is not None], y_gradient.transpose(1, 2))
    given = [one for one in operands if one is not None]
    turned = (one.transpose(1, 2) if one.dim() == 3 else one for one in made)  # all with a length, and only they
    return [one.to(like.dtype).contiguous() for one, like in zip(turned, given, strict=True)]


def _backward_fake(y_gradient: Tensor, *operands: Tensor | None) -> list[Tensor]:
    return [one.new_empty(one.shape) for one in operands if one is not None]


def _theirs(*operands: Tensor | None) -> list[Tensor | None]:
    """The operands as their function takes them."""
    x, delta, A, B, C, D, z, delta_bias = operands
    narrow = [None if one is None else _channels_first(one) for one in (x, delta, B, C, z)]
    wide = [None if one is None else one.float() for one in (A, D, delta_bias)]
    return [*narrow[:2], wide[0], *narrow[2:4], wide[1], narrow[4], wide[2]]


def _call(theirs: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Their function, which is one autograd function: it records what it did even where torch's own do not."""
    *others, z, delta_bias = theirs
    return _their_scan()(*others, z=z, delta_bias=delta_bias, delta_softplus=True, return_last_state=True)


def _channels_first(tensor: Tensor) -> Tensor:
    """(batch, length, channels) -> (batch, channels, length), dense along the length."""
    return tensor.transpose(1, 2).contiguous()


def _their_scan() -> Callable[..., Any]:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise UserError(f"mamba-ssm is installed but does not load ({error}): {FIX}") from error
    return selective_scan_fn


def _keep(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, y_gradient: Tensor | None, final_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if final_gradient is not None:  # their backward pass would drop it silently
        raise UserError(
            f"selective_scan: mamba-ssm's kernel (kernels=vendor) has no gradient of the final state: {FIX}"
        )
    operands = ctx.saved_tensors
    made = iter(_gradients_of(y_gradient, *operands))
    return tuple(None if one is None else next(made) for one in operands)


_OPERANDS = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, Tensor? delta_bias"
_scan = operators.define(
    f"selective_scan_vendor({_OPERANDS}) -> (Tensor y, Tensor final_state)", _forward, _forward_fake
)
_gradients_of = operators.define(
    f"selective_scan_vendor_backward(Tensor y_gradient, {_OPERANDS}) -> Tensor[]", _backward, _backward_fake
)
operators.differentiate(_scan, _keep, _gradients, _gradients_of)
