"""Linear layers by our kernels."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from moe_mamba.kernels import linear


class Linear(nn.Linear):
    """``nn.Linear`` with a product that can be another one.

    Attributes:
        product: of an input (..., in), a weight (out, in) and a bias (out) or None; ZeRO-3 puts its own in this place.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, product: Callable[..., Tensor]) -> None:
        super().__init__(in_features, out_features, bias)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in) to (..., out)."""
        return self.product(x, self.weight, self.bias)


def build_linear(in_features: int, out_features: int, bias: bool = False, kernels: str = "auto") -> nn.Linear:
    """Make a linear layer; ``kernels`` as in ``run.kernels``."""
    return Linear(in_features, out_features, bias, partial(linear, backend=kernels))
