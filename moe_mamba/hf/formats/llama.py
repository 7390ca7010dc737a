"""LlamaForCausalLM: attention with rotary positions, then a SwiGLU feed-forward layer.

And what Mistral and Mixtral have in common with it.
"""

from collections.abc import Iterator
from typing import Any

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.formats.base import (
    Entry,
    attention_entries,
    attention_refusal,
    build,
    describe_layer,
    edges,
    gated_entries,
    same,
    stack_refusal,
)
from moe_mamba.hf.formats.settings import INERT, TRAINING_ALONE, Configuration, Settings

SCALING = (
    ("factor", "rope_factor"),
    ("low_freq_factor", "rope_low_freq_factor"),
    ("high_freq_factor", "rope_high_freq_factor"),
    ("original_max_position_embeddings", "rope_original_length"),
)
ROPE = {"default": (), "linear": SCALING[:1], "llama3": SCALING}
"""rope_type -> their keys of it and ours."""


class Llama:
    """Pattern ``*-``."""

    name = "llama"
    architecture = "LlamaForCausalLM"

    def refusal(self, model: ModelConfig, moe: MoEConfig) -> str | None:
        """See WayOut."""
        refusal = transformer_refusal(model, moe, self.architecture, "*-", ("attention_bias", "mlp_bias"))
        if refusal is None and model.d_model % model.heads:
            refusal = f"model.d_model={model.d_model}: {self.architecture} wants a multiple of its {model.heads} heads"
        return refusal

    def configuration(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """See WayOut."""
        return {
            "model_type": "llama",
            "architectures": [self.architecture],
            **transformer_configuration(model),
            "intermediate_size": model.resolved_d_ff,
            "attention_bias": model.attention_bias,
            "mlp_bias": model.mlp_bias,
        }

    def read(self, configuration: Configuration) -> tuple[ModelConfig, MoEConfig]:
        """See Format."""
        inert = INERT | TRAINING_ALONE | {"pretraining_tp"}
        with Settings(configuration, self.architecture, inert) as settings:
            keys = read_transformer(settings, rms_norm_eps=1e-6)
            keys |= {key: settings.flag(key, False) for key in ("attention_bias", "mlp_bias")}
            return build(keys | {"pattern": "*-"}, {})

    def entries(self, model: ModelConfig, moe: MoEConfig, stacked: bool = False) -> Iterator[Entry]:
        """See Format."""
        return dense_entries(model)


def transformer_refusal(
    model: ModelConfig, moe: MoEConfig, architecture: str, pair: str, holds: tuple[str, ...] = ()
) -> str | None:
    """Why a class of attention and ``pair[1]`` in turn does not hold the model; None where it does.

    Args:
        model: ours.
        moe: ours.
        architecture: the class.
        pair: the letters.
        holds: see ``attention_refusal``.
    """
    for index, letter in enumerate(model.layers):
        if letter not in set(pair):
            return f"{describe_layer(model, index)}, which {architecture} lacks"
        if letter != pair[index % 2]:
            return f"{describe_layer(model, index)}: {architecture} has {pair[0]} and {pair[1]} in turn"
    if len(model.layers) % 2:
        return f"{describe_layer(model, len(model.layers) - 1)}, the last: {architecture} ends with {pair[1]}"
    if model.positions != "rope":
        return f"model.positions={model.positions}: {architecture} has rotary positions"
    return attention_refusal(model, architecture, holds) or stack_refusal(model, moe, architecture)


def transformer_configuration(model: ModelConfig) -> dict[str, Any]:
    """The keys that Llama's, Mistral's and Mixtral's config.json share."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": len(model.layers) // 2,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.resolved_kv_heads,
        "head_dim": model.resolved_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        **_rope_configuration(model),
        "tie_word_embeddings": model.tied_head,
    }


def _rope_configuration(model: ModelConfig) -> dict[str, Any]:
    """Rotary frequencies: Transformers 4 reads rope_theta and rope_scaling, 5 rope_parameters."""
    scaling = {"rope_type": model.rope_type} | {theirs: getattr(model, ours) for theirs, ours in ROPE[model.rope_type]}
    keys = {"rope_theta": model.rope_base, "rope_parameters": {"rope_theta": model.rope_base, **scaling}}
    if model.rope_type != "default":
        keys["rope_scaling"] = scaling
    if model.rope_type == "llama3":  # the context that was stretched; both versions warn of a shorter one
        keys["max_position_embeddings"] = int(model.rope_original_length * model.rope_factor)
    return keys


def read_transformer(
    settings: Settings, rms_norm_eps: float, rope_theta: float = 10000.0, kv_heads: int | None = None
) -> dict[str, Any]:
    """Our keys, but for the pattern, from those that Llama's, Mistral's and Mixtral's config.json share.

    Args:
        settings: the file.
        rms_norm_eps: what their class takes where the key is missing, as for the next ones.
        rope_theta: base of the rotary frequencies.
        kv_heads: key and value heads; None: as many as heads.
    """
    settings.require({"hidden_act": "silu"}, "our gate is SwiGLU's")
    heads = settings.number("num_attention_heads")
    return {
        "repeat": settings.number("num_hidden_layers"),
        "d_model": settings.number("hidden_size"),
        "vocab_size": settings.number("vocab_size"),
        "heads": heads,
        "kv_heads": settings.optional_number("num_key_value_heads", kv_heads) or heads,
        "head_dim": read_head_dim(settings, heads),
        **_read_rope(settings, rope_theta),
        "d_ff": settings.number("intermediate_size"),
        "activation": "swiglu",
        "norm_epsilon": settings.real("rms_norm_eps", rms_norm_eps, most=1.0),
        "tied_head": settings.flag("tie_word_embeddings", False),
    }


def _read_rope(settings: Settings, base: float) -> dict[str, Any]:
    """Rotary frequencies, wherever a version writes them: see ``_rope_configuration``."""
    rope = settings.section("rope_parameters", "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE:
        rope.refuse("rope_type" if rope.get("rope_type") else "type", f"our rotary frequencies are {', '.join(ROPE)}")
    rope.require({"type": kind}, "rope_type says otherwise")
    for place in (settings, rope):
        place.require({"partial_rotary_factor": 1.0}, "our rotation takes the whole head")
    theta = rope.real("rope_theta", settings.get("rope_theta", base))
    settings.require({"rope_theta": theta}, "rope_parameters says otherwise")
    scaling = {ours: rope.number(theirs) if "length" in ours else rope.real(theirs) for theirs, ours in ROPE[kind]}
    return {"rope_base": theta, "rope_type": kind, **scaling}


def read_head_dim(settings: Settings, heads: int) -> int | None:
    """Width of a head; None where it is the usual one, as in files that leave it out."""
    head_dim = settings.optional_number("head_dim")
    return None if head_dim == settings.number("hidden_size") / heads else head_dim


def transformer_entries(index: int, bias: bool = False) -> Iterator[Entry]:
    """Norms and attention of one layer of Llama's, Mistral's or Mixtral's, which is two of ours."""
    theirs, ours = f"model.layers.{index}", (f"layers.{2 * index}", f"layers.{2 * index + 1}")
    yield same(f"{theirs}.input_layernorm.weight", f"{ours[0]}.norm.weight")
    yield from attention_entries(f"{theirs}.self_attn", f"{ours[0]}.mixer", bias)
    yield same(f"{theirs}.post_attention_layernorm.weight", f"{ours[1]}.norm.weight")


def dense_entries(model: ModelConfig) -> Iterator[Entry]:
    """Every tensor of Llama and Mistral."""
    first, last = edges(model, "model.embed_tokens", "model.norm")
    yield first
    for index in range(len(model.layers) // 2):
        theirs, ours = f"model.layers.{index}.mlp", f"layers.{2 * index + 1}.mixer"
        yield from transformer_entries(index, model.attention_bias)
        yield from gated_entries(theirs, ours, model.resolved_d_ff, model.mlp_bias)
    yield from last
