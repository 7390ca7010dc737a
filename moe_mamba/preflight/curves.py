"""How speed depends on size: what a plan of a step needs and no single rate says.

A product is slow where one of its dimensions is small; an operator costs something however little it does, and more
where its result no longer fits a cache, or its memory is new; a collective costs a latency, and then by the byte.
"""

import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn import functional

from moe_mamba.parallel.distributed import from_all, from_first
from moe_mamba.preflight.report import Curve, What

SMALLEST = (4, 8, 16, 32, 64, 128, 256, 512)  # dimension of a product
OTHERS = {"cpu": 512, "cuda": 8192}  # its other two
LARGER = {"cpu": (), "cuda": (1024, 2048, 4096, 8192)}
PASS_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}  # the largest pass
MESSAGE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}  # the largest message
COLLECTIVES: tuple[What, ...] = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
SECONDS, MOST_CALLS = 0.15, 50  # of one point


def measure_compute_curves(device: torch.device, dtype: torch.dtype) -> list[Curve]:
    """Products and passes of this rank; every rank measures at once, as in training."""
    kind = device.type
    products = [(float(size), _product_rate(size, OTHERS[kind], dtype, device)) for size in (*SMALLEST, *LARGER[kind])]
    passes = [(float(size), _seconds(_pass(size, dtype, device), device)) for size in _sizes(4 << 10, PASS_BYTES[kind])]
    return [Curve(what="product", ranks=1, points=products), Curve(what="pass", ranks=1, points=passes)]


def median_curves(ranks: list[list[Curve]]) -> list[Curve]:
    """The same curves of several ranks as one each: the median of every point."""
    found = []
    for alike in zip(*ranks, strict=True):
        points = [
            (one[0][0], statistics.median(value for _, value in one))
            for one in zip(*(c.points for c in alike), strict=True)
        ]
        found.append(alike[0].model_copy(update={"points": points}))
    return found


def measure_collective_curves(device: torch.device) -> list[Curve]:
    """Seconds of collectives over the whole world by the bytes of their larger side; every rank calls it."""
    ranks = dist.get_world_size()
    curves = []
    for what in COLLECTIVES:
        points = []
        for size in _sizes(1 << 10, MESSAGE_BYTES[device.type], 8):
            call = _collective(what, size, ranks, device)
            points.append((float(size), _slowest(call, device)))
        curves.append(Curve(what=what, ranks=ranks, points=points))
    return curves


def _sizes(least: int, most: int, factor: int = 4) -> list[int]:
    return [least * factor**power for power in range(1 + round(math.log(most / least, factor)))]


def _product_rate(smallest: int, other: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a linear layer forward and backward: three products of the same dimensions."""
    x = torch.randn(other, smallest, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(other, smallest, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(other, other, device=device, dtype=dtype)

    def call() -> None:
        torch.autograd.grad(functional.linear(x, weight), (x, weight), gradient)

    return 6 * smallest * other**2 / _seconds(call, device)


def _pass(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """A sum of two tensors into new memory; ``size`` bytes are read and written in all."""
    one, other = (torch.zeros(max(1, size // 3 // dtype.itemsize), device=device, dtype=dtype) for _ in range(2))
    return lambda: one + other


def _collective(what: str, size: int, ranks: int, device: torch.device) -> Callable[[], object]:
    whole = torch.zeros(max(1, size // 4 // ranks) * ranks, device=device)
    part, other = torch.zeros(len(whole) // ranks, device=device), torch.empty_like(whole)
    calls: dict[str, Callable[[], object]] = {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all-to-all": lambda: dist.all_to_all_single(other, whole),
    }
    return calls[what]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, of several in a row where one is short."""
    call()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < MOST_CALLS and (len(times) < 3 or time.perf_counter() - begin < SECONDS):
        times.append(_timed(call, 1, device))
    if (once := statistics.median(times)) > 1e-3:
        return once
    together = 1 + int(1e-3 / max(once, 1e-7))
    return statistics.median(_timed(call, together, device) for _ in range(5)) / together


def _slowest(call: Callable[[], object], device: torch.device) -> float:
    """As ``_seconds``, of all ranks together: as often on each, and the slowest rank's."""
    call()
    times = int(from_first(max(3, min(MOST_CALLS, round(SECONDS / max(1e-6, _timed(call, 1, device)))))))
    return max(from_all(statistics.median(_timed(call, 1, device) for _ in range(times))))


def _timed(call: Callable[[], object], times: int, device: torch.device) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
