"""What attention allocates on a GPU: torch picks a fused kernel there, and on a device of Python's none.

Flash attention and cuDNN's give the output and the logarithm of each row's sum, and keep these for the backward pass
with queries, keys and values. A mask of booleans becomes one that is added, in the dtype of the queries (torch 2.13,
``convert_boolean_attn_mask``). In fp32 only the kernel of xFormers is left, which takes no grouped heads: there torch
writes the products down, weights of all pairs of tokens included.
"""

import functools
from typing import Any

import torch
from torch import Tensor

NAME = "scaled_dot_product_attention"
LIBRARY = torch.library.Library("moe_mamba_rehearsal", "FRAGMENT")
NARROW = (torch.bfloat16, torch.float16)


@functools.cache
def register() -> None:
    """Give the device its attention, for as long as the process lives."""
    aten = torch.library.Library("aten", "IMPL")
    aten.impl(NAME, _attention, "AutogradPrivateUse1")
    LIBRARY.define("attention(Tensor query, Tensor key, Tensor value, Tensor? bias) -> (Tensor y, Tensor sums)")
    LIBRARY.define(
        "attention_backward(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor y, Tensor sums, "
        "Tensor? bias) -> (Tensor query, Tensor key, Tensor value)"
    )
    for name, fake in (("attention", _forward_fake), ("attention_backward", _backward_fake)):
        torch.library.register_fake(f"moe_mamba_rehearsal::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd("moe_mamba_rehearsal::attention", _gradients, setup_context=_keep, lib=LIBRARY)
    _kept.append(aten)


_kept: list[torch.library.Library] = []  # a library that is let go takes its functions along


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As ``torch.nn.functional.scaled_dot_product_attention``: (b, h, l, e), and fewer heads of keys and values."""
    if query.dtype not in NARROW and enable_gqa:
        written = torch.ops.aten._scaled_dot_product_attention_math
        made: Tensor = written(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)[0]
        return made
    bias = attn_mask
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    y: Tensor = torch.ops.moe_mamba_rehearsal.attention(query, key, value, bias)[0]
    return y


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(query)  # the kernels lay it out as the queries
    return y, query.new_empty(query.shape[:3], dtype=torch.float32)


def _backward_fake(gradient: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(one) for one in operands[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *operands, bias = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands, *output, bias)


def _gradients(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *torch.ops.moe_mamba_rehearsal.attention_backward(gradient, *ctx.saved_tensors), None
