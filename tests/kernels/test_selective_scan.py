"""Every back end of the scan against the float64 reference: values, all gradients, resets, states, steps."""

import math

import pytest
import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels import selective_scan, selective_scan_step
from moe_mamba.kernels.backends import BACKENDS
from moe_mamba.kernels.selective_scan import torch_scan
from tests.kernels.available import cases, device, typed_cases

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
WIDE = ("A", "D", "delta_bias", "initial_state")  # fp32 beside bf16 inputs
SHAPES = [(3, 37, 6, 4), (2, 16, 8, 3), (5, 33, 4, 2), (1, 1, 5, 2)]  # batch, length, d_inner, d_state
CASES, TYPED_CASES = cases("selective_scan"), typed_cases("selective_scan")
every_case = pytest.mark.parametrize(("backend", "on"), CASES)


def is_slow(backend: str, on: str) -> bool:
    """Triton's interpreter takes some 20 ms a time step."""
    return backend == "triton" and on == "cpu"


def widest(backend: str) -> torch.dtype:
    return torch.float64 if torch.float64 in BACKENDS["selective_scan"][backend].dtypes else torch.float32


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
    made: dict[str, Tensor], document_starts: Tensor | None, dtype: torch.dtype, backend: str, on: str = "cpu"
) -> dict[str, Tensor]:
    """y, the final state, and the gradient of every operand for fixed random weights of both, on the CPU."""
    work = torch.promote_types(dtype, torch.float32)
    inputs = {
        name: value.to(on, work if name in WIDE else dtype).detach().clone().requires_grad_()
        for name, value in made.items()
    }
    moved = None if document_starts is None else document_starts.to(on)
    y, final_state = selective_scan(**inputs, document_starts=moved, backend=backend)
    assert y.dtype == dtype and final_state.dtype == work
    generator = torch.Generator().manual_seed(1)
    y_weight, state_weight = (
        torch.randn(value.shape, generator=generator, dtype=torch.float64).to(on) for value in (y, final_state)
    )
    ((y.double() * y_weight).sum() + (final_state.double() * state_weight).sum()).backward()
    gradients = {f"gradient of {name}": value.grad.cpu() for name, value in inputs.items() if value.grad is not None}
    assert len(gradients) == len(made)
    return {"y": y.detach().cpu(), "final state": final_state.detach().cpu(), **gradients}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        error = (actual[name].double() - value).norm()
        assert error <= tolerance * max(value.norm(), 1e-3), f"{name}: {error / value.norm()}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("backend", "on", "dtype"), TYPED_CASES)
def test_equals_the_reference(backend: str, on: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if is_slow(backend, on) and shape[1] > 1:
        pytest.skip("test_triton_scan.py has shapes for the interpreter")
    for optional in (True, False):
        made = operands(*shape, optional)
        document_starts = torch.rand(shape[:2]) < 0.15 if optional else None
        expected = results(made, document_starts, torch.float64, "reference")
        assert_equal(results(made, document_starts, dtype, backend, on), expected, TOLERANCE[dtype])


def test_equals_the_reference_in_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_scan, "BLOCK", 48 / torch.get_num_threads())  # two rows at once, then one
    made = operands(5, 40, 6, 4)
    document_starts = torch.rand(5, 40) < 0.1
    expected = results(made, document_starts, torch.float64, "reference")
    assert_equal(results(made, document_starts, torch.float64, "torch"), expected, 1e-12)


@every_case
@pytest.mark.parametrize("A", [-1e-8, -4.0])
def test_small_A_and_large_delta_neither_overflow_nor_lose_the_state(backend: str, on: str, A: float) -> None:
    made = operands(1, 13, 4, 3)
    made["A"].fill_(A)
    made["delta"] = torch.where(torch.rand(made["delta"].shape) < 0.5, 60.0, -60.0).double()
    expected = results(made, None, torch.float64, "reference")
    assert all(value.isfinite().all() for value in expected.values())
    assert_equal(results(made, None, torch.float32, backend, on), expected, 1e-5)


@every_case
@pytest.mark.parametrize("name", ["x", "delta", "B", "C", "z"])
def test_nan_comes_out_exactly_where_the_reference_has_it(backend: str, on: str, name: str) -> None:
    made = operands(2, 11, 3, 2)
    made[name][0, 5, 1] = math.nan
    y, state = selective_scan(**made, backend="reference")
    given = {key: value.to(on, widest(backend)) for key, value in made.items()}
    actual_y, actual_state = selective_scan(**given, backend=backend)
    assert y.isnan().any() and torch.equal(actual_y.isnan().cpu(), y.isnan())
    assert torch.equal(actual_state.isnan().cpu(), state.isnan())


