"""What ``preflight.json`` holds: pydantic models whose descriptions are its documentation.

Bytes, seconds and operations are plain numbers in base units; a rate is per second. ``null`` is what was not, or could
not be, measured.
"""

import itertools
from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator

FORMAT_VERSION = 1
Level = Literal["ok", "warning", "refused"]
LEAST, MOST = 1e-30, 1e30  # of what is measured: products and quotients of such numbers are numbers


def _measured(description: str, default: Any = ...) -> Any:
    """A field that is a positive number, or null where its type allows it."""
    return Field(default, description=description, ge=LEAST, le=MOST, allow_inf_nan=False)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Finding(_Record):
    """One line of what was found."""

    level: Level = Field(description="ok; warning: it trains, but see to it; refused: it would fail")
    subject: str = Field(description="what was looked at: versions, kernels, clocks, network, folders, data, ...")
    machines: list[str] = Field([], description="host names that it is about; none: all")
    line: str = Field(description="what is, or what is wrong, where, and how to fix it")


class Interface(_Record):
    """An address of a machine."""

    name: str = Field(description="of the interface, as GLOO_SOCKET_IFNAME takes it")
    address: str = Field(description="IPv4 or IPv6")


class SourceFacts(_Record):
    """What a rank sees of a source of data."""

    source: str = Field(description="as data.train or data.validation has it")
    files: int = Field(0, description="how many")
    size: int = Field(0, description="bytes, all files together")
    content: str = Field("", description="hash of names, sizes and manifests")
    times: str = Field("", description="hash of the times of change")
    is_documents: bool = Field(False, description="text that is tokenized into data.cache first")
    fault: str | None = Field(None, description="why it cannot be read")


class DiskFacts(_Record):
    """The disk that the run's folder lies on."""

    free_bytes: int | None = Field(None, description="free for this user")
    checkpoints: int = Field(0, description="how many lie there already")
    fault: str | None = Field(None, description="why the folder cannot be written")


class RankFacts(_Record):
    """What one rank knows of itself and its machine."""

    rank: int
    local_rank: int = Field(description="among the ranks of its machine")
    machine: str = Field(description="host name")
    device: str = Field(description="cpu, or the GPU's name")
    versions: dict[str, str] = Field(description="Python and libraries -> version")
    revision: str = Field(description="commit of the checkout, marked dirty where files differ; or the wheel's version")
    sources: str = Field(description="hash of the package's source files")
    kernels: dict[str, str] | None = Field(None, description="operation -> back end; null in the short form")
    kernels_build: str | None = Field(None, description="key of the built C++ kernels; null: not used")
    host_addresses: list[str] = Field([], description="what the host name resolves to on this machine")
    interfaces: list[Interface] = Field([], description="addresses of the interfaces that are up, loopback too")
    asked_interfaces: dict[str, str] = Field({}, description="GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, where set")
    address: str | None = Field(None, description="at which gloo will listen for others; null: it finds none")
    route_interface: str | None = Field(None, description="the interface that leads to rank 0's machine")
    unreached: dict[str, str] = Field({}, description="machine whose address this one could not connect to -> why")
    data: list[SourceFacts] = Field([], description="each source, training and validation")
    disk: DiskFacts = DiskFacts()
    shared_memory_bytes: int | None = Field(None, description="size of /dev/shm; null: there is none")
    open_files: int | None = Field(None, description="RLIMIT_NOFILE, soft; null: no limit")
    most_open_files: int | None = Field(None, description="RLIMIT_NOFILE, hard; null: no limit")
    keepalive: Literal["unused", "set", "missing", "unseen"] = Field(
        "unused", description="ssh keep-alives of deepspeed --hostfile; unseen: the launcher is on another machine"
    )


class Clock(_Record):
    """A machine's clock against rank 0's."""

    machine: str
    offset_seconds: float = Field(description="its time minus rank 0's")
    delay_seconds: float = Field(description="round trip of the sample: the offset is right to half of it")


class Folder(_Record):
    """Who sees the same folder."""

    name: str = Field(description="run.folder, data.cache, or a cache of a library")
    path: str = Field(description="on rank 0")
    groups: list[list[str]] = Field(description="machines that see the same one, group by group; rank 0's first")
    is_seen_by_all: bool = Field(description="every rank read what rank 0 wrote, and saw every other rank's file")


class Sizes(_Record):
    """The sizes that were measured with, of this configuration where they fit the time."""

    tokens: int = Field(description="of a micro-step on a device", gt=0)
    dtype: Literal["float32", "bfloat16"]
    matmul: list[int] = Field(description="rows, in, out", min_length=3, max_length=3)
    copy_bytes: int = Field(gt=0)
    scan: list[int] | None = Field(
        description="batch, length, channels, states; null: the model has no scan", min_length=4, max_length=4
    )
    grouped: list[int] | None = Field(
        description="groups, rows in all, in, out; null: the model has no experts", min_length=4, max_length=4
    )
    is_whole: bool = Field(description="false: the configuration's sizes were reduced to fit the time")

    @field_validator("matmul", "scan", "grouped")
    @classmethod
    def _are_positive(cls, sizes: list[int] | None) -> list[int] | None:
        if sizes and not all(0 < size < MOST for size in sizes):
            raise ValueError("sizes are positive")
        return sizes


