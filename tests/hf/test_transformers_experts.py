"""Experts by Transformers' own functions give what the class's own way gives, whatever the routing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.hf.conftest import DESIGNS

pytest.importorskip("transformers")
moe_functions = pytest.importorskip("transformers.integrations.moe")
TOKENS = torch.arange(2 * 9).view(2, 9) * 7 % 31
WAYS = ("batched_mm", "grouped_mm")
ROUTINGS = {
    "switch": {},
    "top_k": {"router": "top_k", "top_k": 2, "renormalize": True, "shared_experts": 1},
    "capacity": {"router": "top_k", "top_k": 2, "capacity_factor": 0.5, "evaluation_capacity": 0.5},
    "expert_choice": {"router": "expert_choice", "top_k": 1, "capacity_factor": 1.0},
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the library's functions, in the order of their calls."""
    names: list[str] = []

    def counted(name: str, function: Callable) -> Callable:
        def run(*args: Any) -> Any:
            names.append(name)
            return function(*args)

        return run

    mapping = moe_functions.ALL_EXPERTS_FUNCTIONS._global_mapping
    for name in WAYS:
        monkeypatch.setitem(mapping, name, counted(name, mapping[name]))
    return names


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_losses_and_gradients_are_those_of_eager(
    pair: Any, called: list[str], routing: dict, activation: str, way: str
) -> None:
    _, model = pair("EME", routing, activation=activation)
    model.train()

    def loss_and_gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(TOKENS, labels=TOKENS, output_router_logits=True).loss
        loss.backward()
        return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}

    expected, gradients = loss_and_gradients()
    assert model.config._experts_implementation == "eager" and not called
    model.set_experts_implementation(way)
    loss, found = loss_and_gradients()
    assert called == [way] * 2  # a layer each
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=name)
    assert gradients["model.layers.0.mixer.experts.in_proj"].any()


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_is_loaded_with_it_and_generates_the_same(
    pair: Any, called: list[str], way: str, tmp_path: Any
) -> None:
    from moe_mamba.hf.modeling_moe_mamba import MoEMambaForCausalLM

    _, model = pair("ME*E", {"router": "top_k", "top_k": 2}, activation="swiglu")
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(TOKENS, **options)
    model.save_pretrained(tmp_path / "plain")
    loaded = MoEMambaForCausalLM.from_pretrained(tmp_path / "plain", experts_implementation=way)
    assert loaded.generate(TOKENS, **options).tolist() == expected.tolist()
    assert called == [way] * 10
    loaded.save_pretrained(tmp_path / "again")  # how experts are computed is nothing that a folder keeps
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    loaded.set_experts_implementation("eager")
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    assert len(called) == 10


@pytest.mark.parametrize("way", WAYS)
def test_compiled_passes_and_bfloat16(pair: Any, way: str) -> None:
    _, model = pair("E", {"router": "top_k", "top_k": 2}, activation="swiglu")
    expected = model(TOKENS).logits
    model.set_experts_implementation(way)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected)
    model.to(torch.bfloat16)
    found = model(TOKENS).logits
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.1)


def test_other_ways_are_refused(pair: Any) -> None:
    _, model = pair("E")
    with pytest.raises(ValueError, match="experts_implementation=deepgemm: MoEMamba has eager, batched_mm, grouped_mm"):
        model.set_experts_implementation("deepgemm")
    assert model.config._experts_implementation == "eager"
    _, dense = pair("M")
    with pytest.raises(ValueError, match="experts_implementation=grouped_mm: a model of pattern M has no experts"):
        dense.set_experts_implementation("grouped_mm")
    _, inside = pair(*DESIGNS["own"])
    with pytest.raises(ValueError, match="of pattern M has no experts of layers E: leave it out"):
        inside.set_experts_implementation("grouped_mm")


def test_experts_inside_mamba_stay_as_they_are(pair: Any, called: list[str]) -> None:
    _, model = pair(*DESIGNS["shared, top 2"])
    expected = model(TOKENS).logits
    model.set_experts_implementation("batched_mm")
    torch.testing.assert_close(model(TOKENS).logits, expected)
    assert called == ["batched_mm"]


def test_expert_weights_are_read_through_their_module(pair: Any, called: list[str]) -> None:
    """Who offloads or shards weights hands them out while their module runs."""
    _, model = pair("E")
    model.set_experts_implementation("batched_mm")
    expected = model(TOKENS).logits
    (experts,) = (module for module in model.modules() if hasattr(module, "gate_up_proj"))
    weights = {name: weight.detach().clone() for name, weight in experts.named_parameters()}

    def hand_out(module: nn.Module, _: Any) -> None:
        for name, weight in weights.items():
            setattr(module, name, nn.Parameter(weight))

    for name in weights:
        setattr(experts, name, nn.Parameter(torch.full_like(weights[name], torch.nan)))
    experts.register_forward_pre_hook(hand_out)
    assert torch.equal(model(TOKENS).logits, expected) and len(called) == 2
