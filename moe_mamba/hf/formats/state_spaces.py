"""Checkpoints of the library mamba-ssm, as state-spaces published them: the way in alone."""

from collections.abc import Iterator

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.formats.base import (
    Configuration,
    Entry,
    build,
    dt_rank,
    edges,
    get,
    mamba_entries,
    number,
    refuse,
    require,
    same,
    section,
)


class StateSpaces:
    """``MambaLMHeadModel``: Mamba-1 layers alone; its config.json names no class."""

    name = "state_spaces"
    architecture = "MambaLMHeadModel"

    def read(self, configuration: Configuration) -> tuple[ModelConfig, MoEConfig]:
        """See Format; the vocabulary is the padded one, which the tensors have."""
        mixer = section(configuration, "ssm_cfg")
        require(mixer, self.architecture, {"layer": "Mamba1"}, "ours is Mamba-1")
        require(mixer, self.architecture, {"conv_bias": True, "bias": False}, "our convolution alone has a bias")
        for key in ("attn_layer_idx", "d_intermediate"):
            if configuration.get(key):
                refuse(self.architecture, key, configuration[key], "Mamba layers alone are read")
        d_model, multiple = number(configuration, "d_model"), number(configuration, "pad_vocab_size_multiple", 8)
        model = {
            "pattern": "M",
            "repeat": number(configuration, "n_layer"),
            "d_model": d_model,
            "vocab_size": -(-number(configuration, "vocab_size") // multiple) * multiple,
            "d_state": number(mixer, "d_state", 16),
            "d_conv": number(mixer, "d_conv", 4),
            "expand": number(mixer, "expand", 2),
            "dt_rank": dt_rank(self.architecture, "dt_rank", mixer.get("dt_rank"), d_model),
            "norm": "rmsnorm" if get(configuration, "rms_norm", True) else "layernorm",
            "tied_head": get(configuration, "tie_embeddings", True),
        }
        return build(model, {})

    def entries(self, model: ModelConfig, moe: MoEConfig, stacked: bool = False) -> Iterator[Entry]:
        """See Format."""
        first, last = edges(model, "backbone.embedding", "backbone.norm_f")
        parts = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
        yield first
        for index in range(len(model.layers)):
            theirs, ours = f"backbone.layers.{index}", f"layers.{index}"
            yield from (same(f"{theirs}.norm.{part}", f"{ours}.norm.{part}") for part in parts)
            yield from mamba_entries(f"{theirs}.mixer", f"{ours}.mixer")
        yield from (same(f"backbone.norm_f.{part}", f"final_norm.{part}") for part in parts[1:])
        yield from last
