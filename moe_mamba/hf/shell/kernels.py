"""The operations with the signatures of ``moe_mamba.kernels``: that package's where it is installed, else plain torch.

The plain ones compute what the reference versions define; ``backend`` is not looked at. What traces a graph (compile,
export) gets the package's as operators: what was exported with them runs only beside the package. Under autocast an
operation computes as it would without: its inputs have the dtype that the products before it gave them, and experts'
products are cast here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_mamba.hf.shell.grouped import plain_grouped_matmul
from moe_mamba.kernels.activation.torch_activation import activation as plain_activation
from moe_mamba.kernels.causal_conv import _final_state
from moe_mamba.kernels.causal_conv.reference import causal_conv as plain_causal_conv
from moe_mamba.kernels.causal_conv.torch_conv import causal_conv_step as plain_causal_conv_step
from moe_mamba.kernels.cross_entropy import Reduce
from moe_mamba.kernels.cross_entropy.reference import cross_entropy as plain_cross_entropy
from moe_mamba.kernels.rms_norm.reference import rms_norm as plain_rms_norm
from moe_mamba.kernels.routing import Order
from moe_mamba.kernels.routing.reference import combine_rows as plain_combine_rows
from moe_mamba.kernels.routing.reference import gather_rows as plain_gather_rows
from moe_mamba.kernels.routing.torch_routing import sort_by_expert as plain_sort_by_expert
from moe_mamba.kernels.selective_scan.chunked_scan import selective_scan as plain_selective_scan
from moe_mamba.kernels.selective_scan.operands import Operands
from moe_mamba.kernels.selective_scan.torch_scan import selective_scan_step as plain_selective_scan_step
from moe_mamba.model.precision import without_autocast


class Plain:
    """Each operation in torch's own functions."""

    @staticmethod
    def activation(hidden: Tensor, kind: str, backend: str = "auto") -> Tensor:
        """See ``moe_mamba.kernels.activation``."""
        return plain_activation(hidden, kind)

    @staticmethod
    def causal_conv(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        document_starts: Tensor | None = None,
        initial_state: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.causal_conv``."""
        if initial_state is None:
            initial_state = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
        y = plain_causal_conv(x, weight, bias, document_starts, initial_state)
        return y, _final_state(x, document_starts, initial_state)

    @staticmethod
    def causal_conv_step(
        x: Tensor, weight: Tensor, bias: Tensor, state: Tensor, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.causal_conv_step``."""
        return plain_causal_conv_step(x, weight, bias, state)

    @staticmethod
    def cross_entropy(
        logits: Tensor, targets: Tensor, first: int = 0, reduce: Reduce | None = None, backend: str = "auto"
    ) -> Tensor:
        """See ``moe_mamba.kernels.cross_entropy``."""
        return plain_cross_entropy(logits, targets, first, reduce)

    @staticmethod
    def grouped_matmul(
        x: Tensor, weight: Tensor, counts: Tensor, capacity: int | None = None, backend: str = "auto"
    ) -> Tensor:
        """See ``moe_mamba.kernels.grouped_matmul``."""
        return plain_grouped_matmul(x, weight, counts, capacity)

    @staticmethod
    def rms_norm(
        x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.rms_norm``."""
        return plain_rms_norm(x, weight, epsilon, residual)

    @staticmethod
    def sort_by_expert(chosen: Tensor, experts: int, capacity: int | None = None, backend: str = "auto") -> Order:
        """See ``moe_mamba.kernels.sort_by_expert``."""
        return Order(*plain_sort_by_expert(chosen, experts, capacity))

    @staticmethod
    def gather_rows(x: Tensor, token: Tensor, slot: Tensor, backend: str = "auto") -> Tensor:
        """See ``moe_mamba.kernels.gather_rows``."""
        return plain_gather_rows(x, token, slot)

    @staticmethod
    def combine_rows(rows: Tensor, weight: Tensor, token: Tensor, slot: Tensor, backend: str = "auto") -> Tensor:
        """See ``moe_mamba.kernels.combine_rows``."""
        return plain_combine_rows(rows, weight, token, slot)

    @staticmethod
    def selective_scan(
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        document_starts: Tensor | None = None,
        initial_state: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.selective_scan``."""
        return plain_selective_scan(Operands(x, delta, A, B, C, D, z, delta_bias, document_starts, initial_state))

    @staticmethod
    def selective_scan_step(
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None,
        delta_bias: Tensor | None,
        state: Tensor,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """See ``moe_mamba.kernels.selective_scan_step``."""
        return plain_selective_scan_step(x, delta, A, B, C, D, z, delta_bias, state)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str = "auto") -> Tensor:
    """Torch's own: what quantises a model or adapts it knows this one."""
    return functional.linear(x, weight, bias)


def build_linear(in_features: int, out_features: int, bias: bool = False, kernels: str = "auto") -> nn.Linear:
    """Torch's own layer, which such libraries look for."""
    return nn.Linear(in_features, out_features, bias=bias)


try:
    from moe_mamba import kernels as operations
except ImportError:
    operations = Plain  # type: ignore[assignment]


def _operation(name: str) -> Callable[..., Any]:
    """The operation of this name, from ``operations``."""

    @without_autocast
    def run(*args: Any, **kwargs: Any) -> Any:
        return getattr(operations, name)(*args, **kwargs)

    return run


def grouped_matmul(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The experts' products, which autocast casts as it does a linear layer's."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    return _grouped_matmul(x, weight, *args, **kwargs)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None, backend: str = "auto") -> Any:
    """The norm of the stream and its update, which autocast gives in another dtype than the stream's."""
    return _rms_norm(x, weight, epsilon, None if residual is None else residual.to(x.dtype), backend)


activation = _operation("activation")
causal_conv, causal_conv_step = _operation("causal_conv"), _operation("causal_conv_step")
cross_entropy = _operation("cross_entropy")
sort_by_expert = _operation("sort_by_expert")
gather_rows, combine_rows = _operation("gather_rows"), _operation("combine_rows")
selective_scan, selective_scan_step = _operation("selective_scan"), _operation("selective_scan_step")
_grouped_matmul, _rms_norm = _operation("grouped_matmul"), _operation("rms_norm")
