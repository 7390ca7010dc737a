"""The C++ scan: the shapes, layouts and dtypes that it treats apart, and the same bits from any number of threads."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moe_mamba.kernels import requirements, selective_scan

pytestmark = pytest.mark.skipif(requirements.cpu() is not None, reason=f"{requirements.cpu()}")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
WIDE = ("A", "D", "delta_bias", "initial_state")  # fp32 beside bf16 inputs
ROWS = ("x", "delta", "B", "C", "z")  # (batch, length, channels)
Operands = dict[str, Tensor]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def operands(batch: int, length: int, d_inner: int, d_state: int) -> Operands:
    shapes = {name: (batch, length, d_inner) for name in ("x", "delta", "z")}
    shapes |= {name: (batch, length, d_state) for name in ("B", "C")}
    shapes |= {"D": (d_inner,), "delta_bias": (d_inner,), "initial_state": (batch, d_inner, d_state)}
    made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return made | {"A": -4 * torch.rand(d_inner, d_state, dtype=torch.float64) - 0.1}


def typed(made: Operands, dtype: torch.dtype) -> Operands:
    work = torch.promote_types(dtype, torch.float32)
    return {name: value.to(work if name in WIDE else dtype) for name, value in made.items()}


def results(made: Operands, document_starts: Tensor | None, backend: str) -> Operands:
    """y, the final state and every gradient, for fixed random weights of the first two."""
    inputs = {name: value.detach().requires_grad_() for name, value in made.items()}
    y, final_state = selective_scan(**inputs, document_starts=document_starts, backend=backend)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype) for v in (y, final_state)]
    gradients = torch.autograd.grad((y, final_state), list(inputs.values()), weights)
    return {"y": y.detach(), "final state": final_state.detach(), **dict(zip(inputs, gradients, strict=True))}


def assert_close(actual: Operands, expected: Operands, tolerance: float) -> None:
    for name, value in expected.items():
        error = (actual[name].double() - value).norm()
        assert error <= tolerance * max(value.norm(), 1e-3), f"{name}: {error / value.norm()}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("batch", "length", "d_inner", "d_state"),
    [(2, 1, 1, 1), (1, 16, 16, 3), (3, 17, 33, 16), (1, 31, 128, 5), (2, 33, 150, 4), (1, 5, 7, 40)],
)
def test_equals_the_reference(batch: int, length: int, d_inner: int, d_state: int, dtype: torch.dtype) -> None:
    made = operands(batch, length, d_inner, d_state)
    for optional in (True, False):
        document_starts = torch.rand(batch, length) < 0.15 if optional else None
        if not optional:
            made = {name: value for name, value in made.items() if name not in ("z", "delta_bias", "initial_state")}
        expected = results(made, document_starts, "reference")
        assert_close(results(typed(made, dtype), document_starts, "cpu"), expected, TOLERANCE[dtype])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("place", [0, 1, 15, 16, 17, 31, 32])
def test_starts_at_the_edges_of_chunks(place: int) -> None:
    made = operands(2, 34, 20, 3)
    document_starts = torch.zeros(2, 34, dtype=torch.bool)
    document_starts[0, place] = True
    assert_close(results(made, document_starts, "cpu"), results(made, document_starts, "reference"), 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_strided_inputs_are_read_in_place_and_others_copied(dtype: torch.dtype) -> None:
    made = operands(2, 20, 24, 3)
    expected = results(made, None, "reference")
    halves = torch.cat((made["x"], made["z"]), -1).to(dtype)  # as the input projection gives them
    slices = torch.cat((made["delta"], made["B"], made["C"]), -1).to(dtype)
    views = {"x": halves[..., :24], "z": halves[..., 24:]}
    views |= {"delta": slices[..., :24], "B": slices[..., 24:27], "C": slices[..., 27:]}
    assert_close(results(typed(made, dtype) | views, None, "cpu"), expected, TOLERANCE[dtype])
    turned = {name: value.transpose(-1, -2).contiguous().transpose(-1, -2) for name, value in views.items()}
    turned |= {
        name: value.flip(0).flip(0).expand(value.shape) for name, value in typed(made, dtype).items() if name in WIDE
    }
    assert_close(results(turned, None, "cpu"), expected, TOLERANCE[dtype])


def test_a_gradient_that_is_expanded() -> None:
    made = {name: value.requires_grad_() for name, value in operands(2, 20, 5, 3).items()}
    totals = [selective_scan(**made, backend=backend)[0].sum() for backend in ("cpu", "reference")]
    actual, expected = (torch.autograd.grad(total, list(made.values())) for total in totals)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    made, document_starts = typed(operands(3, 70, 300, 16), dtype), torch.rand(3, 70) < 0.05
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(results(made, document_starts, "cpu"))
    torch.set_num_threads(before)
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROWS)
def test_nan_is_where_the_reference_has_it(name: str, dtype: torch.dtype) -> None:
    made = operands(2, 40, 18, 5)
    made[name][0, 20, 2] = math.nan
    document_starts = torch.zeros(2, 40, dtype=torch.bool)
    document_starts[0, [5, 33]] = True
    actual, expected = results(typed(made, dtype), document_starts, "cpu"), results(made, document_starts, "reference")
    for key, value in expected.items():
        assert torch.equal(actual[key].isnan(), value.isnan()), key


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 30.0, 1e4, 1e30])
def test_weak_and_strong_decay(scale: float) -> None:
    made = operands(2, 40, 18, 5)
    made["A"] = scale * made["A"]
    for delta in (0.1, 30.0):
        changed = made | {"delta": delta * made["delta"]}
        actual, expected = results(typed(changed, torch.float32), None, "cpu"), results(changed, None, "reference")
        for name in ("y", "final state", "x", "B", "C", "D", "z", "initial_state"):
            error = (actual[name].double() - expected[name]).norm() / max(expected[name].norm(), 1e-3)
            assert error <= 1e-5, name


def test_a_state_without_decay_is_kept_exactly() -> None:
    made = typed(operands(1, 5000, 16, 2), torch.float32)
    made |= {"A": torch.full((16, 2), -1e-12), "x": torch.zeros(1, 5000, 16)}
    _, final_state = selective_scan(**made, backend="cpu")
    torch.testing.assert_close(final_state, made["initial_state"], rtol=1e-6, atol=0)


def test_softplus_and_the_gate_at_their_extremes() -> None:
    values = torch.tensor([-200.0, -104.0, -88.0, -30.0, -1e-3, 0.0, 1e-3, 19.99, 20.01, 88.0, 89.0, 200.0])
    made = {name: torch.zeros(1, 1, 12, dtype=torch.float64) for name in ("x", "delta", "z")}
    made |= {"x": made["x"] + 1, "delta": values.double()[None, None], "A": -torch.ones(12, 1, dtype=torch.float64)}
    made |= {name: torch.ones(1, 1, 1, dtype=torch.float64) for name in ("B", "C")}
    made |= {"D": torch.zeros(12, dtype=torch.float64), "z": values.double()[None, None]}
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float64, 1e-13)):
        actual, expected = results(typed(made, dtype), None, "cpu"), results(made, None, "reference")
        for name in ("y", "final state", "delta", "z"):
            torch.testing.assert_close(actual[name].double(), expected[name], rtol=tolerance, atol=1e-37)


def test_every_half_is_read_and_rounded_as_torch_does() -> None:
    """Through D and the gate's open end: y = D x for a delta that is 0 and a gate that is left out."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype)[None, :, None]
        length = x.shape[1]
        narrow = torch.zeros(1, length, 1, dtype=dtype)
        document_starts = torch.ones(1, length, dtype=torch.bool)
        for D in (1.0, 0.37, 3.3e-3):
            with torch.no_grad():
                delta, A = torch.full_like(x, -1e4), -torch.ones(1, 1)
                y, _ = selective_scan(
                    x, delta, A, narrow, narrow, torch.tensor([D]), document_starts=document_starts, backend="cpu"
                )
            expected = (x.float() * D).to(dtype)
            finite = x.isfinite()
            assert torch.equal(y[finite], expected[finite])
            assert y[x.isnan()].isnan().all()
