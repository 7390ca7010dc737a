"""What a cluster can do: presets by their makers' data sheets, and what is reached of a peak.

A preset's peaks are the makers'; the shares of them that training reaches are ours, stated here once and not fitted
to any result. A measured cluster (``preflight/measured.py``) has curves in the place of both.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import torch

from moe_mamba.errors import UserError
from moe_mamba.planning.devices import peak_flops

GIB = 2**30
Operation = Literal["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]


@dataclass(frozen=True)
class Link:
    """How fast a device talks to others, in one direction.

    Attributes:
        rate: bytes a second.
        latency: seconds until a message begins to arrive.
    """

    rate: float
    latency: float


@dataclass(frozen=True)
class Curve:
    """Measured values over sizes, between which logarithms are joined by lines; both grow.

    Attributes:
        points: (size, value), by size.
    """

    points: tuple[tuple[float, float], ...]

    def at(self, size: float) -> float:
        """The value of a size: below the first point its value, beyond the last one the last slope's."""
        points = self.points
        if size <= points[0][0] or len(points) == 1:
            return points[0][1]
        for (left, low), (right, high) in itertools.pairwise(points):
            if size <= right or (right, high) == points[-1]:
                slope = math.log(high / low) / math.log(right / left)
                return low * (size / left) ** slope
        raise AssertionError("points are in order")

    @property
    def most(self) -> float:
        """The largest value that was measured."""
        return max(value for _, value in self.points)


@dataclass(frozen=True)
class Reached:
    """Shares of peaks that training reaches.

    Attributes:
        products: dense bf16 or fp32 products of large matrices: 0.65 (an H200 reaches 0.8 in a product alone).
        experts: grouped products: 0.5.
        attention: fused attention: 0.4, the mean of forward and backward of causal kernels.
        scan: 0.26 of the plain fp32 units, as our Triton scan by its instruction counts (docs/measurements.md).
        memory: of the memory's rate: 0.8.
        links: of the links' rate: 0.8.
        beside: of what could run beside computing, how much does: 0.8.
    """

    products: float = 0.65
    experts: float = 0.5
    attention: float = 0.4
    scan: float = 0.26
    memory: float = 0.8
    links: float = 0.8
    beside: float = 0.8


