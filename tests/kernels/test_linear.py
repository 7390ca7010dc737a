"""Every back end of the linear layer against float64, and bf16 on a CPU, with and without what multiplies it."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_mamba.kernels import grouped_matmul, linear, products, requirements
from moe_mamba.kernels.few_rows import most_rows
from moe_mamba.kernels.grouped_matmul.loop import product_by_group, weight_gradient_by_group
from moe_mamba.kernels.products import (
    ISA,
    Product,
    cpp_product,
    multiplies_bf16,
    product_of,
    read_processor,
    torch_product,
    window,
)
from moe_mamba.kernels.widened import widened_product
from tests.kernels.available import typed_cases

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
every_case = pytest.mark.parametrize(("backend", "on", "dtype"), typed_cases("linear"))
needs_cpp = pytest.mark.skipif(requirements.cpu() is not None, reason="no C++ compiler")


@pytest.fixture(params=["multiplies bf16", "does not"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """A processor of either kind: both compute the same."""
    multiplies = request.param == "multiplies bf16"
    monkeypatch.setattr(products, "processor_flags", lambda: frozenset(["amx_bf16"] if multiplies else []))
    monkeypatch.delenv(ISA, raising=False)
    forget()
    yield multiplies
    forget()


def forget() -> None:
    read_processor.cache_clear()
    most_rows.cache_clear()


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and actual.shape == expected.shape
    assert (actual.cpu().double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def operands(shape: tuple[int, ...], out: int, has_bias: bool) -> list[Tensor]:
    sizes = [shape, (out, shape[-1])] + [(out,)] * has_bias
    return [torch.randn(size, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 40), (40, 24)])
@every_case
def test_equals_float64(
    processor: bool, backend: str, on: str, dtype: torch.dtype, shape: tuple[int, ...], has_bias: bool
) -> None:
    """Values and all gradients; and without gradients, as in generation."""
    made = operands(shape, 9, has_bias)
    inputs = [one.to(on, dtype).requires_grad_() for one in made]
    expected = [one.detach().cpu().double().requires_grad_() for one in inputs]
    y, wanted = linear(*inputs, backend=backend), torch.nn.functional.linear(*expected)
    incoming = torch.randn(wanted.shape, dtype=torch.float64).to(dtype)
    y.backward(incoming.to(on))
    wanted.backward(incoming.double())
    assert_close(y.detach(), wanted.detach(), dtype)
    for one, other in zip(inputs, expected, strict=True):
        assert one.grad is not None and other.grad is not None
        assert_close(one.grad, other.grad, dtype)
    with torch.no_grad():
        assert_close(linear(*inputs, backend=backend), wanted.detach(), dtype)


@needs_cpp
@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 7), (33, 70), (256, 40)])
@pytest.mark.parametrize("rows", [0, 1, 2, 4, 7, 16])
def test_few_rows_equal_float64(processor: bool, rows: int, sizes: tuple[int, int], is_grouped: bool) -> None:
    """Along the lines of a matrix and across them, whole vectors and parts of one, rows apart in memory."""
    inner, out = sizes
    x = torch.randn(rows, inner + 3).bfloat16()[:, :inner]
    weight = torch.randn(out, inner).bfloat16()
    with torch.no_grad():
        if is_grouped:
            counts = torch.tensor([0, rows])
            y = grouped_matmul(x, torch.stack([weight, weight]).transpose(1, 2).contiguous(), counts)
            same = grouped_matmul(x, torch.stack([weight, weight]).transpose(1, 2), counts)  # as they lie
            assert_close(same, y.double(), torch.bfloat16)
        else:
            y = linear(x, weight)
    expected = x.double() @ weight.double().t()
    # Sums are in fp32 and rounded once.
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5 * inner)


@needs_cpp
def test_threads_change_no_bit() -> None:
    x, weight = torch.randn(3, 1024).bfloat16(), torch.randn(1040, 1024).bfloat16()
    threads = torch.get_num_threads()
    made = []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            with torch.no_grad():
                counts = torch.tensor([3])
                made.append((linear(x, weight), grouped_matmul(x, weight.t().contiguous()[None], counts)))
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(made[0][0], made[1][0]) and torch.equal(made[0][1], made[1][1])


def laid_out(rows: int, columns: int, layout: str) -> Tensor:
    """Random bf16 numbers: row by row, column by column, or apart from one another."""
    if layout == "apart":
        return torch.randn(rows, 2 * columns + 1).bfloat16()[:, ::2][:, :columns]
    return (
        torch.randn(columns, rows).bfloat16().t() if layout == "transposed" else torch.randn(rows, columns).bfloat16()
    )


@needs_cpp
@pytest.mark.parametrize(
    "layouts", [("plain", "plain"), ("plain", "transposed"), ("transposed", "plain"), ("apart", "apart")]
)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (6, 40, 16), (7, 300, 33), (100, 257, 530), (780, 70, 20), (0, 5, 3), (4, 0, 5), (5, 3, 0)]
)
def test_widened_products_equal_float64(sizes: tuple[int, int, int], layouts: tuple[str, str]) -> None:
    """Whole tiles and parts of them, several passes over the inner dimension, none, and an output with gaps."""
    rows, inner, columns = sizes
    a, b = laid_out(rows, inner, layouts[0]), laid_out(inner, columns, layouts[1])
    around = torch.full((rows, columns + 3), 7.0).bfloat16()
    widened_product(a, b, around[:, 1 : columns + 1])
    made = around[:, 1 : columns + 1].double()
    torch.testing.assert_close(made, a.double() @ b.double(), rtol=2**-8, atol=1e-6 * inner)
    assert (around[:, 0] == 7).all() and (around[:, columns + 1 :] == 7).all()
    transposed = torch.empty(columns, rows).bfloat16().t()  # rows lie side by side
    widened_product(a, b, transposed)
    assert torch.equal(transposed.double(), made)


@needs_cpp
@pytest.mark.parametrize("sizes", [(200, 300, 70), (70, 300, 200)])
def test_threads_change_no_bit_of_widened_products(sizes: tuple[int, int, int]) -> None:
    rows, inner, columns = sizes
    a, b, threads = torch.randn(rows, inner).bfloat16(), torch.randn(inner, columns).bfloat16(), torch.get_num_threads()
    made = [torch.empty(rows, columns).bfloat16() for _ in range(2)]
    try:
        for count, y in zip((1, 3), made, strict=True):
            torch.set_num_threads(count)
            widened_product(a, b, y)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*made)


@needs_cpp
def test_only_who_asks_for_torch_gets_torch(processor: bool) -> None:
    x = torch.randn(2, 3).bfloat16()
    assert product_of(x, "auto") is (torch_product if processor else cpp_product)
    assert product_of(x, "torch") is product_of(x.float(), "auto") is torch_product


def test_windows_are_few_and_hardly_larger() -> None:
    windows = [window(rows) for rows in range(1, 4097)]
    assert all(rows <= size <= max(rows + 15, rows * 1.13) for rows, size in enumerate(windows, 1))
    assert len(set(windows)) <= 50 and all(size % 16 == 0 for size in windows)


class Shapes(TorchDispatchMode):
    """Notes the shapes of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.mm:
            self.seen.add((tuple(args[0].shape), tuple(args[1].shape)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("processor", ["multiplies bf16"], indirect=True)
def test_experts_products_are_of_few_shapes(processor: bool) -> None:
    """Whatever the router does: each new one costs more than the product."""
    x, weight, gradient = (torch.randn(shape).bfloat16() for shape in ((1000, 4), (4, 4, 6), (1000, 6)))
    with Shapes() as shapes:
        for _ in range(100):
            counts = torch.bincount(torch.randint(4, (1000,)), minlength=4)
            product_by_group(x, weight, counts, torch_product)
            product_by_group(gradient, weight.transpose(1, 2), counts, torch_product)
            weight_gradient_by_group(gradient, x, counts, torch_product)
    assert {sizes[0] % 16 for sizes, _ in shapes.seen if sizes[1] in (4, 6)} == {0}
    assert len(shapes.seen) <= 3 * 8


@pytest.mark.parametrize("product", [torch_product, pytest.param(cpp_product, marks=needs_cpp)])
def test_a_group_sees_nothing_of_the_next_ones_nan(processor: bool, product: Product) -> None:
    x, weight = torch.randn(20, 8).bfloat16(), torch.randn(2, 8, 6).bfloat16()
    gradient, counts = torch.randn(20, 6).bfloat16(), torch.tensor([3, 17])
    x[3:], gradient[5:] = torch.nan, torch.inf
    y, made = product_by_group(x, weight, counts, product), weight_gradient_by_group(gradient, x, counts, product)
    assert y[:3].isfinite().all() and y[3:].isnan().all()
    assert made[0].isfinite().all() and made[1].isnan().all()


@pytest.mark.parametrize(
    ("flag", "vendor", "most", "expected"),
    [
        ("amx_bf16", "GenuineIntel", "all", True),
        ("amx_bf16", "GenuineIntel", "AVX512_CORE_AMX", True),
        ("amx_bf16", "GenuineIntel", "AVX512_CORE_BF16", False),
        ("avx512_bf16", "GenuineIntel", "all", False),
        ("avx512_bf16", "AuthenticAMD", "default", True),
        ("avx512_bf16", "AuthenticAMD", "AVX512_CORE_BF16", True),
        ("avx512_bf16", "AuthenticAMD", "AVX512_CORE_AMX", True),
        ("avx512_bf16", "AuthenticAMD", "AVX512_CORE_VNNI", False),
        ("avx2", "AuthenticAMD", "all", False),
        ("bf16", "", "all", True),
    ],
)
def test_who_multiplies_bf16_faster(
    monkeypatch: pytest.MonkeyPatch, flag: str, vendor: str, most: str, expected: bool
) -> None:
    """By the flags of the processor, whose it is, and what oneDNN may use of it."""
    monkeypatch.setattr(products, "processor_flags", lambda: frozenset([flag]))
    monkeypatch.setattr(products, "processor_vendor", lambda: vendor)
    monkeypatch.setenv(ISA, most)
    forget()
    assert multiplies_bf16() is expected
    forget()
