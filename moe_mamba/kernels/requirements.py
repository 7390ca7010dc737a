"""Why a family of back ends cannot run on this machine, and the fix: each function gives one line, or None."""

import os
from functools import cache
from importlib.util import find_spec

import torch

OLDEST_GENERATION = (8, 0)  # Ampere: the first with bf16


@cache
def triton() -> str | None:
    """Triton's kernels: the package, and a GPU that it serves."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "Triton's kernels need a GPU, but torch finds none"
    return generation(torch.cuda.get_device_capability())


def generation(capability: tuple[int, int]) -> str | None:
    """Triton's kernels: a GPU that is new enough."""
    if capability >= OLDEST_GENERATION:
        return None
    major, minor = capability
    return f"this GPU has compute capability {major}.{minor}, but Triton's kernels need 8.0 (Ampere) or newer"


@cache
def cpu() -> str | None:
    """Our C++ kernels: they are built on first use."""
    from moe_mamba.kernels.extension import build

    return build()


@cache
def mamba_ssm() -> str | None:
    """The scan of Mamba's authors."""
    return None if find_spec("mamba_ssm") else "mamba-ssm is not installed: pip install -e '.[cuda]'"


@cache
def causal_conv1d() -> str | None:
    """The convolution of Mamba's authors."""
    return None if find_spec("causal_conv1d") else "causal-conv1d is not installed: pip install -e '.[cuda]'"
