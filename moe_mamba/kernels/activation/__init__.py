"""The activations between the two matrices of a feed-forward layer or an expert."""

from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels.backends import choose

__all__ = ["KINDS", "activation"]

KINDS = ("relu", "squared_relu", "gelu", "swiglu")


def activation(hidden: Tensor, kind: str, backend: str = "auto") -> Tensor:
    """Apply an activation element by element.

    Torch computes as its own functions do, and so rounds silu(gate) to bf16 or fp16 before its product with up. Triton
    computes in fp32, and rounds once.

    Args:
        hidden: (..., width); for ``swiglu`` (..., 2 width), the gate before the values that it gates.
        kind: ``relu``; ``squared_relu`` (Primer, arXiv 2109.08668); ``gelu``, the exact one with erf; ``swiglu``
            (Shazeer, arXiv 2002.05202): silu(gate) * up.
        backend: ``auto``, or one of ``BACKENDS["activation"]``.

    Returns:
        (..., width), dtype of hidden.

    Raises:
        UserError: an unknown kind, an odd last dimension for ``swiglu``, or a back end that does not exist.
    """
    if kind not in KINDS:
        raise UserError(f"activation has no kind {kind!r}: choose one of {', '.join(KINDS)}")
    if hidden.dim() == 0 or (kind == "swiglu" and hidden.shape[-1] % 2):
        width = "2 width" if kind == "swiglu" else "width"
        raise UserError(f"activation: hidden has shape {tuple(hidden.shape)}, and must be (..., {width})")
    _, function = choose("activation", hidden.device.type, hidden.dtype, backend)
    return function(hidden, kind)
