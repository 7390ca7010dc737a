"""Opaque kernels as operators of torch: schema, fake, gradient, and what a profiler calls them."""

import re
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_mamba import kernels
from moe_mamba.errors import UserError
from moe_mamba.kernels import operators, requirements
from moe_mamba.kernels.backends import BACKENDS
from tests.kernels import stand_ins

BATCH, LENGTH, CHANNELS, STATES, WIDTH = 2, 5, 6, 4, 4
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
needs_triton = pytest.mark.skipif(
    requirements.triton() is not None or torch.cuda.is_available(), reason="Triton's interpreter is not asked for"
)
needs_cpp = pytest.mark.skipif(requirements.cpu() is not None, reason="no C++ compiler")
BACKEND_MARKS = {"cpu": [needs_cpp], "triton": [needs_triton]}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins.install(monkeypatch)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def starts() -> Tensor:
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    mask[0, 3] = mask[1, 0] = True
    return mask


def scan_arguments(is_full: bool) -> list[Any]:
    """Full: with every optional tensor; x and z halves of one projection, as in the mixer."""
    projected = leaf(BATCH, LENGTH, 2 * CHANNELS)
    x, z = projected.chunk(2, -1)
    state = leaf(BATCH, STATES, CHANNELS).transpose(1, 2)
    A = -leaf(CHANNELS, STATES).exp()
    operands = [x, leaf(BATCH, LENGTH, CHANNELS), A, leaf(BATCH, LENGTH, STATES), leaf(BATCH, LENGTH, STATES)]
    operands = [one.detach().requires_grad_() for one in (*operands, leaf(CHANNELS))]
    if not is_full:
        return [*operands, None, None, None, None, True]
    optional = [one.detach().requires_grad_() for one in (z, leaf(CHANNELS))]
    return [*operands, *optional, starts(), state.detach().requires_grad_(), True]


def conv_arguments(is_full: bool) -> list[Any]:
    x = leaf(BATCH, LENGTH, 2 * CHANNELS)[..., :CHANNELS].detach().requires_grad_()
    return [x, leaf(CHANNELS, WIDTH), leaf(CHANNELS), starts() if is_full else None, leaf(BATCH, WIDTH - 1, CHANNELS)]


def scan_step_arguments(is_full: bool) -> list[Any]:
    x, delta, A, B, C, D = (
        torch.randn(shape)
        for shape in (
            (BATCH, CHANNELS),
            (BATCH, CHANNELS),
            (CHANNELS, STATES),
            (BATCH, STATES),
            (BATCH, STATES),
            (CHANNELS,),
        )
    )
    state = torch.randn(BATCH, STATES, CHANNELS).transpose(1, 2)
    return [x, delta, -A.exp(), B, C, D, *([x, D] if is_full else [None, None]), state]


def conv_step_arguments(is_full: bool) -> list[Any]:
    window = torch.randn(BATCH, WIDTH, CHANNELS)
    return [window[:, 0], torch.randn(CHANNELS, WIDTH), torch.randn(CHANNELS), window[:, 1:]]


def order(is_full: bool) -> kernels.Order:
    return kernels.sort_by_expert(torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1]]), 3, 2 if is_full else None)


def combine_arguments(is_full: bool) -> list[Any]:
    made = order(is_full)
    return [leaf(len(made.token), CHANNELS), torch.rand(len(made.token), requires_grad=True), made.token, made.slot]


def grouped_arguments(is_full: bool) -> list[Any]:
    return [leaf(6, 3), leaf(4, 3, 5), torch.tensor([2, 0, 3, 1])]


def linear_arguments(is_full: bool) -> list[Any]:
    return [leaf(6, 3), leaf(5, 3)]


def in_bf16(arguments: list[Any]) -> list[Any]:
    return [
        one.detach().bfloat16() if isinstance(one, Tensor) and one.is_floating_point() else one for one in arguments
    ]


def to_train(arguments: list[Any]) -> list[Any]:
    return [one.requires_grad_() if isinstance(one, Tensor) else one for one in arguments]


def norm_arguments(is_full: bool) -> list[Any]:
    return [leaf(5, CHANNELS), leaf(CHANNELS), 1e-5, leaf(5, CHANNELS) if is_full else None]


def logits_arguments(is_full: bool) -> list[Any]:
    return [torch.randn(5, 7), torch.tensor([0, 6, -100, 3, 9])]


def in_place_arguments(is_full: bool) -> list[Any]:
    local = torch.tensor([0, 6, 3, 3, 9])
    return [torch.randn(5, 7), local, torch.tensor([True, True, False, True, True]), *torch.empty(3, 5)]


