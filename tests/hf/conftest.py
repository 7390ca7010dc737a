"""A model of the trainer's, and the one that Transformers loads, with the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel

SIZES = {"repeat": 1, "d_model": 16, "vocab_size": 31, "d_state": 4, "heads": 4, "d_ff": 24}


@pytest.fixture
def pair() -> Callable[..., Any]:
    """``pair(pattern, moe={...}, **model keys)`` -> (LanguageModel, MoEMambaForCausalLM), both in evaluation mode."""
    pytest.importorskip("transformers")
    from moe_mamba.hf.configuration_moe_mamba import MoEMambaConfig
    from moe_mamba.hf.modeling_moe_mamba import MoEMambaForCausalLM

    def make(pattern: str, moe: dict[str, Any] | None = None, **model: Any) -> tuple[LanguageModel, Any]:
        keys = {"pattern": pattern, **SIZES, **model}
        routing = {"experts": 4, "capacity_factor": None, **(moe or {})}
        ours = LanguageModel(ModelConfig(**keys), MoEConfig(**routing))
        initialize(ours, 0)
        torch.manual_seed(0)
        with torch.no_grad():  # norms, D and biases too, so that nothing can be mixed up
            for tensor in (*ours.parameters(), *ours.buffers()):
                tensor += 0.1 * torch.randn_like(tensor)
        theirs = MoEMambaForCausalLM(MoEMambaConfig(**keys, moe=routing, eos_token_id=0, pad_token_id=1))
        weights = {f"model.{name}": tensor for name, tensor in ours.state_dict().items() if name != "head.weight"}
        weights["lm_head.weight"] = (ours.embedding if ours.head is None else ours.head).weight
        theirs.load_state_dict(weights)
        return ours.eval(), theirs.eval()

    return make