@pytest.mark.parametrize(
    "backend", [case.values[0] for case in TYPED_CASES if case.values[1:] == ("cpu", torch.float64)]
)
def test_gradcheck(backend: object) -> None:
    made = {name: value.requires_grad_() for name, value in operands(1, 18, 2, 2).items()}
    document_starts = torch.rand(1, 18) < 0.1

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(made, values, strict=True)), document_starts=document_starts, backend=backend)

    assert torch.autograd.gradcheck(scan, tuple(made.values()))


@every_case
@pytest.mark.parametrize("place", [0, 5, 15, 16, 17, 31, 32, 39])
def test_a_start_hides_everything_before_it(backend: str, on: str, place: int) -> None:
    """NaN before a start leaks neither forward nor, as a gradient, backward."""
    length = 18 if is_slow(backend, on) else 40
    if is_slow(backend, on) and place not in (0, 5, 16):
        pytest.skip("too slow in the interpreter")
    made = operands(2, length, 3, 2)
    for name in ("x", "delta", "B", "C", "z"):
        made[name][0, :place] = math.nan
    if place == 0:
        made["initial_state"][0] = math.nan
    document_starts = torch.zeros(2, length, dtype=torch.bool)
    document_starts[0, place] = True
    actual = results(made, document_starts, widest(backend), backend, on)

    after = {name: value[:, place:] if name in ("x", "delta", "B", "C", "z") else value for name, value in made.items()}
    after["initial_state"] = torch.zeros_like(made["initial_state"])
    inputs = {name: value[:1] if value.dim() == 3 else value for name, value in after.items()}
    y, final_state = selective_scan(**inputs, backend="reference")
    seen = {"y": actual["y"][:1, place:], "final state": actual["final state"][:1]}
    assert_equal(seen, {"y": y, "final state": final_state}, TOLERANCE[widest(backend)])
    for name in ("x", "delta", "B", "C", "z"):
        assert actual[f"gradient of {name}"][0, place:].isfinite().all()
        assert actual[f"gradient of {name}"][1].isfinite().all()


@every_case
def test_no_gradient_crosses_a_start(backend: str, on: str) -> None:
    length, place = (12, 5) if is_slow(backend, on) else (40, 20)
    given = operands(1, length, 3, 2)
    made = {name: value.to(on, widest(backend)).requires_grad_() for name, value in given.items()}
    document_starts = torch.zeros(1, length, dtype=torch.bool, device=on)
    document_starts[0, place] = True
    y, final_state = selective_scan(**made, document_starts=document_starts, backend=backend)
    (y[:, place:].sum() + final_state.sum()).backward()
    gradient = made["x"].grad
    assert gradient is not None and gradient[:, :place].eq(0).all() and gradient[:, place:].ne(0).all()
    assert made["initial_state"].grad is not None and made["initial_state"].grad.eq(0).all()


@every_case
def test_two_halves_with_the_state_between_equal_the_whole(backend: str, on: str) -> None:
    length = 18 if is_slow(backend, on) else 40
    made = {name: value.to(on, widest(backend)) for name, value in operands(2, length, 3, 2).items()}
    whole, last = selective_scan(**made, backend=backend)
    state = made.pop("initial_state")
    outputs = []
    for steps in (slice(0, 13), slice(13, length)):
        part = {name: value[:, steps] if value.dim() == 3 else value for name, value in made.items()}
        y, state = selective_scan(**part, initial_state=state, backend=backend)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)


@every_case
def test_two_runs_are_equal_to_the_bit(backend: str, on: str) -> None:
    batch = 1 if is_slow(backend, on) else 4
    made, document_starts = operands(batch, 5, 35, 3), torch.rand(batch, 5) < 0.2
    first, second = (results(made, document_starts, torch.float32, backend, on) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@every_case
def test_strided_and_expanded_operands(backend: str, on: str) -> None:
    """Halves of a projection, slices of another, every other channel, and a gradient that is expanded."""
    dtype = widest(backend)
    projected = torch.randn(2, 7, 10, device=on, dtype=dtype, requires_grad=True)
    narrow = torch.randn(2, 7, 9, device=on, dtype=dtype, requires_grad=True)
    delta = torch.randn(2, 7, 10, device=on, dtype=dtype)[..., ::2]
    A, D = -torch.rand(3, 5, device=on, dtype=dtype).t(), torch.randn(1, device=on, dtype=dtype).expand(5)
    gradients = {}
    for name in (backend, "reference"):
        x, z = projected.chunk(2, -1)
        y, _ = selective_scan(x, delta, A, narrow[..., 3:6], narrow[..., 6:], D, z, backend=name)
        gradients[name] = torch.autograd.grad(y.sum(), (projected, narrow))
    torch.testing.assert_close(gradients[backend], gradients["reference"])


def in_chunks(made: dict[str, Tensor], dtype: torch.dtype, backend: str, on: str, chunk: int) -> tuple[Tensor, Tensor]:
    """y and the final state on the CPU, the state handed on from chunk to chunk of the length."""
    given = {name: value.to(on, dtype) for name, value in made.items()}
    outputs, state = [], None
    for first in range(0, given["x"].shape[1], chunk):
        steps = slice(first, first + chunk)
        part = {name: value[:, steps] if value.dim() == 3 else value for name, value in given.items()}
        y, state = selective_scan(**part, initial_state=state, backend=backend)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1).cpu(), state.cpu()


