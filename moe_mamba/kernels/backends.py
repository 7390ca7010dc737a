"""The one table of back ends: which implementation of an operation runs on which device, dtype and shape."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from moe_mamba.errors import UserError
from moe_mamba.kernels import requirements
from moe_mamba.kernels.stand_in import stand_in_for

NAMES = ("reference", "torch", "cpu", "triton", "vendor")
"""What a back end may be called; ``auto`` picks one."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDE = (*FLOATS, torch.float64)


SIZES = {
    "selective_scan": "d_state",
    "selective_scan_step": "d_state",
    "causal_conv": "width",
    "causal_conv_step": "width",
    "rms_norm": "d",
}
"""Operation -> the size of its arguments that back ends may limit."""


@dataclass(frozen=True)
class Backend:
    """One implementation: where it lies and what it takes.

    Attributes:
        module: below ``moe_mamba.kernels``.
        function: in the module.
        dtypes: of the first argument.
        device: type of the device it computes on; None: every one.
        sizes: smallest and largest of what ``SIZES`` names; None: any.
        missing: gives the reason why this machine cannot run it, and the fix; None: it can.
        gain: what is lost without it, where that is worth a warning.
        automatic: dtypes for which ``auto`` may pick it; None: all of them.
    """

    module: str
    function: str
    dtypes: tuple[torch.dtype, ...]
    device: str | None = None
    sizes: tuple[int, int] | None = None
    missing: Callable[[], str | None] = lambda: None
    gain: str = ""
    automatic: tuple[torch.dtype, ...] | None = None

    def takes(self, device: str, dtype: torch.dtype) -> bool:
        """Whether it computes on such tensors, if their sizes suit it."""
        stands_in = is_interpreted() or stand_in_for(device) is not None
        is_here = self.device in (None, device) or (self.device == "cuda" and stands_in)
        return is_here and dtype in self.dtypes

    def fits(self, size: int) -> bool:
        """Whether the size is within its limits."""
        return self.sizes is None or self.sizes[0] <= size <= self.sizes[1]

    def why_missing(self, device: str) -> str | None:
        """Why it cannot run on devices of this type, and the fix; None: it can."""
        stand_in = stand_in_for(device)
        if stand_in is not None and self.missing is requirements.triton:
            return requirements.generation(stand_in.capability)
        return self.missing()

    def load(self) -> Callable[..., Any]:
        """The function itself; imports what it needs."""
        return getattr(import_module(f"moe_mamba.kernels.{self.module}"), self.function)


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton(folder: str, function: str, sizes: tuple[int, int] | None = None, gain: str = "") -> Backend:
    return Backend(f"{folder}.triton_{folder}", function, FLOATS, "cuda", sizes, requirements.triton, gain)


def _cpu(folder: str, module: str, function: str, sizes: tuple[int, int] | None = None, gain: str = "") -> Backend:
    return Backend(f"{folder}.{module}", function, WIDE, "cpu", sizes, requirements.cpu, gain)


def _narrow(folder: str, module: str, function: str) -> Backend:
    """C++ for bf16; what else is asked of it torch does."""
    taken, own = FLOATS if folder == "grouped_matmul" else WIDE, (torch.bfloat16,)
    return Backend(f"{folder}.{module}", function, taken, "cpu", missing=requirements.cpu, automatic=own)


def _vendor(folder: str, module: str, sizes: tuple[int, int], missing: Callable[[], str | None]) -> Backend:
    return Backend(f"{folder}.{module}", folder, FLOATS, "cuda", sizes, missing, automatic=())


STATES, WIDTHS, ROW = (1, 256), (2, 4), (1, 16_384)  # that kernels keep in registers
SLOW_SCAN = "without it the scan is a loop over time, many times slower"
SLOW_CONV = "without it the convolution takes several passes over memory"
SLOW_CPU_SCAN = "without it the scan takes three times as long"

