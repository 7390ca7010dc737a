"""Figures of a cluster from a command line, ``--cluster.memory_gib=141`` and the like, in units of data sheets."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from moe_mamba.config_types import DEVICES, Range, allowed
from moe_mamba.errors import UserError, shown
from moe_mamba.planning.cluster import GIB, Cluster

Rate = Annotated[float | None, Range(1e-6, 1e9)]


class Figures(BaseModel):
    """What may replace a figure of a preset or of a preflight.

    Attributes:
        gpus_per_machine: devices of a machine.
        memory_gib: of a device, GiB.
        bf16_tflops: peak of dense bf16 products, 10^12 operations a second.
        fp32_tflops: peak of fp32 products.
        plain_tflops: peak of fp32 arithmetic outside products.
        memory_gbs: rate of the device's memory, 10^9 bytes a second.
        host_gbs: rate between a device and the machine's memory.
        host_memory_gib: of a machine's own memory, GiB.
        inside_gbs: rate of a device to others of its machine, in one direction.
        between_gbs: rate of a device to other machines.
        inside_us: latency inside a machine, 10^-6 seconds.
        between_us: latency between machines.
        disk_gbs: rate at which a machine writes checkpoints.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    gpus_per_machine: Annotated[int | None, Range(1, DEVICES)] = None
    memory_gib: Rate = None
    bf16_tflops: Rate = None
    fp32_tflops: Rate = None
    plain_tflops: Rate = None
    memory_gbs: Rate = None
    host_gbs: Rate = None
    host_memory_gib: Rate = None
    inside_gbs: Rate = None
    between_gbs: Rate = None
    inside_us: Rate = None
    between_us: Rate = None
    disk_gbs: Rate = None


UNITS = {
    "memory_gib": ("memory", GIB),
    "bf16_tflops": ("bf16", 1e12),
    "fp32_tflops": ("fp32", 1e12),
    "plain_tflops": ("plain", 1e12),
    "memory_gbs": ("memory_rate", 1e9),
    "host_gbs": ("host_rate", 1e9),
    "host_memory_gib": ("host_memory", GIB),
    "inside_gbs": ("inside_rate", 1e9),
    "between_gbs": ("between_rate", 1e9),
    "inside_us": ("inside_latency", 1e-6),
    "between_us": ("between_latency", 1e-6),
    "disk_gbs": ("disk_rate", 1e9),
}


def change(cluster: Cluster, given: Mapping[str, Any]) -> Cluster:
    """The same with the figures that were given, by their names in ``Figures``.

    Raises:
        UserError: a figure is not known, or no number in its range.
    """
    try:
        figures = Figures.model_validate(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        name = f"--cluster.{first['loc'][0]}"
        if first["type"] == "extra_forbidden":
            known = ", ".join(Figures.model_fields)
            raise UserError(f"{name} is no figure of a cluster: there are {known}") from None
        raise UserError(f"{name}={shown(first['input'])}: {allowed(first)}") from None
    changes: dict[str, float | None] = {"gpus_per_machine": figures.gpus_per_machine}
    for name, (attribute, unit) in UNITS.items():
        value = getattr(figures, name)
        changes[attribute] = None if value is None else value * unit
    return cluster.changed(**changes)
