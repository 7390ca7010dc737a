"""The class for Transformers computes what the trainer's model computes, with its kernels and without."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_mamba.parallel.topology import Topology, World
from moe_mamba.train.objective import Objective
from tests.hf.conftest import DESIGNS, OWN, SHARED, TOP_2

modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")

Pair = Callable[..., Any]
FAMILIES = [
    *(("M", {}), ("*-", {}), ("*E", {}), ("M-", {}), ("ME", {}), ("MEM-*E", {}), ("*M", {"positions": "none"})),
    *(("M*-", {"norm": "layernorm"}), ("ME", {"final_norm": False}), ("M*E", {"tied_head": True})),
    *(("M", {"mamba_norms": True}), ("M", {"selective": False}), ("*-", {"kv_heads": 2})),
    ("M", {"dt_rank": 3, "d_inner": 21}),
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


@pytest.fixture(params=["kernels", "plain"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the package's kernels, and as in an environment without the package."""
    if request.param == "plain":
        monkeypatch.setattr(modeling, "operations", modeling.Plain)
    return request.param


def _close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_plain_operations_are_all_that_a_model_calls() -> None:
    names = {name for name in vars(modeling.Plain) if not name.startswith("_")}
    assert {"activation", "causal_conv", "selective_scan_step", "sort_by_expert"} <= names
    assert modeling.operations is not modeling.Plain
    assert all(callable(getattr(modeling, name)) and callable(getattr(modeling.operations, name)) for name in names)


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


@pytest.mark.parametrize(("pattern", "moe"), DESIGNS.values(), ids=DESIGNS)
def test_logits_of_every_design(pair: Pair, backend: str, pattern: str, moe: dict[str, Any]) -> None:
    ours, theirs = pair(pattern, moe)
    tokens = torch.randint(31, (2, 12))
    _close(theirs(tokens).logits, ours(tokens).logits)


STEPPED = [*((pattern, TOP_2) for pattern in ("M", "*", "ME", "MEM-*E")), *DESIGNS.values()]


@pytest.mark.parametrize(("pattern", "moe"), STEPPED, ids=str)
def test_one_step_at_a_time_equals_the_parallel_pass(
    pair: Pair, backend: str, pattern: str, moe: dict[str, Any]
) -> None:
    _, theirs = pair(pattern, moe)
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


LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("MEE", {"capacity_factor": 0.5, "z_loss_weight": 0.1}),
    ("MEE", {"router": "top_k", "top_k": 2, "capacity_factor": 1.0, "balance_weight": 0.5}),
    ("MEE", {"router": "expert_choice", "capacity_factor": 1.0, "balance": "none", "z_loss_weight": 0.1}),
    ("MEE", {"router": "top_k", "top_k": 2, "balance": "bias"}),
    ("(ME)", {"z_loss_weight": 0.1, "balance_weight": 0.5, "inner": SHARED | {"balance": "none"}}),
    ("(ME)E", {"z_loss_weight": 0.1, "balance_weight": 0.5, "balance": "bias", "inner": OWN | {"balance": "loss"}}),
    ("MM", {"balance_weight": 0.5, "inner": OWN | {"every": 2, "capacity_factor": 0.5}}),
    ("ME", {"z_loss_weight": 0.1, "balance": "none", "inner": SHARED | {"balance": "bias", "top_k": 2}}),
]


@pytest.mark.parametrize(("pattern", "moe"), LOSSES, ids=str)
def test_the_loss_of_training_is_the_trainers(pair: Pair, backend: str, pattern: str, moe: dict[str, Any]) -> None:
    ours, theirs = pair(pattern, moe)
    ours.train()
    theirs.train()
    tokens = torch.randint(31, (3, 8))
    labels = tokens.masked_fill(torch.rand(3, 8) < 0.3, -100)
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    out = ours(tokens, targets=targets)
    total, count = out.cross_entropy, (targets != -100).sum()
    one = Topology(World(0, 1, 0, 1))
    objective = Objective(ours.moe_config, int(count), 1, one, ours.balanced_routers())
    expected = objective(total, out.statistics)
    routers = expected - total / count
    got = theirs(tokens, labels=labels, output_router_logits=True)
    _close(got.aux_loss, routers)
    _close(got.loss, expected)
    _close(theirs(tokens, labels=labels).loss, total / count)
    assert got.past_key_values is None
    assert [logits.shape for logits in got.router_logits] == [(24, 4)] * len(out.statistics)
    shared = theirs(tokens, labels=labels, output_router_logits=True, num_items_in_batch=2 * int(count))
    _close(2 * shared.loss, got.loss)
    ours_gradient = torch.autograd.grad(expected, list(ours.parameters()), allow_unused=True)
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