@dataclass(frozen=True)
class Cluster:
    """Machines of one kind.

    Attributes:
        name: for people.
        gpus_per_machine: devices of a machine.
        memory: bytes of a device that a process can allocate.
        bf16: floating-point operations a second of dense bf16 products.
        fp32: of fp32 products, without TF32.
        plain: of fp32 arithmetic outside products.
        memory_rate: bytes a second of the device's memory.
        host_rate: bytes a second between a device and the machine's memory.
        host_memory: bytes of a machine's own memory.
        inside: from a device to the others of its machine.
        between: from a device to other machines.
        disk_rate: bytes a second that a machine writes of a checkpoint.
        operator: seconds that the host needs to start an operator.
        reached: shares of all these.
        is_gpu: streams run beside one another, and the host runs ahead of the device.
        products: smallest dimension of a product -> operations a second; measured clusters have it.
        passes: bytes that an operator reads and writes -> seconds; measured clusters have it.
        kernels: the same of our kernels, which are one operator where they are fused, and several elsewhere.
        attention: operations a second of attention; None: a share of those of products.
        collectives: operation -> (bytes -> seconds), over ``measured_ranks`` ranks; measured clusters have it.
        measured_ranks: see ``collectives``.
    """

    name: str
    gpus_per_machine: int
    memory: float
    bf16: float
    fp32: float
    plain: float
    memory_rate: float
    host_rate: float
    host_memory: float
    inside: Link
    between: Link
    disk_rate: float
    operator: float = 6e-6
    reached: Reached = Reached()
    is_gpu: bool = True
    products: Curve | None = None
    passes: Curve | None = None
    kernels: Curve | None = None
    attention: float | None = None
    collectives: Mapping[str, Curve] = field(default_factory=lambda: MappingProxyType({}))
    measured_ranks: int = 1

    @classmethod
    def of(cls, name: str) -> "Cluster":
        """The preset of this name.

        Raises:
            UserError: there is none; names those that there are.
        """
        if name not in PRESETS:
            raise UserError(
                f"cluster={name!r} is not known: give {', '.join(PRESETS)}, or --measured FILE of a preflight"
            )
        return PRESETS[name]

    def changed(self, **figures: float | None) -> "Cluster":
        """The same with other figures: fields of this class, ``inside_rate``, ``between_latency`` and the like.

        A figure None stays as it is. A figure that replaces a peak is still multiplied by the share that is reached.
        """
        changes: dict[str, object] = {}
        for name, value in figures.items():
            if value is None:
                continue
            link, _, part = name.rpartition("_")
            if link in ("inside", "between"):
                changes[link] = replace(changes.get(link, getattr(self, link)), **{part: value})  # type: ignore[type-var]
            else:
                changes[name] = value
        return replace(self, name=f"{self.name}, changed" if changes else self.name, **changes)  # type: ignore[arg-type]

    def product_rate(self, is_half: bool, smallest: float, share: float) -> float:
        """Operations a second of a product whose smallest dimension is ``smallest``."""
        if self.products is not None:
            return min(self.products.at(max(1.0, smallest)), self.products.most)
        return share * (self.bf16 if is_half else self.fp32)

    def peak(self, is_half: bool) -> float:
        """Operations a second of which MFU is a share: of products, by a data sheet.

        Without one, on a measured CPU, it is the fastest that was measured: products, scan or attention.
        """
        if self.products is None:
            return self.bf16 if is_half else self.fp32
        return max(self.bf16 if is_half else self.fp32, self.products.most, self.plain, self.attention or 0.0)

    def pass_seconds(self, size: float, operators: float) -> float:
        """Seconds of passes over ``size`` bytes in all by that many of our kernels."""
        if self.kernels is not None and operators:
            return operators * self.kernels.at(size / operators)
        return size / (self.memory_rate * self.reached.memory)

    def collective_seconds(self, kind: str, size: float, calls: int, ranks: Sequence[int]) -> tuple[float, float]:
        """Seconds that calls of a collective take inside machines, and between them.

        A ring moves (n - 1) / n of the bytes of an all-gather or reduce-scatter, twice that of an all-reduce. Where a
        group has m ranks on each of k machines, what goes between machines is shared by the m ranks' own links; inside
        and between are counted as one after the other. An all-to-all sends (n - 1) / n of its bytes, what stays
        on the machine inside, the rest between.

        Args:
            kind: of the collective.
            size: bytes of all calls together, of the larger side on a rank.
            calls: how many.
            ranks: of the group; rank r is on machine r // ``gpus_per_machine``.
        """
        count = len(ranks)
        machines = len({rank // self.gpus_per_machine for rank in ranks})
        if kind in self.collectives and self.measured_ranks > 1:
            scale = (1 - 1 / count) / (1 - 1 / self.measured_ranks)
            seconds = calls * scale * self.collectives[kind].at(size / max(1, calls))
            return (seconds, 0.0) if machines == 1 else (0.0, seconds)
        here = count / machines
        if kind == "all-to-all":
            within, out = size * (here - 1) / count, size * (count - here) / count
        else:
            turns = 2 if kind == "all-reduce" else 1
            within = turns * size * (here - 1) / here
            out = turns * size / here * (machines - 1) / machines
        inside = within / (self.inside.rate * self.reached.links) + calls * self.inside.latency * math.log2(
            max(1, here)
        )
        between = out / (self.between.rate * self.reached.links)
        return inside, between + calls * self.between.latency * math.log2(machines)


def _preset(
    gpu: str, memory: float, memory_rate: float, nvlink: float, nic: float, pcie: float, host: float
) -> Cluster:
    """Eight of a GPU in a machine; ``memory`` in GiB, rates in GB/s in one direction, ``host`` memory in TiB."""
    bf16, fp32 = (peak_flops(gpu, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert bf16 is not None
    assert fp32 is not None
    return Cluster(
        name=f"8 x {gpu} a machine",
        gpus_per_machine=8,
        memory=memory * GIB,
        bf16=bf16,
        fp32=fp32,
        plain=fp32,  # without TF32, products in fp32 run on the plain units
        memory_rate=memory_rate * 1e9,
        host_rate=pcie * 1e9,
        host_memory=host * 2**40,
        inside=Link(nvlink * 1e9, 10e-6),
        between=Link(nic * 1e9, 20e-6),
        disk_rate=2e9,
    )


PRESETS: Mapping[str, Cluster] = MappingProxyType(
    {
        # NVIDIA's data sheets of the GPUs, and of the DGX systems of each for links: NVLink's half is one direction,
        # and each GPU has a port of InfiniBand, 200 Gb/s beside A100 and 400 Gb/s beside the others.
        "a100-80": _preset("A100", 79.1, 2039, 300, 25, 25, 2),
        "h100": _preset("H100", 79.1, 3350, 450, 50, 50, 2),
        "h200": _preset("H200", 139.8, 4800, 450, 50, 50, 2),
        "b200": _preset("B200", 178.3, 8000, 900, 50, 50, 4),
    }
)
