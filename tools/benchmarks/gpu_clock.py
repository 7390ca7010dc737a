"""How a GPU's rows are timed, and the floor under each: bytes over the bandwidth, operations over the rate."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from benchmarks.pairs import Clock, Row, Run, pair_row, wall_clock

CALLS = 5  # between two events: the launch of one hides behind the work of the one before
WARM_UP = 3  # runs in which kernels are compiled and memory is taken
RATE_REPEATS = 5

LARGE = {"copy": 2**30, "bf16": 8192, "fp32": 4096}  # bytes copied; sides of the square matrices
TINY = {"copy": 2**16, "bf16": 32, "fp32": 32}


@dataclass(frozen=True)
class Rates:
    """What this device reached on plain work: the measure of every floor.

    Attributes:
        bytes_per_second: of a copy from device to device, read and written bytes.
        bf16_flops: operations per second of a large bf16 matrix product.
        fp32_flops: the same in fp32, without TF32: the units that a scan runs on.
    """

    bytes_per_second: float
    bf16_flops: float
    fp32_flops: float

    def floor(self, traffic: float, operations: float, in_bf16: bool = False) -> tuple[float, str]:
        """Least milliseconds that bytes and operations leave possible, and which of them sets it."""
        moving = traffic / self.bytes_per_second
        computing = operations / (self.bf16_flops if in_bf16 else self.fp32_flops)
        return 1e3 * max(moving, computing), "bytes" if moving > computing else "operations"


@cache
def rates(device: torch.device) -> Rates:
    """Measure the device; small matrices and copies on a CPU, where figures mean nothing."""
    sizes = LARGE if device.type == "cuda" else TINY
    source = torch.empty(sizes["copy"], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = {"copy": _seconds(partial(target.copy_, source), device)}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        side = sizes[name]
        left, right = torch.randn(2, side, side, device=device).to(dtype)
        seconds[name] = _seconds(partial(torch.mm, left, right, out=torch.empty_like(left)), device)
    return Rates(
        2 * sizes["copy"] / seconds["copy"],
        2 * sizes["bf16"] ** 3 / seconds["bf16"],
        2 * sizes["fp32"] ** 3 / seconds["fp32"],
    )


def _seconds(run: Run, device: torch.device) -> float:
    for _ in range(WARM_UP):
        run()
    return statistics.median(clock(device)(run) for _ in range(RATE_REPEATS)) / 1e3


def clock(device: torch.device) -> Clock:
    """Milliseconds of a run on this device, by its own events on a GPU."""
    return _events if device.type == "cuda" else wall_clock


def _events(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(CALLS):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / CALLS


def gpu_row(
    what: str,
    against: str,
    ours: Run,
    theirs: Callable[[], Run],
    repeats: int,
    goal: float,
    device: torch.device,
    floor: tuple[float, str],
) -> Row:
    """A row timed by the device's clock, after runs of both that compile and take memory; see ``pair_row``."""

    def warm_theirs() -> Run:
        run = theirs()
        _warm_up(run)
        return run

    _warm_up(ours)
    return pair_row(what, against, ours, warm_theirs, repeats, goal, clock=clock(device), floor=floor)


def _warm_up(run: Run) -> None:
    for _ in range(WARM_UP):
        run()
