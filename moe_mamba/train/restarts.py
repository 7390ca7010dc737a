"""The start of a run in the words of its events: how often it was started, why again, and on which machines."""

import os
from collections import Counter
from collections.abc import Sequence

import torch

from moe_mamba.preflight.facts import device_name, versions
from moe_mamba.run.console import Screen
from moe_mamba.run.events import STARTS, Events, read_events, why_ended
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.heartbeats import forget_machines
from moe_mamba.train.start_up import StartUp

# How often a launcher says that it has started this job again: torchrun's agent and SLURM.
COUNTERS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def note_start(
    events: Events,
    folder: RunFolder,
    screen: Screen,
    step: int,
    steps: int,
    hosts: Sequence[str],
    device: torch.device,
) -> None:
    """Note that training begins, or goes on: the why, and another number of processes, are said as well.

    Only the first rank does anything.

    Args:
        events: where it is noted.
        folder: of the run.
        screen: where a restart is said.
        step: steps that are made already.
        steps: of the whole run.
        hosts: rank -> name of its machine.
        device: that this rank computes on.
    """
    if not events.enabled:
        return
    machines = dict(Counter(hosts))
    forget_machines(folder.path, set(machines))
    before, _ = read_events(folder.path)
    starts = [event for event in before if event["event"] in STARTS]
    details = {
        "processes": len(hosts),
        "machines": machines,
        "device": device_name(device),
        "versions": versions(),
        "steps": steps,
        "log_bytes": folder.log.stat().st_size if folder.log.exists() else 0,
        "launcher": {name: os.environ[name] for name in COUNTERS if name in os.environ},
    }
    if not starts:
        events.write("start", step, **details)
        return
    reason = why_ended(before, folder.log)
    events.write("restart", step, number=len(starts), reason=reason, **details)
    screen.say(f"restart   number {len(starts)}, after step {step:,}: {reason}")
    was = starts[-1].get("processes")
    if was != len(hosts):
        screen.say(f"world     {was} processes before, {len(hosts)} now, on {', '.join(machines)}")


def note_first_step(start_up: StartUp, events: Events, screen: Screen, step: int) -> None:
    """Note, once, that this start's first step is over, and where the time until then went."""
    if "first step" in start_up.seconds:
        return
    start_up.reached("first step")
    events.write("first_step", step, seconds={part: round(seconds, 3) for part, seconds in start_up.seconds.items()})
    screen.say(f"start     {start_up.describe()}")
