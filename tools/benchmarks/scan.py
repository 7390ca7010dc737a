"""The benchmark's row ``scan``: the selective scan on a CPU, in fp32, against the peers that run there."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pairs import Row, Run, pair_row, peer, wall_clock
from moe_mamba.kernels import selective_scan
from moe_mamba.parallel.distributed import keep_freed_memory

STATUS = Path("/proc/self/status")  # Linux: the only place that tells a process's own peak
MEMORY_GOAL = 300.0  # MiB at memory_length
LINEAR_GOAL = 1 / 1.2  # of the smallest cost of a token over the largest

Operands = list[Tensor]
Scan = Callable[..., Tensor]


@dataclass(frozen=True)
class ScanShapes:
    """What is measured."""

    batch: int = 8
    length: int = 256
    long: int = 1024
    d_inner: int = 512
    d_state: int = 16
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)

    @staticmethod
    def choose(tiny: bool) -> "ScanShapes":
        """The shapes that docs/measurements.md reports, or tiny ones."""
        return ScanShapes(2, 16, 64, 32, 4, (16, 32)) if tiny else ScanShapes()

    def name(self, length: int) -> str:
        """Of a row."""
        return f"scan, forward and backward, {self.batch} x {length:,} x {self.d_inner} x {self.d_state}"


def scan_rows(shapes: ScanShapes, repeats: int) -> list[Row]:
    """Forward and backward, softplus, D and gate included: speed, memory, and what a token costs at each length.

    Freed memory is kept for the next tensors, as in training: else the system's clearing of pages is measured too.
    """
    keep_freed_memory()
    rows = []
    for length, against, goal, theirs in (
        (shapes.length, "our torch version", 2.0, lambda: partial(our_scan, backend="torch")),
        (shapes.long, "our torch version", 2.0, lambda: partial(our_scan, backend="torch")),
        (
            shapes.length,
            "Transformers' loop (its backward grows with the square of the length)",
            200.0,
            transformers_scan,
        ),
        (shapes.length, "plain loop with autograd", 1.0, lambda: plain_scan),
        (shapes.long, "mamba.py's parallel scan", 8.0, mambapy_scan),
    ):
        operands = scan_operands(shapes.batch, length, shapes.d_inner, shapes.d_state)
        ours = partial(both_ways, our_scan, operands)
        rows.append(pair_row(shapes.name(length), against, ours, partial(_theirs, theirs, operands), repeats, goal))
    return [*rows, *memory_rows(shapes), length_row(shapes, repeats)]


def _theirs(make: Callable[[], Scan], operands: Operands) -> Run:
    return partial(both_ways, make(), operands)


def memory_rows(shapes: ScanShapes) -> list[Row]:
    """Peak memory of the scan's forward and backward, each in a process of its own (on Linux)."""
    if not STATUS.exists():
        return []
    size = (shapes.batch, shapes.long, shapes.d_inner, shapes.d_state)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as one, ProcessPoolExecutor(1, spawn) as other:
        peaks = one.submit(peak_memory, False, size), other.submit(peak_memory, True, size)
    ours, theirs = (peak.result() / 2**20 for peak in peaks)
    name = f"scan, peak memory, {size[0]} x {size[1]:,} x {size[2]} x {size[3]}"
    return [
        Row(name, "plain loop with autograd", "MiB", ours, theirs, theirs / ours, goal=3.0),
        Row(name, "the most it may take", "MiB", ours, MEMORY_GOAL, MEMORY_GOAL / ours, goal=1.0),
    ]


def length_row(shapes: ScanShapes, repeats: int) -> Row:
    """The cost of a token at the dearest length against the cheapest: 1 is linear in the length."""
    runs = []
    for length in shapes.lengths:
        operands = scan_operands(shapes.batch, length, shapes.d_inner, shapes.d_state)
        runs.append(partial(both_ways, our_scan, operands))
    for run in runs:
        run()
    # In turns; neighbours only ever add time, and to the longer lengths more often: so the least of each.
    rounds = [[wall_clock(run) for run in runs] for _ in range(repeats)]
    times = [min(each) for each in zip(*rounds, strict=True)]
    costs = [1e3 * time / (shapes.batch * length) for time, length in zip(times, shapes.lengths, strict=True)]
    each = ", ".join(f"{cost:.1f} at {length:,}" for cost, length in zip(costs, shapes.lengths, strict=True))
    name = f"scan, microseconds per token: {each}; the dearest"
    dearest, cheapest = max(costs), min(costs)
    return Row(name, "the cheapest", "us", dearest, cheapest, cheapest / dearest, goal=round(LINEAR_GOAL, 2))


def scan_operands(batch: int, length: int, d_inner: int, d_state: int) -> Operands:
    """x, delta, A, B, C, D, z and the bias of delta, as a mixer at the start of its training has them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    A = -torch.arange(1.0, d_state + 1).repeat(d_inner, 1)
    wide, narrow = (batch, length, d_inner), (batch, length, d_state)
    made = [normal(*wide), normal(*wide), A, normal(*narrow), normal(*narrow), normal(d_inner), normal(*wide)]
    return [tensor.requires_grad_() for tensor in (*made, normal(d_inner) - 4)]


def both_ways(scan: Scan, operands: Operands) -> None:
    """One forward and one backward pass."""
    y = scan(*operands)
    torch.autograd.grad(y, operands, torch.ones_like(y))


def our_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, backend: str = "auto"
) -> Tensor:
    """The back end that this machine gets."""
    return selective_scan(x, delta, A, B, C, D, z, bias, backend=backend)[0]


def plain_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """A loop over time as one would write it with some care, and autograd."""
    delta = F.softplus(delta + bias)
    h = x.new_zeros(x.shape[0], *A.shape)  # (batch, d_inner, d_state)
    read = []
    for delta_t, entering, B_t, C_t in zip(*(v.unbind(1) for v in (delta, delta * x, B, C)), strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + entering[..., None] * B_t[:, None]
        read.append((h @ C_t[..., None])[..., 0])
    return (torch.stack(read, 1) + D * x) * F.silu(z)


def transformers_scan() -> Scan:
    """The recurrence of Transformers' Mamba and Jamba, given its operands in its own layout."""
    loop = peer(
        "transformers.models.mamba.modeling_mamba", "mamba_selective_scan", "transformers 5.20 or later", "benchmark"
    )

    def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        x, delta, B, C, z = (tensor.transpose(1, 2) for tensor in (x, delta, B, C, z))
        return loop(x, delta, A, B, C, D, z, bias, delta_softplus=True).transpose(1, 2)

    return scan


def mambapy_scan() -> Scan:
    """mamba.py's scan by halves, with what stands around it in its mixer."""
    pscan = peer("mambapy.pscan", "pscan", "mambapy", "benchmark")

    def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        delta = F.softplus(delta + bias)
        decay = torch.exp(delta[..., None] * A)  # (batch, length, d_inner, d_state)
        states = pscan(decay, (delta * x)[..., None] * B[:, :, None])
        return ((states @ C[..., None])[..., 0] + D * x) * F.silu(z)

    return scan


def peak_memory(plain: bool, size: tuple[int, int, int, int]) -> int:
    """Bytes that a forward and backward pass adds to this process at its peak, gradients included."""
    scan: Scan = plain_scan if plain else our_scan
    both_ways(scan, scan_operands(1, 32, 64, 4))
    operands = scan_operands(*size)
    before = _status("VmRSS")
    both_ways(scan, operands)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])