@pytest.mark.parametrize("pattern", ["ME", "*E", "M*-"])
def test_autocast_casts_products_and_leaves_the_rest(pair: Pair, backend: str, pattern: str) -> None:
    """As elsewhere: linear maps in bf16, the stream, the norms, the routers and what a scan keeps in fp32."""
    _, theirs = pair(pattern, {"router": "top_k", "top_k": 2, "balance": "bias"}, mamba_norms=True)
    tokens = torch.randint(31, (2, 6))
    expected = theirs(tokens, labels=tokens, output_router_logits=True)
    dtypes: list[torch.dtype] = []
    linear = next(module for module in theirs.model.layers.modules() if isinstance(module, torch.nn.Linear))
    handle = linear.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = theirs(tokens, labels=tokens, output_router_logits=True, output_hidden_states=True, use_cache=True)
        step = theirs(tokens[:, :1], cache=found[modeling.CACHE])
    handle.remove()
    assert dtypes[0] == torch.bfloat16
    assert found.hidden_states[-1].dtype == torch.float32
    assert all(logits.dtype == torch.float32 for logits in found.router_logits)
    assert step.logits.isfinite().all()
    scans = [state.scan for state in step[modeling.CACHE].states if hasattr(state, "scan")]
    assert all(scan.dtype == torch.float32 for scan in scans)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0.02, atol=0.02)
    found.loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in theirs.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, "pass either input_ids or inputs_embeds"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, r"attention_mask has shape \(1, 1, 3, 3\), and must be \(1, 3\)"),
        ({"attention_mask": torch.ones(1, 5)}, "goes on from earlier tokens, whose cache must be passed as well"),
        ({"position_ids": torch.tensor([[4, 5, 6]])}, "go on from tokens whose state is not here"),
        ({"position_ids": torch.tensor([[0, 2, 3]])}, "must rise by one per token"),
        ({"position_ids": torch.tensor([[0, 1]])}, "2 columns for 3 new tokens"),
        ({"past_key_values": "two", "cache": "two"}, "two names for the same thing"),
        ({"seq_idx": torch.zeros(1, 2)}, r"seq_idx has shape \(1, 2\), and must be \(1, 3\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "must be the same"),
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
    keys = {key: caches[value] if isinstance(value, str) else value for key, value in keys.items()}
    tokens = {"input_ids": torch.tensor([[1, 2, 3]])} if keys else {}
    with pytest.raises(ValueError, match=says) as error:
        theirs(**tokens, **keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["state", "cache_params", "past_key_value", "cache_position", "anything"])
def test_no_keyword_is_swallowed(pair: Pair, name: str) -> None:
    _, theirs = pair("M")
    tokens = torch.tensor([[1, 2, 3]])
    for model in (theirs, theirs.model):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            model(tokens, **{name: model(tokens)[modeling.CACHE]})


def test_the_older_name_of_a_cache_is_the_newer(pair: Pair) -> None:
    _, theirs = pair("ME*")
    tokens = torch.randint(31, (1, 7))
    whole = theirs(tokens).logits
    for name in ("cache", "past_key_values"):
        first = theirs(tokens[:, :4], **{name: modeling.MoEMambaCache()})
        _close(theirs(tokens[:, 4:], **{name: first[modeling.CACHE]}).logits, whole[:, 4:])


def test_labels_that_are_shifted_already(pair: Pair) -> None:
    _, theirs = pair("ME")
    tokens = torch.randint(31, (2, 8))
    shifted = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    expected = theirs(tokens, labels=tokens)
    for labels in (None, tokens.flip(1)):
        _close(theirs(tokens, labels=labels, shift_labels=shifted).loss, expected.loss)
    parts = [theirs(tokens[:, :5], labels=tokens[:, :5], shift_labels=shifted[:, :5], num_items_in_batch=14)]
    parts.append(
        theirs(tokens[:, 5:], cache=parts[0][modeling.CACHE], shift_labels=shifted[:, 5:], num_items_in_batch=14)
    )
    _close(parts[0].loss + parts[1].loss, expected.loss)


def test_attentions_are_those_that_are_computed(pair: Pair) -> None:
    _, theirs = pair("M*E*", kv_heads=2)
    tokens = torch.randint(31, (2, 7))
    out = theirs(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
    _close(out.logits, theirs(tokens).logits)
    assert [weight.shape for weight in out.attentions] == [(2, 4, 7, 7)] * 2
    _close(out.attentions[0].sum(-1), torch.ones(2, 4, 7))
    assert not out.attentions[0].triu(1).any()
    kept = (out.attentions[1], out.hidden_states[0], out.hidden_states[2])
    for tensor in kept:
        tensor.retain_grad()
    out.logits[0, -1, 0].backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in kept)
    theirs.set_attn_implementation("eager")
    _close(theirs(tokens).logits, out.logits)
    assert theirs.model.layers[1].mixer.config._attn_implementation == "eager"  # where others look for it
    step = theirs(tokens[:, 5:], cache=theirs(tokens[:, :5])[modeling.CACHE], output_attentions=True)
    _close(step.attentions[0], out.attentions[0][:, :, 5:])


@pytest.mark.parametrize(("pattern", "moe"), STEPPED, ids=str)
def test_documents_of_one_row_are_read_apart(pair: Pair, pattern: str, moe: dict[str, Any]) -> None:
    _, theirs = pair(pattern, moe)
    tokens = torch.randint(31, (1, 9))
    alone = torch.cat([theirs(part).logits for part in tokens.split([4, 2, 3], 1)], 1)
    bounds = torch.tensor([0, 4, 6, 9], dtype=torch.int32)
    for keys in (
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])},
        {"seq_idx": torch.tensor([[5, 5, 5, 5, 6, 6, 9, 9, 9]])},
        {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 4, "max_length_k": 4},
    ):
        _close(theirs(tokens, **keys).logits, alone)
    cache = theirs(tokens[:, :2])[modeling.CACHE]
    positions = torch.tensor([[2, 3, 0, 1, 0, 1, 2]])
    _close(theirs(tokens[:, 2:], position_ids=positions, cache=cache).logits, alone[:, 2:])
