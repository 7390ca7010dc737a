"""Checkpoints of the library mamba-ssm, as state-spaces published them: only the way in."""

from collections.abc import Iterator

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.formats.base import (
    Entry,
    build,
    dt_rank,
    edges,
    mamba_entries,
    same,
)
from moe_mamba.hf.formats.settings import Configuration, Settings

INITIAL = frozenset({"dt_init", "dt_init_floor", "dt_max", "dt_min", "dt_scale"})
"""Keys of how weights started."""


class StateSpaces:
    """``MambaLMHeadModel``: only Mamba-1 layers; its config.json names no class."""

    name = "state_spaces"
    architecture = "MambaLMHeadModel"

    def read(self, configuration: Configuration) -> tuple[ModelConfig, MoEConfig]:
        """See Format; the vocabulary is the padded one, which the tensors have."""
        with Settings(configuration, self.architecture, {"fused_add_norm", "residual_in_fp32"}) as settings:
            mixer = settings.section("ssm_cfg", inert=INITIAL | {"use_fast_path"})
            mixer.require({"layer": "Mamba1"}, "ours is Mamba-1")
            mixer.require({"conv_bias": True, "bias": False}, "only our convolution has a bias")
            for key in ("attn_layer_idx", "d_intermediate"):
                if settings.get(key):
                    settings.refuse(key, "only Mamba layers are read")
            d_model, multiple = settings.number("d_model"), settings.number("pad_vocab_size_multiple", 8)
            model = {
                "pattern": "M",
                "repeat": settings.number("n_layer"),
                "d_model": d_model,
                "vocab_size": -(-settings.number("vocab_size") // multiple) * multiple,
                "d_state": mixer.number("d_state", 16),
                "d_conv": mixer.number("d_conv", 4),
                "expand": mixer.number("expand", 2),
                "dt_rank": dt_rank(mixer, "dt_rank", d_model),
                "norm": "rmsnorm" if settings.flag("rms_norm", True) else "layernorm",
                "tied_head": settings.flag("tie_embeddings", True),
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
