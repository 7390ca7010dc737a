"""The one table of back ends: which implementation of an operation runs on which device, dtype and shape."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch

from moe_mamba.errors import UserError
from moe_mamba.kernels import requirements

NAMES = ("reference", "torch", "cpu", "triton", "vendor")
"""What a back end may be called; ``auto`` picks one."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WIDE = (*FLOATS, torch.float64)


@dataclass(frozen=True)
class Backend:
    """One implementation: where it lies and what it takes.

    Attributes:
        module: below ``moe_mamba.kernels``.
        function: in the module.
        dtypes: of the first argument.
        device: type of the device it computes on; None: every one.
        largest: of the size that the operation tells (d_state of the scan, width of the convolution); None: any.
        missing: gives the reason why this machine cannot run it, and the mend; None: it can.
        gain: what is lost without it, where that is worth a warning.
        is_automatic: whether ``auto`` may pick it.
    """

    module: str
    function: str
    dtypes: tuple[torch.dtype, ...]
    device: str | None = None
    largest: int | None = None
    missing: Callable[[], str | None] = lambda: None
    gain: str = ""
    is_automatic: bool = True

    def refuses(self, device: str, dtype: torch.dtype, size: int) -> str | None:
        """What of such tensors it does not take, in words; None: it takes them."""
        if self.device not in (None, device) and not (self.device == "cuda" and is_interpreted()):
            return f"tensors on a {device} device"
        if dtype not in self.dtypes:
            return f"{dtype} tensors"
        if self.largest is not None and size > self.largest:
            return f"a size of {size} (at most {self.largest})"
        return None

    def load(self) -> Callable[..., Any]:
        """The function itself; imports what it needs."""
        return getattr(import_module(f"moe_mamba.kernels.{self.module}"), self.function)


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton(module: str, function: str, gain: str, largest: int | None = None) -> Backend:
    return Backend(f"{module}.triton_{module}", function, FLOATS, "cuda", largest, requirements.triton, gain)


# Operation -> name -> back end; the first that takes the tensors is what "auto" means.
BACKENDS: dict[str, dict[str, Backend]] = {
    "selective_scan": {
        "triton": _triton("selective_scan", "selective_scan", "without it the scan is a loop, many times slower", 256),
        "cpu": Backend(
            "selective_scan.cpu_scan",
            "selective_scan",
            WIDE,
            "cpu",
            missing=requirements.cpu,
            gain="without it the scan takes more than twice the time",
        ),
        "torch": Backend("selective_scan.torch_scan", "selective_scan", WIDE),
        "reference": Backend("selective_scan.reference", "selective_scan", WIDE),
        "vendor": Backend(
            "selective_scan.vendor_scan",
            "selective_scan",
            FLOATS,
            "cuda",
            largest=256,
            missing=requirements.mamba_ssm,
            is_automatic=False,
        ),
    },
    "selective_scan_step": {
        "triton": _triton("selective_scan", "selective_scan_step", "", 256),
        "torch": Backend("selective_scan.torch_scan", "selective_scan_step", WIDE),
    },
    "causal_conv": {
        "triton": _triton("causal_conv", "causal_conv", "without it the convolution is several passes", 4),
        "cpu": Backend(
            "causal_conv.cpu_conv", "causal_conv", WIDE, "cpu", largest=4, missing=requirements.cpu, gain=""
        ),
        "torch": Backend("causal_conv.torch_conv", "causal_conv", WIDE),
        "reference": Backend("causal_conv.reference", "causal_conv", WIDE),
        "vendor": Backend(
            "causal_conv.vendor_conv",
            "causal_conv",
            FLOATS,
            "cuda",
            largest=4,
            missing=requirements.causal_conv1d,
            is_automatic=False,
        ),
    },
    "causal_conv_step": {
        "triton": _triton("causal_conv", "causal_conv_step", "", 4),
        "torch": Backend("causal_conv.torch_conv", "causal_conv_step", WIDE),
    },
    "grouped_matmul": {
        "torch": Backend("grouped_matmul.torch_grouped", "grouped_matmul", FLOATS),
        "reference": Backend("grouped_matmul.reference", "grouped_matmul", WIDE),
    },
    "sort_by_expert": {
        "triton": Backend("routing.triton_routing", "sort_by_expert", FLOATS, "cuda", missing=requirements.triton),
        "torch": Backend("routing.torch_routing", "sort_by_expert", WIDE),
        "reference": Backend("routing.reference", "sort_by_expert", WIDE),
    },
    "gather_rows": {
        "triton": Backend("routing.triton_routing", "gather_rows", FLOATS, "cuda", missing=requirements.triton),
        "torch": Backend("routing.torch_routing", "gather_rows", WIDE),
        "reference": Backend("routing.reference", "gather_rows", WIDE),
    },
    "combine_rows": {
        "triton": Backend("routing.triton_routing", "combine_rows", FLOATS, "cuda", missing=requirements.triton),
        "torch": Backend("routing.torch_routing", "combine_rows", WIDE),
        "reference": Backend("routing.reference", "combine_rows", WIDE),
    },
    "activation": {
        "triton": Backend("activation.triton_activation", "activation", FLOATS, "cuda", missing=requirements.triton),
        "torch": Backend("activation.torch_activation", "activation", WIDE),
    },
    "rms_norm": {
        "triton": Backend("rms_norm.triton_rms_norm", "rms_norm", FLOATS, "cuda", 16_384, requirements.triton),
        "torch": Backend("rms_norm.torch_rms_norm", "rms_norm", WIDE),
        "reference": Backend("rms_norm.reference", "rms_norm", WIDE),
    },
    "cross_entropy": {
        "triton": Backend("cross_entropy.triton_cross_entropy", "cross_entropy", FLOATS, "cuda",
                          missing=requirements.triton),
        "torch": Backend("cross_entropy.torch_cross_entropy", "cross_entropy", WIDE),
        "reference": Backend("cross_entropy.reference", "cross_entropy", WIDE),
    },
}  # fmt: skip


