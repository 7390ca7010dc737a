"""The recurrence in C++ (``csrc/selective_scan.cpp``), with its own backward: the back end that trains on CPUs.

Softplus, the gate, D and the bias of delta are computed in the same pass. The forward pass keeps one state in 16. The
gradients of B and C leave as one partial sum for each group of channels, those of A, D and the bias as one for each
batch row; they are added here in a fixed order, so that results do not depend on the number of threads.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_mamba.kernels.extension import TYPES, Strided, fill, library, sum_in_order
from moe_mamba.kernels.launch import unit_stride
from moe_mamba.kernels.selective_scan.operands import Operands

CHUNK = 16  # time steps from one kept state to the next, STEPS in C++
GROUP = 128  # channels of a task, GROUP in C++


class _Scan(ctypes.Structure):
    """``Scan`` in C++, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "length", "d_inner", "d_state")),
        *((name, ctypes.c_int64) for name in ("groups", "chunks", "type", "threads")),
        *((name, Strided) for name in ("x", "delta", "z", "B", "C", "y")),
        *((name, Strided) for name in ("y_gradient", "x_gradient", "delta_gradient", "z_gradient")),
        *((name, ctypes.c_void_p) for name in ("starts", "decay", "D", "delta_bias", "initial_state")),
        *((name, ctypes.c_void_p) for name in ("final_gradient", "kept", "final_state", "initial_gradient")),
        *((name, ctypes.c_void_p) for name in ("A_gradient", "D_gradient", "bias_gradient")),
        *((name, ctypes.c_void_p) for name in ("B_gradient", "C_gradient")),
    )


@torch.compiler.disable
def selective_scan(operands: Operands) -> tuple[Tensor, Tensor]:
    """See ``moe_mamba.kernels.selective_scan``; computes in fp64 for fp64 inputs, else in fp32.

    Keeps its inputs and (batch, ceil(length / 16), d_state, d_inner) states for the backward pass.
    """
    return _SelectiveScan.apply(*operands)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> tuple[Tensor, Tensor]:
        x, delta, A, B, C, D, z, delta_bias, document_starts, initial_state = operands
        work = torch.promote_types(x.dtype, torch.float32)
        batch, length, d_inner = x.shape
        tensors = {
            "x": unit_stride(x),
            "delta": unit_stride(delta),
            "z": None if z is None else unit_stride(z),
            "B": unit_stride(B),
            "C": unit_stride(C),
            "starts": None if document_starts is None else document_starts.contiguous(),
            "decay": (A.to(work).t() * math.log2(math.e)).contiguous(),  # (d_state, d_inner)
            "D": D.to(work).contiguous(),
            "delta_bias": None if delta_bias is None else delta_bias.to(work).contiguous(),
            "kept": x.new_empty(batch, -(-length // CHUNK), A.shape[1], d_inner, dtype=work),
        }
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        final_state = x.new_empty(batch, A.shape[1], d_inner, dtype=work)
        state = None if initial_state is None else _states_first(initial_state, work)
        outputs = {"initial_state": state, "y": y, "final_state": final_state}
        library().selective_scan_forward(_arguments({**tensors, **outputs}))
        ctx.dtypes = A.dtype, D.dtype, delta_bias.dtype if delta_bias is not None else None
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        ctx.names = tuple(tensors)
        ctx.save_for_backward(*tensors.values())
        return y, final_state.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_gradient: Tensor, final_gradient: Tensor) -> tuple[Tensor | None, ...]:
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        x, B, z, decay = (tensors[name] for name in ("x", "B", "z", "decay"))
        batch, length, d_inner = x.shape
        groups = -(-d_inner // GROUP)

        def like(tensor: Tensor) -> Tensor:
            return torch.empty_like(tensor, memory_format=torch.contiguous_format)

        gradients = {
            "x_gradient": like(x),
            "delta_gradient": like(x),
            "z_gradient": None if z is None else like(x),
            "initial_gradient": decay.new_empty(batch, *decay.shape),
            "A_gradient": decay.new_empty(batch, *decay.shape),
            "D_gradient": decay.new_empty(batch, d_inner),
            "bias_gradient": decay.new_empty(batch, d_inner),
            "B_gradient": decay.new_empty(batch, groups, length, decay.shape[0]),
            "C_gradient": decay.new_empty(batch, groups, length, decay.shape[0]),
        }
        inputs = {
            "y_gradient": unit_stride(y_gradient),
            "final_gradient": _states_first(final_gradient, decay.dtype),
        }
        library().selective_scan_backward(_arguments({**tensors, **inputs, **gradients}))
        A_dtype, D_dtype, bias_dtype = ctx.dtypes
        bias_gradient = None if bias_dtype is None else sum_in_order(gradients["bias_gradient"], 0).to(bias_dtype)
        initial_gradient = None
        if ctx.state_dtype is not None:
            initial_gradient = gradients["initial_gradient"].transpose(1, 2).to(ctx.state_dtype)
        return (
            gradients["x_gradient"],
            gradients["delta_gradient"],
            sum_in_order(gradients["A_gradient"], 0).t().to(A_dtype),
            sum_in_order(gradients["B_gradient"], 1).to(B.dtype),
            sum_in_order(gradients["C_gradient"], 1).to(B.dtype),
            sum_in_order(gradients["D_gradient"], 0).to(D_dtype),
            gradients["z_gradient"],
            bias_gradient,
            None,
            initial_gradient,
        )


def _states_first(state: Tensor, work: torch.dtype) -> Tensor:
    """(batch, d_inner, d_state) -> (batch, d_state, d_inner)."""
    return state.transpose(1, 2).to(work).contiguous()


def _arguments(tensors: dict[str, Tensor | None]) -> Any:
    """``Scan`` for these tensors, by reference."""
    x, decay = tensors["x"], tensors["decay"]
    assert x is not None and decay is not None
    batch, length, d_inner = x.shape
    chunks, groups = -(-length // CHUNK), -(-d_inner // GROUP)
    threads = torch.get_num_threads()
    return fill(_Scan(batch, length, d_inner, decay.shape[0], groups, chunks, TYPES[x.dtype], threads), tensors)
