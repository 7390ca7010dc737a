"""The vendors' kernels behind our signatures: against stand-ins without a GPU, against the real ones with one."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_mamba.errors import UserError
from moe_mamba.kernels import requirements
from moe_mamba.kernels.causal_conv import reference as conv_reference
from moe_mamba.kernels.causal_conv import vendor_conv
from moe_mamba.kernels.selective_scan import reference as scan_reference
from moe_mamba.kernels.selective_scan import vendor_scan
from moe_mamba.kernels.selective_scan.operands import Operands
from tests.kernels import stand_ins

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
WIDE = ("A", "D", "delta_bias")

on_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture
def vendor(device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins on a CPU; on a GPU the real packages, where they are installed."""
    if device == "cpu":
        stand_ins.install(monkeypatch)
        return
    reason = requirements.mamba_ssm() if "scan" in request.node.name else requirements.causal_conv1d()
    if reason:
        pytest.skip(reason)


def scan_operands(gated: bool) -> dict[str, Tensor | None]:
    batch, length, d_inner, d_state = 2, 11, 6, 4
    projected = torch.randn(batch, length, 2 * d_inner)
    narrow = torch.randn(batch, length, 2 * d_state)
    return {
        "x": projected[..., :d_inner],
        "delta": torch.randn(batch, length, d_inner),
        "A": -4 * torch.rand(d_inner, d_state) - 0.1,
        "B": narrow[..., :d_state],
        "C": narrow[..., d_state:],
        "D": torch.randn(d_inner),
        "z": projected[..., d_inner:] if gated else None,
        "delta_bias": torch.randn(d_inner) if gated else None,
        "document_starts": None,
        "initial_state": None,
    }


def conv_operands(channels: int, width: int, started: bool) -> dict[str, Tensor | None]:
    batch, length = 3, 13
    document_starts = torch.rand(batch, length) < 0.3
    document_starts[0, 0], document_starts[1, 0] = True, False
    return {
        "x": torch.randn(batch, length, 2 * channels)[..., channels:],
        "weight": torch.randn(channels, width),
        "bias": torch.randn(channels),
        "document_starts": document_starts if started else None,
        "initial_state": torch.randn(batch, width - 1, channels),
    }


def their_scan(**operands: Any) -> tuple[Tensor, Tensor]:
    return vendor_scan.selective_scan(Operands(**operands))


def reference_scan(**operands: Any) -> tuple[Tensor, Tensor]:
    return scan_reference.selective_scan(Operands(**operands))


def with_gradients(function, operands: dict, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """y and the gradient of every float operand."""
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {}
    for name, value in operands.items():
        if value is not None and value.is_floating_point():
            value = value.detach().to(device, wide if name in WIDE else dtype).requires_grad_()
        inputs[name] = value if value is None else value.to(device)
    y = function(**inputs)
    y = y[0] if isinstance(y, tuple) else y
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    leaves = {name: value for name, value in inputs.items() if value is not None and value.requires_grad}
    gradients = torch.autograd.grad(y, list(leaves.values()), weight)
    return {"y": y} | {f"gradient of {name}": one for name, one in zip(leaves, gradients, strict=True)}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert (actual[name].double().cpu() - value).norm() <= tolerance * value.norm(), name


@on_device
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [True, False])
def test_scan(gated: bool, dtype: torch.dtype, device: str, vendor: None) -> None:
    operands = scan_operands(gated)
    rounded = {name: value if value is None or name in WIDE else value.to(dtype) for name, value in operands.items()}
    expected = with_gradients(reference_scan, rounded, torch.float64, "cpu")
    actual = with_gradients(their_scan, rounded, dtype, device)
    assert_close(actual, expected, TOLERANCE[dtype])


@on_device
def test_scan_gives_the_final_state(device: str, vendor: None) -> None:
    operands = {name: value if value is None else value.to(device) for name, value in scan_operands(True).items()}
    _, expected = reference_scan(**operands)
    _, final_state = their_scan(**operands)
    assert final_state.dtype == torch.float32
    torch.testing.assert_close(final_state, expected, rtol=1e-5, atol=1e-5)


@on_device
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(("channels", "width"), [(16, 4), (8, 2), (5, 3)])
def test_conv(channels: int, width: int, started: bool, dtype: torch.dtype, device: str, vendor: None) -> None:
    operands = conv_operands(channels, width, started)
    rounded = {
        name: value if value is None or not value.is_floating_point() else value.to(dtype)
        for name, value in operands.items()
    }
    expected = with_gradients(conv_reference.causal_conv, rounded, torch.float64, "cpu")
    actual = with_gradients(vendor_conv.causal_conv, rounded, dtype, device)
    assert_close(actual, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "x", [torch.randn(2, 1, 8), torch.randn(2, 8, 5).transpose(1, 2), torch.randn(1, 5, 9)[..., 1:]]
)
def test_conv_takes_any_strides(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)
    operands = conv_operands(8, 4, started=False) | {"x": x, "initial_state": torch.randn(len(x), 3, 8)}
    expected = conv_reference.causal_conv(**operands)
    torch.testing.assert_close(vendor_conv.causal_conv(**operands), expected)


@pytest.mark.parametrize(
    ("name", "value"), [("document_starts", torch.zeros(2, 11).bool()), ("initial_state", torch.zeros(2, 6, 4))]
)
def test_scan_refuses_what_it_cannot_do(name: str, value: Tensor) -> None:
    with pytest.raises(UserError, match=f"^selective_scan: .* does not take {name}: choose --run.kernels=auto$"):
        their_scan(**scan_operands(True) | {name: value})


def test_scan_refuses_the_gradient_of_the_final_state(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)
    operands = scan_operands(True)
    y, final_state = their_scan(**operands | {"x": operands["x"].clone().requires_grad_()})
    y.sum().backward(retain_graph=True)
    with pytest.raises(UserError, match=r"no gradient of the final state: choose --run\.kernels=auto$"):
        final_state.sum().backward()


def test_scan_refuses_to_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(UserError, match="vary from run to run"):
        their_scan(**scan_operands(True))


@pytest.mark.parametrize("width", [1, 5])
def test_conv_refuses_a_width(width: int) -> None:
    with pytest.raises(UserError, match=f"takes a weight of width 2 to 4, not {width}: "):
        vendor_conv.causal_conv(**conv_operands(8, width, started=False))


def test_a_package_that_does_not_load_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="mamba-ssm is installed but does not load"):
        their_scan(**scan_operands(True))
    with pytest.raises(UserError, match="causal-conv1d is installed but does not load"):
        vendor_conv.causal_conv(**conv_operands(8, 4, started=False))
