"""The check's section ``kernels``: every back end on the device against the float64 reference, values and gradients.

The tests compare at small ragged shapes; here the sizes are a model's, with lengths and rows that fill no block.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moe_mamba.command_line import run_command
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.kernels import causal_conv, causal_conv_step, grouped_matmul, selective_scan, selective_scan_step
from moe_mamba.kernels.activation import activation
from moe_mamba.kernels.backends import BACKENDS
from moe_mamba.kernels.cross_entropy import IGNORED, cross_entropy, cross_entropy_with_gradient
from moe_mamba.kernels.rms_norm import rms_norm
from moe_mamba.kernels.routing import combine_rows, gather_rows, sort_by_expert

ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
ALLOWED_PRODUCTS = {torch.float32: 1e-3}  # cuBLAS may sum in another order, or in TF32
WIDE = (
    "A",
    "D",
    "delta_bias",
    "initial_state of the scan",
    "state of the scan",
    "weight of the norm",
    "weight of the rows",
)  # fp32 beside bf16 inputs

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An operation on given operands, the float ones differentiable where the operation has gradients.

    ``call`` takes the operands and a back end.
    """

    operation: str
    what: str
    operands: Named
    call: Callable[[Named, str], Tensor | tuple[Tensor, ...]]
    has_gradients: bool = True


