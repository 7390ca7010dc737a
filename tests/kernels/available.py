"""Which back ends of an operation run on this machine, for tests to parametrize over."""

import pytest
import torch
from _pytest.mark import ParameterSet

from moe_mamba.kernels.backends import BACKENDS


def device() -> str:
    """Type of the device that this machine's tests of kernels use: its GPU, where it has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def available(operation: str, on: str | None = None, dtype: torch.dtype | None = None) -> list[str]:
    """Names of the back ends that run here on tensors of the device type ``on`` (None: ``device()``) and this dtype.

    Under Triton's interpreter the Triton back ends take tensors on a CPU, and so are among them.
    """
    names = []
    for name, backend in BACKENDS[operation].items():
        kind = dtype or backend.dtypes[0]
        if backend.takes(on or device(), kind) and backend.missing() is None:
            names.append(name)
    return names


def cases(operation: str) -> list[ParameterSet]:
    """Parameters ``("backend", "on")``: what runs on CPU tensors, and, marked ``gpu``, what runs on a GPU.

    The GPU's cases are listed, to be skipped, where there is none.
    """
    on_cpu = [pytest.param(name, "cpu", id=name) for name in available(operation, "cpu")]
    names = [name for name, backend in BACKENDS[operation].items() if backend.device in (None, "cuda")]
    if torch.cuda.is_available():
        names = available(operation, "cuda")
    return on_cpu + [pytest.param(name, "cuda", id=f"{name}-cuda", marks=pytest.mark.gpu) for name in names]


def typed_cases(operation: str) -> list[ParameterSet]:
    """The same once for each dtype that the back end takes: parameters ``("backend", "on", "dtype")``."""
    made = []
    for case in cases(operation):
        for dtype in BACKENDS[operation][str(case.values[0])].dtypes:
            name = f"{case.id}-{str(dtype).removeprefix('torch.')}"
            made.append(pytest.param(*case.values, dtype, id=name, marks=case.marks))
    return made
