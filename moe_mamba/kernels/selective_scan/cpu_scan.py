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

from moe_mamba.kernels.extension import TYPES, Strided, fill, library, sum_in_order
from moe_mamba.kernels.launch import unit_stride
from moe_mamba.kernels.selective_scan.intervals import CHUNK, GROUP
from moe_mamba.kernels.selective_scan.operator import define_scan, new_states


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


def _outputs(x: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    """Room for y, the final state, what is kept (batch, ceil(length / 16), d_state, d_inner), and nothing."""
    state = new_states(x, A)
    kept = state.new_empty(x.shape[0], -(-x.shape[1] // CHUNK), *state.shape[1:])
    return x.new_empty(x.shape), state.transpose(1, 2), kept, x.new_empty(0)


def _fake(x: Tensor, delta: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return _outputs(x, A)


def _inputs(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    document_starts: Tensor | None,
) -> dict[str, Tensor | None]:
    """The operands as C++ takes them, by the names of ``_Scan``."""
    work = torch.promote_types(x.dtype, torch.float32)
    return {
        "x": unit_stride(x),
        "delta": unit_stride(delta),
        "z": None if z is None else unit_stride(z),
        "B": unit_stride(B),
        "C": unit_stride(C),
        "starts": None if document_starts is None else document_starts.contiguous(),
        "decay": (A.to(work).t() * math.log2(math.e)).contiguous(),  # (d_state, d_inner)
        "D": D.to(work).contiguous(),
        "delta_bias": None if delta_bias is None else delta_bias.to(work).contiguous(),
    }


def _forward(x: Tensor, delta: Tensor, A: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *others, initial_state, _ = given
    outputs = y, final_state, kept, _ = _outputs(x, A)
    states = {
        "initial_state": None if initial_state is None else _states_first(initial_state, kept.dtype),
        "final_state": final_state.transpose(1, 2),
    }
    _call("selective_scan_forward", {**_inputs(x, delta, A, *others), **states, "kept": kept, "y": y})
    return outputs


def _backward(y_gradient: Tensor, final_gradient: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *operands, kept, _ = given
    inputs = _inputs(*operands)
    x, A, D, z, delta_bias = (operands[place] for place in (0, 2, 5, 6, 7))
    batch, length, d_inner = x.shape
    d_state, groups = A.shape[1], -(-d_inner // GROUP)
    gradients = {
        "x_gradient": x.new_empty(x.shape),
        "delta_gradient": x.new_empty(x.shape),
        "z_gradient": None if z is None else x.new_empty(x.shape),
        "initial_gradient": kept.new_empty(batch, d_state, d_inner),
        "A_gradient": kept.new_empty(batch, d_state, d_inner),
        "D_gradient": kept.new_empty(batch, d_inner),
        "bias_gradient": kept.new_empty(batch, d_inner),
        "B_gradient": kept.new_empty(batch, groups, length, d_state),
        "C_gradient": kept.new_empty(batch, groups, length, d_state),
    }
    arriving = {
        "y_gradient": unit_stride(y_gradient),
        "final_gradient": _states_first(final_gradient, kept.dtype),
        "kept": kept,
    }
    _call("selective_scan_backward", {**inputs, **arriving, **gradients})
    bias_gradient = sum_in_order(gradients["bias_gradient"], 0)
    return (
        gradients["x_gradient"],
        gradients["delta_gradient"],
        sum_in_order(gradients["A_gradient"], 0).t().to(A.dtype),
        sum_in_order(gradients["B_gradient"], 1).to(x.dtype),
        sum_in_order(gradients["C_gradient"], 1).to(x.dtype),
        sum_in_order(gradients["D_gradient"], 0).to(D.dtype),
        x.new_empty(0) if z is None else gradients["z_gradient"],
        x.new_empty(0) if delta_bias is None else bias_gradient.to(delta_bias.dtype),
        gradients["initial_gradient"].transpose(1, 2),
    )


def _states_first(state: Tensor, work: torch.dtype) -> Tensor:
    """(batch, d_inner, d_state) -> (batch, d_state, d_inner)."""
    return state.transpose(1, 2).to(work).contiguous()


def _call(function: str, tensors: dict[str, Tensor | None]) -> None:
    """Call C++ with a ``Scan`` for these tensors, which live until it returns."""
    x, decay = tensors["x"], tensors["decay"]
    assert x is not None and decay is not None
    batch, length, d_inner = x.shape
    chunks, groups = -(-length // CHUNK), -(-d_inner // GROUP)
    threads = torch.get_num_threads()
    scan = _Scan(batch, length, d_inner, decay.shape[0], groups, chunks, TYPES[x.dtype], threads)
    getattr(library(), function)(fill(scan, tensors))


selective_scan = define_scan("selective_scan_cpu", _forward, _backward, _fake, "CPU")
"""See ``moe_mamba.kernels.selective_scan``; computes in fp64 for fp64 inputs, else in fp32.

Keeps its inputs and (batch, ceil(length / 16), d_state, d_inner) states for the backward pass.
"""
