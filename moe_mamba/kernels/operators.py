"""How a kernel that torch cannot see into becomes an operator of torch, ``torch.ops.moe_mamba.<name>``.

A kernel's file gives a schema, what runs, and a fake: the outputs' shapes, dtypes and strides without their values. So
``torch.compile`` and ``torch.export`` put the call into their graph, fake tensors and memory trackers see its outputs,
and the profiler names it. Gradients are operators of their own, tied to the forward pass by ``differentiate``.

Outputs are new memory: never an input, a view of one, or a view of another output; what may be absent is empty. One
that writes into what it is given returns nothing, and has no gradient. They are made by ``Library.define`` and ``impl``
and not by ``torch.library.custom_op``, whose wrapper takes three times as long as the dispatch of a call: a step of
generation is short.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload

from moe_mamba.errors import UserError

NAMESPACE = "moe_mamba"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
ANY_DEVICE = "CompositeExplicitAutograd"  # dispatch key of what runs wherever its tensors lie

Operator = OpOverload[..., Any]
Fake = Callable[..., Any]
Keep = Callable[[Any, tuple[Any, ...], Any], None]
"""(ctx, inputs, output): saves on ctx what the gradient needs."""


def define(
    schema: str, run: Callable[..., Any], fake: Fake, key: str = ANY_DEVICE, is_constant: bool = False
) -> Operator:
    """Make the operator of a schema.

    Args:
        schema: as torch writes it, ``name(Tensor x, int? n) -> Tensor``.
        run: computes it, from the schema's arguments by position.
        fake: makes its outputs of the same arguments, without looking at values.
        key: dispatch key of the devices that ``run`` computes on, such as ``CPU``.
        is_constant: no gradient flows: outputs never require one, and calls do not pass by autograd. Without it, and
            without ``differentiate``, torch warns where a gradient would be needed.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, run, key)
    if is_constant:
        LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def differentiate(operator: Operator, keep: Keep, gradients: Callable[..., Any], *backward: Operator) -> None:
    """Tie a forward operator to its backward operators, which cannot be differentiated again: that is an error.

    Args:
        operator: of the forward pass.
        keep: saves what the gradient needs.
        gradients: (ctx, a gradient for each output) -> a gradient for each input; calls ``backward``.
        backward: the operators that compute them.
    """
    torch.library.register_autograd(operator, gradients, setup_context=keep, lib=LIBRARY)
    for one in backward:
        torch.library.register_autograd(one, _refuse(str(operator)), lib=LIBRARY)


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refuse(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise UserError(f"{name} has no second derivative: choose --run.kernels=reference, which has one")

    return refuse
