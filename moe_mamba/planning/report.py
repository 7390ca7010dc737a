"""An estimate for people and for programs: a table, and the same numbers as JSON."""

import math
import shlex
from collections.abc import Mapping
from typing import Any

from moe_mamba.config import Config
from moe_mamba.model.pattern import describe, has_experts
from moe_mamba.planning.estimate import Estimate
from moe_mamba.planning.load import Load
from moe_mamba.planning.memory import size

KINDS = ("weights", "gradients", "optimizer", "activations", "communication", "update", "fragmentation")
UPDATE = ", once activations and communication's are gone"
NAMES = {
    "products": "products",
    "experts": "experts' products",
    "attention": "attention",
    "scan": "scan",
    "memory": "norms, activations, copies",
    "inside": "collectives inside machines",
    "between": "collectives between machines",
    "optimizer": "engine and optimizer",
    "host": "waiting for the host",
}


def numbers(one: Estimate) -> dict[str, Any]:
    """Everything that is known of an estimate, in bytes, seconds and operations."""
    counts, topology, time = one.plan.model.parameter_counts(), one.plan.topology, one.time
    config = one.plan.config
    return {
        "cluster": one.cluster.name,
        "gpus": one.gpus,
        "load": one.load.text,
        "tensor": topology.tensor,
        "expert": topology.expert,
        "expert_tensor": topology.expert_tensor,
        "data": topology.data,
        "zero": config.parallel.zero,
        "offload_optimizer": config.parallel.offload_optimizer,
        "recompute": config.train.recompute,
        "micro_batch": one.micro_batch,
        "accumulation": one.accumulation,
        **{f"{name}_parameters": count for name, count in counts.items()},
        "training_flops_per_token": one.flops_per_token,
        "fits": one.fits,
        "memory_bytes": {**{kind: getattr(one.memory, kind) for kind in KINDS}, "total": one.memory.total},
        "host_bytes": one.memory.host,
        "memory_bytes_with_recompute" if not config.train.recompute else "memory_bytes_without_recompute": (
            one.memory_otherwise.total
        ),
        "device_bytes": one.cluster.memory,
        "collectives": [flow._asdict() for flow in one.flows],
        "step_seconds": time.seconds,
        "parts_seconds": time.parts,
        "hidden_seconds": time.hidden,
        "bound": time.bound,
        "tokens_per_second_per_gpu": one.tokens_per_second,
        "mfu": one.mfu,
        "checkpoint_bytes": one.checkpoint_bytes,
        "checkpoint_seconds": one.checkpoint_seconds,
        "tokens": one.tokens,
        "days": one.days,
        "gpu_hours": one.gpu_hours,
        "cost": one.cost,
    }


