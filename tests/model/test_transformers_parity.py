"""The same weights in Transformers' own classes: logits within 1e-5, every gradient within 1e-4."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe_mamba.model.language_model import LanguageModel

transformers = pytest.importorskip("transformers")

Tiny = Callable[..., LanguageModel]
SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
EDGES = {"embedding.weight": "embed_tokens.weight", "head.weight": "lm_head.weight"}
NORMS = {"dt_norm.weight": "dt_layernorm.weight", "B_norm.weight": "b_layernorm.weight"} | {
    "C_norm.weight": "c_layernorm.weight"
}


def _pick(theirs: dict[str, Tensor], end: str) -> Tensor | None:
    """The one tensor whose name has this end, or None."""
    found = [tensor for name, tensor in theirs.items() if name == end or name.endswith(f".{end}")]
    assert len(found) < 2, end
    return found[0] if found else None


def _mixer(theirs: dict[str, Tensor], part: str) -> Tensor:
    """A parameter of a mixer among the tensors of one layer of theirs."""
    stacked = {"experts.in_proj": "experts.gate_up_proj", "experts.out_proj": "experts.down_proj"}
    if part in stacked:
        return _pick(theirs, stacked[part]).transpose(1, 2)
    if part == "router.weight":
        return next(tensor for name, tensor in theirs.items() if name.endswith(("gate.weight", "router.weight")))
    if part == "in_proj.weight" and (gate := _pick(theirs, "gate_proj.weight")) is not None:
        return torch.cat((gate, _pick(theirs, "up_proj.weight")))
    if part == "out_proj.weight" and (down := _pick(theirs, "down_proj.weight")) is not None:
        return down
    tensor = _pick(theirs, NORMS.get(part, part))
    return tensor.squeeze(1) if part == "conv1d.weight" else tensor


def _translate(model: LanguageModel, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their weights, or gradients, under our names. A layer of theirs is two of ours, but for Mamba alone."""
    mamba = any(name.startswith("backbone") for name in theirs)
    ours = {}
    for name in dict(model.named_parameters()):
        if not name.startswith("layers."):
            ends = (EDGES.get(name, ""), "embeddings.weight" if name == "embedding.weight" else "")
            ends += ("norm_f.weight", "model.norm.weight", "final_layernorm.weight") if "norm" in name else ()
            ours[name] = next(tensor for end in ends if end and (tensor := _pick(theirs, end)) is not None)
            continue
        _, index, kind, part = name.split(".", 3)
        layer, half = (int(index), 0) if mamba else divmod(int(index), 2)
        inside = {key: tensor for key, tensor in theirs.items() if f".layers.{layer}." in key}
        second = ("feed_forward.", "mlp.", "post_attention_layernorm", "pre_ff_layernorm")
        inside = {key: tensor for key, tensor in inside.items() if any(word in key for word in second) == (half == 1)}
        if kind == "norm":
            ours[name] = next(
                tensor
                for key, tensor in inside.items()
                if key.endswith(("input_layernorm.weight", second[2] + ".weight", second[3] + ".weight"))
                or (mamba and key.endswith(".norm.weight"))
            )
        else:
            ours[name] = _mixer(inside, part)
    return ours


def _check(model: LanguageModel, theirs: nn.Module, **keys: object) -> None:
    torch.manual_seed(0)
    for weight in theirs.parameters():  # norms and router too, so that nothing can be mixed up
        weight.data.add_(torch.randn_like(weight) * 0.1)
    translated = _translate(model, dict(theirs.named_parameters()))
    for name, weight in model.named_parameters():
        weight.data.copy_(translated[name])
    tokens = torch.randint(31, (2, 12))
    theirs.train()
    expected = theirs(input_ids=tokens, use_cache=False, **keys).logits
    got = model(tokens).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    zero = {
        name: weight.grad if weight.grad is not None else torch.zeros_like(weight)
        for name, weight in theirs.named_parameters()
    }
    gradients = _translate(model, zero)
    for name, weight in model.named_parameters():
        scale = max(1.0, gradients[name].abs().max().item())
        torch.testing.assert_close(
            weight.grad, gradients[name], rtol=0, atol=1e-4 * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_mamba(tiny: Tiny) -> None:
    from transformers.models.mamba import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=31, hidden_size=16, state_size=4, num_hidden_layers=2, conv_kernel=4, expand=2,
        time_step_rank=3, residual_in_fp32=False, tie_word_embeddings=False,
    )  # fmt: skip
    _check(tiny("M", repeat=2, dt_rank=3), MambaForCausalLM(config))


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_llama(tiny: Tiny, base: float) -> None:
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES, **HEADS, num_hidden_layers=2, head_dim=4, rope_parameters={"rope_theta": base, "rope_type": "default"}
    )
    _check(tiny("*-", repeat=2, kv_heads=2, activation="swiglu", rope_base=base), LlamaForCausalLM(config))


def test_mixtral(tiny: Tiny) -> None:
    from transformers.models.mixtral import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **SIZES,
        **HEADS,
        num_hidden_layers=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )
    moe = {"router": "top_k", "top_k": 2, "renormalize": True}
    _check(tiny("*E", moe=moe, repeat=2, kv_heads=2, activation="swiglu"), MixtralForCausalLM(config))


@pytest.mark.parametrize(
    ("pattern", "attention", "experts"),
    [("MEME", (9, 8), (1, 0)), ("ME*E", (2, 1), (1, 0)), ("M-ME*-ME", (4, 2), (2, 1))],
)
def test_jamba(tiny: Tiny, pattern: str, attention: tuple[int, int], experts: tuple[int, int]) -> None:
    from transformers.models.jamba import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        **SIZES, **HEADS, num_hidden_layers=len(pattern) // 2, num_experts=4, num_experts_per_tok=1,
        attn_layer_period=attention[0], attn_layer_offset=attention[1],
        expert_layer_period=experts[0], expert_layer_offset=experts[1],
        mamba_d_state=4, mamba_d_conv=4, mamba_dt_rank=2, pad_token_id=None,
    )  # fmt: skip
    keys = {"kv_heads": 2, "activation": "swiglu", "positions": "none", "mamba_norms": True, "dt_rank": 2}
    _check(tiny(pattern, **keys), JambaForCausalLM(config))
