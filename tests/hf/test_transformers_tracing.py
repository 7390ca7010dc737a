"""What compiles and exports the class sees all of it, with the package's kernels at hand and without."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf.conftest import DESIGNS

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")

Pair = Callable[..., Any]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid": ("ME*-", {"router": "top_k", "top_k": 2}),
    "own": ("(M-)", DESIGNS["own, top 2"][1] | {"inner": DESIGNS["own"][1]["inner"]}),
    "shared": DESIGNS["shared, top 2"],
}


@pytest.fixture(autouse=True, params=[pytest.param("kernels", marks=pytest.mark.slow), "plain"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    if request.param == "plain":
        monkeypatch.setattr(modeling, "operations", modeling.Plain)


def _close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pattern", "moe"), MODELS.values(), ids=MODELS)
def test_a_training_pass_compiles_as_one_graph(pair: Pair, pattern: str, moe: dict[str, Any]) -> None:
    _, model = pair(pattern, moe)
    tokens = torch.randint(31, (2, 9))
    model.train()
    expected = model(tokens, labels=tokens, output_router_logits=True)
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(tokens, labels=tokens, output_router_logits=True)
    found.loss.backward()
    _close(found.logits, expected.logits)
    for name, parameter in model.named_parameters():
        if gradients[name] is not None:
            _close(parameter.grad, gradients[name])


@pytest.mark.parametrize(("pattern", "moe"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_a_step_compiles_once_for_all_tokens(pair: Pair, pattern: str, moe: dict[str, Any]) -> None:
    _, model = pair(pattern, moe)
    tokens = torch.randint(31, (2, 9))
    mask = torch.tensor([[1] * 9, [0, 0] + [1] * 7])
    expected = model(tokens, mask).logits
    cache = modeling.MoEMambaStaticCache(12)
    model(tokens[:, :5], mask[:, :5], cache=cache)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    steps = [compiled(tokens[:, 5:6], cache=cache).logits]
    with torch.compiler.set_stance("fail_on_recompile"):
        steps += [compiled(tokens[:, place : place + 1], cache=cache).logits for place in range(6, 9)]
    _close(torch.cat(steps, 1), expected[:, 5:])


@pytest.mark.parametrize(("pattern", "moe"), MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_it_is_exported(pair: Pair, pattern: str, moe: dict[str, Any]) -> None:
    _, model = pair(pattern, moe)
    tokens, mask = torch.randint(31, (2, 9)), torch.tensor([[1] * 9, [0, 0] + [1] * 7])
    keys = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    program = torch.export.export(model, (), keys).module()
    for given in (tokens, tokens.flip(1)):
        keys["input_ids"] = given
        _close(program(**keys).logits[mask.bool()], model(**keys).logits[mask.bool()])


def test_the_experts_operators_are_what_torch_asks_of_one() -> None:
    x, weight = torch.randn(6, 3, requires_grad=True), torch.randn(4, 3, 5, requires_grad=True)
    counts = torch.tensor([2, 0, 3, 1])
    operators = torch.ops.moe_mamba_plain
    torch.library.opcheck(operators.grouped_product.default, (x, weight, counts))
    torch.library.opcheck(operators.grouped_outer.default, (x.detach(), torch.randn(6, 5), counts))


@pytest.mark.slow
def test_the_code_of_several_folders_may_be_loaded(pair: Pair, tmp_path: Path) -> None:
    """Each copy of the file is a module of its own; the operators are the process's."""
    _, model = pair("ME", {"router": "top_k", "top_k": 2})
    tokens = torch.randint(31, (2, 5))
    with torch.no_grad():
        expected = model(tokens).logits
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        path = tmp_path / name / "modeling_moe_mamba.py"
        path.write_text(path.read_text() + f"# {name}\n")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        for each in (loaded, model):
            compiled = torch.compile(each.train(), fullgraph=True, backend="aot_eager")
            out = compiled(tokens, labels=tokens)
            out.loss.backward()
            _close(out.logits, expected)