@dataclass(frozen=True)
class Compared:
    """How far a back end is from the reference: the largest relative norm of the error, and of what.

    ``refused`` is the user's error with which it does not take such operands, ``broken`` an exception.
    """

    operation: str
    backend: str
    dtype: str
    error: float
    of: str
    allowed: float
    refused: str = ""
    broken: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error, if there is one, is small."""
        return not self.broken and (bool(self.refused) or self.error <= self.allowed)


def main(output: str, device: str = "cuda", tiny: bool = False) -> None:
    """Compare, and write the errors down.

    Args:
        output: JSON file.
        device: where to compute.
        tiny: sizes for a CPU and Triton's interpreter.
    """
    torch.manual_seed(0)
    rows = [row for case in cases(tiny) for row in compare(case, device)]
    content = {"rows": [asdict(row) | {"passed": row.passed} for row in rows]}
    Path(output).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    wrong = [row for row in rows if not row.passed]
    for row in wrong:
        fault = row.broken or f"{row.of} is off by {row.error:.1e}"
        print(f"{row.operation}, {row.backend}, {row.dtype}: {fault}", file=sys.stderr)
    if wrong:
        raise RunStopped(f"{len(wrong)} of {len(rows)} comparisons failed")


def cases(tiny: bool) -> Iterator[Case]:
    """Operands in float64 on the CPU."""
    batch, length, d_inner, d_state = (2, 5, 6, 4) if tiny else (3, 517, 1536, 16)
    document_starts = torch.rand(batch, length) < 3 / length
    for what in ("plain", "with resets and a state"):
        scan = _scan(batch, length, d_inner, d_state)
        conv = {
            "x": _normal(batch, length, 2 * d_inner)[..., :d_inner],
            "weight": _normal(d_inner, 4),
            "bias": _normal(d_inner),
        }
        if what != "plain":
            scan |= {"document_starts": document_starts, "initial_state of the scan": _normal(batch, d_inner, d_state)}
            conv |= {"document_starts": document_starts, "initial_state": _normal(batch, 3, d_inner)}
        yield Case("selective_scan", what, scan, _call_scan)
        yield Case("causal_conv", what, conv, lambda named, backend: causal_conv(**named, backend=backend))
    yield from _steps(batch, d_inner, d_state)
    groups, rows, width = (3, 8, 16) if tiny else (32, 8192 + 40, 512)
    yield from _grouped(groups, rows, width)
    normed = {"x": _normal(rows, width), "weight of the norm": _normal(width), "residual": _normal(rows, width)}
    yield Case("rms_norm", "with a residual", normed, _call_norm)
    for kind in ("swiglu", "gelu", "squared_relu"):
        hidden = {"hidden": _normal(rows, 2 * width)}
        yield Case("activation", kind, hidden, partial(_call_activation, kind))
    yield from _routing(rows, width, groups)
    tokens, vocabulary = (4, 11) if tiny else (1031, 50257)
    targets = torch.randint(vocabulary, (tokens,))
    targets[1] = IGNORED
    logits = {"logits": 4 * _normal(tokens, vocabulary), "targets": targets}
    yield Case("cross_entropy", "one target ignored", logits, _call_cross_entropy)
    at_once = "cross_entropy_with_gradient"
    yield Case(at_once, "one target ignored", logits, _call_cross_entropy_with_gradient, has_gradients=False)


def _steps(batch: int, d_inner: int, d_state: int) -> Iterator[Case]:
    """A token of each sequence, as in generation."""
    token = {
        name: value[:, 0] if value.dim() == 3 else value for name, value in _scan(batch, 1, d_inner, d_state).items()
    }
    scan = token | {"state of the scan": _normal(batch, d_inner, d_state)}
    yield Case("selective_scan_step", "a token", scan, _call_scan_step, has_gradients=False)
    conv = {
        "x": _normal(batch, 2 * d_inner)[:, :d_inner],
        "weight": _normal(d_inner, 4),
        "bias": _normal(d_inner),
        "state": _normal(batch, 3, d_inner),
    }
    yield Case("causal_conv_step", "a token", conv, _call_conv_step, has_gradients=False)


def _grouped(groups: int, rows: int, width: int) -> Iterator[Case]:
    """Groups of any height, and groups that are filled up to a capacity."""
    weight = _normal(groups, width, 3 * width) / width**0.5
    counts = torch.bincount(torch.randint(groups, (rows,)), minlength=groups)
    uneven = {"x": _normal(rows, width), "weight": weight, "counts": counts}
    yield Case("grouped_matmul", "uneven", uneven, partial(_call_grouped, None))
    capacity = rows // groups
    even = {"x": _normal(groups * capacity, width), "weight": weight, "counts": torch.full((groups,), capacity)}
    yield Case("grouped_matmul", "with a capacity", even, partial(_call_grouped, capacity))


def _routing(tokens: int, width: int, experts: int) -> Iterator[Case]:
    """Two experts per token, with a capacity that drops some."""
    order = sort_by_expert(torch.randint(experts, (tokens, 2)), experts, tokens // experts, backend="reference")
    places = {"token": order.token, "slot": order.slot}
    gathered = {"x": _normal(tokens, width), **places}
    yield Case("gather_rows", "two experts per token", gathered, _call_gather)
    slots = len(order.token)
    filled = torch.zeros(slots, dtype=torch.float64)
    filled[order.slot[order.slot >= 0]] = 1
    combined = {"rows": _normal(slots, width), "weight of the rows": torch.rand(slots).double() * filled, **places}
    yield Case("combine_rows", "two experts per token", combined, _call_combine)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _scan(batch: int, length: int, d_inner: int, d_state: int) -> Named:
    projected = _normal(batch, length, 2 * d_inner)
    selected = _normal(batch, length, 2 * d_state)
    return {
        "x": projected[..., :d_inner],
        "delta": _normal(batch, length, d_inner),
        "A": -torch.arange(1, d_state + 1, dtype=torch.float64).repeat(d_inner, 1),
        "B": selected[..., :d_state],
        "C": selected[..., d_state:],
        "D": _normal(d_inner),
        "z": projected[..., d_inner:],
        "delta_bias": _normal(d_inner) - 3,
    }


def _call_scan(named: Named, backend: str) -> tuple[Tensor, ...]:
    named = dict(named)
    state = named.pop("initial_state of the scan", None)
    y, final_state = selective_scan(**named, initial_state=state, backend=backend)
    # Without a state of its own, what mamba-ssm's kernel can do too: it has no gradient of the final state.
    return (y,) if state is None else (y, final_state)


def _call_scan_step(named: Named, backend: str) -> tuple[Tensor, Tensor]:
    named = dict(named)
    state = named.pop("state of the scan")
    return selective_scan_step(**named, state=state, backend=backend)


def _call_conv_step(named: Named, backend: str) -> tuple[Tensor, Tensor]:
    return causal_conv_step(**named, backend=backend)


def _call_grouped(capacity: int | None, named: Named, backend: str) -> Tensor:
    return grouped_matmul(named["x"], named["weight"], named["counts"], capacity, backend)


def _call_activation(kind: str, named: Named, backend: str) -> Tensor:
    return activation(named["hidden"], kind, backend=backend)


def _call_gather(named: Named, backend: str) -> Tensor:
    return gather_rows(named["x"], named["token"], named["slot"], backend=backend)


def _call_combine(named: Named, backend: str) -> Tensor:
    weight = named["weight of the rows"]
    return combine_rows(named["rows"], weight, named["token"], named["slot"], backend=backend)


def _call_cross_entropy(named: Named, backend: str) -> Tensor:
    return cross_entropy(named["logits"], named["targets"], backend=backend)


def _call_cross_entropy_with_gradient(named: Named, backend: str) -> tuple[Tensor, Tensor]:
    return cross_entropy_with_gradient(named["logits"].clone(), named["targets"], backend=backend)


def _call_norm(named: Named, backend: str) -> tuple[Tensor, ...]:
    return rms_norm(named["x"], named["weight of the norm"], 1e-5, named["residual"], backend=backend)


def compare(case: Case, device: str) -> Iterator[Compared]:
    """Every back end that runs on the device, in every dtype, against the reference in float64."""
    name = f"{case.operation}, {case.what}"
    for dtype in ALLOWED:
        rounded = {key: value.to(_dtype(key, value, dtype)) for key, value in case.operands.items()}
        exact = {key: value.to(_dtype(key, value, torch.float64)).to(device) for key, value in rounded.items()}
        expected = results(case, exact, "reference")
        allowed = ALLOWED[dtype]
        if case.operation == "grouped_matmul":
            allowed = ALLOWED_PRODUCTS.get(dtype, allowed)
        for backend, entry in BACKENDS[case.operation].items():
            if backend == "reference" or not entry.takes(device, dtype) or entry.missing():
                continue
            label = str(dtype).removeprefix("torch.")
            try:
                actual = results(case, {key: value.to(device) for key, value in rounded.items()}, backend)
            except UserError as error:
                yield Compared(name, backend, label, 0.0, "", allowed, refused=str(error))
                continue
            except Exception as error:  # whatever a broken kernel raises: the others are to be compared too
                yield Compared(name, backend, label, 0.0, "", allowed, broken=f"{type(error).__name__}: {error}")
                continue
            errors = {key: _error(actual[key], value) for key, value in expected.items()}
            worst = max(errors, key=lambda key: errors[key])
            yield Compared(name, backend, label, errors[worst], worst, allowed)


def _dtype(name: str, value: Tensor, dtype: torch.dtype) -> torch.dtype:
    if not value.is_floating_point():
        return value.dtype
    return torch.promote_types(dtype, torch.float32) if name in WIDE else dtype


def results(case: Case, operands: Named, backend: str) -> Named:
    """The outputs and, where there are any, every float operand's gradient for the same weights of the outputs."""
    leaves = {
        name: value.detach().requires_grad_() if value.is_floating_point() else value
        for name, value in operands.items()
    }
    outputs = case.call(leaves, backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {f"output {place}": value.detach() for place, value in enumerate(outputs)}
    if not case.has_gradients:
        return named
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(one.shape, generator=generator).to(one.device, one.dtype) for one in outputs]
    floats = {name: value for name, value in leaves.items() if value.requires_grad}
    gradients = torch.autograd.grad(outputs, list(floats.values()), weights)
    return named | {f"gradient of {name}": one for name, one in zip(floats, gradients, strict=True)}


def _error(actual: Tensor, expected: Tensor) -> float:
    """The relative norm; what is no finite number counts as wholly wrong."""
    error = float((actual.double() - expected).norm() / expected.norm())
    return error if math.isfinite(error) else 1e9


if __name__ == "__main__":
    run_command(main)
