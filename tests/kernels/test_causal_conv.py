"""Every back end of the convolution against the float64 reference and against torch's own convolution."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels import causal_conv
from moe_mamba.kernels.backends import BACKENDS
from moe_mamba.kernels.causal_conv import torch_conv

NAMES = list(BACKENDS["causal_conv"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def operands(batch: int, length: int, channels: int, width: int) -> dict[str, Tensor]:
    shapes = {
        "x": (batch, length, channels),
        "weight": (channels, width),
        "bias": (channels,),
        "initial_state": (batch, width - 1, channels),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def results(made: dict[str, Tensor], starts: Tensor | None, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    inputs = {name: value.to(dtype).detach().clone().requires_grad_() for name, value in made.items()}
    y, final_state = causal_conv(**inputs, starts=starts, backend=backend)
    assert y.dtype == final_state.dtype == dtype
    generator = torch.Generator().manual_seed(1)
    y_weight, state_weight = (
        torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in (y, final_state)
    )
    ((y.double() * y_weight).sum() + (final_state.double() * state_weight).sum()).backward()
    gradients = {f"gradient of {name}": value.grad for name, value in inputs.items()}
    return {"y": y.detach(), "final state": final_state.detach(), **gradients}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (actual[name].double() - value).norm()
        assert error <= tolerance * max(value.norm(), 1e-3), f"{name}: {error / value.norm()}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 20])
@pytest.mark.parametrize("backend", NAMES)
def test_equals_the_reference(backend: str, length: int, width: int, dtype: torch.dtype) -> None:
    for starts in (None, torch.rand(3, length) < 0.2):
        made = operands(3, length, 5, width)
        expected = results(made, starts, torch.float64, "reference")
        assert_equal(results(made, starts, dtype, backend), expected, TOLERANCE[dtype])


def test_equals_the_reference_in_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_conv, "BLOCK", 2 * 20 * 5 // torch.get_num_threads())  # two rows at once, then one
    made, starts = operands(5, 20, 5, 4), torch.rand(5, 20) < 0.2
    expected = results(made, starts, torch.float64, "reference")
    assert_equal(results(made, starts, torch.float64, "torch"), expected, 1e-12)


@pytest.mark.parametrize("backend", NAMES)
def test_equals_torchs_convolution(backend: str) -> None:
    made = operands(2, 20, 5, 4)
    y, final_state = causal_conv(made["x"], made["weight"], made["bias"], backend=backend)
    expected = F.conv1d(made["x"].transpose(1, 2), made["weight"][:, None], made["bias"], padding=3, groups=5)
    torch.testing.assert_close(y, F.silu(expected[..., :20]).transpose(1, 2))
    torch.testing.assert_close(final_state, made["x"][:, -3:])


@pytest.mark.parametrize("backend", NAMES)
def test_gradcheck(backend: str) -> None:
    made = {name: value.requires_grad_() for name, value in operands(2, 9, 2, 4).items()}
    starts = torch.rand(2, 9) < 0.2

    def convolve(*values: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv(**dict(zip(made, values, strict=True)), starts=starts, backend=backend)

    assert torch.autograd.gradcheck(convolve, tuple(made.values()))


@pytest.mark.parametrize("backend", NAMES)
def test_packed_documents_equal_single_ones(backend: str) -> None:
    """Documents shorter than the filter, and NaN in every other one, which must not leak."""
    lengths = (1, 2, 3, 7, 1, 5)
    made = operands(1, sum(lengths), 3, 4)
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, [0, 1, 3, 6, 13, 14]] = True
    documents = list(made["x"].split(lengths, 1))
    for document in documents[::2]:
        document[:] = math.nan
    y, final_state = causal_conv(**made, starts=starts, backend=backend)
    weights = made["weight"], made["bias"]
    single = [causal_conv(document, *weights, backend="reference") for document in documents]
    torch.testing.assert_close(y, torch.cat([part for part, _ in single], 1), equal_nan=True)
    torch.testing.assert_close(final_state, single[-1][1])


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("cuts", [(1,) * 20, (2, 1, 3, 14), (10, 10)])
def test_pieces_with_the_state_between_equal_the_whole(backend: str, cuts: tuple[int, ...]) -> None:
    made, starts = operands(2, 20, 3, 4), torch.rand(2, 20) < 0.2
    whole, last = causal_conv(**made, starts=starts, backend=backend)
    state, pieces = made["initial_state"], []
    for x, piece_starts in zip(made["x"].split(cuts, 1), starts.split(cuts, 1), strict=True):
        y, state = causal_conv(x, made["weight"], made["bias"], piece_starts, state, backend=backend)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight", torch.zeros(4, 4), r"weight has shape \(4, 4\), and must have \(3, 4\)"),
        ("initial_state", torch.zeros(2, 4, 3), r"initial_state has shape \(2, 4, 3\), and must have \(2, 3, 3\)"),
        ("bias", torch.zeros(3, dtype=torch.float64), "bias is torch.float64, and must be torch.float32"),
        ("starts", torch.zeros(2, 5, dtype=torch.long), "starts is torch.int64, and must be torch.bool"),
        ("backend", "fast", "no back end 'fast'"),
    ],
)
def test_bad_input_is_one_line(name: str, value: object, words: str) -> None:
    made: dict[str, object] = {key: tensor.float() for key, tensor in operands(2, 5, 3, 4).items()}
    made[name] = value
    with pytest.raises(UserError, match=words):
        causal_conv(**made)
