"""LlamaForCausalLM: attention with rotary positions, then a SwiGLU feed-forward layer."""

from collections.abc import Iterator
from typing import Any

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.formats.base import (
    Configuration,
    Entry,
    attention_entries,
    build,
    describe_layer,
    edges,
    gated_entries,
    get,
    number,
    refuse,
    require,
    require_plain_attention,
    same,
    section,
    stack_refusal,
)


class Llama:
    """Pattern ``*-``."""

    name = "llama"
    architecture = "LlamaForCausalLM"

    def refusal(self, model: ModelConfig, moe: MoEConfig) -> str | None:
        """See WayOut."""
        return transformer_refusal(model, self.architecture, "*-")

    def configuration(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """See WayOut."""
        return {
            "model_type": "llama",
            "architectures": [self.architecture],
            **transformer_configuration(model),
            "intermediate_size": model.resolved_d_ff,
            "attention_bias": False,
            "mlp_bias": False,
        }

    def read(self, configuration: Configuration) -> tuple[ModelConfig, MoEConfig]:
        """See Format."""
        biases = {"attention_bias": False, "mlp_bias": False}
        require(configuration, self.architecture, biases, "our projections have no bias")
        keys = read_transformer(configuration, self.architecture, rms_norm_eps=1e-6, rope_theta=10000.0)
        return build(keys | {"pattern": "*-"}, {})

    def entries(self, model: ModelConfig, moe: MoEConfig, stacked: bool = False) -> Iterator[Entry]:
        """See Format."""
        first, last = edges(model, "model.embed_tokens", "model.norm")
        yield first
        for index in range(len(model.layers) // 2):
            yield from transformer_entries(index)
            yield from gated_entries(f"model.layers.{index}.mlp", f"layers.{2 * index + 1}.mixer", model.resolved_d_ff)
        yield from last


def transformer_refusal(model: ModelConfig, architecture: str, pair: str) -> str | None:
    """Why a class of attention and ``pair[1]`` in turn does not hold the model; None where it does."""
    for index, letter in enumerate(model.layers):
        if letter not in pair:
            return f"{describe_layer(model, index)}, which {architecture} has not"
        if letter != pair[index % 2]:
            return f"{describe_layer(model, index)}: {architecture} has {pair[0]} and {pair[1]} in turn"
    if len(model.layers) % 2:
        return f"{describe_layer(model, len(model.layers) - 1)}, the last: {architecture} ends with {pair[1]}"
    if model.positions != "rope":
        return f"model.positions={model.positions}: {architecture} has rotary positions"
    return stack_refusal(model, architecture)


def transformer_configuration(model: ModelConfig) -> dict[str, Any]:
    """The keys that Llama's and Mixtral's config.json share."""
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": len(model.layers) // 2,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.resolved_kv_heads,
        "head_dim": model.d_model // model.heads,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,  # Transformers 4 reads this, 5 the next
        "rope_parameters": {"rope_theta": model.rope_base, "rope_type": "default"},
        "tie_word_embeddings": model.tied_head,
    }


def read_transformer(
    configuration: Configuration, architecture: str, rms_norm_eps: float, rope_theta: float
) -> dict[str, Any]:
    """Our keys, but for the pattern, from those that Llama's and Mixtral's config.json share; with their defaults."""
    require(configuration, architecture, {"hidden_act": "silu"}, "our gate is SwiGLU's")
    d_model, heads = number(configuration, "hidden_size"), number(configuration, "num_attention_heads")
    require_plain_attention(configuration, architecture, d_model // heads)
    return {
        "repeat": number(configuration, "num_hidden_layers"),
        "d_model": d_model,
        "vocab_size": number(configuration, "vocab_size"),
        "heads": heads,
        "kv_heads": number(configuration, "num_key_value_heads", heads),
        "rope_base": _rope_base(configuration, architecture, rope_theta),
        "d_ff": number(configuration, "intermediate_size"),
        "activation": "swiglu",
        "norm_epsilon": get(configuration, "rms_norm_eps", rms_norm_eps),
        "tied_head": get(configuration, "tie_word_embeddings", False),
    }


def _rope_base(configuration: Configuration, architecture: str, default: float) -> float:
    """Base of the rotary frequencies: Transformers 4 writes rope_theta and rope_scaling, 5 rope_parameters."""
    rope = section(configuration, "rope_parameters") or section(configuration, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        refuse(architecture, "rope_type", kind, "our rotary frequencies are not scaled")
    for partial in (rope, configuration):
        require(partial, architecture, {"partial_rotary_factor": 1.0}, "our rotation takes the whole head")
    return get(rope, "rope_theta", get(configuration, "rope_theta", default))


def transformer_entries(index: int) -> Iterator[Entry]:
    """Norms and attention of one layer of Llama's or Mixtral's, which is two of ours."""
    theirs, ours = f"model.layers.{index}", (f"layers.{2 * index}", f"layers.{2 * index + 1}")
    yield same(f"{theirs}.input_layernorm.weight", f"{ours[0]}.norm.weight")
    yield from attention_entries(f"{theirs}.self_attn", f"{ours[0]}.mixer")
    yield same(f"{theirs}.post_attention_layernorm.weight", f"{ours[1]}.norm.weight")
