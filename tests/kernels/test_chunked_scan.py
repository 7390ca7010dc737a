"""The scan in chunks equals the loop that defines it, values and all gradients."""

import pytest
import torch

from moe_mamba.kernels.selective_scan.chunked_scan import selective_scan as chunked
from moe_mamba.kernels.selective_scan.operands import Operands
from moe_mamba.kernels.selective_scan.reference import selective_scan as reference


def _operands(length: int, packed: bool, state: bool, gate: bool) -> Operands:
    torch.manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    A = (-torch.rand(4, 3, dtype=torch.float64) - 0.1).requires_grad_()
    return Operands(
        x=random(2, length, 4),
        delta=random(2, length, 4),
        A=A,
        B=random(2, length, 3),
        C=random(2, length, 3),
        D=random(4),
        z=random(2, length, 4) if gate else None,
        delta_bias=random(4) if gate else None,
        document_starts=torch.rand(2, length) < 0.3 if packed else None,
        initial_state=random(2, 4, 3) if state else None,
    )


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9, 10, 17])
@pytest.mark.parametrize(("packed", "state", "gate"), [(False, False, True), (True, True, True), (True, False, False)])
def test_values_and_gradients(length: int, packed: bool, state: bool, gate: bool) -> None:
    operands = _operands(length, packed, state, gate)
    leaves = [value for value in operands if value is not None and value.is_floating_point()]
    results = []
    for scan in (chunked, reference):
        y, last = scan(operands)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        total = (y * weights).sum() + (last**2).sum()
        results.append([y, last, *torch.autograd.grad(total, leaves, allow_unused=True)])
    for found, expected in zip(*results, strict=True):
        if expected is None:  # a state that a start at position 0 hides
            assert found is None or not found.any()
        else:
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_start_hides_what_is_not_finite() -> None:
    operands = _operands(7, False, False, True)
    x = operands.x.detach().clone()
    x[:, 2] = torch.nan
    document_starts = torch.zeros(2, 7, dtype=torch.bool)
    document_starts[:, 3] = True
    y, last = chunked(operands._replace(x=x, document_starts=document_starts))
    assert y[:, 3:].isfinite().all() and last.isfinite().all()
