"""Every back end of the activations against torch's own in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe_mamba.errors import UserError
from moe_mamba.kernels.activation import KINDS, activation
from tests.kernels.available import cases, typed_cases

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def expected_values(hidden: Tensor, kind: str) -> Tensor:
    if kind == "swiglu":
        width = hidden.shape[-1] // 2
        return functional.silu(hidden[..., :width]) * hidden[..., width:]
    if kind == "gelu":
        return hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden.clamp(min=0) ** (2 if kind == "squared_relu" else 1)


def results(hidden: Tensor, weights: Tensor, kind: str, backend: str) -> tuple[Tensor, Tensor]:
    """Values and gradient, in float64 on the CPU."""
    hidden = hidden.detach().clone().requires_grad_()
    out = expected_values(hidden, kind) if backend == "expected" else activation(hidden, kind, backend)
    assert out.dtype == hidden.dtype
    (gradient,) = torch.autograd.grad((out * weights.to(out)).sum(), hidden)
    return out.detach().double().cpu(), gradient.double().cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "on", "dtype"), typed_cases("activation"))
def test_equals_float64(backend: str, on: str, dtype: torch.dtype, kind: str) -> None:
    for shape in ((3, 1, 2), (4, 66), (7, 10)):
        hidden = 3 * torch.randn(shape, dtype=torch.float64)
        weights = torch.randn(*shape[:-1], shape[-1] // 2 if kind == "swiglu" else shape[-1], dtype=torch.float64)
        actual = results(hidden.to(on, dtype), weights, kind, backend)
        for value, expected in zip(actual, results(hidden, weights, kind, "expected"), strict=True):
            assert (value - expected).norm() <= TOLERANCE[dtype] * max(expected.norm(), 1e-3)


@pytest.mark.parametrize("kind", ["swiglu", "squared_relu"])
@pytest.mark.parametrize(("backend", "on"), cases("activation"))
def test_several_blocks_of_columns(backend: str, on: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        monkeypatch.setattr(pytest.importorskip("moe_mamba.kernels.activation.triton_activation"), "BLOCK", 16)
    hidden = torch.randn(3, 66, dtype=torch.float64)
    weights = torch.randn(3, 33 if kind == "swiglu" else 66, dtype=torch.float64)
    actual = results(hidden.to(on, torch.float32), weights, kind, backend)
    for value, expected in zip(actual, results(hidden, weights, kind, "expected"), strict=True):
        assert (value - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "on"), cases("activation"))
def test_strided_empty_and_extreme_inputs(backend: str, on: str, kind: str) -> None:
    wide = torch.randn(3, 4, 20, device=on)
    for strided in (wide[..., 4:10], wide[..., ::2], wide.permute(2, 0, 1)):
        leaf = strided.detach().requires_grad_()  # keeps the strides
        out = activation(leaf, kind, backend)
        torch.testing.assert_close(out, expected_values(strided, kind), atol=1e-5, rtol=1e-5)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)  # an expanded gradient
        dense = strided.contiguous().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(expected_values(dense, kind).sum(), dense)[0])
    assert activation(torch.zeros(0, 6, device=on), kind, backend).shape == (0, 3 if kind == "swiglu" else 6)
    extreme = torch.tensor([[200.0, -200.0, math.nan, 0.0, 1.0, 1.0, 1.0, 1.0]], device=on)
    out = activation(extreme, kind, backend)
    assert out.isnan().equal(expected_values(extreme, kind).isnan()) and out[0, 0] >= 200


@pytest.mark.parametrize(
    ("hidden", "kind", "words"),
    [
        (torch.zeros(2, 3), "tanh", "no kind 'tanh': choose one of relu, squared_relu, gelu, swiglu"),
        (torch.zeros(2, 3), "swiglu", r"hidden has shape \(2, 3\), and must be \(..., 2 width\)"),
        (torch.tensor(1.0), "relu", r"hidden has shape \(\), and must be \(..., width\)"),
        (torch.zeros(2, 2, dtype=torch.long), "relu", "does not take torch.int64 tensors"),
    ],
)
def test_bad_input_is_one_line(hidden: Tensor, kind: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        activation(hidden, kind)
    assert "\n" not in str(caught.value)
