"""The whole preflight: what the short form finds, kernels and caches, and how fast everything is."""

import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

from moe_mamba.atomic_file import write_atomically
from moe_mamba.config import Config
from moe_mamba.data.tokenizer import load_tokenizer
from moe_mamba.errors import UserError
from moe_mamba.model.pattern import has_experts
from moe_mamba.parallel.distributed import finish_world, from_all, from_first, limit_collectives, start_world
from moe_mamba.parallel.meeting import Meeting
from moe_mamba.parallel.placement import check_shards
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.memory import per_device
from moe_mamba.planning.micro_batch import choose_micro_batch
from moe_mamba.planning.state import FP32
from moe_mamba.preflight.checks import check_speed
from moe_mamba.preflight.compute import measure_compute, measure_storage, sizes
from moe_mamba.preflight.curves import measure_collective_curves, measure_compute_curves, median_curves
from moe_mamba.preflight.exchange import Exchange
from moe_mamba.preflight.links import measure_collectives, measure_links
from moe_mamba.preflight.report import Curve, Finding, Link, Measures, Report
from moe_mamba.preflight.short_form import Comparison, compare
from moe_mamba.run.console import Screen

T = TypeVar("T")
SECONDS_TO_COME = 90.0  # for every rank: a first import from a network disk takes a minute
SECONDS_FOR_COLLECTIVE = 60.0
SLOW, SLOW_DISK_OR_LINK = 0.8, 0.5  # of the median of the others: computing varies less than disks and links


def preflight(config: Config, output: Path, screen: Screen) -> list[Finding]:
    """Look, measure, say what was found, a line each, and write the report; every rank of a launcher calls it.

    Args:
        config: of the run that is to come.
        output: file for the report, in JSON.
        screen: what the user sees.

    Returns:
        What a run would fail of, the same on every rank.

    Raises:
        UserError: the configuration does not fit the world, or a rank did not come.
    """
    say = screen.say
    begin, made = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    world = World.from_environment()
    world.check_devices()
    topology = Topology.of(config, world)
    with Meeting(world, screen.shout) as meeting:
        comparison = compare(Exchange(world, meeting.store, SECONDS_TO_COME), config, thorough=True)
        meeting.start()
        for finding in comparison.findings:
            say(line_of(finding))
        measures, more = None, list[Finding]()
        if not any(finding.subject == "network" for finding in comparison.refusals):
            try:
                measures, more = _measure(config, topology, comparison)
            except RuntimeError as error:  # of gloo and NCCL, whose texts have many lines
                line = f"the ranks cannot talk to one another: {str(error).splitlines()[0]}; the log has more"
                more = [Finding(level="refused", subject="network", line=line)]
    if measures is not None and world.is_first:
        more += speed_findings(measures, comparison.machines)
    for finding in more:
        say(line_of(finding))
    if world.is_first:
        report = _report(comparison, more, measures, made, time.perf_counter() - begin, world)
        _write(report, output)
        for line in summary(measures) if measures else ():
            say(line)
        say(f"report    {output} ({report.seconds:.0f} s)")
    return [finding for finding in (*comparison.findings, *more) if finding.level == "refused"]


def line_of(finding: Finding) -> str:
    """A finding for the screen."""
    return f"{finding.level:<9} {finding.subject}: {finding.line}"


def _measure(config: Config, topology: Topology, comparison: Comparison) -> tuple[Measures, list[Finding]]:
    """Join the world, measure, and leave it: the numbers, and what could not be measured; the same on every rank."""
    world = topology.world
    start_world(world)
    try:
        limit_collectives(SECONDS_FOR_COLLECTIVE)
        machines: dict[str, list[int]] = from_first(comparison.machines)
        plan = _plan(config, topology)
        measured = from_first(sizes(plan.config, topology, choose_micro_batch(plan)))
        compute, no_compute = _from_those_who_can(lambda: measure_compute(plan.config, topology, measured))
        is_first_here = world.rank == min(ranks[0] for ranks in machines.values() if world.rank in ranks)
        can_write = not any(finding.subject in ("run.folder", "disk") for finding in comparison.refusals)
        storage, no_storage = _from_those_who_can(
            lambda: measure_storage(Path(config.run.folder)) if is_first_here and can_write else None
        )
        width = 2 if measured.dtype == "bfloat16" else 4
        dispatch = measured.tokens * config.model.d_model * config.moe.top_k * width
        measures = Measures(
            sizes=measured,
            compute=compute,
            storage=[one for one in storage if one is not None],
            links=measure_links(machines, world.device),
            collectives=measure_collectives(
                topology,
                FP32 * per_device(plan)["parameters_per_device"],
                dispatch if has_experts(config.model, config.moe) else None,
            )
            if world.size > 1
            else [],
            curves=_curves(plan.config, world, getattr(torch, measured.dtype)),
        )
        return measures, [*no_compute, *no_storage]
    finally:
        finish_world()


def _curves(config: Config, world: World, dtype: torch.dtype) -> list[Curve]:
    """How speed depends on size, the same on every rank."""
    computed = median_curves(from_all(measure_compute_curves(config, world.device, dtype)))
    return [*computed, *(measure_collective_curves(world.device) if world.size > 1 else [])]


