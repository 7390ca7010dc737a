"""A back end of the scan as an operator: what is kept between forward and backward, whatever computes them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_mamba.kernels import operators
from moe_mamba.kernels.selective_scan.operands import Operands

OPERANDS = (
    "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, Tensor? delta_bias, "
    "Tensor? document_starts"
)


def define_scan(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    fake: operators.Fake,
    key: str = operators.ANY_DEVICE,
) -> Callable[[Operands], tuple[Tensor, Tensor]]:
    """Make the operators ``name`` and ``name_backward``.

    Args:
        name: of the operator.
        forward: (operands, is_trained) -> y, the final state, and two tensors for ``backward`` (empty: none), which
            need not hold anything where ``is_trained`` is false.
        backward: (gradient of y, gradient of the final state, operands but the initial state, the two tensors) ->
            gradients of x, delta, A, B, C, D, z and delta_bias (empty without them) and the initial state.
        fake: of ``forward``.
        key: dispatch key of the devices.

    Returns:
        The back end: operands -> y and the final state.
    """
    run = operators.define(
        f"{name}({OPERANDS}, Tensor? initial_state, bool is_trained) -> "
        "(Tensor y, Tensor final_state, Tensor kept, Tensor totals)",
        forward,
        fake,
        key,
    )
    gradients_of = operators.define(
        f"{name}_backward(Tensor y_gradient, Tensor final_gradient, {OPERANDS}, Tensor kept, Tensor totals) -> "
        "(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, Tensor delta_bias, Tensor state)",
        backward,
        _backward_fake,
        key,
    )

    def gradients(ctx: Any, y_gradient: Tensor | None, final_gradient: Tensor | None, *rest: None) -> Any:
        x, delta, A, *others = ctx.saved_tensors
        if y_gradient is None:
            y_gradient = x.new_zeros(x.shape)
        if final_gradient is None:
            work = torch.promote_types(x.dtype, torch.float32)
            final_gradient = x.new_zeros(x.shape[0], *A.t().shape, dtype=work).transpose(1, 2)
        made = gradients_of(y_gradient, final_gradient, x, delta, A, *others)
        z, delta_bias = others[3:5]
        state = None if ctx.state_dtype is None else made[8].to(ctx.state_dtype)
        return (
            *made[:6],
            None if z is None else made[6],
            None if delta_bias is None else made[7],
            None,
            state,
            None,
        )

    operators.differentiate(run, _keep, gradients, gradients_of)

    def scan(operands: Operands) -> tuple[Tensor, Tensor]:
        is_trained = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in operands)
        y, final_state, _, _ = run(*operands, is_trained)
        return y, final_state

    return scan


def define_step(name: str, run: Callable[..., Any], fake: operators.Fake, key: str = operators.ANY_DEVICE) -> Any:
    """Make the operator of a step, (operands, z, delta_bias, state) -> y and the new state; it has no gradient."""
    operands = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? z, Tensor? delta_bias"
    return operators.define(f"{name}({operands}, Tensor state) -> (Tensor y, Tensor new_state)", run, fake, key, True)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, initial_state, _ = inputs
    _, _, kept, totals = output
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.mark_non_differentiable(kept, totals)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, kept, totals)


def _backward_fake(
    y_gradient: Tensor,
    final_gradient: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    document_starts: Tensor | None,
    kept: Tensor,
    totals: Tensor,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return (
        like(x),
        like(delta),
        A.new_empty(A.t().shape).t(),
        *map(like, (B, C, D, z, delta_bias)),
        new_states(x, A).transpose(1, 2),
    )


def new_states(x: Tensor, A: Tensor) -> Tensor:
    """Room for a state of each batch row, channels innermost: (batch, d_state, d_inner), in the dtype computed in."""
    work = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], *A.t().shape, dtype=work)
