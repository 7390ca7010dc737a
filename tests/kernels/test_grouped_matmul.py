"""Every back end of the grouped product against the float64 loop, empty groups and odd widths included."""

import pytest
import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels import grouped_matmul
from moe_mamba.kernels.backends import BACKENDS

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
CASES = [(name, dtype) for name, entry in BACKENDS["grouped_matmul"].items() for dtype in entry.dtypes]


def results(
    x: Tensor, weight: Tensor, counts: Tensor, g: Tensor, backend: str, capacity: int | None = None
) -> list[Tensor]:
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (x, weight)]
    y = grouped_matmul(*inputs, counts, capacity, backend)
    y.backward(g)
    return [y.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


@pytest.mark.parametrize("sizes", [(16, 24), (5, 7), (12, 9)])
@pytest.mark.parametrize("counts", [(3, 1, 6, 2), (0, 12, 0, 0), (4, 0, 5, 3), (0, 0, 0, 0)])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_equals_the_reference(
    backend: str, dtype: torch.dtype, counts: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    made = [torch.randn(shape, dtype=torch.float64) for shape in ((sum(counts), sizes[0]), (4, *sizes))]
    g = torch.randn(sum(counts), sizes[1], dtype=torch.float64)
    expected = results(*made, torch.tensor(counts), g, "reference")
    actual = results(*(tensor.to(dtype) for tensor in made), torch.tensor(counts), g.to(dtype), backend)
    assert len(actual) == 3
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * other.norm()


@pytest.mark.parametrize("sizes", [(16, 24), (5, 7)])
@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_groups_of_one_height_equal_the_reference(
    backend: str, dtype: torch.dtype, capacity: int, sizes: tuple[int, int]
) -> None:
    made = [torch.randn(shape, dtype=torch.float64) for shape in ((4 * capacity, sizes[0]), (4, *sizes))]
    counts, g = torch.full((4,), capacity), torch.randn(4 * capacity, sizes[1], dtype=torch.float64)
    expected = results(*made, counts, g, "reference")
    actual = results(*(tensor.to(dtype) for tensor in made), counts, g.to(dtype), backend, capacity)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * other.norm()


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_operands_that_lie_anywhere_in_memory(backend: str, dtype: torch.dtype, capacity: int | None) -> None:
    """Rows apart, weights transposed, and both at addresses that no kernel likes."""
    x = torch.randn(1 + 6 * 40).to(dtype)[1:].view(6, 40)[:, :16]
    weight = torch.randn(1 + 2 * 24 * 16).to(dtype)[1:].view(2, 24, 16).transpose(1, 2)
    counts = torch.tensor([3, 3])
    expected = grouped_matmul(x.double(), weight.double(), counts, backend="reference")
    actual = grouped_matmul(x, weight, counts, capacity, backend)
    assert (actual.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_gradient_that_is_expanded(backend: str, dtype: torch.dtype, capacity: int | None) -> None:
    x = torch.randn(4, 16).to(dtype).requires_grad_()
    weight = torch.randn(2, 16, 8).to(dtype).requires_grad_()
    counts = torch.tensor([1, 3] if capacity is None else [2, 2])
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
    with pytest.raises(UserError, match=r"back end 'torch' does not take torch\.float64 tensors: choose reference"):
        grouped_matmul(*made, torch.tensor([2, 2]), backend="torch")