@cache
def choose(
    operation: str, device: str, dtype: torch.dtype, forced: str = "auto", size: int = 0
) -> tuple[str, Callable[..., Any]]:
    """Name and function of the back end that runs ``operation`` on tensors of this device type, dtype and size.

    Where a faster one is missing on this machine, a warning says, once, what that costs and how to get it.

    Args:
        operation: a key of ``BACKENDS``.
        device: type of the device, such as ``cpu`` or ``cuda``.
        dtype: of the inputs.
        forced: name of a back end; an operation that has none of that name takes what ``auto`` gives it. ``auto``:
            the first of the table that takes the tensors and runs here.
        size: what the operation's back ends may limit, d_state of the scan and width of the convolution.

    Raises:
        UserError: no such back end, or it does not compute on such tensors or on this machine.
    """
    table = BACKENDS[operation]
    if forced not in ("auto", *NAMES):
        raise UserError(f"{operation} has no back end {forced!r}: choose auto or one of {', '.join(table)}")
    if forced in table:
        return forced, _forced(operation, forced, device, dtype, size)
    for name, backend in table.items():
        if not backend.is_automatic or backend.refuses(device, dtype, size):
            continue
        if is_interpreted() and backend.device not in (None, device):
            continue  # the interpreter is for tests, which ask for it
        reason = backend.missing()
        if reason is None:
            return name, backend.load()
        if backend.gain:
            warnings.warn(f"{operation}: {reason}; {backend.gain}", stacklevel=2)
    raise UserError(f"{operation} does not take {dtype} tensors on a {device} device: use fp32 or bf16")


def _forced(operation: str, name: str, device: str, dtype: torch.dtype, size: int) -> Callable[..., Any]:
    backend = BACKENDS[operation][name]
    fault = backend.refuses(device, dtype, size)
    if fault is None and (reason := backend.missing()):
        raise UserError(f"{operation}'s back end {name!r} cannot run here: {reason}")
    if fault is not None:
        others = BACKENDS[operation].items()
        fitting = [other for other, one in others if not one.refuses(device, dtype, size) and not one.missing()]
        mend = f"choose {' or '.join(fitting)}" if fitting else "use fp32 or bf16"
        raise UserError(f"{operation}'s back end {name!r} does not take {fault}: {mend}")
    return backend.load()
