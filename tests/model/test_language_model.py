from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_mamba.config import ModelConfig, MoEConfig
from moe_mamba.kernels.cross_entropy import linear
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.loss import cross_entropy_sum

Tiny = Callable[..., LanguageModel]
PATTERNS = ["M", "*", "-", "E", "ME", "*-", "*E", "M-", "M*-E", "ME*E", "(ME)", "(*E)-", "(M*-)"]
PATTERNS += ["M own", "ME shared", "(ME) switch"]


def _tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(31, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_equal_the_documents_one_by_one(tiny: Tiny, pattern: str, top_k: int) -> None:
    model = tiny(pattern, moe={"router": "top_k", "top_k": top_k})
    lengths = [[5, 1, 7, 3], [9, 7]]
    tokens, targets = _tokens(2, 16), _tokens(2, 16, seed=1)
    document_starts = torch.zeros(2, 16, dtype=torch.bool)
    total, count = torch.zeros(()), 0
    for row, chunks in enumerate(lengths):
        at = 0
        for chunk in chunks:
            document_starts[row, at] = True
            one_document = targets[row : row + 1, at : at + chunk].clone()
            targets[row, at + chunk - 1] = one_document[0, -1] = -100
            logits = model(tokens[row : row + 1, at : at + chunk]).logits
            one, counted = cross_entropy_sum(logits, one_document)
            total, count, at = total + one, count + int(counted), at + chunk
    packed, counted = cross_entropy_sum(model(tokens, document_starts).logits, targets)
    assert int(counted) == count == 32 - 6
    torch.testing.assert_close(packed / count, total / count, rtol=0, atol=1e-5)
    weights = dict(model.named_parameters())
    ours = torch.autograd.grad(packed, list(weights.values()))
    theirs = torch.autograd.grad(total, list(weights.values()))
    for name, one, two in zip(weights, ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("prefill", [0, 6])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_stepping_equals_the_parallel_pass(tiny: Tiny, pattern: str, prefill: int, packed: bool) -> None:
    model = tiny(pattern, moe={"capacity_factor": 1.0, "router": "top_k", "top_k": 2}, mamba_norms=True, kv_heads=2)
    model.eval()
    tokens = _tokens(2, 11)
    document_starts = torch.zeros(2, 11, dtype=torch.bool)
    document_starts[0, [3, 8]] = document_starts[1, 7] = True
    chunks = [slice(0, prefill)] * (prefill > 0) + [slice(at, at + 1) for at in range(prefill, 11)]
    with torch.no_grad():
        whole = model(tokens, document_starts if packed else None).logits
        states, logits = model.initial_states(2), []
        for chunk in chunks:
            output = model(tokens[:, chunk], document_starts[:, chunk] if packed else None, states)
            states = output.states
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-5)


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator gives, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


@pytest.mark.parametrize("tied_head", [False, True])
def test_with_targets_no_logits_stand_in_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tied_head: bool) -> None:
    """Loss, accuracy and gradients are those of the logits, in training and evaluation."""
    model = tiny("M-", tied_head=tied_head, vocab_size=1009)
    weights = list(model.parameters())
    tokens = torch.randint(1009, (4, 64))
    targets = torch.randint(1009, (4, 64)).masked_fill(torch.rand(4, 64) < 0.2, -100)
    logits = model(tokens).logits
    targets[0, :9] = logits[0, :9].argmax(-1)
    expected, counted = cross_entropy_sum(logits, targets)
    monkeypatch.setattr(linear, "CHUNK", 40 * 1009 * 4)  # of 40 tokens
    with _Largest() as largest:
        output = model(tokens, targets=targets)
        gradients = torch.autograd.grad(output.cross_entropy / counted, weights)
        with torch.no_grad():
            scored = model.eval()(tokens, targets=targets)
    assert largest.elements < 64 * 1009 < logits.numel()
    assert output.logits is scored.logits is output.right is None
    assert scored.right == (logits.argmax(-1) == targets).sum() >= 9
    torch.testing.assert_close(output.cross_entropy, expected)
    torch.testing.assert_close(scored.cross_entropy, expected.detach())
    for one, two in zip(gradients, torch.autograd.grad(expected / counted, weights), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_recomputation_gives_the_same_gradients(tiny: Tiny, pattern: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = tiny(pattern, moe={"capacity_factor": 1.0})
        model.recompute = recompute
        output = model(_tokens(2, 8))
        loss = output.logits.square().mean() + sum(one.probability.square().sum() for one in output.statistics.values())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        assert output.statistics.keys() == model.routers().keys()
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_names_of_parameters(tiny: Tiny) -> None:
    model = tiny("M*-E", moe={"shared_experts": 1, "balance": "bias"}, norm="layernorm")
    assert {name for name, _ in model.named_parameters() if "layers.0" not in name} == {
        "embedding.weight", "head.weight", "final_norm.weight", "final_norm.bias",
        *(f"layers.{layer}.norm.{part}" for layer in (1, 2, 3) for part in ("weight", "bias")),
        *(f"layers.1.mixer.{part}_proj.weight" for part in "qkvo"),
        "layers.2.mixer.in_proj.weight", "layers.2.mixer.out_proj.weight", "layers.3.mixer.router.weight",
        "layers.3.mixer.experts.in_proj", "layers.3.mixer.experts.out_proj",
        "layers.3.mixer.shared.in_proj.weight", "layers.3.mixer.shared.out_proj.weight",
    }  # fmt: skip
    assert {name for name in model.fp32_parameter_names() if "mixer" in name} == {
        "layers.0.mixer.A_log", "layers.0.mixer.D", "layers.0.mixer.dt_proj.bias",
        "layers.3.mixer.router.weight", "layers.3.mixer.router.balance_bias",
    }  # fmt: skip
    assert {"final_norm.weight", "final_norm.bias", "layers.0.norm.bias"} <= model.fp32_parameter_names()
    jamba = tiny("M", mamba_norms=True)
    assert {f"layers.0.mixer.{part}_norm.weight" for part in ("dt", "B", "C")} <= jamba.fp32_parameter_names()


def test_bf16_with_the_fp32_list(tiny: Tiny) -> None:
    # Every token sees all experts: rounding would tip a choice of some of them.
    model = tiny("M*-E", moe={"router": "top_k", "top_k": 4})
    keep = model.fp32_parameter_names()
    exact = model(_tokens(2, 8)).logits
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(torch.float32 if name in keep else torch.bfloat16)
    output = model(_tokens(2, 8))
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.float(), exact, rtol=0, atol=2e-2)
    cross_entropy_sum(output.logits, _tokens(2, 8))[0].backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


def test_tied_head_and_no_final_norm(tiny: Tiny) -> None:
    model = tiny("-", tied_head=True, final_norm=False)
    assert not any(name.startswith(("head", "final_norm")) for name, _ in model.named_parameters())
    stream, _, _ = model.hidden(_tokens(1, 4))
    torch.testing.assert_close(model(_tokens(1, 4)).logits[0], stream @ model.embedding.weight.T)
    assert model.parameter_counts()["embedding"] == 31 * 16


def test_loss_counts_what_is_not_ignored() -> None:
    logits, targets = torch.randn(2, 3, 7).bfloat16(), torch.tensor([[1, -100, 2], [-100, -100, 6]])
    total, count = cross_entropy_sum(logits, targets)
    chosen = logits.float().log_softmax(-1)[[0, 0, 1], [0, 2, 2], [1, 2, 6]]
    assert total.dtype == torch.float32
    assert int(count) == 3
    torch.testing.assert_close(total, -chosen.sum())


def test_counts_of_a_small_model_by_hand(tiny: Tiny) -> None:
    model = tiny("M*-E", moe={"router": "top_k", "top_k": 2, "shared_experts": 1}, mamba_norms=True, kv_heads=2)
    d, inner, rank, state, width = 16, 32, 1, 4, 24
    mamba_matrices = 2 * inner * d + inner * (rank + 2 * state) + inner * rank + d * inner + inner * 4
    mamba = mamba_matrices + inner + inner + inner * state + inner  # both biases, A_log, D
    attention, dense, router = 2 * d * d + 2 * d * 8, 2 * d * width, 4 * d
    assert model.parameter_counts() == {
        "total": mamba + attention + dense + 5 * dense + router,
        "active": mamba + attention + dense + 3 * dense + router,
        "norm": 5 * d + rank + 2 * state,
        "embedding": 2 * 31 * d,
    }
    matrices = mamba_matrices + attention + dense + 3 * dense + router + 31 * d
    assert model.flops_per_token(10) == 6 * matrices + 6 * 10 * d + 27 * inner * state


@pytest.mark.parametrize(("d_model", "parameters"), [(512, 1_694_720), (768, 3_770_880)])
def test_counts_of_one_layer_of_the_paper(d_model: int, parameters: int) -> None:
    """Those of its whole models are looked at where they are planned, from the configurations that ship."""
    with torch.device("meta"):
        model = LanguageModel(ModelConfig(vocab_size=50257, pattern="M", repeat=1, d_model=d_model), MoEConfig())
    found = model.parameter_counts()
    assert (found["total"], found["active"]) == (parameters, parameters)


@pytest.mark.parametrize("window", [None, 1, 4, 10, 30])
def test_flops_of_attention_count_what_a_window_sees(tiny: Tiny, window: int | None) -> None:
    """Its tokens see 1 + 2 + ... + w keys and then w each; as for a whole past, half a key per token is not counted."""
    model = tiny("*", heads=2, head_dim=6, sliding_window=window, attention_bias=True)
    matrices = (
        sum(weight.numel() for weight in model.parameters() if weight.dim() == 2) - model.embedding.weight.numel()
    )
    seen = sum(min(token + 1, window or 10) for token in range(10))
    extra = min(window or 10, 10) / 2
    per_key = 2 * 2 * 3 * 2 * 6  # two products, two operations each, forward and twice backward, a width of two heads
    assert model.flops_per_token(10) == pytest.approx(6 * matrices + per_key * (seen - extra) / 10, abs=1)
