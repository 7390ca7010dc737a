"""MambaForCausalLM: Mamba layers alone."""

from collections.abc import Iterator
from typing import Any

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.formats.base import (
    Configuration,
    Entry,
    build,
    describe_layer,
    dt_rank,
    edges,
    get,
    mamba_entries,
    number,
    require,
    same,
    stack_refusal,
)


class Mamba:
    """Pattern ``M``."""

    name = "mamba"
    architecture = "MambaForCausalLM"

    def refusal(self, model: ModelConfig, moe: MoEConfig) -> str | None:
        """See WayOut."""
        for index, letter in enumerate(model.layers):
            if letter != "M":
                return f"{describe_layer(model, index)}, which {self.architecture} has not"
        if model.mamba_norms:
            return f"model.mamba_norms=true: {self.architecture} has no norms inside the mixer"
        return stack_refusal(model, self.architecture)

    def configuration(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """See WayOut."""
        return {
            "model_type": "mamba",
            "architectures": [self.architecture],
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "intermediate_size": model.d_inner,
            "num_hidden_layers": len(model.layers),
            "state_size": model.d_state,
            "conv_kernel": model.d_conv,
            "expand": model.expand,
            "time_step_rank": model.resolved_dt_rank,
            "layer_norm_epsilon": model.norm_epsilon,
            "hidden_act": "silu",
            "use_bias": False,
            "use_conv_bias": True,
            "residual_in_fp32": False,  # our stream has the dtype of the weights
            "tie_word_embeddings": model.tied_head,
        }

    def read(self, configuration: Configuration) -> tuple[ModelConfig, MoEConfig]:
        """See Format."""
        d_model, expand = number(configuration, "hidden_size"), number(configuration, "expand", 2)
        require(configuration, self.architecture, {"hidden_act": "silu"}, "our Mamba has SiLU")
        require(configuration, self.architecture, {"use_bias": False}, "our projections have no bias")
        require(configuration, self.architecture, {"use_conv_bias": True}, "our convolution has a bias")
        width = {"intermediate_size": expand * d_model}
        require(configuration, self.architecture, width, "our width is expand x hidden_size")
        model = {
            "pattern": "M",
            "repeat": number(configuration, "num_hidden_layers"),
            "d_model": d_model,
            "vocab_size": number(configuration, "vocab_size"),
            "d_state": number(configuration, "state_size", 16),
            "d_conv": number(configuration, "conv_kernel", 4),
            "expand": expand,
            "dt_rank": dt_rank(self.architecture, "time_step_rank", configuration.get("time_step_rank"), d_model),
            "norm_epsilon": get(configuration, "layer_norm_epsilon", 1e-5),
            "tied_head": get(configuration, "tie_word_embeddings", True),
        }
        return build(model, {})

    def entries(self, model: ModelConfig, moe: MoEConfig, stacked: bool = False) -> Iterator[Entry]:
        """See Format."""
        first, last = edges(model, "backbone.embeddings", "backbone.norm_f")
        yield first
        for index in range(len(model.layers)):
            theirs, ours = f"backbone.layers.{index}", f"layers.{index}"
            yield same(f"{theirs}.norm.weight", f"{ours}.norm.weight")
            yield from mamba_entries(f"{theirs}.mixer", f"{ours}.mixer")
        yield from last
