"""Operations that torch lacks or does slowly, each with one signature and a table of back ends that pick themselves."""

from moe_mamba.kernels.activation import activation
from moe_mamba.kernels.causal_conv import causal_conv, causal_conv_step
from moe_mamba.kernels.cross_entropy import cross_entropy
from moe_mamba.kernels.grouped_matmul import grouped_matmul
from moe_mamba.kernels.linear import linear
from moe_mamba.kernels.rms_norm import rms_norm
from moe_mamba.kernels.routing import Order, combine_rows, gather_rows, sort_by_expert
from moe_mamba.kernels.selective_scan import selective_scan, selective_scan_step

__all__ = [
    "Order",
    "activation",
    "causal_conv",
    "causal_conv_step",
    "combine_rows",
    "cross_entropy",
    "gather_rows",
    "grouped_matmul",
    "linear",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "sort_by_expert",
]
