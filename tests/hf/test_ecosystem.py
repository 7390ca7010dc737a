"""What libraries on top of Transformers (TRL, PEFT) ask of the class: quick checks without those libraries."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")
Pair = Callable[..., Any]


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_router_logits_stand_at_their_tokens_whatever_is_padding(pair: Pair, side: str) -> None:
    """TRL's balance loss drops the router logits where ``attention_mask`` is 0, so they must be in its order."""
    _, model = pair("MEE")
    text = torch.arange(2, 9)[None]
    visible = {"left": range(5, 12), "right": range(7), "middle": (0, 1, 2, 8, 9, 10, 11)}[side]
    padded, mask = torch.ones(2, 12, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.int64)
    padded[0, list(visible)], mask[0, list(visible)], mask[1] = text[0], 1, 1
    alone = model(text, output_router_logits=True).router_logits
    batched = model(padded, attention_mask=mask, output_router_logits=True).router_logits
    assert len(batched) == 2
    for one, other in zip(alone, batched, strict=True):
        torch.testing.assert_close(other.view(2, 12, -1)[0, list(visible)], one, rtol=1e-5, atol=1e-5)


def test_the_configuration_answers_by_the_names_that_mixtral_has() -> None:
    from moe_mamba.hf.configuration_moe_mamba import MoEMambaConfig

    config = MoEMambaConfig(pattern="ME", moe={"experts": 6, "router": "top_k", "top_k": 2, "balance_weight": 0.03})
    assert (config.num_experts, config.num_experts_per_tok, config.router_aux_loss_coef) == (6, 2, 0.03)
    config.router_aux_loss_coef = 0.5  # what TRL trains with is what the folder says
    assert MoEMambaConfig.from_dict(config.to_dict()).moe["balance_weight"] == 0.5
    by_bias = MoEMambaConfig(pattern="ME", moe={"experts": 6, "balance": "bias"})
    by_bias.router_aux_loss_coef = 0.0
    assert by_bias.router_aux_loss_coef == 0.0
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0.1 with moe.balance=bias, which has no loss"):
        by_bias.router_aux_loss_coef = 0.1
    without = MoEMambaConfig(pattern="M*-")
    assert not any(hasattr(without, name) for name in ("num_experts", "num_experts_per_tok", "router_aux_loss_coef"))