class Compute(_Record):
    """What one rank computes while all do."""

    rank: int
    machine: str
    matmul_flops: float = _measured("floating-point operations per second of the matrix product")
    copy_bytes: float = _measured("bytes read and written per second")
    scan_tokens: float | None = _measured("tokens per second of the selective scan, forward and backward")
    grouped_flops: float | None = _measured("operations per second of the experts' grouped product")
    memory_bytes: int | None = Field(
        None, description="of the GPU, or this rank's share of the machine's memory", gt=0, le=2**60
    )


class Storage(_Record):
    """The run's folder as a machine writes and reads it, all machines at once."""

    machine: str
    bytes: int = Field(description="written, to the disk itself (fsync), and read")
    write_bytes: float = _measured("per second")
    read_bytes: float = _measured("per second, the machine's own page cache dropped where that is possible")


class Link(_Record):
    """Two ranks that talk, while no other pair uses their machines' links."""

    ranks: tuple[int, int]
    machines: tuple[str, str]
    latency_seconds: float = _measured("one way: half of the smallest round trip of 8 bytes")
    bytes_per_second: float = _measured("in one direction")
    message_bytes: int


class Collective(_Record):
    """A collective over ranks, as training calls it."""

    operation: Literal["all_reduce", "all_to_all"]
    group: int = Field(description="ranks in a group; all groups run at once", gt=0)
    bytes: int = Field(description="that a rank gives")
    config_bytes: int = Field(description="that a rank gives in training; more than bytes where the time did not do")
    seconds: float = _measured("of the slowest rank, the median of several calls")


What = Literal["product", "pass", "kernel", "attention", "all-reduce", "all-gather", "reduce-scatter", "all-to-all"]


class Curve(_Record):
    """How speed depends on size."""

    what: What = Field(
        description="product: a linear layer; pass: a sum into new memory; kernel: our norm; "
        "product, kernel and attention forward and backward"
    )
    ranks: int = Field(description="that take part in a call", gt=0)
    points: list[tuple[float, float]] = Field(
        description="product: smallest dimension, operations per second; attention: operations, and those per second; "
        "else: bytes (that an operator reads and writes; of a collective's larger side), seconds",
        min_length=1,
    )

    @field_validator("points")
    @classmethod
    def _ascend(cls, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        if not all(LEAST <= number <= MOST for point in points for number in point):
            raise ValueError("a curve's sizes and values are positive numbers")
        if not all(left < right for (left, _), (right, _) in itertools.pairwise(points)):
            raise ValueError("a curve's sizes ascend")
        return points


class Measures(_Record):
    """The numbers; how fast each rank, disk and link is."""

    sizes: Sizes
    compute: list[Compute] = Field(min_length=1)
    storage: list[Storage]
    links: list[Link]
    collectives: list[Collective]
    curves: list[Curve] = Field([], description="what a plan of a step needs (tools/plan.py --measured)")


class Report(_Record):
    """A whole preflight."""

    format_version: int = FORMAT_VERSION
    made: str = Field(description="when, ISO 8601, UTC")
    seconds: float = Field(description="how long it took")
    world_size: int = Field(description="ranks", gt=0)
    machines: dict[str, list[int]] = Field(description="host name -> its ranks", min_length=1)
    checkpoint_bytes: int | None = Field(description="of one checkpoint of this configuration; null: not known")
    findings: list[Finding]
    ranks: list[RankFacts] = Field(min_length=1)
    clocks: list[Clock]
    folders: list[Folder]
    measures: Measures | None = Field(description="null where the ranks cannot be joined")

    @field_validator("machines")
    @classmethod
    def _have_ranks(cls, machines: dict[str, list[int]]) -> dict[str, list[int]]:
        if not all(machines.values()):
            raise ValueError("every machine has ranks")
        return machines

    @property
    def refusals(self) -> list[Finding]:
        """What a run would fail of."""
        return [finding for finding in self.findings if finding.level == "refused"]


def schema() -> str:
    """The models for people: one line for each field, nested ones indented."""
    return "\n".join(_describe(Report, 1))


def _describe(model: type[BaseModel], depth: int) -> Iterator[str]:
    for name, field in model.model_fields.items():
        kind = str(field.annotation).replace("moe_mamba.preflight.report.", "").replace("typing.", "")
        if isinstance(field.annotation, type) and not get_args(field.annotation):
            kind = field.annotation.__name__
        yield f"{'  ' * depth}{name}: {kind}" + (f"  {field.description}" if field.description else "")
        for nested in _models(field.annotation):
            yield from _describe(nested, depth + 1)


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    """The records that a type is made of."""
    if isinstance(annotation, type) and not get_args(annotation):
        if issubclass(annotation, BaseModel):
            yield annotation
        return
    for part in get_args(annotation):
        yield from _models(part)
