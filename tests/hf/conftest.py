"""A model of the trainer's, and the one that Transformers loads, with the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel

SIZES = {"repeat": 1, "d_model": 16, "vocab_size": 31, "d_state": 4, "heads": 4, "d_ff": 24}
TOP_2: dict[str, Any] = {"router": "top_k", "top_k": 2}
OWN: dict[str, Any] = {"projections": ["conv", "gate"]}
SHARED: dict[str, Any] = {"projections": ["conv", "gate", "out"], "router": "shared"}
SWITCH: dict[str, Any] = {"expert": "switch", "d_expert": 8}
DESIGNS: dict[str, tuple[str, dict[str, Any]]] = {
    "parallel": ("(ME)", {}),
    "parallel, top 2": ("(ME)", TOP_2),
    "parallel attention": ("(*E)-", TOP_2 | {"shared_experts": 1}),
    "own": ("M", {"inner": OWN}),
    "own, top 2": ("MM", TOP_2 | {"renormalize": True, "inner": OWN | SWITCH | {"every": 2}}),
    "own, out": ("M", {"inner": {"projections": ["out"], **SWITCH, "experts": 3, "top_k": 2, "balance": "bias"}}),
    "shared": ("ME", {"inner": SHARED | {"balance": "none", "experts": 3}}),
    "shared, top 2": ("(ME)", {"balance": "none", "inner": SHARED | {"top_k": 2, "balance": "loss"}}),
}
"""The paper's other designs: pattern and routing."""


def their_name(name: str) -> str:
    """The name of one of our tensors in the class."""
    return "lm_head.weight" if name == "head.weight" else f"model.{name}"


def make_pair(pattern: str, moe: dict[str, Any] | None = None, **model: Any) -> tuple[LanguageModel, Any]:
    """(LanguageModel, MoEMambaForCausalLM) with the same weights, both in evaluation mode."""
    from moe_mamba.hf.configuration_moe_mamba import MoEMambaConfig
    from moe_mamba.hf.modeling_moe_mamba import MoEMambaForCausalLM

    keys = {"pattern": pattern, **SIZES, **model}
    routing = {"experts": 4, "capacity_factor": None, **(moe or {})}
    ours = LanguageModel(ModelConfig(**keys), MoEConfig(**routing))
    initialize(ours, 0)
    torch.manual_seed(0)
    with torch.no_grad():  # norms, D and biases too, so that nothing can be mixed up
        for tensor in (*ours.parameters(), *ours.buffers()):
            tensor += 0.1 * torch.randn_like(tensor)
    theirs = MoEMambaForCausalLM(MoEMambaConfig(**keys, moe=routing, eos_token_id=0, pad_token_id=1))
    weights = {their_name(name): tensor for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict({"lm_head.weight": ours.embedding.weight, **weights})
    return ours.eval(), theirs.eval()


@pytest.fixture
def pair() -> Callable[..., Any]:
    """``make_pair``, where Transformers is installed."""
    pytest.importorskip("transformers")
    return make_pair