def _from_those_who_can(measure: Callable[[], T | None]) -> tuple[list[T], list[Finding]]:
    """Every rank's measure, and a finding for each that fails: the others do not wait for it."""
    value, fault = None, None
    try:
        value = measure()
    except (OSError, RuntimeError, UserError) as error:
        text = str(error).splitlines() or [type(error).__name__]
        line = f"{socket.gethostname()} cannot be measured: {text[0]}"
        fault = Finding(level="warning", subject="speed", machines=[socket.gethostname()], line=line)
    everyone = from_all((value, fault))
    values = [one for one, _ in everyone if one is not None]
    return values, [fault for _, fault in everyone if fault is not None]


def _plan(config: Config, topology: Topology) -> RunPlan:
    if not config.has_vocabulary:
        config = config.with_vocabulary(load_tokenizer(config.data.tokenizer).vocab_size)
    check_shards(config, topology)
    return RunPlan.of(config, topology)


def speed_findings(measures: Measures, machines: dict[str, list[int]]) -> list[Finding]:
    """Slow machines, or slow ranks where there is one machine; one line where none is.

    Args:
        measures: of all ranks.
        machines: host name -> its ranks.
    """

    def place(machine: str, rank: int) -> str:
        return machine if len(machines) > 1 else f"rank {rank}"

    def slowest(name: str) -> dict[str, float]:
        values: dict[str, float] = {}
        for one in measures.compute:
            value, where = getattr(one, name), place(one.machine, one.rank)
            if value is not None:
                values[where] = min(value, values.get(where, value))
        return values

    of_ranks = {
        "the matrix product": ("matmul_flops", "FLOP/s"),
        "the memory copy": ("copy_bytes", "bytes/s"),
        "the selective scan": ("scan_tokens", "tokens/s"),
        "the experts' grouped product": ("grouped_flops", "FLOP/s"),
    }
    findings = [
        finding for what, (name, unit) in of_ranks.items() for finding in check_speed(what, unit, slowest(name), SLOW)
    ]
    for what in ("write", "read"):
        rates = {one.machine: getattr(one, f"{what}_bytes") for one in measures.storage}
        findings += check_speed(f"run.folder's {what} rate", "bytes/s", rates, SLOW_DISK_OR_LINK)
    between = [link for link in measures.links if link.machines[0] != link.machines[1]]
    inside = [link for link in measures.links if link.machines[0] == link.machines[1]]
    findings += check_speed("the link to other machines", "bytes/s", _best_rates(between), SLOW_DISK_OR_LINK)
    findings += check_speed("the link inside", "bytes/s", _best_rates(inside), SLOW_DISK_OR_LINK)
    if not findings and len(measures.compute) > 1:
        kind = f"{len(machines)} machines" if len(machines) > 1 else f"{len(measures.compute)} ranks"
        findings = [Finding(level="ok", subject="speed", line=f"no slow one among {kind}")]
    return findings


def _best_rates(links: list[Link]) -> dict[str, float]:
    """Machine -> rate of its best link: a machine whose best one is slow is itself the slow one of its pairs."""
    rates: dict[str, float] = {}
    for link in links:
        for machine in link.machines:
            rates[machine] = max(rates.get(machine, 0.0), link.bytes_per_second)
    return rates


def summary(measures: Measures) -> list[str]:
    """The numbers in a few lines: medians over ranks, machines and links."""
    of_ranks: dict[str, list[Any]] = {
        name: [getattr(one, name) for one in measures.compute if getattr(one, name) is not None]
        for name in ("matmul_flops", "copy_bytes", "scan_tokens", "grouped_flops")
    }
    units = {
        "matmul_flops": ("matrix product", 1e9, "GFLOP/s"),
        "copy_bytes": ("copy", 1e9, "GB/s"),
        "scan_tokens": ("scan", 1.0, "tokens/s"),
        "grouped_flops": ("grouped product", 1e9, "GFLOP/s"),
    }
    said = [
        f"{units[name][0]} {median(values) / units[name][1]:,.1f} {units[name][2]}"
        for name, values in of_ranks.items()
        if values
    ]
    lines = [f"compute   {', '.join(said)} per rank ({measures.sizes.dtype})"]
    if measures.storage:
        write, read = (median(getattr(one, f"{way}_bytes") for one in measures.storage) for way in ("write", "read"))
        lines.append(f"storage   run.folder: write {write / 1e6:,.0f} MB/s, read {read / 1e6:,.0f} MB/s per machine")
    for name, is_inside in (("inside", True), ("between", False)):
        links = [link for link in measures.links if (link.machines[0] == link.machines[1]) == is_inside]
        if links:
            delay = median(link.latency_seconds for link in links)
            rate = median(link.bytes_per_second for link in links)
            lines.append(f"links     {name} machines: {rate / 1e9:,.2f} GB/s, {delay * 1e6:,.0f} us")
    for one in measures.collectives:
        lines.append(
            f"{one.operation:<10} {one.bytes / 1e6:,.1f} MB over {one.group} ranks: {one.seconds * 1e3:,.1f} ms"
        )
    return lines


def _report(
    comparison: Comparison, more: list[Finding], measures: Measures | None, made: str, seconds: float, world: World
) -> Report:
    return Report(
        made=made,
        seconds=seconds,
        world_size=world.size,
        machines=comparison.machines,
        checkpoint_bytes=comparison.checkpoint_bytes,
        findings=[*comparison.findings, *more],
        ranks=comparison.ranks,
        clocks=comparison.clocks,
        folders=comparison.folders,
        measures=measures,
    )


def _write(report: Report, output: Path) -> None:
    try:
        write_atomically(output, report.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}): give another with --output") from None