# Operation -> name -> back end; the first that takes the tensors is what "auto" means.
BACKENDS: dict[str, dict[str, Backend]] = {
    "selective_scan": {
        "triton": _triton("selective_scan", "selective_scan", STATES, SLOW_SCAN),
        "cpu": _cpu("selective_scan", "cpu_scan", "selective_scan", gain=SLOW_CPU_SCAN),
        "torch": Backend("selective_scan.torch_scan", "selective_scan", WIDE),
        "reference": Backend("selective_scan.reference", "selective_scan", WIDE),
        "vendor": _vendor("selective_scan", "vendor_scan", STATES, requirements.mamba_ssm),
    },
    "selective_scan_step": {
        "triton": _triton("selective_scan", "selective_scan_step", STATES),
        "cpu": _cpu("selective_scan", "cpu_step", "selective_scan_step"),
        "torch": Backend("selective_scan.torch_scan", "selective_scan_step", WIDE),
    },
    "causal_conv": {
        "triton": _triton("causal_conv", "causal_conv", WIDTHS, SLOW_CONV),
        "cpu": _cpu("causal_conv", "cpu_conv", "causal_conv", (1, 4)),
        "torch": Backend("causal_conv.torch_conv", "causal_conv", WIDE),
        "reference": Backend("causal_conv.reference", "causal_conv", WIDE),
        "vendor": _vendor("causal_conv", "vendor_conv", WIDTHS, requirements.causal_conv1d),
    },
    "causal_conv_step": {
        "triton": _triton("causal_conv", "causal_conv_step", WIDTHS),
        "cpu": _cpu("causal_conv", "cpu_step", "causal_conv_step"),
        "torch": Backend("causal_conv.torch_conv", "causal_conv_step", WIDE),
    },
    "linear": {
        "cpu": _narrow("linear", "cpu_linear", "linear"),
        "torch": Backend("linear.torch_linear", "linear", WIDE),
    },
    "grouped_matmul": {
        "cpu": _narrow("grouped_matmul", "cpu_grouped", "grouped_matmul"),
        "torch": Backend("grouped_matmul.torch_grouped", "grouped_matmul", FLOATS),
        "reference": Backend("grouped_matmul.reference", "grouped_matmul", WIDE),
    },
    "sort_by_expert": {
        "triton": _triton("routing", "sort_by_expert"),
        "torch": Backend("routing.torch_routing", "sort_by_expert", WIDE),
        "reference": Backend("routing.reference", "sort_by_expert", WIDE),
    },
    "gather_rows": {
        "triton": _triton("routing", "gather_rows"),
        "torch": Backend("routing.torch_routing", "gather_rows", WIDE),
        "reference": Backend("routing.reference", "gather_rows", WIDE),
    },
    "combine_rows": {
        "triton": _triton("routing", "combine_rows"),
        "torch": Backend("routing.torch_routing", "combine_rows", WIDE),
        "reference": Backend("routing.reference", "combine_rows", WIDE),
    },
    "activation": {
        "triton": _triton("activation", "activation"),
        "torch": Backend("activation.torch_activation", "activation", WIDE),
    },
    "rms_norm": {
        "triton": _triton("rms_norm", "rms_norm", ROW, "without it the norm takes several passes over memory"),
        "cpu": _narrow("rms_norm", "cpu_rms_norm", "rms_norm"),
        "torch": Backend("rms_norm.torch_rms_norm", "rms_norm", WIDE),
        "reference": Backend("rms_norm.reference", "rms_norm", WIDE),
    },
    "cross_entropy": {
        "triton": _triton("cross_entropy", "cross_entropy"),
        "cpu": _cpu("cross_entropy", "cpu_cross_entropy", "cross_entropy"),
        "torch": Backend("cross_entropy.torch_cross_entropy", "cross_entropy", WIDE),
        "reference": Backend("cross_entropy.reference", "cross_entropy", WIDE),
    },
    "cross_entropy_with_gradient": {
        "triton": _triton("cross_entropy", "cross_entropy_with_gradient"),
        "cpu": _cpu("cross_entropy", "cpu_cross_entropy", "cross_entropy_with_gradient"),
        "torch": Backend("cross_entropy.torch_cross_entropy", "cross_entropy_with_gradient", WIDE),
        "reference": Backend("cross_entropy.reference", "cross_entropy_with_gradient", WIDE),
    },
}


