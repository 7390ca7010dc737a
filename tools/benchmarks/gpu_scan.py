"""The benchmark's rows ``gpu_scan`` and ``gpu_conv``: both kernels of the mixer in bf16 against their CUDA ancestors.

Ours get their operands as the model has them (z is half of a projection, B and C are slices of another); theirs get
them in the layout of their own model, made before the clock starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_clock import gpu_row, rates
from benchmarks.pairs import Row, Run, peer
from benchmarks.scan import transformers_scan
from moe_mamba.kernels import causal_conv, selective_scan

DTYPE = torch.bfloat16
SCAN_OPERATIONS = 9  # a state and token forward, as Mamba's section 4.5 counts; three times that for both ways
# Wide tensors (x, delta, z, y and their gradients) and narrow ones (B, C) that each way reads and writes.
SCAN_TRAFFIC = {"forward": (4, 2), "forward and backward": (4 + 7, 2 + 4)}
CONV_TRAFFIC = {"forward": 2, "forward and backward": 2 + 3}
WIDTH = 4


@dataclass(frozen=True)
class KernelShapes:
    """What is measured: (batch, length) pairs, and the mixer's sizes."""

    sizes: tuple[tuple[int, int], ...] = ((32, 1024), (4, 8192))
    short: tuple[int, int] = (8, 256)  # for a peer whose backward grows with the square of the length
    d_inner: int = 1536
    d_state: int = 16

    @staticmethod
    def choose(tiny: bool) -> "KernelShapes":
        """The shapes that docs/measurements.md reports, or tiny ones."""
        return KernelShapes(((2, 16),), (2, 8), 16, 4) if tiny else KernelShapes()


def scan_rows(device: torch.device, tiny: bool, repeats: int) -> list[Row]:
    """The scan, forward and both ways, against mamba-ssm's ``selective_scan_fn``; both ways against Transformers'."""
    shapes = KernelShapes.choose(tiny)
    rows = [_transformers_row(shapes, device, repeats)]
    for batch, length in shapes.sizes:
        operands = scan_operands(batch, length, shapes, device)
        for way in SCAN_TRAFFIC:
            name, floor = _scan_name(shapes, batch, length, way), _scan_floor(shapes, batch, length, way, device)
            ours = _passes(way, _our_scan, operands)
            theirs = partial(_their_scan, way, operands)
            rows.append(gpu_row(name, "mamba-ssm's CUDA kernel", ours, theirs, repeats, 1.5, device, floor))
    return rows


def _scan_name(shapes: KernelShapes, batch: int, length: int, way: str) -> str:
    return f"scan, {way}, bf16, {batch} x {length:,} x {shapes.d_inner} x {shapes.d_state}"


def _scan_floor(shapes: KernelShapes, batch: int, length: int, way: str, device: torch.device) -> tuple[float, str]:
    wide, narrow = batch * length * shapes.d_inner, batch * length * shapes.d_state
    wides, narrows = SCAN_TRAFFIC[way]
    operations = wide * shapes.d_state * SCAN_OPERATIONS * (1 if way == "forward" else 3)
    return rates(device).floor(DTYPE.itemsize * (wides * wide + narrows * narrow), operations)


def _transformers_row(shapes: KernelShapes, device: torch.device, repeats: int) -> Row:
    batch, length = shapes.short
    operands = scan_operands(batch, length, shapes, device)
    way = "forward and backward"
    name, floor = _scan_name(shapes, batch, length, way), _scan_floor(shapes, batch, length, way, device)

    def theirs() -> Run:
        return _passes(way, transformers_scan(), operands)

    ours = _passes(way, _our_scan, operands)
    return gpu_row(name, "Transformers' loop", ours, theirs, repeats, 1.0, device, floor)


def conv_rows(device: torch.device, tiny: bool, repeats: int) -> list[Row]:
    """The convolution, forward and both ways, against causal-conv1d's ``causal_conv1d_fn``."""
    shapes = KernelShapes.choose(tiny)
    rows = []
    for batch, length in shapes.sizes:
        projected = torch.randn(batch, length, 2 * shapes.d_inner, device=device, dtype=DTYPE)
        weight = torch.randn(shapes.d_inner, WIDTH, device=device, dtype=DTYPE)
        bias = torch.randn(shapes.d_inner, device=device, dtype=DTYPE)
        operands = [projected[..., : shapes.d_inner].requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
        for way, wides in CONV_TRAFFIC.items():
            wide = batch * length * shapes.d_inner
            operations = wide * 2 * WIDTH * (1 if way == "forward" else 3)
            floor = rates(device).floor(DTYPE.itemsize * wides * wide, operations)
            name = f"convolution, {way}, bf16, {batch} x {length:,} x {shapes.d_inner}"
            ours = _passes(way, _our_conv, operands)
            theirs = partial(_their_conv, way, operands)
            rows.append(gpu_row(name, "causal-conv1d's CUDA kernel", ours, theirs, repeats, 1.0, device, floor))
    return rows


def scan_operands(batch: int, length: int, shapes: KernelShapes, device: torch.device) -> list[Tensor]:
    """x, delta, A, B, C, D, z and the bias of delta, each a leaf in the strides that the model gives it."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=DTYPE)

    d_inner, d_state = shapes.d_inner, shapes.d_state
    projected = normal(batch, length, 2 * d_inner)
    selected = normal(batch, length, d_inner // 16 + 2 * d_state)  # dt, B, C
    A = -torch.arange(1.0, d_state + 1, device=device).repeat(d_inner, 1)
    B, C = selected[..., -2 * d_state : -d_state], selected[..., -d_state:]
    delta_bias = torch.randn(d_inner, device=device) - 4
    made = [normal(batch, length, d_inner), normal(batch, length, d_inner), A, B, C]
    made += [torch.randn(d_inner, device=device), projected[..., d_inner:], delta_bias]
    return [tensor.detach().requires_grad_() for tensor in made]


def _passes(way: str, function: Callable[..., Tensor], operands: list[Tensor]) -> Run:
    """A run of the function, or of the function and its gradients."""
    gradient = torch.randn_like(function(*operands))

    @torch.no_grad()
    def forward() -> None:
        function(*operands)

    def both() -> None:
        torch.autograd.grad(function(*operands), operands, gradient)

    return forward if way == "forward" else both


def _our_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    return selective_scan(x, delta, A, B, C, D, z, bias)[0]


def _our_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return causal_conv(x, weight, bias)[0]


def _their_scan(way: str, operands: list[Tensor]) -> Run:
    scan = peer("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", "mamba-ssm", "cuda")

    def function(
        x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
    ) -> Tensor:
        return scan(x, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)

    return _passes(way, function, [_channels_first(tensor) for tensor in operands])


def _their_conv(way: str, operands: list[Tensor]) -> Run:
    conv = peer("causal_conv1d", "causal_conv1d_fn", "causal-conv1d", "cuda")

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv(x, weight, bias, activation="silu")

    return _passes(way, function, [_channels_first(tensor) for tensor in operands])


def _channels_first(tensor: Tensor) -> Tensor:
    """(batch, length, channels) -> a dense leaf (batch, channels, length); other tensors stay."""
    return tensor.detach().mT.contiguous().requires_grad_() if tensor.dim() == 3 else tensor
