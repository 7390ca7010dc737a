"""Normalisation over the last axis, in fp32 whatever the input's dtype, of the stream and what is added to it."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mamba.config import ModelConfig
from moe_mamba.kernels import rms_norm
from moe_mamba.model.initialize import Initializer, ones, zeros


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 2019): ``x / sqrt(mean(x^2) + epsilon) * weight``."""

    fp32_names = ("weight",)

    def __init__(self, d: int, epsilon: float, kernels: str = "auto") -> None:
        super().__init__()
        self.epsilon = epsilon
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add ``update`` to ``x`` (..., d), in one pass with the norm; returns (normalised sum, sum) in x's dtype."""
        return rms_norm(x, self.weight, self.epsilon, residual=update, backend=self.kernels)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters start."""
        return {"weight": ones}


class LayerNorm(nn.Module):
    """Layer norm (Ba et al., 2016) with weight and bias, as in torch."""

    fp32_names = ("weight", "bias")

    def __init__(self, d: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add ``update`` to ``x`` (..., d), and normalise; returns (normalised sum, sum) in x's dtype."""
        total = x if update is None else x + update
        wide = total.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        y = functional.layer_norm(wide, weight.shape, weight, bias, self.epsilon)
        return y.to(x.dtype), total

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters start."""
        return {"weight": ones, "bias": zeros}


def build_norm(config: ModelConfig, kernels: str = "auto") -> RMSNorm | LayerNorm:
    """Build the norm over ``d_model`` that the config names."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, config.norm_epsilon, kernels)
    return LayerNorm(config.d_model, config.norm_epsilon)
