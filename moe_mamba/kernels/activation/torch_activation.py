"""The activations in torch, with autograd's gradients."""

from torch import Tensor
from torch.nn import functional


def activation(hidden: Tensor, kind: str) -> Tensor:
    """See ``moe_mamba.kernels.activation``."""
    if kind == "swiglu":
        gate, up = hidden.chunk(2, dim=-1)
        return functional.silu(gate) * up
    if kind == "gelu":
        return functional.gelu(hidden)
    hidden = functional.relu(hidden)
    return hidden.square() if kind == "squared_relu" else hidden
