"""Every back end of the scan against the float64 reference: values, all gradients, resets, states, steps."""

import math

import pytest
import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels import selective_scan, selective_scan_step
from moe_mamba.kernels.backends import BACKENDS
from moe_mamba.kernels.selective_scan import torch_scan

NAMES = list(BACKENDS["selective_scan"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
WIDE = ("A", "D", "delta_bias", "initial_state")  # fp32 beside bf16 inputs
SHAPES = [(3, 37, 6, 4), (2, 16, 8, 3), (5, 33, 4, 2), (1, 1, 5, 2)]  # batch, length, d_inner, d_state


def operands(batch: int, length: int, d_inner: int, d_state: int, optional: bool = True) -> dict[str, Tensor]:
    """Random operands in float64, the optional ones when asked."""
    wide = {"dtype": torch.float64}
    made = {
        "x": torch.randn(batch, length, d_inner, **wide),
        "delta": torch.randn(batch, length, d_inner, **wide),
        "A": -4 * torch.rand(d_inner, d_state, **wide) - 0.1,
        "B": torch.randn(batch, length, d_state, **wide),
        "C": torch.randn(batch, length, d_state, **wide),
        "D": torch.randn(d_inner, **wide),
    }
    if optional:
        made |= {
            "z": torch.randn(batch, length, d_inner, **wide),
            "delta_bias": torch.randn(d_inner, **wide),
            "initial_state": torch.randn(batch, d_inner, d_state, **wide),
        }
    return made


def results(
    made: dict[str, Tensor], starts: Tensor | None, dtype: torch.dtype, backend: str, seed: int = 1
) -> dict[str, Tensor]:
    """y, the final state, and the gradient of every operand for fixed random weights of both."""
    work = torch.promote_types(dtype, torch.float32)
    inputs = {
        name: value.to(work if name in WIDE else dtype).detach().clone().requires_grad_()
        for name, value in made.items()
    }
    y, final_state = selective_scan(**inputs, starts=starts, backend=backend)
    assert y.dtype == dtype and final_state.dtype == work
    generator = torch.Generator().manual_seed(seed)
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
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", NAMES)
def test_equals_the_reference(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for optional in (True, False):
        made = operands(*shape, optional)
        starts = torch.rand(shape[:2]) < 0.15 if optional else None
        expected = results(made, starts, torch.float64, "reference")
        assert_equal(results(made, starts, dtype, backend), expected, TOLERANCE[dtype])


def test_equals_the_reference_in_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_scan, "BLOCK", 48 / torch.get_num_threads())  # two rows at once, then one
    made = operands(5, 40, 6, 4)
    starts = torch.rand(5, 40) < 0.1
    expected = results(made, starts, torch.float64, "reference")
    assert_equal(results(made, starts, torch.float64, "torch"), expected, 1e-12)


def test_strong_decay_neither_overflows_nor_underflows_into_nan() -> None:
    made = operands(2, 40, 4, 3)
    made["delta"] = 30 * made["delta"]
    expected = results(made, None, torch.float64, "reference")
    assert_equal(results(made, None, torch.float32, "torch"), expected, 1e-5)


@pytest.mark.parametrize("backend", NAMES)
def test_gradcheck(backend: str) -> None:
    made = {name: value.requires_grad_() for name, value in operands(2, 18, 2, 2).items()}
    starts = torch.rand(2, 18) < 0.1

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(made, values, strict=True)), starts=starts, backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(made.values()))


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("place", [0, 5, 15, 16, 17, 31, 32, 39])
def test_a_start_hides_everything_before_it(backend: str, place: int) -> None:
    """NaN before a start leaks neither forward nor, as a gradient, backward."""
    made = operands(2, 40, 3, 2)
    for name in ("x", "delta", "B", "C", "z"):
        made[name][0, :place] = math.nan
    if place == 0:
        made["initial_state"][0] = math.nan
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[0, place] = True
    actual = results(made, starts, torch.float64, backend)

    after = {name: value[:, place:] if name in ("x", "delta", "B", "C", "z") else value for name, value in made.items()}
    after["initial_state"] = torch.zeros_like(made["initial_state"])
    inputs = {name: value[:1] if value.dim() == 3 else value for name, value in after.items()}
    y, final_state = selective_scan(**inputs, backend="reference")
    torch.testing.assert_close(actual["y"][:1, place:], y)
    torch.testing.assert_close(actual["final state"][:1], final_state)
    for name in ("x", "delta", "B", "C", "z"):
        assert actual[f"gradient of {name}"][0, place:].isfinite().all()
        assert actual[f"gradient of {name}"][1].isfinite().all()


