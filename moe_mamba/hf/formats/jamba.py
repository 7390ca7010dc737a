"""JambaForCausalLM: Mamba with norms or attention without positions, then a SwiGLU feed-forward layer or experts."""

from collections.abc import Iterator, Sequence
from typing import Any

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.hf.formats.base import (
    Entry,
    attention_entries,
    attention_refusal,
    balance_coefficient,
    build,
    describe_layer,
    dt_rank,
    edges,
    expert_entries,
    expert_width,
    gated_entries,
    mamba_entries,
    read_balance,
    routing_refusal,
    same,
    shortest_pattern,
    stack_refusal,
)
from moe_mamba.hf.formats.llama import read_head_dim
from moe_mamba.hf.formats.settings import INERT, MOST_LAYERS, TRAINING_ALONE, Configuration, Settings
from moe_mamba.model.mixers.attention import Attention
from moe_mamba.model.mixers.feed_forward import FeedForward
from moe_mamba.model.mixers.mamba import Mamba
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.pattern import has

KERNELS = frozenset(
    {
        *("calc_logits_for_entire_prompt", "num_logits_to_keep"),
        *("use_associative_scan", "use_mamba_kernels", "use_mambapy"),
    }
)
"""Keys of how it is computed."""

NORMS = {"dt_norm": "dt_layernorm", "B_norm": "b_layernorm", "C_norm": "c_layernorm"}

HALVES = (Mamba.letter + Attention.letter, FeedForward.letter + MoE.letter)
"""What the first and the second half of a Jamba layer can be."""