# Operator without its back end -> its back ends, and its arguments, with every optional one and without them.
FORWARD: dict[str, tuple[tuple[str, ...], Callable[[bool], list[Any]]]] = {
    "selective_scan": (("cpu", "torch", "triton"), scan_arguments),
    "selective_scan_step": (("cpu", "triton"), scan_step_arguments),
    "causal_conv": (("cpu", "torch", "triton", "vendor"), conv_arguments),
    "causal_conv_step": (("cpu", "triton"), conv_step_arguments),
    "grouped_matmul": (("torch", "cpu_trained"), grouped_arguments),
    "linear": (("torch", "cpu_widened"), linear_arguments),
    "activation": (("triton",), lambda is_full: [leaf(3, 8), "swiglu" if is_full else "gelu"]),
    "rms_norm": (("torch", "triton"), norm_arguments),
    "sort_by_expert": (("triton",), lambda is_full: [torch.tensor([[0, 2], [1, 0]]), 3, 1 if is_full else None]),
    "gather_rows": (
        ("torch", "triton"),
        lambda is_full: [leaf(4, CHANNELS), order(is_full).token, order(is_full).slot],
    ),
    "combine_rows": (("torch", "triton"), combine_arguments),
    "cross_entropy": (("torch", "cpu", "triton"), logits_arguments),
}
# In bf16 and without gradients, as in generation.
NARROW = {"linear": linear_arguments, "grouped_matmul": grouped_arguments, "rms_norm": norm_arguments}
VENDOR_SCAN = ("selective_scan_vendor", lambda is_full: scan_arguments(is_full)[:8])
CASES = [
    pytest.param(f"{name}_{backend}", make, id=f"{name}_{backend}", marks=BACKEND_MARKS.get(backend, []))
    for name, (backends, make) in FORWARD.items()
    for backend in backends
]
CASES += [
    pytest.param(f"{name}_cpu", lambda is_full, make=make: in_bf16(make(is_full)), id=f"{name}_cpu", marks=needs_cpp)
    for name, make in NARROW.items()
]
CASES += [
    pytest.param("rms_norm_cpu_trained", lambda is_full: to_train(in_bf16(norm_arguments(is_full))), marks=needs_cpp),
    pytest.param("grouped_matmul_torch_by_group", lambda is_full: [one.detach() for one in grouped_arguments(True)]),
    pytest.param("widened_product", lambda is_full: in_bf16([leaf(6, 3), leaf(3, 5), leaf(6, 5)]), marks=needs_cpp),
    pytest.param("cross_entropy_cpu_in_place", in_place_arguments, marks=needs_cpp),
    pytest.param(*VENDOR_SCAN, id="selective_scan_vendor"),
]


def load() -> None:
    for table in BACKENDS.values():
        for name, backend in table.items():
            if name != "triton" or requirements.triton() is None:
                import_module(f"moe_mamba.kernels.{backend.module}")


load()


def defined() -> Iterator[str]:
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace == operators.NAMESPACE:
            yield name


def operator(name: str) -> Any:
    return getattr(torch.ops.moe_mamba, name).default


def outputs_of(run: Callable[..., Any], arguments: list[Any]) -> list[Tensor]:
    made = run(*arguments)
    return [made] if isinstance(made, Tensor) else list(made)


def test_every_operator_is_tested_here() -> None:
    tested = {case.values[0] for case in CASES}
    assert {re.sub(r"_backward(_x|_weight)?$", "", name) for name in defined()} <= tested


@pytest.mark.parametrize("is_full", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "make"), CASES)
def test_torch_finds_no_fault_with_it(name: str, make: Callable[[bool], list[Any]], is_full: bool) -> None:
    """Its fake gives the outputs' shapes, dtypes and strides; it returns no alias; it traces, with its gradient."""
    utilities = UTILITIES[:-1] if name == "selective_scan_vendor" else UTILITIES  # whose final state has no gradient
    torch.library.opcheck(operator(name), tuple(make(is_full)), test_utils=utilities)


def float_inputs(arguments: list[Any]) -> list[Tensor]:
    return [one for one in arguments if isinstance(one, Tensor) and one.requires_grad]


DIFFERENTIABLE = [case for case in CASES if float_inputs(case.values[1](True))]


@pytest.mark.parametrize(("name", "make"), DIFFERENTIABLE)
def test_a_second_derivative_is_an_error(name: str, make: Callable[[bool], list[Any]]) -> None:
    arguments = make(True)
    first = outputs_of(operator(name), arguments)[0]
    gradients = torch.autograd.grad(first.square().sum(), float_inputs(arguments)[:1], create_graph=True)
    with pytest.raises(UserError, match=rf"^moe_mamba.{name}\.default has no second derivative: choose --run\.kernels"):
        gradients[0].square().sum().backward()


@pytest.mark.parametrize(("name", "make"), [case for case in CASES if "step" in str(case.values[0])])
def test_no_gradient_flows_through_a_step(name: str, make: Callable[[bool], list[Any]]) -> None:
    outputs = outputs_of(operator(name), [one.requires_grad_() for one in make(True)])
    assert not any(one.requires_grad for one in outputs)


@pytest.mark.parametrize(("name", "make"), DIFFERENTIABLE)
def test_gradients_have_the_layout_of_their_fakes(name: str, make: Callable[[bool], list[Any]]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = make(True)
    real = gradients_of(name, arguments)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(one) if isinstance(one, Tensor) else one for one in arguments]
        fake = gradients_of(name, fakes)
    assert [(one.shape, one.dtype, one.stride()) for one in real] == [
        (one.shape, one.dtype, one.stride()) for one in fake
    ]


def gradients_of(name: str, arguments: list[Any]) -> tuple[Tensor, ...]:
    first = outputs_of(operator(name), arguments)[0]
    return torch.autograd.grad(first, float_inputs(arguments), torch.ones_like(first), allow_unused=False)


def test_a_profiler_shows_every_operation() -> None:
    """Operators, and the functions of back ends that are plain torch."""
    x, weight = leaf(4, 8), torch.ones(8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kernels.rms_norm(x, weight, 1e-5, backend="torch")
        kernels.activation(x, "gelu", backend="torch")
        kernels.selective_scan(*scan_arguments(True)[:10], backend="torch")[0].sum().backward()
    names = {event.name for event in profile.events()}
    assert names >= {f"moe_mamba::{name}" for name in ("rms_norm", "activation", "selective_scan")}
    assert names >= {"moe_mamba::selective_scan_torch", "moe_mamba::selective_scan_torch_backward"}
