"""``torch.nn.functional.grouped_mm``, with its conditions met; where all groups are as high, one batched product.

Read in torch's source (2.11 to 2.13), and what follows from it:

- Its kernel is only for bf16 on GPUs of compute capability 9.0 and newer. Other dtypes and older GPUs, like CPUs, get
  a loop that reads the offsets, and so waits for the GPU. With a capacity there is nothing to read: ``bmm`` runs on
  every GPU in every dtype, and its gradients are products of transposed views.
- Addresses and row strides of all operands, the gradient too, are multiples of 16 bytes: odd widths are padded with
  zeros, odd addresses copied, and a gradient that is expanded (as ``.sum()`` hands it down) made real.
- Row-major weights (groups, in, out) are taken as they lie, and transposed views of them in the gradient of x. The
  gradient of the weights multiplies x transposed, with columns together, by rows: the one layout in which a group may
  be empty and of any height.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16  # bytes


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, capacity: int | None) -> Tensor:
    """See ``moe_mamba.kernels.grouped_matmul``."""
    if capacity is None:
        is_plain = x.device.type == "cpu" and not torch.is_grad_enabled()
        return _by_group(x, weight, counts) if is_plain else _by_offsets(x, weight, counts)
    return torch.bmm(x.unflatten(0, (len(weight), capacity)), weight).flatten(0, 1)


@torch.compiler.disable  # the counts decide on the products
def _by_group(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """One product for each group that has rows: the few tokens of a step of generation go to a few of the experts."""
    y = x.new_empty(len(x), weight.shape[2])
    first = 0
    for group, count in enumerate(counts.tolist()):
        if count:
            torch.mm(x[first : first + count], weight[group], out=y[first : first + count])
            first += count
    return y


@torch.compiler.disable  # it knows only shapes of bf16 products (torch 2.13), and breaks at every address
def _by_offsets(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    out = weight.shape[2]
    multiple = ALIGNMENT // x.element_size()
    pad_in, pad_out = -x.shape[1] % multiple, -out % multiple
    if pad_in or pad_out:
        x, weight = F.pad(x, (0, pad_in)), F.pad(weight, (0, pad_out, 0, pad_in))
    offsets = counts.cumsum(0, dtype=torch.int32)  # end of each group
    y = F.grouped_mm(_aligned(x), _aligned(weight), offs=offsets)
    return _AlignedGradient.apply(y)[:, :out]


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, from an address that is a multiple of 16 bytes; the storage's own is one."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.storage_offset() * tensor.element_size() % ALIGNMENT else tensor


class _AlignedGradient(torch.autograd.Function):
    """The identity, whose gradient is aligned."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # an empty one may be expanded, and counts as contiguous
        return (
            _aligned(gradient)
            if gradient.numel()
            else torch.empty_like(gradient, memory_format=torch.contiguous_format)
        )
