"""The C++ convolution: the shapes, layouts and dtypes that it treats apart, and the same bits from any threads."""

import math

import pytest
import torch
from torch import Tensor

from moe_mamba.kernels import causal_conv, requirements

pytestmark = pytest.mark.skipif(requirements.cpu() is not None, reason=f"{requirements.cpu()}")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
Operands = dict[str, Tensor]


def operands(batch: int, length: int, channels: int, width: int) -> Operands:
    shapes = {"x": (batch, length, channels), "weight": (channels, width), "bias": (channels,)}
    shapes |= {"initial_state": (batch, width - 1, channels)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def typed(made: Operands, dtype: torch.dtype) -> Operands:
    return {name: value.to(dtype) for name, value in made.items()}


def results(made: Operands, document_starts: Tensor | None, backend: str) -> Operands:
    """y and every gradient, for a fixed random weight of y."""
    inputs = {name: value.detach().requires_grad_() for name, value in made.items()}
    y, _ = causal_conv(**inputs, document_starts=document_starts, backend=backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return {"y": y.detach(), **dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), weight), strict=True))}


def assert_close(actual: Operands, expected: Operands, tolerance: float) -> None:
    for name, value in expected.items():
        error = (actual[name].double() - value).norm()
        assert error <= tolerance * max(value.norm(), 1e-3), f"{name}: {error / value.norm()}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize(("length", "channels"), [(1, 1), (2, 16), (3, 17), (40, 300)])
def test_equals_the_reference(length: int, channels: int, width: int, dtype: torch.dtype) -> None:
    made = typed(operands(2, length, channels, width), dtype)
    exact = typed(made, torch.float64)
    for document_starts in (None, torch.rand(2, length) < 0.2):
        expected = results(exact, document_starts, "reference")
        assert_close(results(made, document_starts, "cpu"), expected, TOLERANCE[dtype])


def test_strided_inputs_are_read_in_place_and_others_copied() -> None:
    made = operands(2, 20, 24, 4)
    expected = results(made, None, "reference")
    half = torch.cat((made["x"], made["x"]), -1)[..., :24]  # as the input projection gives it
    assert_close(results(made | {"x": half}, None, "cpu"), expected, 1e-12)
    turned = {name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in made.items()}
    assert_close(results(turned, None, "cpu"), expected, 1e-12)


def test_a_gradient_that_is_expanded() -> None:
    made = {name: value.requires_grad_() for name, value in operands(2, 20, 5, 4).items()}
    totals = [causal_conv(**made, backend=backend)[0].sum() for backend in ("cpu", "reference")]
    actual, expected = (torch.autograd.grad(total, list(made.values())) for total in totals)
    torch.testing.assert_close(actual, expected)


def test_threads_do_not_change_a_bit() -> None:
    made, document_starts = typed(operands(3, 70, 700, 4), torch.float32), torch.rand(3, 70) < 0.05
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(results(made, document_starts, "cpu"))
    torch.set_num_threads(before)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


@pytest.mark.parametrize("width", [2, 4])
def test_nan_is_where_the_reference_has_it(width: int) -> None:
    made = operands(2, 20, 18, width)
    made["x"][0, 9, 2] = math.nan
    made["initial_state"][1, -1, 0] = math.nan
    document_starts = torch.zeros(2, 20, dtype=torch.bool)
    document_starts[0, 11] = document_starts[1, 1] = True
    actual = results(typed(made, torch.float32), document_starts, "cpu")
    expected = results(made, document_starts, "reference")
    for name, value in expected.items():
        assert torch.equal(actual[name].isnan(), value.isnan()), name
