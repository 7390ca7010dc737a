"""Adapters (PEFT) and quantised weights (bitsandbytes, torchao), alone and together."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hf.conftest import SHARED
from tests.hf.ecosystem import relative_error, unchanged

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")
MoEMambaForCausalLM = modeling.MoEMambaForCausalLM

Pair = Callable[..., Any]
pytestmark = pytest.mark.long
PATTERNS = ["M", "ME", "ME*-"]
TOKENS = torch.arange(48).view(2, 24)
SIZES = {"repeat": 2, "d_model": 64, "d_ff": 128, "vocab_size": 64}


def _model(pair: Pair, pattern: str, moe: dict[str, Any] | None = None) -> Any:
    return pair(pattern, moe, **SIZES)[1]


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model.eval()(TOKENS, use_cache=False).logits.float()


def _train(model: Any, steps: int = 10, rate: float = 0.02) -> list[float]:
    """Steps on the one batch; the loss before each."""
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _base(model: Any) -> dict[str, Tensor]:
    """The parameters that adapters leave alone."""
    return {name: one.detach().clone() for name, one in model.named_parameters() if not one.requires_grad}


def _check_adapters(model: Any, adapted: Any, folder: Path) -> None:
    """Only they are trained, and they give the same logits merged, and saved and loaded; they adapt ``model``."""
    before = _base(adapted)
    assert all("lora_" in name for name, one in adapted.named_parameters() if one.requires_grad)
    plain = _logits(model)
    torch.testing.assert_close(_logits(adapted), plain)  # an adapter starts as nothing
    losses = _train(adapted)
    assert losses[-1] < losses[0] - 0.3
    assert unchanged(before, adapted)
    trained = _logits(adapted)
    assert relative_error(trained, plain) > 0.05
    with adapted.disable_adapter():
        torch.testing.assert_close(_logits(adapted), plain)
    adapted.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    torch.testing.assert_close(_logits(loaded), trained)
    torch.testing.assert_close(_logits(adapted.merge_and_unload()), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_lora_of_all_linear_layers(pair: Pair, tmp_path: Path, pattern: str) -> None:
    model = _model(pair, pattern)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear", r=4))
    with_adapters = {name.rsplit(".", 1)[-1] for name, one in adapted.named_modules() if hasattr(one, "lora_A")}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"} if "*" in pattern else set()
    assert with_adapters == {"in_proj", "x_proj", "out_proj"} | attention
    _check_adapters(model, adapted, tmp_path)


@pytest.mark.parametrize(
    ("pattern", "moe", "targets"),
    [
        ("ME", {}, ["experts.in_proj", "experts.out_proj"]),
        ("M", {"inner": SHARED}, ["conv_experts.weight", "out_experts.weight"]),
    ],
    ids=["layers", "inside Mamba"],
)
def test_lora_of_stacked_experts(
    pair: Pair, tmp_path: Path, pattern: str, moe: dict[str, Any], targets: list[str]
) -> None:
    """Their matrices are parameters (experts, in, out), which is how PEFT reads three dimensions."""
    model = _model(pair, pattern, moe)
    config = peft.LoraConfig(target_modules=[], target_parameters=targets, r=4, lora_alpha=16)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    ranks = {tuple(one.shape) for name, one in adapted.named_parameters() if "lora_A" in name}
    experts = model.config.num_experts
    assert ranks == {(4 * experts, 64), (4 * experts, 128)}
    _check_adapters(model, adapted, tmp_path)


def _bits(kind: str) -> Any:
    """Settings of bitsandbytes; no column of activations is kept out of int8, so that sums can be repeated by hand."""
    if kind == "8 bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _quantised(model: Any, folder: Path, kind: str) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=_bits(kind), dtype=torch.float32).eval()


def _in_fp32(model: Any, quantised: Any) -> Any:
    """``model`` with the weights that bitsandbytes has; its products, with 8 bits those of activations too, by hand."""
    functional = pytest.importorskip("bitsandbytes").functional
    copied = copy.deepcopy(model)
    for name, layer in copied.named_modules():
        weight = getattr(quantised.get_submodule(name), "weight", None)
        if weight is None or weight.dtype.is_floating_point:
            continue
        assert type(layer) is nn.Linear
        if weight.dtype == torch.int8:
            layer.forward = partial(_product_of_8_bits, weight=weight.data, scale=weight.SCB)
        else:
            layer.weight.data = functional.dequantize_4bit(weight.data, weight.quant_state)
    return copied


def _product_of_8_bits(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """LLM.int8 (Dettmers et al., 2022, eq. 4) by bitsandbytes' own operators: rounding differs by its constants."""
    rows, of_rows, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(x.half().flatten(0, -2))
    product = torch.ops.bitsandbytes.int8_scaled_mm(rows, weight, of_rows, scale, bias=None, dtype=x.dtype)
    return product.view(*x.shape[:-1], -1)


