"""The one table of back ends: which implementation of an operation runs on which device and dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch

from moe_mamba.errors import UserError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """One implementation: where it lies and what it takes. ``devices`` None: every device."""

    module: str
    function: str
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] | None = None

    def takes(self, device: str, dtype: torch.dtype) -> bool:
        """Whether this back end computes on such tensors."""
        return dtype in self.dtypes and (self.devices is None or device in self.devices)


# Operation -> name -> back end; the first that takes the tensors is what "auto" means.
BACKENDS: dict[str, dict[str, Backend]] = {
    "selective_scan": {
        "torch": Backend("selective_scan.torch_scan", "selective_scan", (*FLOATS, torch.float64)),
        "reference": Backend("selective_scan.reference", "selective_scan", (*FLOATS, torch.float64)),
    },
    "causal_conv": {
        "torch": Backend("causal_conv.torch_conv", "causal_conv", (*FLOATS, torch.float64)),
        "reference": Backend("causal_conv.reference", "causal_conv", (*FLOATS, torch.float64)),
    },
    "grouped_matmul": {
        "torch": Backend("grouped_matmul.torch_grouped", "grouped_matmul", FLOATS),
        "reference": Backend("grouped_matmul.reference", "grouped_matmul", (*FLOATS, torch.float64)),
    },
}


@cache
def choose(operation: str, device: str, dtype: torch.dtype, forced: str = "auto") -> tuple[str, Callable[..., Any]]:
    """Name and function of the back end that runs ``operation`` on tensors of this device type and dtype.

    Args:
        operation: a key of ``BACKENDS``.
        device: type of the device, such as ``cpu`` or ``cuda``.
        dtype: of the inputs.
        forced: name of a back end, or ``auto`` for the first of the table that fits.

    Raises:
        UserError: no such back end, or it does not compute on such tensors.
    """
    table = BACKENDS[operation]
    if forced != "auto" and forced not in table:
        raise UserError(f"{operation} has no back end {forced!r}: choose auto or one of {', '.join(table)}")
    for name, backend in table.items():
        if forced in ("auto", name) and backend.takes(device, dtype):
            return name, getattr(import_module(f"moe_mamba.kernels.{backend.module}"), backend.function)
    fitting = [name for name, backend in table.items() if backend.takes(device, dtype)]
    mend = f"choose {' or '.join(fitting)}" if fitting else "use fp32 or bf16"
    name = "" if forced == "auto" else f"'s back end {forced!r}"
    raise UserError(f"{operation}{name} does not take {dtype} tensors on a {device} device: {mend}")