@pytest.mark.parametrize("backend", NAMES)
def test_no_gradient_crosses_a_start(backend: str) -> None:
    made = {name: value.requires_grad_() for name, value in operands(1, 40, 3, 2).items()}
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, 20] = True
    y, final_state = selective_scan(**made, starts=starts, backend=backend)
    (y[:, 20:].sum() + final_state.sum()).backward()
    assert made["x"].grad is not None and made["x"].grad[:, :20].eq(0).all() and made["x"].grad[:, 20:].ne(0).all()
    assert made["initial_state"].grad is not None and made["initial_state"].grad.eq(0).all()


@pytest.mark.parametrize("backend", NAMES)
def test_two_halves_with_the_state_between_equal_the_whole(backend: str) -> None:
    made = operands(2, 40, 3, 2)
    whole, last = selective_scan(**made, backend=backend)
    state = made.pop("initial_state")
    pieces = []
    for steps in (slice(0, 13), slice(13, 40)):
        part = {name: value[:, steps] if value.dim() == 3 else value for name, value in made.items()}
        y, state = selective_scan(**part, initial_state=state, backend=backend)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_stepping_equals_the_parallel_pass(dtype: torch.dtype) -> None:
    work = torch.promote_types(dtype, torch.float32)
    made = {name: value.to(work if name in WIDE else dtype) for name, value in operands(2, 20, 5, 3).items()}
    whole, last = selective_scan(**made)
    state = made.pop("initial_state")
    for t in range(20):
        token = {name: value[:, t] if value.dim() == 3 else value for name, value in made.items()}
        y, state = selective_scan_step(**token, state=state)
        assert y.dtype == dtype
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)


def test_keeps_a_sixteenth_of_the_states() -> None:
    kept: list[Tensor] = []
    made = {name: value.float().requires_grad_() for name, value in operands(2, 64, 8, 16).items()}

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(**made, backend="torch")
    given = {tensor.data_ptr() for tensor in made.values()}
    states = sum(tensor.numel() for tensor in kept if tensor.data_ptr() not in given)
    assert states == 2 * 64 // 16 * 8 * 16


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("delta", torch.zeros(2, 6, 3), r"delta has shape \(2, 6, 3\), and must have \(2, 5, 3\)"),
        ("B", torch.zeros(2, 5, 3), r"B has shape \(2, 5, 3\), and must have \(2, 5, 2\)"),
        ("C", torch.zeros(2, 5, 2, dtype=torch.bfloat16), "C is torch.bfloat16, and must be torch.float32"),
        ("starts", torch.zeros(2, 5), "starts is torch.float32, and must be torch.bool"),
        ("A", torch.zeros(3), r"A has shape \(3,\), and must be \(d_inner, d_state\)"),
        ("backend", "cuda", "no back end 'cuda': choose auto or one of torch, reference"),
    ],
)
def test_bad_input_is_one_line(name: str, value: object, words: str) -> None:
    made: dict[str, object] = {key: tensor.float() for key, tensor in operands(2, 5, 3, 2).items()}
    made[name] = value
    with pytest.raises(UserError, match=words) as caught:
        selective_scan(**made)
    assert "\n" not in str(caught.value)
