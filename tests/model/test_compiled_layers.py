"""Layers under torch.compile and under fake tensors: kernels are operators; nothing breaks a graph or runs for real."""

import resource
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.model.language_model import LanguageModel
from tests.designs import split

PATTERNS: list[Any] = ["M", "*", "-", "(ME)", "M shared top-2"]
PATTERNS += [pytest.param(pattern, marks=pytest.mark.slow) for pattern in ("E", "M own", "M switch")]
SIZES: dict[str, Any] = {"repeat": 1, "d_model": 32, "vocab_size": 64, "heads": 4, "kv_heads": 2, "d_state": 4}


def build(pattern: str, kernels: str = "auto", **moe: Any) -> LanguageModel:
    letters, inner = split(pattern)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(pattern=letters, **SIZES), MoEConfig(experts=4, inner=inner, **moe), kernels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model.train()


def step(model: LanguageModel, length: int = 16) -> list[Tensor]:
    """Logits and all gradients of a pass over two packed sequences."""
    torch.manual_seed(1)
    tokens, starts = torch.randint(64, (2, length)), torch.zeros(2, length, dtype=torch.bool)
    starts[0, 5] = True
    model.zero_grad()
    logits = model(tokens, starts).logits
    logits.square().mean().backward()
    return [logits, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def compile_layers(model: LanguageModel, **options: Any) -> None:
    torch._dynamo.reset()
    counters.clear()
    for layer in model.layers:
        layer.compile(backend="aot_eager", **options)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_layer_breaks_its_graph(pattern: str) -> None:
    model = build(pattern, capacity_factor=1.0 if pattern == "E" else None)
    expected = step(model)
    compile_layers(model)
    found = step(model)
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert counters["stats"]["unique_graphs"] == len(model.layers)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernels", ["torch", pytest.param("reference", marks=pytest.mark.slow)])
def test_nor_do_the_back_ends_in_plain_torch(kernels: str) -> None:
    model = build("M(*E)" if kernels == "torch" else "M*", kernels)
    expected = step(model)
    compile_layers(model)
    found = step(model)
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pattern", [pytest.param("M", marks=pytest.mark.slow), "(ME)"])
def test_one_graph_serves_every_length(pattern: str) -> None:
    model = build(pattern)
    compile_layers(model, dynamic=True)
    step(model, 19)
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (18, 40):
            found = step(model, length)
    plain = step(build(pattern), 40)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("capacity_factor", [None, 1.25])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_of_fakes_allocates_nothing(recompute: bool, capacity_factor: float | None) -> None:
    """Of 100 times the memory that this process may have: forward, loss and backward, in shapes alone."""
    config = ModelConfig(pattern="ME*-", repeat=2, d_model=4096, vocab_size=65_536, d_state=16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with FakeTensorMode():
        model = LanguageModel(config, MoEConfig(experts=64, capacity_factor=capacity_factor)).train()
        model.recompute = recompute
        tokens = torch.zeros(64, 8192, dtype=torch.int64)
        starts = torch.zeros(64, 8192, dtype=torch.bool)
        loss = model(tokens, starts, targets=tokens).cross_entropy
        assert loss.shape == ()
        loss.backward()
        for name, parameter in model.named_parameters():
            assert isinstance(parameter.grad, FakeTensor), name
            assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == parameter.dtype, name
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000, f"{grown} KiB more"


@pytest.mark.parametrize("pattern", ["M", "(ME)"])
def test_a_step_of_generation_is_one_graph(pattern: str) -> None:
    model = build(pattern).eval()
    tokens = torch.randint(64, (2, 3))
    with torch.no_grad():
        expected = model(tokens).logits
        compile_layers(model, fullgraph=True)
        states: Any = model.initial_states(2)
        found = []
        for place in range(3):
            output = model(tokens[:, place : place + 1], states=states)
            states = output.states
            found.append(output.logits)
    assert sum(counters["graph_break"].values()) == 0
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-5)
