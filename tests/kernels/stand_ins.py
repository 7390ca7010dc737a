"""What mamba-ssm and causal-conv1d document of their functions, in plain torch, for machines without them.

They check the layouts that the real ones ask for.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make both packages importable, as far as our code uses them."""
    modules = {name: ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops", "causal_conv1d")}
    interface = modules["mamba_ssm.ops.selective_scan_interface"] = ModuleType("selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    modules["causal_conv1d"].causal_conv1d_fn = causal_conv1d_fn  # type: ignore[attr-defined]
    blocks = modules["mamba_ssm.modules.mamba_simple"] = ModuleType("mamba_simple")
    blocks.Mamba = Mamba  # type: ignore[attr-defined]
    modules["mamba_ssm.modules"] = ModuleType("mamba_ssm.modules")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


class Mamba(torch.nn.Linear):
    """A block of the right shapes, which mixes no tokens."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, d_model)


class _Theirs(torch.autograd.Function):
    """One autograd function around a formula, as the real ones are; only the first output has a gradient."""

    @staticmethod
    def forward(ctx, formula: Callable, *arguments):
        ctx.formula, ctx.arguments = formula, arguments
        return formula(*arguments)

    @staticmethod
    def backward(ctx, gradient: Tensor, *ignored: Tensor) -> tuple:
        leaves = [one.detach().requires_grad_() if _is_float(one) else one for one in ctx.arguments]

        def differentiate() -> list[Tensor]:
            y = ctx.formula(*leaves)
            y = y[0] if isinstance(y, tuple) else y
            return list(torch.autograd.grad(y, [one for one in leaves if _is_float(one)], gradient))

        with ThreadPoolExecutor(1) as pool:  # where the dispatcher is as in a fresh program
            made = pool.submit(differentiate).result()
        return None, *(made.pop(0) if _is_float(one) else None for one in leaves)


def _is_float(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """See ``_scan``; the final state carries a graph, but no gradient, as in the real one."""
    y, last_state = _Theirs.apply(_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (y, last_state) if return_last_state else y


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
    """See ``_conv``."""
    return _Theirs.apply(_conv, x, weight, bias, seq_idx, initial_states, activation)


def _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """u, delta, z (batch, dim, length), B and C (batch, dstate, length); A, D and delta_bias in fp32."""
    batch, dim, length = u.shape
    assert delta.shape == u.shape and A.shape[0] == dim and B.shape == C.shape == (batch, A.shape[1], length)
    assert all(tensor is None or tensor.dtype == torch.float32 for tensor in (A, D, delta_bias))
    assert all(tensor is None or tensor.dtype == u.dtype for tensor in (delta, B, C, z))
    wide_u, delta, B, C = (tensor.float() for tensor in (u, delta, B, C))
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    h = wide_u.new_zeros(batch, dim, A.shape[1])
    outputs = []
    for t in range(length):
        entering = (delta[..., t] * wide_u[..., t])[..., None] * B[:, None, :, t]
        h = torch.exp(delta[..., t, None] * A) * h + entering
        outputs.append((h * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, -1)
    y = y if D is None else y + D[:, None] * wide_u
    y = y if z is None else y * F.silu(z.float())
    return y.to(u.dtype), h


def _conv(x, weight, bias, seq_idx, initial_states, activation):
    """x (batch, dim, length), channels or length innermost; seq_idx (batch, length) int32 and initial_states (batch,
    dim, width - 1) only where it is the channels.
    """
    batch, dim, _ = x.shape
    width = weight.shape[1]
    assert 2 <= width <= 4 and activation in (None, "silu")
    if seq_idx is None and initial_states is None:
        assert x.stride(2) == 1 or x.stride(1) == 1
    else:
        assert x.stride(1) == 1 and x.stride(2) > 1
    assert x.stride(1) != 1 or dim % 8 == x.stride(0) % 8 == x.stride(2) % 8 == 0
    assert seq_idx is None or (initial_states is None and seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    assert initial_states is None or initial_states.stride(1) == 1
    past = x.new_zeros(batch, dim, width - 1) if initial_states is None else initial_states
    taps = torch.cat((past, x), -1).float().unfold(-1, width, 1)  # (batch, dim, length, width)
    if seq_idx is not None:
        documents = F.pad(seq_idx, (width - 1, 0), value=-1).unfold(-1, width, 1)
        taps = taps.masked_fill((documents != seq_idx[..., None])[:, None], 0)
    y = (taps * weight.float()[:, None]).sum(-1) + bias.float()[:, None]
    y = F.silu(y) if activation else y
    return y.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