def _jamba() -> Any:
    """Transformers' own Mamba with experts and attention, of the same sizes, as a measure of what 8 bits cost."""
    torch.manual_seed(0)
    config = transformers.JambaConfig(
        **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
        **{"num_experts": 4, "num_experts_per_tok": 1, "mamba_d_state": 4, "use_mamba_kernels": False},
    )
    model = transformers.JambaForCausalLM(config)
    with torch.no_grad():  # as make_pair does
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["8 bit", "4 bit"])
def test_bitsandbytes_quantises_what_is_linear_and_nothing_else(
    pair: Pair, tmp_path: Path, pattern: str, kind: str
) -> None:
    pytest.importorskip("bitsandbytes")
    model = _model(pair, pattern)
    quantised = _quantised(model, tmp_path, kind)
    linear = {name for name, layer in model.named_modules() if type(layer) is nn.Linear} - {"lm_head"}
    changed = {name for name, one in quantised.named_parameters() if not one.dtype.is_floating_point}
    assert changed == {f"{name}.weight" for name in linear}
    by_hand = _logits(_in_fp32(model, quantised))  # before a pass, which puts the scales elsewhere
    got = _logits(quantised)
    error = relative_error(got, by_hand)
    assert error < 1e-5
    cost = relative_error(got, _logits(model))
    print(f"\n{pattern}, {kind}: logits {error:.1e} from the sums by hand, {cost:.3f} from fp32", end="")
    if kind == "8 bit":
        jamba = _jamba()
        bound = relative_error(_logits(_quantised(jamba, tmp_path / "jamba", kind)), _logits(jamba))
        print(f" (Jamba's: {bound:.3f})")
        assert cost < bound


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["8 bit", "4 bit"])
def test_a_quantised_model_generates_with_states_in_fp32(pair: Pair, tmp_path: Path, pattern: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = _model(pair, pattern)
    quantised = _quantised(model, tmp_path, kind)
    keys = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 63, "pad_token_id": 63}
    cached = quantised.generate(TOKENS[:, :8], **keys, return_dict_in_generate=True)
    whole = quantised.generate(TOKENS[:, :8], **keys, use_cache=False)
    assert torch.equal(cached.sequences, whole)
    kept = [vars(state) for state in getattr(cached, modeling.CACHE).states if state is not None]
    values = {name: value.dtype for state in kept for name, value in state.items() if name in VALUES}
    assert set(values) == {"conv", "scan"} | ({"key", "value"} if "*" in pattern else set())
    assert set(values.values()) == {torch.float32}


VALUES = ("conv", "scan", "key", "value")  # beside them attention keeps places, which are integers


@pytest.mark.parametrize("pattern", PATTERNS)
def test_qlora_trains_adapters_on_4_bits(pair: Pair, tmp_path: Path, pattern: str) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = _quantised(_model(pair, pattern), tmp_path / "base", "4 bit")
    plain = _logits(quantised)
    prepared = peft.prepare_model_for_kbit_training(quantised)
    adapted = peft.get_peft_model(prepared, peft.LoraConfig(target_modules="all-linear", r=4))
    before = _base(adapted)
    losses = _train(adapted)
    assert losses[-1] < losses[0] - 0.3
    assert unchanged(before, adapted)
    with adapted.disable_adapter():
        torch.testing.assert_close(_logits(adapted), plain)
    trained = _logits(adapted)
    adapted.save_pretrained(tmp_path / "adapters")
    again = MoEMambaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=_bits("4 bit"))
    torch.testing.assert_close(_logits(peft.PeftModel.from_pretrained(again, tmp_path / "adapters")), trained)


def test_a_4_bit_folder_loads_again(pair: Pair, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = _quantised(_model(pair, "ME*-"), tmp_path / "base", "4 bit")
    quantised.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(_logits(MoEMambaForCausalLM.from_pretrained(tmp_path / "saved")), _logits(quantised))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("way", ["quantize_", "TorchAoConfig"])
def test_torchao_weights_of_8_bits(pair: Pair, tmp_path: Path, pattern: str, way: str) -> None:
    """Logits are those of the same weights taken out of int8; activations stay fp32."""
    quantization = pytest.importorskip("torchao.quantization")
    model, settings = _model(pair, pattern), quantization.Int8WeightOnlyConfig()
    if way == "quantize_":
        quantised = copy.deepcopy(model)
        quantization.quantize_(quantised, settings)
    else:
        model.save_pretrained(tmp_path)
        config = transformers.TorchAoConfig(settings)
        quantised = MoEMambaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    in_fp32, found = copy.deepcopy(model), set()
    for name, layer in in_fp32.named_modules():
        weight = getattr(quantised.get_submodule(name), "weight", None)
        if hasattr(weight, "dequantize") and type(weight) not in (Tensor, nn.Parameter):
            assert type(layer) is nn.Linear
            layer.weight.data = weight.dequantize()
            found.add(name)
    linear = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    assert found == (linear if way == "quantize_" else linear - {"lm_head"})
    torch.testing.assert_close(_logits(quantised), _logits(in_fp32), rtol=1e-4, atol=1e-4)
    assert relative_error(_logits(quantised), _logits(model)) < 0.05
    keys = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 63, "pad_token_id": 63}
    assert torch.equal(
        quantised.generate(TOKENS[:, :8], **keys), quantised.generate(TOKENS[:, :8], **keys, use_cache=False)
    )
