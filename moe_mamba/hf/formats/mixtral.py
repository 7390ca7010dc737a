"""MixtralForCausalLM: attention with rotary positions, then SwiGLU experts with renormalised top-k weights."""

from collections.abc import Iterator
from typing import Any

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.formats.base import (
    Entry,
    balance_coefficient,
    build,
    edges,
    expert_entries,
    expert_width,
    read_balance,
    routing_refusal,
    same,
)
from moe_mamba.hf.formats.llama import (
    read_transformer,
    transformer_configuration,
    transformer_entries,
    transformer_refusal,
)
from moe_mamba.hf.formats.settings import INERT, TRAINING_ALONE, Configuration, Settings


class Mixtral:
    """Pattern ``*E``."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"

    def refusal(self, model: ModelConfig, moe: MoEConfig) -> str | None:
        """See WayOut."""
        return transformer_refusal(model, moe, self.architecture, "*E", ("sliding_window",)) or routing_refusal(
            moe, self.architecture, renormalize=True
        )

    def configuration(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """See WayOut."""
        return {
            "model_type": "mixtral",
            "architectures": [self.architecture],
            **transformer_configuration(model),
            "intermediate_size": expert_width(model, moe),
            "num_local_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": balance_coefficient(moe),
            "sliding_window": model.sliding_window,
        }

    def read(self, configuration: Configuration) -> tuple[ModelConfig, MoEConfig]:
        """See Format."""
        with Settings(configuration, self.architecture, INERT | TRAINING_ALONE) as settings:
            keys = read_transformer(settings, rms_norm_eps=1e-5, rope_theta=1e6, kv_heads=8)
            keys |= {"pattern": "*E", "sliding_window": settings.optional_number("sliding_window")}
            top_k = settings.number("num_experts_per_tok", 2)
            if top_k == 1:
                settings.refuse("num_experts_per_tok", "its one weight is always 1, which trains no router")
            moe = {
                "experts": settings.number("num_local_experts", 8),
                "router": "top_k",
                "top_k": top_k,
                "renormalize": True,
                "capacity_factor": None,
                **read_balance(settings, top_k),
            }
            return build(keys, moe)

    def entries(self, model: ModelConfig, moe: MoEConfig, stacked: bool = False) -> Iterator[Entry]:
        """See Format."""
        block = "mlp" if stacked else "block_sparse_moe"
        width = expert_width(model, moe)
        first, last = edges(model, "model.embed_tokens", "model.norm")
        yield first
        for index in range(len(model.layers) // 2):
            theirs, ours = f"model.layers.{index}.{block}", f"layers.{2 * index + 1}.mixer"
            yield from transformer_entries(index)
            yield same(f"{theirs}.gate.weight", f"{ours}.router.weight")
            yield from expert_entries(
                f"{theirs}.experts", f"{ours}.experts", moe.experts, width, ("w1", "w3", "w2"), stacked
            )
        yield from last
