"""How speed depends on size: what a plan of a step needs and no single rate says.

A product is slow where one of its dimensions is small; an operator costs something however little it does, and more
where its result no longer fits a cache, or its memory is new; a collective costs a latency, and then by the byte.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn import functional

from moe_mamba.config import Config
from moe_mamba.kernels import rms_norm
from moe_mamba.model.mixers.attention import Attention
from moe_mamba.model.pattern import has
from moe_mamba.model.work import norm_work
from moe_mamba.parallel.distributed import from_all, from_first
from moe_mamba.preflight.report import Curve, What

SMALLEST = (4, 8, 16, 32, 64, 128, 256, 512)  # dimension of a product
OTHERS = {"cpu": 512, "cuda": 8192}  # its other two
LARGER = {"cpu": (), "cuda": (1024, 2048, 4096, 8192)}
PASS_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}  # the largest pass
MESSAGE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}  # the largest message
COLLECTIVES: tuple[What, ...] = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
SECONDS, MOST_CALLS = 0.1, 50  # of one point
POOL_BYTES, MOST_TURNS = {"cpu": 256 << 20, "cuda": 1 << 30}, 512  # of tensors that are taken in turns
LONGEST = {"cpu": 1024, "cuda": 16384}  # sequence of attention


def measure_compute_curves(config: Config, device: torch.device, dtype: torch.dtype) -> list[Curve]:
    """Products, passes and attention of this rank; every rank measures at once, as in training."""
    kind, kernels = device.type, config.run.kernels
    sizes = _sizes(4 << 10, PASS_BYTES[kind])
    curves: dict[What, list[tuple[float, float]]] = {
        "product": [(n, _product_rate(n, OTHERS[kind], dtype, device)) for n in (*SMALLEST, *LARGER[kind])],
        "pass": [(size, _seconds(_pass(size, dtype, device), device)) for size in sizes],
        "kernel": [_kernel_point(size, config.model.d_model, kernels, dtype, device) for size in sizes[1:-1]],
    }
    if has(config.model, Attention):
        curves["attention"] = [_attention_point(config, dtype, device)]
    return [Curve(what=what, ranks=1, points=points) for what, points in curves.items()]


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
    """A sum of two tensors into new memory; ``size`` bytes are read and written in all.

    Tensors are taken in turns, so that none is in a cache because it was just used: in a step none was.
    """
    numbers = max(1, size // 3 // dtype.itemsize)
    turns = itertools.cycle([torch.ones(2, numbers, device=device, dtype=dtype) for _ in range(_turns(size, device))])

    def call() -> None:
        one, other = next(turns)
        torch.add(one, other)

    return call


def _turns(size: int, device: torch.device) -> int:
    return max(1, min(MOST_TURNS, POOL_BYTES[device.type] // size))


def _kernel_point(
    size: int, d_model: int, kernels: str, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Bytes of an operator, and its seconds, of our norm forward and backward: the kind that layers are made of."""
    rows = max(1, size // d_model // dtype.itemsize)
    work = norm_work(rows, d_model, dtype.itemsize)
    whole, operators = work.forward + work.backward, 3 * work.operators
    pool = [torch.ones(2, rows, d_model, device=device, dtype=dtype) for _ in range(_turns(whole, device))]
    weight = torch.ones(d_model, device=device, requires_grad=True)
    turns = itertools.cycle(pool)

    def call() -> None:
        x, update = (tensor.requires_grad_() for tensor in next(turns).unbind())
        y, total = rms_norm(x, weight, 1e-5, residual=update, backend=kernels)
        torch.autograd.grad((y, total), (x, update, weight), (x.detach(), update.detach()))

    return whole / operators, _seconds(call, device) / operators


def _attention_point(config: Config, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Floating-point operations of causal attention forward and backward, and how many there are a second."""
    model, length = config.model, min(config.data.sequence_length, LONGEST[device.type])
    heads, width = model.heads, model.resolved_head_dim
    query, key, value = (
        torch.randn(1, heads, length, width, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    )

    def call() -> None:
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(y, (query, key, value), y.detach())

    operations = 6 * length**2 * heads * width  # of the half that is not masked
    return float(operations), operations / _seconds(call, device)


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
