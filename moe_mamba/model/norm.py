"""Normalisation over the last axis, in fp32 whatever the input's dtype."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mamba.config import ModelConfig
from moe_mamba.model.initialize import Initializer, ones, zeros


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 2019): ``x / sqrt(mean(x^2) + epsilon) * weight``."""

    def __init__(self, d: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., d); the result has ``x``'s dtype."""
        wide = _at_least_fp32(x)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale * self.weight).to(x.dtype)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters start."""
        return {"weight": ones}


class LayerNorm(nn.Module):
    """Layer norm (Ba et al., 2016) with weight and bias, as in torch."""

    def __init__(self, d: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (..., d); the result has ``x``'s dtype."""
        wide = _at_least_fp32(x)
        return functional.layer_norm(wide, self.weight.shape, self.weight, self.bias, self.epsilon).to(x.dtype)

    def initializers(self) -> dict[str, Initializer]:
        """How this module's own parameters start."""
        return {"weight": ones, "bias": zeros}


def build_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """Build the norm over ``d_model`` that the config names."""
    kind = RMSNorm if config.norm == "rmsnorm" else LayerNorm
    return kind(config.d_model, config.norm_epsilon)
