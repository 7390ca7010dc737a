"""FLOPs that a model says of itself, against torch's own count of the products that it computes."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel

LENGTH, D, INNER, STATE, CONV = 32, 16, 32, 4, 4
SCAN = 27 * INNER * STATE + 6 * INNER * CONV  # of a Mamba layer and token: the scan's, and the convolution's weights
TOP_2 = {"router": "top_k", "top_k": 2, "shared_experts": 1}
CHOICE = {"router": "expert_choice", "capacity_factor": 2.0, "balance": "none"}  # two experts a token, on average
SHARED = {"inner": {"projections": ["conv", "gate", "out"], "router": "shared"}}
SWITCH = {"inner": {"projections": ["conv", "out"], "router": "own", "expert": "switch", "top_k": 2}}


def counted(model: LanguageModel) -> tuple[float, float]:
    """Operations of a token, forward and backward: those of products of weights, and those of other products."""
    tokens = torch.randint(32, (2, LENGTH))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = model(tokens, targets=tokens.roll(-1, 1))
        routers = sum(statistics.z for statistics in output.statistics.values())  # each has a gradient, as in training
        (output.cross_entropy + routers).backward()
    kinds = {str(kind): count / tokens.numel() for kind, count in counter.get_flop_counts()["Global"].items()}
    weights = sum(count for kind, count in kinds.items() if kind in ("aten.mm", "aten.addmm"))
    return weights, sum(kinds.values()) - weights


@pytest.mark.parametrize(
    ("pattern", "moe", "model"),
    [
        ("M", {}, {"mamba_norms": True}),
        ("M", {}, {"selective": False, "d_inner": 11}),
        ("M", SHARED, {}),
        ("M", SWITCH, {"activation": "swiglu", "d_inner": 11}),
        ("-", {}, {"mlp_bias": True}),
        ("-", {}, {"activation": "swiglu"}),
        ("E", {}, {}),
        ("E", {"capacity_factor": 1.0}, {}),
        ("E", TOP_2, {"activation": "swiglu"}),
        ("E", CHOICE, {}),
        ("(ME)", {}, {"tied_head": True}),
    ],
    ids=lambda value: str(value) or "plain",
)
def test_products_of_weights_are_those_that_torch_counts(
    pattern: str, moe: dict[str, Any], model: dict[str, Any]
) -> None:
    built = build(pattern, moe, model)
    scan = SCAN * built.config.resolved_d_inner // INNER if "M" in pattern else 0
    assert built.flops_per_token(LENGTH) == counted(built)[0] + scan


def test_products_of_attention_are_half_of_those_that_torch_counts_without_the_mask() -> None:
    built = build("*", {}, {"heads": 4, "kv_heads": 2, "attention_bias": True})
    weights, scores = counted(built)
    assert scores == 12 * LENGTH * D
    assert built.flops_per_token(LENGTH) == weights + scores / 2


def build(pattern: str, moe: dict[str, Any], model: dict[str, Any]) -> LanguageModel:
    sizes = {"repeat": 1, "d_model": D, "vocab_size": 32, "d_state": STATE, "d_conv": CONV, "d_ff": 24}
    routed = {"experts": 4, "capacity_factor": None} | moe
    built = LanguageModel(ModelConfig(pattern=pattern, **sizes | model), MoEConfig(**routed), "reference")
    initialize(built, seed=0)
    return built
