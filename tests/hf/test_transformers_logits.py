"""The class for Transformers computes what the trainer's model computes, with its kernels and without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_mamba.model.routing import balance_loss, z_loss

modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")

Pair = Callable[..., Any]
FAMILIES = [
    *(("M", {}), ("*-", {}), ("*E", {}), ("M-", {}), ("ME", {}), ("MEM-*E", {}), ("*M", {"positions": "none"})),
    *(("M*-", {"norm": "layernorm"}), ("ME", {"final_norm": False}), ("M*E", {"tied_head": True})),
    *(("M", {"mamba_norms": True}), ("M", {"selective": False}), ("*-", {"kv_heads": 2}), ("M", {"dt_rank": 3})),
    *(("-E", {"activation": kind}) for kind in ("squared_relu", "gelu", "swiglu")),
]
ROUTERS: list[dict[str, Any]] = [
    {"router": "switch"},
    {"router": "top_k", "top_k": 2},
    {"router": "top_k", "top_k": 2, "renormalize": True},
    {"router": "top_k", "top_k": 2, "scores": "sigmoid"},
    {"router": "top_k", "top_k": 2, "balance": "bias"},
    {"router": "switch", "shared_experts": 2, "d_expert": 8},
    {"router": "switch", "evaluation_capacity": 0.5},
    {"router": "expert_choice", "capacity_factor": 1.0, "balance": "none"},
]
OPERATIONS = [name for name in vars(modeling.Plain) if not name.startswith("_")]


@pytest.fixture(params=["kernels", "plain"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the package's kernels, and as in an environment without the package."""
    if request.param == "plain":
        for name in OPERATIONS:
            monkeypatch.setattr(modeling, name, getattr(modeling.Plain, name))
    return request.param


def _close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_plain_operations_are_all_that_a_model_calls() -> None:
    assert {"activation", "causal_conv", "selective_scan_step", "sort_by_expert"} <= set(OPERATIONS)
    assert modeling.operations is not modeling.Plain
    assert all(getattr(modeling, name) is getattr(modeling.operations, name) for name in OPERATIONS)


