"""Every back end of the convolution against the float64 reference and against torch's own convolution."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels import causal_conv, causal_conv_step
from moe_mamba.kernels.backends import BACKENDS
from moe_mamba.kernels.causal_conv import torch_conv
from tests.kernels.available import available, cases, device, typed_cases

NAMES = ("backend", "on")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def operands(batch: int, length: int, channels: int, width: int) -> dict[str, Tensor]:
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, width - 1, channels),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def widest(backend: str) -> torch.dtype:
    return torch.float64 if torch.float64 in BACKENDS["causal_conv"][backend].dtypes else torch.float32


def results(
    made: dict[str, Tensor], document_starts: Tensor | None, dtype: torch.dtype, backend: str, on: str = "cpu"
) -> dict[str, Tensor]:
    inputs = {name: value.to(on, dtype).detach().clone().requires_grad_() for name, value in made.items()}
    moved = None if document_starts is None else document_starts.to(on)
    y, final_state = causal_conv(**inputs, document_starts=moved, backend=backend)
    assert y.dtype == final_state.dtype == dtype
    generator = torch.Generator().manual_seed(1)
    y_weight, state_weight = (
        torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in (y, final_state)
    )
    ((y.cpu().double() * y_weight).sum() + (final_state.cpu().double() * state_weight).sum()).backward()
    gradients = {f"gradient of {name}": torch.as_tensor(value.grad).cpu() for name, value in inputs.items()}
    return {"y": y.detach().cpu(), "final state": final_state.detach().cpu(), **gradients}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (actual[name].double() - value).norm()
        assert error <= tolerance * max(value.norm(), 1e-3), f"{name}: {error / value.norm()}"


@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 3), (9, 4), (14, 2), (14, 3), (14, 4)])
@pytest.mark.parametrize((*NAMES, "dtype"), typed_cases("causal_conv"))
def test_equals_the_reference(backend: str, on: str, dtype: torch.dtype, length: int, width: int) -> None:
    document_starts = None if length == 9 else torch.rand(2, length) < 0.25
    made = operands(2, length, 5, width)
    expected = results(made, document_starts, torch.float64, "reference")
    assert_equal(results(made, document_starts, dtype, backend, on), expected, TOLERANCE[dtype])


def test_equals_the_reference_in_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_conv, "BLOCK", 2 * 20 * 5 // torch.get_num_threads())  # two rows at once, then one
    made, document_starts = operands(5, 20, 5, 4), torch.rand(5, 20) < 0.2
    expected = results(made, document_starts, torch.float64, "reference")
    assert_equal(results(made, document_starts, torch.float64, "torch"), expected, 1e-12)


@pytest.mark.parametrize(NAMES, cases("causal_conv"))
def test_equals_the_reference_in_many_blocks_of_channels_and_chunks(
    backend: str, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        triton_conv = pytest.importorskip("moe_mamba.kernels.causal_conv.triton_causal_conv")
        monkeypatch.setattr(triton_conv, "BLOCK", 32)
        monkeypatch.setattr(triton_conv, "SMALLEST_ROWS", 4)
    for width in (2, 4):
        made, document_starts = operands(2, 14, 33, width), torch.rand(2, 14) < 0.2
        expected = results(made, document_starts, torch.float64, "reference")
        assert_equal(results(made, document_starts, torch.float32, backend, on), expected, 1e-5)


@pytest.mark.parametrize(NAMES, cases("causal_conv"))
def test_strided_inputs_equal_dense_ones(backend: str, on: str) -> None:
    """Rows of a wider projection, channels that do not lie next to each other, a gradient that is expanded."""
    made = {name: value.to(on, torch.float32) for name, value in operands(2, 9, 5, 3).items()}
    document_starts = (torch.rand(9, 2) < 0.2).to(on).t()
    expected = causal_conv(**made, document_starts=document_starts.contiguous(), backend=backend)[0]
    projection = torch.cat((made["x"], made["x"] + 1), 2).requires_grad_()
    strided = made | {"weight": made["weight"].t().contiguous().t(), "x": projection[..., :5]}
    strided["initial_state"] = made["initial_state"].transpose(0, 2).contiguous().transpose(0, 2)
    y = causal_conv(**strided, document_starts=document_starts, backend=backend)[0]
    assert y.equal(expected)
    y.sum().backward()
    dense = made["x"].clone().requires_grad_()
    causal_conv(**made | {"x": dense}, document_starts=document_starts, backend=backend)[0].backward(torch.ones_like(y))
    assert projection.grad is not None and dense.grad is not None
    assert projection.grad[..., :5].equal(dense.grad) and projection.grad[..., 5:].eq(0).all()
    across = made["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert causal_conv(**made | {"x": across}, document_starts=document_starts, backend=backend)[0].equal(expected)


@pytest.mark.parametrize(NAMES, cases("causal_conv"))
def test_equals_torchs_convolution(backend: str, on: str) -> None:
    dtype = widest(backend)
    made = {name: value.to(on, dtype) for name, value in operands(2, 20, 5, 4).items()}
    y, final_state = causal_conv(made["x"], made["weight"], made["bias"], backend=backend)
    expected = F.conv1d(made["x"].transpose(1, 2), made["weight"][:, None], made["bias"], padding=3, groups=5)
    torch.testing.assert_close(y, F.silu(expected[..., :20]).transpose(1, 2))
    torch.testing.assert_close(final_state, made["x"][:, -3:])


@pytest.mark.parametrize("backend", available("causal_conv", "cpu", torch.float64))
def test_gradcheck(backend: str) -> None:
    made = {name: value.requires_grad_() for name, value in operands(2, 9, 2, 4).items()}
    document_starts = torch.rand(2, 9) < 0.2

    def convolve(*values: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv(**dict(zip(made, values, strict=True)), document_starts=document_starts, backend=backend)

    assert torch.autograd.gradcheck(convolve, tuple(made.values()))


@pytest.mark.parametrize(NAMES, cases("causal_conv"))
def test_packed_documents_equal_single_ones(backend: str, on: str) -> None:
    """Documents shorter than the filter, and NaN in every other one, which must not leak, nor may its gradient."""
    lengths = (1, 2, 3, 7, 1, 5)
    dtype = widest(backend)
    made = {name: value.to(on, dtype) for name, value in operands(1, sum(lengths), 3, 4).items()}
    document_starts = torch.zeros(1, sum(lengths), dtype=torch.bool, device=on)
    document_starts[0, [0, 1, 3, 6, 13, 14]] = True
    documents = list(made["x"].split(lengths, 1))
    for document in documents[::2]:
        document[:] = math.nan
    made["x"] = made["x"].clone().requires_grad_()
    y, final_state = causal_conv(**made, document_starts=document_starts, backend=backend)
    weights = made["weight"], made["bias"]
    single = [causal_conv(document, *weights, backend="reference") for document in documents]
    torch.testing.assert_close(y, torch.cat([part for part, _ in single], 1), equal_nan=True)
    torch.testing.assert_close(final_state, single[-1][1])
    (gradient,) = torch.autograd.grad(y.sum(), made["x"])
    assert gradient.isnan().equal(made["x"].isnan())


@pytest.mark.parametrize(NAMES, cases("causal_conv"))
@pytest.mark.parametrize("widths", [(1,) * 12, (2, 1, 3, 6)])
def test_chunks_with_the_state_between_equal_the_whole(backend: str, on: str, widths: tuple[int, ...]) -> None:
    made = {name: value.to(on, widest(backend)) for name, value in operands(2, 12, 3, 4).items()}
    document_starts = (torch.rand(2, 12) < 0.2).to(on)
    whole, last = causal_conv(**made, document_starts=document_starts, backend=backend)
    state, outputs = made["initial_state"], []
    for x, chunk_starts in zip(made["x"].split(widths, 1), document_starts.split(widths, 1), strict=True):
        y, state = causal_conv(x, made["weight"], made["bias"], chunk_starts, state, backend=backend)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize((*NAMES, "dtype"), typed_cases("causal_conv_step"))
def test_stepping_equals_the_parallel_pass(backend: str, on: str, dtype: torch.dtype, width: int) -> None:
    made = operands(3, 6, 5, width)
    whole, last = causal_conv(**made, backend="reference")
    weight, bias, state = (made[name].to(on, dtype) for name in ("weight", "bias", "initial_state"))
    for t in range(6):
        y, state = causal_conv_step(made["x"][:, t].to(on, dtype), weight, bias, state, backend=backend)
        assert y.dtype == state.dtype == dtype
        assert_equal({"y": y.cpu()}, {"y": whole[:, t]}, TOLERANCE[dtype])
    torch.testing.assert_close(state.cpu(), last.to(dtype))


@pytest.mark.parametrize(NAMES, cases("causal_conv"))
def test_is_deterministic(backend: str, on: str) -> None:
    made, document_starts = operands(2, 14, 33, 4), torch.rand(2, 14) < 0.1
    first, second = (results(made, document_starts, torch.float32, backend, on) for _ in range(2))
    assert all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight", torch.zeros(4, 4), r"weight has shape \(4, 4\), and must have \(3, 4\)"),
        ("initial_state", torch.zeros(2, 4, 3), r"initial_state has shape \(2, 4, 3\), and must have \(2, 3, 3\)"),
        ("bias", torch.zeros(3, dtype=torch.float64), "bias is torch.float64, and must be torch.float32"),
        ("document_starts", torch.zeros(2, 5).long(), "document_starts is torch.int64, and must be torch.bool"),
        ("backend", "fast", "no back end 'fast'"),
    ],
)
def test_bad_input_is_one_line(name: str, value: object, words: str) -> None:
    made: dict[str, Any] = {key: tensor.float() for key, tensor in operands(2, 5, 3, 4).items()}
    made[name] = value
    with pytest.raises(UserError, match=words) as caught:
        causal_conv(**made)
    assert "\n" not in str(caught.value)


def test_bad_input_of_a_step_is_one_line() -> None:
    x, weight, bias, state = torch.zeros(2, 3), torch.zeros(3, 4), torch.zeros(3), torch.zeros(2, 2, 3)
    with pytest.raises(UserError, match=r"causal_conv_step: state has shape \(2, 2, 3\), and must have \(2, 3, 3\)"):
        causal_conv_step(x, weight, bias, state)
    with pytest.raises(UserError, match=r"causal_conv_step: x has shape \(1, 2, 3\), and must be \(batch, channels\)"):
        causal_conv_step(x[None], weight, bias, state)


@pytest.mark.parametrize("backend", [name for name in available("causal_conv") if name in ("cpu", "triton")])
def test_refuses_a_filter_that_is_too_wide(backend: str) -> None:
    made = {name: value.to(device(), torch.float32) for name, value in operands(2, 6, 3, 5).items()}
    with pytest.raises(UserError, match=r"takes width from \d to 4, not 5"):
        causal_conv(**made, backend=backend)
