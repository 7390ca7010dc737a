"""The C++ steps of generation: shapes, layouts and dtypes that they treat apart, and the same bits from any threads."""

import math

import pytest
import torch
from torch import Tensor

from moe_mamba.kernels import causal_conv_step, requirements, selective_scan_step

pytestmark = pytest.mark.skipif(requirements.cpu() is not None, reason=f"{requirements.cpu()}")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
WIDE = ("A", "D", "delta_bias", "state")  # fp32 beside 16-bit inputs
Operands = dict[str, Tensor]
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def scan_operands(batch: int, d_inner: int, d_state: int) -> Operands:
    shapes = {name: (batch, d_inner) for name in ("x", "delta", "z")}
    shapes |= {"B": (batch, d_state), "C": (batch, d_state), "D": (d_inner,), "delta_bias": (d_inner,)}
    made = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    made["A"] = -4 * torch.rand(d_inner, d_state, dtype=torch.float64) - 0.1
    return made | {"state": torch.randn(batch, d_inner, d_state, dtype=torch.float64)}


def conv_operands(batch: int, channels: int, width: int) -> Operands:
    shapes = {"x": (batch, channels), "weight": (channels, width), "bias": (channels,)}
    shapes |= {"state": (batch, width - 1, channels)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def typed(made: Operands, dtype: torch.dtype) -> Operands:
    """Rounded to the dtype; what is wide is computed in fp32 at least."""
    wide = torch.promote_types(dtype, torch.float32)
    return {name: value.to(wide if name in WIDE and "A" in made else dtype) for name, value in made.items()}


def exact(made: Operands) -> Operands:
    return {name: value.double() for name, value in made.items()}


def assert_close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    for value, other in zip(actual, expected, strict=True):
        error = (value.double() - other).norm()
        assert error <= tolerance * max(other.norm(), 1e-3), error / other.norm()


@every_dtype
@pytest.mark.parametrize(
    ("batch", "d_inner", "d_state"), [(1, 1, 1), (2, 16, 3), (17, 33, 16), (3, 300, 5), (33, 520, 2)]
)
def test_the_scan_equals_torch(batch: int, d_inner: int, d_state: int, dtype: torch.dtype) -> None:
    made = typed(scan_operands(batch, d_inner, d_state), dtype)
    for optional in (True, False):
        given: dict = made if optional else made | {"z": None, "delta_bias": None}
        expected = selective_scan_step(
            **{key: value if value is None else value.double() for key, value in given.items()}, backend="torch"
        )
        kept = made["state"].clone()
        actual = selective_scan_step(**given, backend="cpu")
        assert actual[0].dtype == dtype and actual[1].dtype == made["state"].dtype
        assert_close(actual, expected, TOLERANCE[dtype])
        assert torch.equal(made["state"], kept)
    turned = made["state"].transpose(1, 2).contiguous().transpose(1, 2)  # channels innermost, as the scan leaves it
    again = selective_scan_step(**made | {"state": turned}, backend="cpu")
    assert all(map(torch.equal, again, selective_scan_step(**made, backend="cpu")))


@every_dtype
@pytest.mark.parametrize("width", [1, 2, 4, 7])
@pytest.mark.parametrize(("batch", "channels"), [(1, 1), (3, 17), (17, 300)])
def test_the_convolution_equals_torch(batch: int, channels: int, width: int, dtype: torch.dtype) -> None:
    made = typed(conv_operands(batch, channels, width), dtype)
    y, state = causal_conv_step(**made, backend="cpu")
    expected = causal_conv_step(**exact(made), backend="torch")
    assert y.dtype == state.dtype == dtype
    assert_close((y, state), expected, TOLERANCE[dtype])
    assert torch.equal(state.double(), expected[1])


def test_strided_operands_are_read_in_place_and_others_copied() -> None:
    scan, conv = scan_operands(3, 24, 4), conv_operands(3, 24, 4)
    both = torch.cat((scan["x"], scan["z"]), 1)  # as the input projection gives them
    three = torch.cat((scan["delta"], scan["B"], scan["C"]), 1)
    views = {"x": both[:, :24], "z": both[:, 24:], "delta": three[:, :24], "B": three[:, 24:28], "C": three[:, 28:]}
    views |= {"B": views["B"].clone()[:1].expand(3, 4)}  # one row for all: without selection
    expected = selective_scan_step(**scan | {"B": views["B"].clone()}, backend="torch")
    assert_close(selective_scan_step(**scan | views, backend="cpu"), expected, 1e-12)
    columns = {name: value.t().contiguous().t() for name, value in scan.items() if value.dim() == 2} | {"B": views["B"]}
    assert_close(selective_scan_step(**scan | columns, backend="cpu"), expected, 1e-12)
    window = torch.cat((conv["state"], conv["state"]), 1)[:, :3]  # a view of more
    turned = {"x": both[:, :24], "state": window, "weight": conv["weight"].t().contiguous().t()}
    made = conv | {"x": scan["x"]}
    assert_close(causal_conv_step(**made | turned, backend="cpu"), causal_conv_step(**made, backend="torch"), 1e-12)


def test_threads_do_not_change_a_bit() -> None:
    scan = typed(scan_operands(70, 600, 16), torch.float32)
    conv = typed(conv_operands(300, 600, 4), torch.float32)
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append((*selective_scan_step(**scan, backend="cpu"), *causal_conv_step(**conv, backend="cpu")))
    torch.set_num_threads(before)
    assert all(torch.equal(value, other[i]) for other in found[1:] for i, value in enumerate(found[0]))


@pytest.mark.parametrize("name", ["x", "delta", "z", "B", "C", "state"])
def test_nan_is_where_torch_has_it(name: str) -> None:
    made = typed(scan_operands(3, 18, 5), torch.float32)
    made[name][1, 2] = math.nan
    actual, expected = (selective_scan_step(**made, backend=backend) for backend in ("cpu", "torch"))
    assert all(torch.equal(value.isnan(), other.isnan()) for value, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 30.0, 1e30])
def test_weak_and_strong_decay(scale: float) -> None:
    made = typed(scan_operands(3, 18, 5), torch.float32)
    made["A"] = scale * made["A"]
    assert_close(selective_scan_step(**made, backend="cpu"), selective_scan_step(**exact(made), backend="torch"), 1e-5)
