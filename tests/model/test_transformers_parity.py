"""The same weights in Transformers' own classes: logits within 1e-5, every gradient within 1e-4."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_mamba.hf.formats import NATIVE
from moe_mamba.model.language_model import LanguageModel

transformers = pytest.importorskip("transformers")

Tiny = Callable[..., LanguageModel]
GATED = {"kv_heads": 2, "activation": "swiglu"}
JAMBA = GATED | {"positions": "none", "mamba_norms": True, "dt_rank": 2}
TOP_2 = {"router": "top_k", "top_k": 2}
BIASES = {"attention_bias": True, "mlp_bias": True}
LLAMA_3 = {"rope_type": "llama3", "rope_factor": 4.0, "rope_original_length": 16}


def _translate(model: LanguageModel, name: str, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights, or gradients, under our names."""
    ours = {name: torch.full_like(weight, torch.nan) for name, weight in model.state_dict().items()}
    for entry in NATIVE[name].entries(model.config, model.moe_config, stacked=True):
        entry.view(ours[entry.ours]).copy_(theirs[entry.theirs])
    return ours


def _theirs(model: LanguageModel, name: str) -> nn.Module:
    """Their model of our config, every weight moved off its start, so that nothing can be mixed up."""
    keys = NATIVE[name].configuration(model.config, model.moe_config)
    config = transformers.AutoConfig.for_model(**keys, pad_token_id=None)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for weight in theirs.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1)
    return theirs.train()


@pytest.mark.parametrize(
    ("name", "pattern", "moe", "keys"),
    [
        ("mamba", "MM", {}, {"dt_rank": 3}),
        ("mamba", "MM", {}, {"d_state": 6, "d_conv": 3, "expand": 3, "norm_epsilon": 1e-3}),
        ("llama", "*-*-", {}, GATED),
        ("llama", "*-*-", {}, GATED | {"rope_base": 100.0, "norm_epsilon": 1e-3}),
        ("llama", "*-*-", {}, GATED | BIASES),
        ("llama", "*-*-", {}, GATED | LLAMA_3 | {"head_dim": 8, "tied_head": True}),
        ("llama", "*-*-", {}, GATED | BIASES | {"rope_type": "linear", "rope_factor": 2.5, "head_dim": 2}),
        ("mistral", "*-*-", {}, GATED | {"sliding_window": 5}),
        ("mistral", "*-*-", {}, GATED | {"sliding_window": 1}),
        ("mistral", "*-*-", {}, GATED | LLAMA_3 | {"sliding_window": 11, "d_model": 18, "head_dim": 6}),
        ("mistral", "*-*-", {}, GATED | {"sliding_window": 12}),
        ("mixtral", "*E*E", TOP_2 | {"renormalize": True}, GATED),
        ("mixtral", "*E*E", {"router": "top_k", "top_k": 3, "renormalize": True}, GATED | {"sliding_window": 4}),
        ("mixtral", "*E", TOP_2 | {"renormalize": True, "experts": 6}, GATED | LLAMA_3 | {"head_dim": 10}),
        ("jamba", "ME*E", {}, JAMBA),
        ("jamba", "M-ME*-ME", TOP_2, JAMBA | {"norm_epsilon": 1e-3}),
        ("jamba", "*-M-", {}, JAMBA),
    ],
)
def test_the_same_function(tiny: Tiny, name: str, pattern: str, moe: dict, keys: dict) -> None:
    model = tiny(pattern, moe=moe, **keys)
    assert NATIVE[name].refusal(model.config, model.moe_config) is None
    theirs = _theirs(model, name)
    model.load_state_dict(_translate(model, name, theirs.state_dict()))
    tokens = torch.randint(31, (2, 12))
    expected = theirs(input_ids=tokens, use_cache=False).logits
    got = model(tokens).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = {key: torch.zeros_like(w) if w.grad is None else w.grad for key, w in theirs.named_parameters()}
    gradients = _translate(model, name, grads)
    for key, weight in model.named_parameters():
        scale = max(1.0, gradients[key].abs().max().item())
        torch.testing.assert_close(
            weight.grad, gradients[key], rtol=0, atol=1e-4 * scale, msg=lambda text, key=key: f"{key}: {text}"
        )