@pytest.mark.parametrize(("pattern", "keys"), FAMILIES, ids=str)
def test_logits_of_every_pattern(pair: Pair, backend: str, pattern: str, keys: dict[str, Any]) -> None:
    ours, theirs = pair(pattern, **keys)
    tokens = torch.randint(31, (2, 9))
    _close(theirs(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize("moe", ROUTERS, ids=str)
def test_logits_of_every_router(pair: Pair, backend: str, moe: dict[str, Any]) -> None:
    ours, theirs = pair("ME", moe)
    tokens = torch.randint(31, (2, 12))
    _close(theirs(tokens).logits, ours(tokens).logits)


@pytest.mark.parametrize("pattern", ["M", "*", "ME", "MEM-*E"])
def test_one_step_at_a_time_equals_the_parallel_pass(pair: Pair, backend: str, pattern: str) -> None:
    _, theirs = pair(pattern, {"router": "top_k", "top_k": 2})
    tokens = torch.randint(31, (2, 9))
    whole = theirs(tokens).logits
    for grad in (False, True):  # the step's kernels are for generation; with gradients it is a pass
        cache, steps = None, []
        with torch.set_grad_enabled(grad):
            for place in range(tokens.shape[1]):
                out = theirs(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
        _close(torch.cat(steps, 1), whole)
        assert steps[-1].requires_grad == grad
    assert cache is not None
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize(
    "moe",
    [
        {"capacity_factor": 0.5, "z_loss_weight": 0.1},
        {"router": "top_k", "top_k": 2, "capacity_factor": 1.0, "balance_weight": 0.5},
        {"router": "expert_choice", "capacity_factor": 1.0, "balance": "none", "z_loss_weight": 0.1},
        {"router": "top_k", "top_k": 2, "balance": "bias"},
    ],
    ids=str,
)
def test_the_loss_of_training_is_the_trainers(pair: Pair, backend: str, moe: dict[str, Any]) -> None:
    ours, theirs = pair("MEE", moe)
    ours.train()
    theirs.train()
    tokens = torch.randint(31, (3, 8))
    labels = tokens.masked_fill(torch.rand(3, 8) < 0.3, -100)
    out = ours(tokens)
    total, count = ours.cross_entropy(out.logits[:, :-1], labels[:, 1:])
    config = ours.moe_config
    z = torch.stack([z_loss(layer) for layer in out.statistics]).mean()
    balance = torch.stack([balance_loss(layer) for layer in out.statistics]).mean()
    routers = config.z_loss_weight * z + (config.balance == "loss") * config.balance_weight * balance
    got = theirs(tokens, labels=labels, output_router_logits=True)
    _close(got.aux_loss, routers)
    _close(got.loss, total / count + routers)
    _close(theirs(tokens, labels=labels).loss, total / count)
    assert got.past_key_values is None
    assert [logits.shape for logits in got.router_logits] == [(24, 4)] * 2
    shared = theirs(tokens, labels=labels, output_router_logits=True, num_items_in_batch=2 * int(count))
    _close(2 * shared.loss, got.loss)
    ours_gradient = torch.autograd.grad(total / count + routers, list(ours.parameters()), allow_unused=True)
    got.loss.backward()
    for (name, _), gradient in zip(ours.named_parameters(), ours_gradient, strict=True):
        if gradient is not None:
            _close(theirs.get_parameter("lm_head.weight" if name == "head.weight" else f"model.{name}").grad, gradient)


def test_outputs_that_are_asked_for(pair: Pair) -> None:
    ours, theirs = pair("ME*")
    tokens = torch.randint(31, (2, 7))
    out = theirs(tokens, output_hidden_states=True, output_router_logits=True)
    _close(out.hidden_states[0], ours.embedding(tokens))
    _close(out.hidden_states[-1].flatten(0, 1), ours.final_norm(ours.hidden(tokens)[0])[0])
    _close(theirs.lm_head(out.hidden_states[-1]), out.logits)
    assert len(out.hidden_states) == 4
    router = ours.layers[1].mixer.router
    _close(out.router_logits[0], router.logits(ours.layers[1].norm(out.hidden_states[1].flatten(0, 1))[0]))
    _close(theirs(inputs_embeds=ours.embedding(tokens)).logits, out.logits)
    _close(theirs(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
    _close(theirs(tokens, logits_to_keep=torch.tensor([1, 4])).logits, out.logits[:, [1, 4]])
    as_tuple = theirs(tokens, return_dict=False, use_cache=False)
    assert isinstance(as_tuple, tuple)
    _close(as_tuple[0], out.logits)
    assert theirs(tokens, labels=tokens, logits_to_keep=1).logits.shape == out.logits.shape


def test_autocast_is_left_and_said_so(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, theirs = pair("ME", mamba_norms=True)
    said: list[str] = []
    monkeypatch.setattr(modeling.logger, "warning_once", said.append)
    tokens = torch.randint(31, (1, 5))
    with torch.autocast("cpu", torch.bfloat16):
        logits = theirs(tokens).logits
    _close(logits, theirs(tokens).logits)
    assert len(said) == 1
    assert "dtype=torch.bfloat16" in said[0]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "give one of input_ids and inputs_embeds"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, r"attention_mask has shape \(1, 1, 3, 3\), and must be \(1, 3\)"),
        ({"past_key_values": "DynamicCache"}, "the cache is a DynamicCache: pass a MoEMambaCache"),
        ({"past_key_values": "two", "use_cache": False}, "leave out one of them"),
        ({"past_key_values": "two"}, "states of 2 sequences, and the batch has 1"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(pair: Pair, keys: dict[str, Any], says: str) -> None:
    from transformers import DynamicCache

    _, theirs = pair("M")
    caches = {"DynamicCache": DynamicCache(), "two": theirs(torch.ones(2, 1, dtype=torch.int64)).past_key_values}
    keys = {key: caches[value] if key == "past_key_values" else value for key, value in keys.items()}
    tokens = {"input_ids": torch.tensor([[1, 2, 3]])} if keys else {}
    with pytest.raises(ValueError, match=says) as error:
        theirs(**tokens, **keys)
    assert "\n" not in str(error.value)
