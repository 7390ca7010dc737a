"""Every back end of the grouped product against the float64 loop, empty groups and odd widths included."""

import pytest
import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels import grouped_matmul
from tests.kernels.available import typed_cases

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
every_case = pytest.mark.parametrize(("backend", "on", "dtype"), typed_cases("grouped_matmul"))


def results(
    operands: list[Tensor], counts: Tensor, capacity: int | None, backend: str, on: str, dtype: torch.dtype
) -> list[Tensor]:
    """The product of x and weight, and their gradients for that of the product, on the CPU."""
    x, weight, g = (tensor.to(on, dtype) for tensor in operands)
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight)]
    y = grouped_matmul(*inputs, counts.to(on), capacity, backend)
    y.backward(g)
    return [y.detach().cpu(), *(tensor.grad.cpu() for tensor in inputs if tensor.grad is not None)]


def assert_equals_the_reference(
    counts: Tensor, sizes: tuple[int, int], capacity: int | None, backend: str, on: str, dtype: torch.dtype
) -> None:
    rows = int(counts.sum())
    shapes = ((rows, sizes[0]), (len(counts), *sizes), (rows, sizes[1]))
    operands = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    expected = results(operands, counts, None, "reference", "cpu", torch.float64)
    actual = results(operands, counts, capacity, backend, on, dtype)
    assert len(actual) == 3
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * other.norm()


@pytest.mark.parametrize("sizes", [(16, 24), (5, 7), (12, 9)])
@pytest.mark.parametrize("counts", [(3, 1, 6, 2), (0, 12, 0, 0), (4, 0, 5, 3), (0, 0, 0, 0)])
@every_case
def test_equals_the_reference(
    backend: str, on: str, dtype: torch.dtype, counts: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    assert_equals_the_reference(torch.tensor(counts), sizes, None, backend, on, dtype)


@pytest.mark.parametrize("counts", [(3, 1, 6, 2), (0, 1, 0, 0), (0, 0, 0, 0)])
@every_case
def test_without_gradients_as_in_generation(backend: str, on: str, dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    x, weight = torch.randn(sum(counts), 5).to(on, dtype), torch.randn(4, 5, 7).to(on, dtype)
    expected = grouped_matmul(x.double(), weight.double(), torch.tensor(counts, device=on), backend="reference")
    with torch.no_grad():
        actual = grouped_matmul(x, weight, torch.tensor(counts, device=on), backend=backend)
    assert actual.dtype == dtype and (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("sizes", [(16, 24), (5, 7)])
@pytest.mark.parametrize("capacity", [1, 3])
@every_case
def test_groups_of_one_height_equal_the_reference(
    backend: str, on: str, dtype: torch.dtype, capacity: int, sizes: tuple[int, int]
) -> None:
    assert_equals_the_reference(torch.full((4,), capacity), sizes, capacity, backend, on, dtype)


@pytest.mark.parametrize("capacity", [None, 3])
@every_case
def test_operands_that_lie_anywhere_in_memory(backend: str, on: str, dtype: torch.dtype, capacity: int | None) -> None:
    """Rows apart, weights transposed, and both at addresses that no kernel likes."""
    x = torch.randn(1 + 6 * 40, device=on).to(dtype)[1:].view(6, 40)[:, :16]
    weight = torch.randn(1 + 2 * 24 * 16, device=on).to(dtype)[1:].view(2, 24, 16).transpose(1, 2)
    counts = torch.tensor([3, 3], device=on)
    expected = grouped_matmul(x.double(), weight.double(), counts, backend="reference")
    actual = grouped_matmul(x, weight, counts, capacity, backend)
    assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("capacity", [None, 2])
@every_case
def test_gradient_that_is_expanded(backend: str, on: str, dtype: torch.dtype, capacity: int | None) -> None:
    x = torch.randn(4, 16, device=on).to(dtype).requires_grad_()
    weight = torch.randn(2, 16, 8, device=on).to(dtype).requires_grad_()
    counts = torch.tensor([1, 3] if capacity is None else [2, 2], device=on)
    grouped_matmul(x, weight, counts, capacity, backend).sum().backward()
    expected = torch.cat([matrix.sum(1).expand(count, 16) for matrix, count in zip(weight, counts, strict=True)])
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=TOLERANCE[dtype], atol=20 * TOLERANCE[dtype])


def test_gradcheck_of_the_reference() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: grouped_matmul(*t, torch.tensor([2, 0, 3])), (x, weight))


@pytest.mark.parametrize(
    ("x", "weight", "counts", "words"),
    [
        (torch.zeros(4, 3), torch.zeros(2, 5, 6), torch.tensor([2, 2]), r"weight has shape \(2, 5, 6\)"),
        (torch.zeros(4, 5), torch.zeros(2, 5, 6), torch.tensor([2, 2, 0]), r"counts has shape \(3,\)"),
        (torch.zeros(4, 5), torch.zeros(2, 5, 6).double(), torch.tensor([2, 2]), "weight is torch.float64"),
        (torch.zeros(4, 5), torch.zeros(2, 5, 6), torch.tensor([2.0, 2.0]), "counts is torch.float32"),
    ],
)
def test_bad_input_is_one_line(x: Tensor, weight: Tensor, counts: Tensor, words: str) -> None:
    with pytest.raises(UserError, match=words):
        grouped_matmul(x, weight, counts)


def test_a_capacity_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"x has 4 rows, and must have groups x capacity = 6"):
        grouped_matmul(torch.zeros(4, 5), torch.zeros(2, 5, 6), torch.tensor([2, 2]), 3)


def test_a_back_end_that_does_not_fit_is_refused() -> None:
    made = torch.zeros(4, 5, dtype=torch.float64), torch.zeros(2, 5, 6, dtype=torch.float64)
    with pytest.raises(UserError, match=r"'torch' does not take torch\.float64 tensors on a cpu device: choose ref"):
        grouped_matmul(*made, torch.tensor([2, 2]), backend="torch")
