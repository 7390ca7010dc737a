"""The three operations that torch lacks, each with one signature and a table of back ends that pick themselves."""

from moe_mamba.kernels.causal_conv import causal_conv
from moe_mamba.kernels.grouped_matmul import grouped_matmul
from moe_mamba.kernels.selective_scan import selective_scan, selective_scan_step

__all__ = ["causal_conv", "grouped_matmul", "selective_scan", "selective_scan_step"]
