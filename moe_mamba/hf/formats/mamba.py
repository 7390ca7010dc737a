"""MambaForCausalLM: only Mamba layers."""

from collections.abc import Iterator
from typing import Any

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.formats.base import (
    Entry,
    build,
    describe_layer,
    dt_rank,
    edges,
    mamba_entries,
    same,
    stack_refusal,
)
from moe_mamba.hf.formats.settings import INERT, Configuration, Settings
from moe_mamba.model.mixers.mamba import Mamba as MambaMixer

INITIAL = frozenset(
    {
        *("rescale_prenorm_residual", "time_step_floor", "time_step_init_scheme", "time_step_max", "time_step_min"),
        "time_step_scale",
    }
)
"""Keys of how weights started."""


class Mamba:
    """Pattern ``M``."""

    name = "mamba"
    architecture = "MambaForCausalLM"

    def refusal(self, model: ModelConfig, moe: MoEConfig) -> str | None:
        """See WayOut."""
        for index, letter in enumerate(model.layers):
            if letter != MambaMixer.letter:
                return f"{describe_layer(model, index)}, which {self.architecture} lacks"
        if model.mamba_norms:
            return f"model.mamba_norms=true: {self.architecture} has no norms inside the mixer"
        return stack_refusal(model, moe, self.architecture)

    def configuration(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """See WayOut."""
        return {
            "model_type": "mamba",
            "architectures": [self.architecture],
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "intermediate_size": model.resolved_d_inner,
            "num_hidden_layers": len(model.layers),
            "state_size": model.d_state,
            "conv_kernel": model.d_conv,
            "expand": model.resolved_d_inner // model.d_model,
            "time_step_rank": model.resolved_dt_rank,
            "layer_norm_epsilon": model.norm_epsilon,
            "hidden_act": "silu",
            "use_bias": False,
            "use_conv_bias": True,
            "residual_in_fp32": False,  # our stream has the dtype of the weights
            "tie_word_embeddings": model.tied_head,
            "pad_vocab_size_multiple": 1,  # llama.cpp else takes 8, pads its list of tokens and then misses weights
        }

    def read(self, configuration: Configuration) -> tuple[ModelConfig, MoEConfig]:
        """See Format."""
        inert = INERT | INITIAL | {"residual_in_fp32", "use_associative_scan", "use_mambapy"}
        with Settings(
            configuration, self.architecture, inert | {"fused_add_norm", "pad_vocab_size_multiple"}
        ) as settings:
            d_model, expand = settings.number("hidden_size"), settings.number("expand", 2)
            layers = settings.number("num_hidden_layers")
            settings.require({"hidden_act": "silu"}, "our Mamba has SiLU")
            settings.require({"use_bias": False}, "our projections have no bias")
            settings.require({"use_conv_bias": True}, "our convolution has a bias")
            settings.require({"intermediate_size": expand * d_model}, "our width is expand x hidden_size")
            # Files that were converted from state-spaces' keep those keys as well.
            older = {"d_model": d_model, "d_inner": expand * d_model, "n_layer": layers, "rms_norm": True}
            settings.require(older, "the keys of Transformers say otherwise")
            model = {
                "pattern": "M",
                "repeat": layers,
                "d_model": d_model,
                "vocab_size": settings.number("vocab_size"),
                "d_state": settings.number("state_size", 16),
                "d_conv": settings.number("conv_kernel", 4),
                "expand": expand,
                "dt_rank": dt_rank(settings, "time_step_rank", d_model),
                "norm_epsilon": settings.real("layer_norm_epsilon", 1e-5, most=1.0),
                "tied_head": settings.flag("tie_word_embeddings", True),
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
