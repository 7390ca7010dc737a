import pytest
import torch

from moe_mamba.config import ModelConfig
from moe_mamba.model.initialize import initialize
from moe_mamba.model.mixers.feed_forward import FeedForward
from moe_mamba.model.sequences import Sequences

PLAIN = {
    "relu": lambda h: h.clamp(min=0),
    "squared_relu": lambda h: h.clamp(min=0) ** 2,
    "gelu": lambda h: h * 0.5 * (1 + torch.erf(h / 2**0.5)),
    "swiglu": lambda h: h[:, :12] * torch.sigmoid(h[:, :12]) * h[:, 12:],
}


@pytest.mark.parametrize("activation", list(PLAIN))
def test_values(activation: str) -> None:
    layer = FeedForward(ModelConfig(d_model=8, d_ff=12, activation=activation)).double()
    initialize(layer, 0)
    x = torch.randn(5, 8, dtype=torch.float64)
    y, statistics, state = layer(x, Sequences(1, 5))
    assert (statistics, state) == ({}, None)
    expected = PLAIN[activation](x @ layer.in_proj.weight.T) @ layer.out_proj.weight.T
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_biases() -> None:
    layer = FeedForward(ModelConfig(d_model=8, d_ff=12, activation="swiglu"), bias=True).double()
    initialize(layer, 0)
    assert not layer.in_proj.bias.any() and not layer.out_proj.bias.any()
    torch.nn.init.normal_(layer.in_proj.bias)
    torch.nn.init.normal_(layer.out_proj.bias)
    x = torch.randn(5, 8, dtype=torch.float64)
    hidden = PLAIN["swiglu"](x @ layer.in_proj.weight.T + layer.in_proj.bias)
    expected = hidden @ layer.out_proj.weight.T + layer.out_proj.bias
    torch.testing.assert_close(layer(x, Sequences(1, 5))[0], expected, rtol=1e-12, atol=1e-12)
