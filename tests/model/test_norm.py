import pytest
import torch

from moe_mamba.config import ModelConfig
from moe_mamba.model.norm import LayerNorm, RMSNorm, build_norm


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_values(kind: str) -> None:
    norm = build_norm(ModelConfig(d_model=16, norm=kind, norm_epsilon=1e-3)).double()
    norm.weight.data.normal_()
    x = torch.randn(5, 16, dtype=torch.float64)
    if kind == "rmsnorm":
        assert isinstance(norm, RMSNorm)
        expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    else:
        assert isinstance(norm, LayerNorm)
        norm.bias.data.normal_()
        centred = x - x.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_an_update_is_added_first(kind: str) -> None:
    norm = build_norm(ModelConfig(d_model=16, norm=kind))
    x, update = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    y, total = norm(x, update)
    assert torch.equal(total, x + update) and torch.equal(y, norm(x + update)[0])
    alone, same = norm(x)
    assert alone.dtype == torch.bfloat16 and torch.equal(same, x)


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_bf16_is_normalised_in_fp32(kind: type) -> None:
    norm = kind(64, 1e-5)
    x = torch.randn(7, 64).bfloat16()
    assert norm(x)[0].dtype == torch.bfloat16
    torch.testing.assert_close(norm(x)[0], norm(x.float())[0].bfloat16(), rtol=0, atol=0)
