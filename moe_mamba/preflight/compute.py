"""How fast a rank computes, and its disk writes and reads, with the configuration's sizes and in bounded time."""

import math
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moe_mamba.config import Config
from moe_mamba.kernels import grouped_matmul, selective_scan
from moe_mamba.model.mixers.moe import MoE
from moe_mamba.model.pattern import has, kernel_operations
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.fit import host_bytes
from moe_mamba.preflight.report import Compute, Sizes, Storage

SECONDS = 1.0  # that a measure is repeated for
MOST_CALLS = 20
# What one call may cost by type of device: floating-point operations, updates of scan states, elements of weights.
MOST_OPERATIONS = {"cpu": 4e9, "cuda": 4e12}
MOST_UPDATES = {"cpu": 4e7, "cuda": 4e10}
MOST_WEIGHTS = {"cpu": 1e8, "cuda": 1e9}
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
STORAGE_BYTES, CHUNK, STORAGE_SECONDS = 64 << 20, 4 << 20, 6.0


def sizes(config: Config, topology: Topology, micro_batch: int) -> Sizes:
    """The sizes of one rank's layers in one micro-step; rows are left out where a call would take too long."""
    model, moe, kind = config.model, config.moe, topology.world.device.type
    length, tokens = config.data.sequence_length, micro_batch * config.data.sequence_length
    is_half = config.train.precision == "bf16"
    operations = kernel_operations(model, moe)
    width = 2 * model.resolved_d_inner if "selective_scan" in operations else model.resolved_d_ff
    matmul = [tokens, model.d_model, -(-width // topology.tensor)]
    wanted: list[list[int] | None] = [list(matmul), None, None]
    matmul[0] = _fewer(tokens, MOST_OPERATIONS[kind] / (2 * math.prod(matmul[1:])))
    scan = grouped = None
    if "selective_scan" in operations:
        scan = [micro_batch, length, -(-model.resolved_d_inner // topology.tensor), model.d_state]
        wanted[1] = list(scan)
        scan[0] = _fewer(micro_batch, MOST_UPDATES[kind] / math.prod(scan[1:]))
        scan[1] = _fewer(length, MOST_UPDATES[kind] / (scan[0] * math.prod(scan[2:])))
    if "grouped_matmul" in operations:
        routing, over = moe, topology.expert
        hidden = (moe.d_expert or model.resolved_d_ff) // (topology.tensor if topology.expert_tensor else 1)
        if not has(model, MoE):  # all experts are inside Mamba, each of a projection's channels
            routing, over, hidden = moe.inner_routing, topology.inner_expert, model.resolved_d_inner // topology.tensor
        grouped = [max(1, routing.experts // over), tokens * routing.top_k, model.d_model, max(1, hidden)]
        wanted[2] = list(grouped)
        grouped[0] = _fewer(grouped[0], MOST_WEIGHTS[kind] / math.prod(grouped[2:]))
        grouped[1] = _fewer(grouped[1], MOST_OPERATIONS[kind] / (2 * math.prod(grouped[2:])))
    return Sizes(
        tokens=tokens,
        dtype="bfloat16" if is_half else "float32",
        matmul=matmul,
        copy_bytes=COPY_BYTES[kind],
        scan=scan,
        grouped=grouped,
        is_whole=[matmul, scan, grouped] == wanted,
    )


def measure_compute(config: Config, topology: Topology, sizes: Sizes) -> Compute:
    """What this rank computes per second; every rank measures at once, as in training."""
    device, dtype = topology.world.device, getattr(torch, sizes.dtype)
    matmul = seconds_of(_matmul(sizes.matmul, dtype, device), device)
    copy = seconds_of(_copy(sizes.copy_bytes, device), device)
    scan = seconds_of(_scan(config, sizes.scan, dtype, device), device) if sizes.scan else None
    grouped = seconds_of(_grouped(config, sizes.grouped, dtype, device), device) if sizes.grouped else None
    return Compute(
        rank=topology.world.rank,
        machine=socket.gethostname(),
        matmul_flops=2 * math.prod(sizes.matmul) / matmul,
        copy_bytes=2 * sizes.copy_bytes / copy,
        scan_tokens=sizes.scan[0] * sizes.scan[1] / scan if sizes.scan and scan else None,
        grouped_flops=2 * math.prod(sizes.grouped[1:]) / grouped if sizes.grouped and grouped else None,
        memory_bytes=device_bytes(topology.world),
    )


def device_bytes(world: World) -> int:
    """Memory of this rank's GPU, or its share of the machine's."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return host_bytes() // world.local_size


def measure_storage(folder: Path) -> Storage:
    """Write a file into the run's folder, to the disk itself, and read it again; for one rank of each machine."""
    path = folder / f".preflight-{socket.gethostname()}-{os.getpid()}"
    chunk = os.urandom(CHUNK)  # some file systems compress
    written, begin = 0, time.perf_counter()
    try:
        with path.open("xb", buffering=0) as file:
            while written < STORAGE_BYTES and time.perf_counter() - begin < STORAGE_SECONDS:
                written += file.write(chunk)
            os.fsync(file.fileno())
            write = time.perf_counter() - begin
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK) and time.perf_counter() - begin < STORAGE_SECONDS:
                pass
            read, seconds = file.tell(), time.perf_counter() - begin
    finally:
        path.unlink(missing_ok=True)
    return Storage(
        machine=socket.gethostname(), bytes=written, write_bytes=written / write, read_bytes=read / max(seconds, 1e-9)
    )


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, after one that does not count; calls are repeated for about `SECONDS`."""
    times: list[float] = []
    _timed(call, device)
    begin = time.perf_counter()
    while len(times) < MOST_CALLS and (not times or time.perf_counter() - begin < SECONDS):
        times.append(_timed(call, device))
    return statistics.median(times)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _matmul(shape: list[int], dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    rows, width, out = shape
    x, weight = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, width), (width, out)))
    return lambda: x @ weight


def _copy(size: int, device: torch.device) -> Callable[[], object]:
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _scan(config: Config, shape: list[int], dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Forward and backward of the selective scan: batch, length, channels, states."""
    batch, length, channels, states = shape

    def tensor(*dimensions: int, as_dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(dimensions, device=device).to(as_dtype).requires_grad_()

    x, delta, z = (tensor(batch, length, channels) for _ in range(3))
    decay = -torch.rand(channels, states, device=device)
    b, c = (tensor(batch, length, states) for _ in range(2))
    skip, bias = (tensor(channels, as_dtype=torch.float32) for _ in range(2))

    def call() -> None:
        y, _ = selective_scan(x, delta, decay, b, c, skip, z, bias, backend=config.run.kernels)
        torch.autograd.grad(y.sum(), (x, delta, z, b, c, skip, bias))

    return call


def _grouped(config: Config, shape: list[int], dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """The experts' product: groups, rows in all, in, out; rows are spread evenly."""
    groups, rows, width, out = shape
    x = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(groups, width, out, device=device, dtype=dtype)
    counts = torch.full((groups,), rows // groups, device=device)
    counts[: rows % groups] += 1
    return lambda: grouped_matmul(x, weight, counts, backend=config.run.kernels)


def _fewer(count: int, most: float) -> int:
    """`count`, or as much of it as `most` allows, at least one."""
    return max(1, min(count, int(most)))