def table(one: Estimate) -> str:
    """The estimate for people."""
    counts, config = one.plan.model.parameter_counts(), one.plan.config
    rows = [
        ("pattern", describe(config.model, config.moe)),
        ("parameters", f"{counts['total']:,} without embedding, head and norms; {counts['active']:,} active per token"),
        ("  whole", f"{counts['total'] + counts['norm'] + counts['embedding']:,} with embedding, head and norms"),
        ("  work", f"{one.flops_per_token:.3g} FLOPs per token, the scan's included"),
        ("cluster", f"{one.gpus} GPUs, {one.cluster.name}; load of the experts: {one.load.text}{_unread(one)}"),
        ("layout", layout_of(one)),
        *_memory_rows(one),
        *_traffic_rows(one),
        *_time_rows(one),
        *_run_rows(one),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _unread(one: Estimate) -> str:
    """What is to be said of a load that changes no figure."""
    is_read = one.plan.topology.expert > 1 or one.plan.topology.inner_expert > 1 or one.load == Load()
    return "" if is_read else ", which changes nothing where each GPU has all experts (parallel.expert=1)"


def layout_of(one: Estimate) -> str:
    """How the model is laid out, in one line."""
    config, topology = one.plan.config, one.plan.topology
    experts = ""
    if has_experts(config.model, config.moe):
        experts = f", experts over {topology.expert}" + " and their tensor-parallel ranks" * topology.expert_tensor
    extras = (
        ", optimizer in the CPU's memory" * config.parallel.offload_optimizer + ", recomputed" * config.train.recompute
    )
    return (
        f"tensor {topology.tensor} x data {topology.data}{experts}; {config.train.precision}, ZeRO "
        f"{config.parallel.zero}{extras}; {one.accumulation} x {one.micro_batch} x "
        f"{config.data.sequence_length:,} tokens"
    )


def _memory_rows(one: Estimate) -> list[tuple[str, str]]:
    memory, otherwise = one.memory, one.memory_otherwise
    there = f"{size(int(one.room))} of {size(int(one.cluster.memory))} to be filled"
    state = "fits" if one.fits else "DOES NOT FIT"
    how = "without" if one.plan.config.train.recompute else "with"
    rows = [("memory", f"{size(memory.total)} on the fullest rank, {there}: {state}")]
    rows += [(f"  {kind}", size(getattr(memory, kind)) + UPDATE * (kind == "update")) for kind in KINDS]
    rows.append((f"  {how} recomputing", f"{size(otherwise.total)}, activations {size(otherwise.activations)}"))
    if memory.host:
        rows.append(("  of the CPU's", f"{size(memory.host)} per device, of {size(int(one.host_room))}"))
    return rows


def _traffic_rows(one: Estimate) -> list[tuple[str, str]]:
    rows = [("traffic", f"{size(sum(flow.bytes for flow in one.flows))} per step and rank")]
    for flow in sorted(one.flows, key=lambda flow: -flow.bytes):
        rows.append(
            (f"  {flow.part}", f"{size(flow.bytes)} by {flow.calls:,} {flow.kind} over {flow.ranks:,} ({flow.group})")
        )
    return rows


def _time_rows(one: Estimate) -> list[tuple[str, str]]:
    time = one.time
    rows = [("step", f"{_seconds(time.seconds)}; bound by {time.bound}")]
    for part, seconds in time.parts.items():
        if seconds >= 0.001 * time.seconds:
            rows.append((f"  {NAMES[part]}", f"{_seconds(seconds)}, {seconds / time.seconds:.0%}"))
    if time.hidden:
        rows.append(("  beside computing", f"{_seconds(time.hidden)} of collectives, not counted"))
    rate = f"{_round(one.tokens_per_second)} tokens/s/GPU, MFU {one.mfu:.1%}"
    return [*rows, ("speed", f"{rate}, {_round(one.tokens_per_second * one.gpus)} tokens/s in all")]


def _run_rows(one: Estimate) -> list[tuple[str, str]]:
    money = "" if one.cost is None else f", {_round(one.cost)} at {one.price:g} per GPU hour"
    return [
        ("checkpoint", f"{size(one.checkpoint_bytes)}, written in {_seconds(one.checkpoint_seconds)}"),
        ("run", f"{one.tokens:.3g} tokens: {_round(one.days)} days, {_round(one.gpu_hours)} GPU hours{money}"),
    ]


def command_line(one: Estimate, config: str | None, settings: Config, overrides: Mapping[str, Any]) -> str:
    """How to train in the layout of an estimate.

    Args:
        one: the estimate.
        config: file of the configuration; None: defaults.
        settings: as file and ``overrides`` have it, whose layout may be another one.
        overrides: keys that were given besides the file.
    """
    parallel, train = one.plan.config.parallel, one.plan.config.train
    keys: dict[str, object] = {
        "parallel.tensor": parallel.tensor,
        "parallel.expert": parallel.expert,
        "parallel.expert_tensor": parallel.expert_tensor,
        "parallel.zero": parallel.zero,
        "parallel.offload_optimizer": parallel.offload_optimizer,
        "train.recompute": train.recompute,
        "train.micro_batch": one.micro_batch,
    }
    if one.tokens != settings.steps * settings.train.global_batch * settings.data.sequence_length:
        keys |= {"train.steps": None, "train.tokens": one.tokens}
    plain = Config()
    said = [
        f"--{key}={_yaml(value)}"
        for key, value in keys.items()
        if key in overrides or not value == _value(plain, key) == _value(settings, key)
    ]
    others = [shlex.quote(f"--{key}={_yaml(value)}") for key, value in overrides.items() if key not in keys]
    start = f"--num_gpus={one.gpus}" if one.gpus <= one.cluster.gpus_per_machine else "--hostfile hosts"
    file = f" --config {shlex.quote(config)}" if config else ""
    return " ".join([f"deepspeed {start} launch/train.py{file}", *said, *others])


def _value(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:,.0f} s"


def _round(number: float) -> str:
    """Three digits that say something, with commas."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    digits = 2 - math.floor(math.log10(abs(number)))
    return f"{round(number, digits):,.{max(0, digits)}f}"
