"""What every back end of the scan is given."""

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """Arguments of ``moe_mamba.kernels.selective_scan``, checked; shapes and meaning stand there."""

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor | None
    delta_bias: Tensor | None
    document_starts: Tensor | None
    initial_state: Tensor | None
