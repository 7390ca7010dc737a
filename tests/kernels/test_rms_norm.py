"""Every back end of the norm against the float64 reference, and the torch one against the reference's very bits."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels import requirements
from moe_mamba.kernels.backends import BACKENDS
from moe_mamba.kernels.rms_norm import rms_norm, torch_rms_norm
from tests.kernels.available import available, cases, device, typed_cases

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
EPSILON = 1e-5


def operands(*shape: int, residual: bool = True) -> dict[str, Tensor]:
    made = {"x": torch.randn(shape, dtype=torch.float64), "weight": torch.randn(shape[-1], dtype=torch.float64)}
    return made | ({"residual": torch.randn(shape, dtype=torch.float64)} if residual else {})


def results(
    made: dict[str, Tensor], dtype: torch.dtype, backend: str, on: str, unused: str | None = None
) -> dict[str, Tensor]:
    """y, the stream, and all gradients for fixed random weights of both outputs, less the unused one."""
    work = torch.promote_types(dtype, torch.float32)
    inputs = {
        name: value.to(on, work if name == "weight" else dtype).detach().clone().requires_grad_()
        for name, value in made.items()
    }
    y, stream = rms_norm(epsilon=EPSILON, backend=backend, **inputs)
    assert y.dtype == stream.dtype == dtype
    generator = torch.Generator().manual_seed(1)
    outputs = {"y": y.cpu(), "stream": stream.cpu()}
    weights = {name: torch.randn(y.shape, generator=generator, dtype=torch.float64) for name in outputs}
    used = [(value.double() * weights[name]).sum() for name, value in outputs.items() if name != unused]
    torch.stack(used).sum().backward()
    gradients = {f"gradient of {name}": value.grad.cpu() for name, value in inputs.items() if value.grad is not None}
    return {name: value.detach() for name, value in outputs.items()} | gradients


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (actual[name].double() - value).norm()
        assert error <= tolerance * max(value.norm(), 1e-3), f"{name}: {error / value.norm()}"


@pytest.mark.parametrize("shape", [(5, 1), (2, 3, 7), (9, 40), (150, 33)])
@pytest.mark.parametrize(("backend", "on", "dtype"), typed_cases("rms_norm"))
def test_equals_the_reference(backend: str, on: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for residual in (True, False):
        made = operands(*shape, residual=residual)
        expected = results(made, torch.float64, "reference", "cpu")
        assert_equal(results(made, dtype, backend, on), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("unused", ["y", "stream"])
@pytest.mark.parametrize(("backend", "on"), cases("rms_norm"))
def test_an_output_may_be_left_unused(backend: str, on: str, unused: str) -> None:
    made = operands(4, 7)
    expected = results(made, torch.float64, "reference", "cpu", unused)
    assert_equal(results(made, torch.float32, backend, on, unused), expected, 1e-5)


@pytest.mark.parametrize(("backend", "on"), cases("rms_norm"))
def test_equals_the_reference_in_several_blocks(backend: str, on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_rms_norm, "BLOCK", 14)  # two rows
    if backend == "triton":
        triton_rms_norm = pytest.importorskip("moe_mamba.kernels.rms_norm.triton_rms_norm")
        monkeypatch.setattr(triton_rms_norm, "SUMS", 4)  # programs, of three rows, the last of one
    made = operands(10, 7)
    expected = results(made, torch.float64, "reference", "cpu")
    assert_equal(results(made, torch.float32, backend, on), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [33, 768])
def test_values_are_the_references_to_the_last_bit(dtype: torch.dtype, d: int) -> None:
    made = {name: value.to(dtype) for name, value in operands(700, d).items()}
    made["weight"] = made["weight"].to(torch.promote_types(dtype, torch.float32))
    actual, expected = (rms_norm(epsilon=EPSILON, backend=name, **made) for name in ("torch", "reference"))
    assert actual[0].equal(expected[0]) and actual[1].equal(expected[1])


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("d", [1, 7, 40, 770])
@pytest.mark.parametrize(("backend", "on"), cases("rms_norm"))
def test_bf16_without_gradients(backend: str, on: str, d: int, has_residual: bool) -> None:
    """As in generation; the stream is rounded before it is normalised. Rows apart in memory."""
    x, residual = torch.randn(2, 5, 2 * d, device=on).bfloat16().chunk(2, dim=-1)
    weight, residual = torch.randn(d, device=on), residual if has_residual else None
    expected = rms_norm(x.double(), weight.double(), EPSILON, None, "reference")[0]
    if residual is not None:
        expected = rms_norm((x + residual).double(), weight.double(), EPSILON, None, "reference")[0]
    with torch.no_grad():
        y, stream = rms_norm(x, weight, EPSILON, residual, backend)
    assert y.dtype == torch.bfloat16
    total = x if residual is None else x + residual
    torch.testing.assert_close(stream, total, rtol=1e-2, atol=0)  # Triton's interpreter cuts bf16 off
    assert stream.equal(total) or backend == "triton"
    torch.testing.assert_close(y.double(), expected, rtol=2e-2, atol=1e-6)


@pytest.mark.skipif(requirements.cpu() is not None, reason="no C++ compiler")
@pytest.mark.parametrize("has_residual", [True, False])
def test_threads_change_no_bit_of_bf16(has_residual: bool) -> None:
    made = operands(517, 200, residual=has_residual)  # enough for three threads
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            found.append(results(made, torch.bfloat16, "cpu", "cpu"))
        finally:
            torch.set_num_threads(threads)
    assert all(found[0][name].equal(other[name]) for other in found[1:] for name in other)


@pytest.mark.parametrize(("backend", "on"), cases("rms_norm"))
def test_strided_inputs_equal_dense_ones(backend: str, on: str) -> None:
    """Half of a wider row, columns apart in memory, an expanded gradient."""
    wide = torch.randn(3, 4, 14, device=on, requires_grad=True)
    across = torch.randn(7, 4, 3, device=on).permute(2, 1, 0)
    weight = torch.randn(14, device=on)[::2]
    y, stream = rms_norm(wide[..., :7], weight, EPSILON, across, backend)
    dense = wide[..., :7].detach().clone().requires_grad_()
    expected = rms_norm(dense, weight.contiguous(), EPSILON, across.contiguous(), backend)
    torch.testing.assert_close((y, stream), expected)
    (y.sum() + stream.sum()).backward()
    torch.autograd.backward(expected, (torch.ones_like(y), torch.ones_like(y)))
    assert wide.grad is not None
    torch.testing.assert_close(wide.grad[..., :7], dense.grad)


@pytest.mark.parametrize("backend", available("rms_norm", "cpu", torch.float64))
def test_gradcheck(backend: str) -> None:
    made = [value.requires_grad_() for value in operands(3, 5).values()]

    def norm(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, EPSILON, residual, backend)

    assert torch.autograd.gradcheck(norm, tuple(made))


@pytest.mark.parametrize(("backend", "on"), cases("rms_norm"))
def test_nan_and_zeros_stay_in_their_row(backend: str, on: str) -> None:
    x = torch.randn(4, 7, device=on)
    x[1, 3], x[2] = math.nan, 0
    x.requires_grad_()
    y, _ = rms_norm(x, torch.ones(7, device=on), EPSILON, backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    for value in (y, gradient):
        assert value[1].isnan().all() and value[[0, 2, 3]].isfinite().all()
    assert y[2].eq(0).all()


@pytest.mark.parametrize(("backend", "on"), cases("rms_norm"))
def test_is_deterministic_and_takes_no_rows(backend: str, on: str) -> None:
    made = operands(9, 40)
    first, second = (results(made, torch.float32, backend, on) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)
    y, stream = rms_norm(torch.zeros(0, 7, device=on), torch.ones(7, device=on), EPSILON, backend=backend)
    assert y.shape == stream.shape == (0, 7)


class Marked(torch.autograd.Function):
    """A node that lives as long as its graph, and keeps the marker as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, marker: object) -> Tensor:
        ctx.marker = marker
        return x.clone()


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("backend", "on"), cases("rms_norm"))
def test_a_graph_is_freed_without_a_backward_pass(
    backend: str, on: str, residual: bool, request: pytest.FixtureRequest
) -> None:
    gc.disable()  # which would free a cycle, but late, and none that passes through C++
    request.addfinalizer(gc.enable)
    made = {name: value.to(on, torch.float32) for name, value in operands(4, 7, residual=residual).items()}

    def graph() -> weakref.ref[set[int]]:
        marker: set[int] = set()
        x = Marked.apply(made["x"].requires_grad_(), marker)
        outputs = rms_norm(epsilon=EPSILON, backend=backend, **made | {"x": x})
        assert all(value.requires_grad for value in outputs)
        return weakref.ref(marker)

    assert graph()() is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight", torch.zeros(4), r"weight has shape \(4,\), and must have \(3,\)"),
        ("weight", torch.zeros(3).half(), "weight is torch.float16, and must be torch.float32 like x"),
        ("residual", torch.zeros(3, 3), r"residual has shape \(3, 3\), and must have \(2, 3\)"),
        ("residual", torch.zeros(2, 3).double(), "residual is torch.float64, and must be torch.float32"),
        ("x", torch.tensor(1.0), r"x is a single number, and must be \(..., d\)"),
        ("backend", "fast", "no back end 'fast'"),
    ],
)
def test_bad_input_is_one_line(name: str, value: object, words: str) -> None:
    made: dict[str, Any] = {"x": torch.zeros(2, 3), "weight": torch.ones(3), "epsilon": EPSILON, name: value}
    with pytest.raises(UserError, match=words) as caught:
        rms_norm(**made)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not available("rms_norm", dtype=torch.float32).count("triton"), reason="needs Triton")
def test_triton_refuses_a_row_that_is_too_long() -> None:
    assert BACKENDS["rms_norm"]["triton"].fits(16_384)
    with pytest.raises(UserError, match=r"takes d from 1 to 16,384, not 16,385"):
        x, weight = torch.zeros(1, 16_385, device=device()), torch.ones(16_385, device=device())
        rms_norm(x, weight, EPSILON, backend="triton")