class Jamba:
    """Pairs of ``M`` or ``*`` with ``-`` or ``E``; one layer of theirs is a pair of ours."""

    name = "jamba"
    architecture = "JambaForCausalLM"

    def refusal(self, model: ModelConfig, moe: MoEConfig) -> str | None:
        """See WayOut."""
        return (
            self._pairs_refusal(model)
            or self._mixers_refusal(model)
            or stack_refusal(model, moe, self.architecture)
            or self._experts_refusal(model, moe)
        )

    def _pairs_refusal(self, model: ModelConfig) -> str | None:
        for index, letter in enumerate(model.layers):
            if letter not in set(HALVES[index % 2]):
                wanted = " or ".join(HALVES[index % 2])
                return f"{describe_layer(model, index)}, where {self.architecture} has {wanted}"
        if len(model.layers) % 2:
            last = describe_layer(model, len(model.layers) - 1)
            return f"{last}, the last: {self.architecture} ends with {' or '.join(HALVES[1])}"
        if not has(model, Attention):
            return f"no layer is attention (*): without one, Transformers' {self.architecture} cannot cache"
        for letter, kind, half in ((Attention.letter, "attention", 0), (MoE.letter, "experts", 1)):
            found = _places(model.layers[half::2], letter)
            if found and _period(found, len(model.layers) // 2) is None:
                at = ", ".join(str(2 * place + half) for place in found)
                return f"{kind} at layers {at}: {self.architecture} has them at a fixed distance"
        return None

    def _mixers_refusal(self, model: ModelConfig) -> str | None:
        if model.positions != "none":
            return f"model.positions={model.positions}: attention in {self.architecture} has no positions"
        if has(model, Mamba) and not model.mamba_norms:
            return f"model.mamba_norms=false: {self.architecture} has norms on dt, B and C"
        if model.head_dim is not None and model.head_dim * model.heads != model.d_model:
            return f"model.head_dim={model.head_dim}: {self.architecture} of Transformers 4 has hidden_size / heads"
        return attention_refusal(model, self.architecture)

    def _experts_refusal(self, model: ModelConfig, moe: MoEConfig) -> str | None:
        if not has(model, MoE):
            return None
        if moe.experts == 1:
            return f"moe.experts=1: {self.architecture} takes one expert for a feed-forward layer without a router"
        if has(model, FeedForward) and expert_width(model, moe) != model.resolved_d_ff:
            return (
                f"moe.d_expert={moe.d_expert} beside model.d_ff={model.resolved_d_ff}: "
                f"{self.architecture} has one width for both"
            )
        return routing_refusal(moe, self.architecture, renormalize=False)

    def configuration(self, model: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
        """See WayOut."""
        layers, has_experts = len(model.layers) // 2, has(model, MoE)
        attention = _period(_places(model.layers[::2], Attention.letter), layers)
        # Without experts their places say nothing, because one expert is a feed-forward layer.
        experts = _period(_places(model.layers[1::2], MoE.letter), layers) or (1, 0)
        assert attention is not None
        return {
            "model_type": "jamba",
            "architectures": [self.architecture],
            "vocab_size": model.vocab_size,
            "hidden_size": model.d_model,
            "intermediate_size": expert_width(model, moe) if has_experts else model.resolved_d_ff,
            "num_hidden_layers": layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.resolved_kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_epsilon,
            "num_experts": moe.experts if has_experts else 1,
            "num_experts_per_tok": moe.top_k if has_experts else 1,
            "router_aux_loss_coef": balance_coefficient(moe),
            "attn_layer_period": attention[0],
            "attn_layer_offset": attention[1],
            "expert_layer_period": experts[0],
            "expert_layer_offset": experts[1],
            "mamba_d_state": model.d_state,
            "mamba_d_conv": model.d_conv,
            "mamba_expand": model.resolved_d_inner // model.d_model,
            "mamba_dt_rank": model.resolved_dt_rank,
            "mamba_conv_bias": True,
            "mamba_proj_bias": False,
            "tie_word_embeddings": model.tied_head,
        }

    def read(self, configuration: Configuration) -> tuple[ModelConfig, MoEConfig]:
        """See Format."""
        inert = INERT | TRAINING_ALONE | KERNELS
        with Settings(configuration, self.architecture, inert) as settings:
            settings.require({"hidden_act": "silu"}, "our gate is SwiGLU's")
            biases = {"mamba_conv_bias": True, "mamba_proj_bias": False}
            settings.require(biases, "only our convolution has a bias")
            settings.require({"mamba_inner_layernorms": True}, "Jamba's Mamba has norms")
            layers, experts = self._read_layers(settings), self._read_experts(settings)
            pattern, repeat = shortest_pattern(layers)
            d_model, heads = settings.number("hidden_size"), settings.number("num_attention_heads", 32)
            model = {
                "pattern": pattern,
                "repeat": repeat,
                "d_model": d_model,
                "vocab_size": settings.number("vocab_size"),
                "d_state": settings.number("mamba_d_state", 16),
                "d_conv": settings.number("mamba_d_conv", 4),
                "expand": settings.number("mamba_expand", 2),
                "dt_rank": dt_rank(settings, "mamba_dt_rank", d_model),
                "mamba_norms": True,
                "heads": heads,
                "kv_heads": settings.optional_number("num_key_value_heads", 8) or heads,
                "head_dim": read_head_dim(settings, heads),
                "positions": "none",
                "d_ff": settings.number("intermediate_size"),
                "activation": "swiglu",
                "norm_epsilon": settings.real("rms_norm_eps", 1e-6, most=1.0),
                "tied_head": settings.flag("tie_word_embeddings", False),
            }
            return build(model, experts if MoE.letter in layers else {})

    def _read_layers(self, settings: Settings) -> str:
        """One letter per layer of ours."""

        def places(kind: str, period: int, offset: int) -> tuple[int, int]:
            return settings.number(f"{kind}_period", period), settings.number(f"{kind}_offset", offset, least=0)

        attention, experts = places("attn_layer", 8, 4), places("expert_layer", 2, 1)
        several = settings.number("num_experts", 16) > 1
        return "".join(
            (Attention.letter if index % attention[0] == attention[1] else Mamba.letter)
            + (MoE.letter if several and index % experts[0] == experts[1] else FeedForward.letter)
            for index in range(settings.number("num_hidden_layers", most=MOST_LAYERS))
        )

    def _read_experts(self, settings: Settings) -> dict[str, Any]:
        top_k = settings.number("num_experts_per_tok", 2)
        return {
            "experts": settings.number("num_experts", 16),
            "router": "switch" if top_k == 1 else "top_k",
            "top_k": top_k,
            "capacity_factor": None,
            **read_balance(settings, top_k),
        }

    def entries(self, model: ModelConfig, moe: MoEConfig, stacked: bool = False) -> Iterator[Entry]:
        """See Format."""
        first, last = edges(model, "model.embed_tokens", "model.final_layernorm")
        yield first
        for index in range(len(model.layers) // 2):
            theirs, ours = f"model.layers.{index}", (f"layers.{2 * index}", f"layers.{2 * index + 1}")
            yield same(f"{theirs}.input_layernorm.weight", f"{ours[0]}.norm.weight")
            if model.layers[2 * index] == Attention.letter:
                yield from attention_entries(f"{theirs}.self_attn", f"{ours[0]}.mixer")
            else:
                yield from mamba_entries(f"{theirs}.mamba", f"{ours[0]}.mixer", NORMS)
            yield same(f"{theirs}.pre_ff_layernorm.weight", f"{ours[1]}.norm.weight")
            theirs, mixer = f"{theirs}.feed_forward", f"{ours[1]}.mixer"
            if model.layers[2 * index + 1] == FeedForward.letter:
                yield from gated_entries(theirs, mixer, model.resolved_d_ff)
            else:
                names = ("gate_proj", "up_proj", "down_proj")
                yield same(f"{theirs}.router.weight", f"{mixer}.router.weight")
                yield from expert_entries(
                    f"{theirs}.experts", f"{mixer}.experts", moe.experts, expert_width(model, moe), names, stacked
                )
        yield from last


def _places(letters: Sequence[str], letter: str) -> list[int]:
    return [index for index, found in enumerate(letters) if found == letter]


def _period(places: list[int], layers: int) -> tuple[int, int] | None:
    """The (period, offset) that give these places among ``layers``; None where no period does, or there are none."""
    if not places:
        return None
    first = places[0]
    period = places[1] - first if len(places) > 1 else max(layers - first, first + 1)
    return (period, first) if places == list(range(first, layers, period)) and first < period else None
