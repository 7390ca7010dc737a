"""Feed-forward layers."""

from torch import Tensor, nn

from moe_mamba.config import ModelConfig
from moe_mamba.kernels import activation
from moe_mamba.model.initialize import Initializer, matrix, zeros
from moe_mamba.model.sequences import Sequences


def input_width(activation: str, width: int) -> int:
    """Columns of the input projection for a hidden width: SwiGLU has a gate beside the values."""
    return 2 * width if activation == "swiglu" else width


class FeedForward(nn.Module):
    """Two matrices, with biases or without, and an activation between them."""

    def __init__(self, config: ModelConfig, width: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.config = config
        self.width = width or config.resolved_d_ff
        self.in_proj = nn.Linear(config.d_model, input_width(config.activation, self.width), bias=bias)
        self.out_proj = nn.Linear(self.width, config.d_model, bias=bias)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's parameters start."""
        fills = {
            "in_proj.weight": matrix(self.config, self.config.d_model),
            "out_proj.weight": matrix(self.config, self.width, residual=True),
        }
        if self.in_proj.bias is not None:
            fills |= {"in_proj.bias": zeros, "out_proj.bias": zeros}
        return fills

    def forward(self, x: Tensor, sequences: Sequences, state: None = None) -> tuple[Tensor, None, None]:
        """Map ``x`` (tokens, d_model) token by token; returns (y, None, None) as every mixer does."""
        hidden = activation(self.in_proj(x), self.config.activation, self.config.kernels)  # (tokens, width)
        return self.out_proj(hidden), None, None