_loaded = SimpleNamespace()
"""``operation_name`` -> function of the back ends that were chosen; attributes, which what traces a caller can read."""


def choose(
    operation: str, device: str, dtype: torch.dtype, forced: str = "auto", size: int = 0
) -> tuple[str, Callable[..., Any]]:
    """Name and function of the back end that runs ``operation`` on tensors of this device type, dtype and size.

    Where a faster one cannot, a warning says, once, what that costs and how to get it.

    Args:
        operation: a key of ``BACKENDS``.
        device: type of the device, such as ``cpu`` or ``cuda``.
        dtype: of the inputs.
        forced: name of a back end; an operation that has none of that name takes what ``auto`` gives it. ``auto``:
            the first of the table that takes the tensors and runs here.
        size: of what ``SIZES`` names for the operation.

    Raises:
        UserError: no such back end, or it does not compute on such tensors or on this machine.
    """
    if torch.compiler.is_compiling():
        name = _name(operation, device, dtype, forced, size)
        return name, getattr(_loaded, f"{operation}_{name}")
    name, function = find(operation, device, dtype, forced, size)
    return name, partial(_recorded, operation, function) if torch.autograd._profiler_enabled() else function


def _recorded(operation: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function under a name that the profiler shows, as it does an operator's."""
    with torch.profiler.record_function(f"moe_mamba::{operation}"):
        return function(*arguments)


def _name(operation: str, device: str, dtype: torch.dtype, forced: str, size: int) -> str:
    return find(operation, device, dtype, forced, size)[0]


# What traces a caller asks once, and goes on in the back end. All that torch.compiler.assume_constant_result does, but
# for importing the compiler, which takes a quarter of a command's start.
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def find(operation: str, device: str, dtype: torch.dtype, forced: str, size: int) -> tuple[str, Callable[..., Any]]:
    """See ``choose``, which does not search twice."""
    table = BACKENDS[operation]
    if forced not in ("auto", *NAMES):
        raise UserError(f"{operation} has no back end {forced!r}: choose auto or one of {', '.join(table)}")
    if forced in table:
        if fault := _fault(operation, forced, device, dtype, size):
            raise UserError(fault)
        return _load(operation, forced)
    for name, backend in table.items():
        # The interpreter is for who asks for it.
        is_wrong = is_interpreted() and backend.device not in (None, device) and stand_in_for(device) is None
        is_for_others = backend.automatic is not None and dtype not in backend.automatic
        if is_wrong or is_for_others or not backend.takes(device, dtype):
            continue
        fault = _fault(operation, name, device, dtype, size)
        if fault is None:
            return _load(operation, name)
        if backend.gain:
            warnings.warn(f"{fault}; {backend.gain}", stacklevel=3)
    raise UserError(f"{operation} does not take {dtype} tensors on a {device} device: use fp32 or bf16")


def _load(operation: str, name: str) -> tuple[str, Callable[..., Any]]:
    function = BACKENDS[operation][name].load()
    setattr(_loaded, f"{operation}_{name}", function)
    return name, function


def _fault(operation: str, name: str, device: str, dtype: torch.dtype, size: int) -> str | None:
    """Why a back end does not serve such tensors here, and the fix, in one line; None: it does."""
    backend = BACKENDS[operation][name]
    who = f"{operation}'s back end {name!r}"
    if not backend.takes(device, dtype):
        others = BACKENDS[operation].items()
        fitting = [
            other
            for other, one in others
            if one.takes(device, dtype) and one.fits(size) and not one.why_missing(device)
        ]
        fix = f"choose {' or '.join(fitting)}" if fitting else "use fp32 or bf16"
        return f"{who} does not take {dtype} tensors on a {device} device: {fix}"
    if backend.sizes is not None and not backend.fits(size):
        return f"{who} takes {SIZES[operation]} from {backend.sizes[0]} to {backend.sizes[1]:,}, not {size:,}"
    reason = backend.why_missing(device)
    return reason and f"{who} cannot run here: {reason}"