@pytest.mark.parametrize("on", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("length", [50_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_states_handed_on_over_a_long_text(length: int, on: str) -> None:
    on_cpu = [str(case.values[0]) for case in CASES if case.values[1] == "cpu"]
    fast = [name for name in on_cpu if name not in ("triton", "reference")]  # which are loops in Python there
    made = operands(1, length, 2, 2, optional=False)
    made["delta"] -= 3  # memories of hundreds of tokens
    expected, last = in_chunks(made, torch.float64, "torch", "cpu", length)
    for backend in fast if on == "cpu" else ["triton"]:
        y, state = in_chunks(made, torch.float32, backend, on, 65_536 if length > 65_536 else 7_000)
        sample = torch.randint(length, (1000,))
        assert_equal({"y": y[:, sample], "state": state}, {"y": expected[:, sample], "state": last}, 1e-5)


@pytest.mark.parametrize(("backend", "on", "dtype"), typed_cases("selective_scan_step"))
def test_stepping_equals_the_parallel_pass(backend: str, on: str, dtype: torch.dtype) -> None:
    work = torch.promote_types(dtype, torch.float32)
    made = {name: value.to(on, work if name in WIDE else dtype) for name, value in operands(2, 9, 35, 3).items()}
    whole, last = selective_scan(**made, backend="torch")
    state = made.pop("initial_state")
    for t in range(9):
        token = {name: value[:, t] if value.dim() == 3 else value for name, value in made.items()}
        y, state = selective_scan_step(**token, state=state, backend=backend)
        assert y.dtype == dtype and state.dtype == work
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
        ("document_starts", torch.zeros(2, 5), "document_starts is torch.float32, and must be torch.bool"),
        ("A", torch.zeros(3), r"A has shape \(3,\), and must be \(d_inner, d_state\)"),
        ("A", torch.zeros(3, 2, dtype=torch.int64), "A is torch.int64, and must be torch.float32 like the first"),
        ("D", torch.zeros(3, device="meta"), "D is on meta, and must be on cpu like the first"),
        ("delta_bias", torch.zeros(3, dtype=torch.float64), "delta_bias is torch.float64, and must be torch.float32"),
        ("backend", "cuda", "no back end 'cuda': choose auto or one of"),
    ],
)
def test_bad_input_is_one_line(name: str, value: object, words: str) -> None:
    made: dict[str, object] = {key: tensor.float() for key, tensor in operands(2, 5, 3, 2).items()}
    made[name] = value
    with pytest.raises(UserError, match=words) as caught:
        selective_scan(**made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("B", torch.zeros(2, 3), r"selective_scan_step: B has shape \(2, 3\), and must have \(2, 2\)"),
        ("z", torch.zeros(2, 3, dtype=torch.float16), "z is torch.float16, and must be torch.float32"),
        ("state", torch.zeros(2, 3, 2, dtype=torch.float16), "state is torch.float16, and must be torch.float32"),
        ("backend", "cuda", "no back end 'cuda'"),
    ],
)
def test_bad_input_of_a_step_is_one_line(name: str, value: object, words: str) -> None:
    made = {key: tensor.float() for key, tensor in operands(2, 1, 3, 2).items()}
    state = made.pop("initial_state")
    token: dict[str, object] = {key: tensor[:, 0] if tensor.dim() == 3 else tensor for key, tensor in made.items()}
    token |= {"state": state, name: value}
    with pytest.raises(UserError, match=words):
        selective_scan_step(**token)


def test_more_states_than_a_back_end_takes_is_one_line() -> None:
    made = {key: tensor.to(device(), torch.float32) for key, tensor in operands(1, 1, 1, 257).items()}
    with pytest.raises(UserError, match="'triton' takes d_state from 1 to 256, not 257"):
        selective_scan(**made, backend="triton")


@pytest.mark.parametrize("shape", [(0, 5, 3, 2), (2, 0, 3, 2), (2, 5, 0, 2)])
def test_an_empty_input_is_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"selective_scan: x has shape \(.*\), and must not be empty"):
        selective_scan(**operands(*shape))
