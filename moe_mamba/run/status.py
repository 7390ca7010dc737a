"""How a run stands, read from its folder alone: of a run that works, has ended, was killed, or has only begun."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import Any

from moe_mamba.checkpoint.divergence import has_diverged
from moe_mamba.checkpoint.manifest import MANIFEST
from moe_mamba.checkpoint.retention import step_of, steps_in
from moe_mamba.config_file import load_config
from moe_mamba.errors import UserError
from moe_mamba.run import metrics as metrics_file
from moe_mamba.run.events import ENDS, STARTS, read_events, read_lines, time_of, why_ended
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.heartbeats import FOLDER as HEARTBEATS
from moe_mamba.run.heartbeats import read_heartbeats

SECONDS_TO_REPORT = 20.0  # in which a run that has ended may still give signs of life
SILENT = 60.0  # seconds without a sign of life after which a machine is not believed to work
RECENT = 50  # lines of metrics that the present speed and the trend of the loss are taken from


@dataclass
class Status:
    """What is known of a run; None and empty where it is not.

    Attributes:
        state: ``runs``, ``silent`` (it should run, but a machine gives no sign of life), ``finished``, ``stopped``,
            ``died`` (without a word), ``begins`` (this start has begun no step yet).
        why: the reason of a stop.
        ages: machine -> seconds since its last sign of life.
        step: steps that are made.
        steps: of the whole run.
        seconds_left: until the last step, at the present pace; only of a run that works.
        loss: the last one, in nats/token.
        trend: mean loss of the older and of the newer half of the last steps.
        validation: step, and set -> loss, of the last validation.
        nan: how many steps were spoilt by NaN.
        spikes: how many spikes there were.
        left_out: how many batches were left out.
        rewinds: how many times the run went back to a checkpoint.
        restarts: the reason of each, oldest first.
        goodput: share of the wall time since the first start in which steps were made that are kept.
        checkpoint: the newest from which the run can go on.
        slow: (rank, machine, how many times as long as usual) of those that are slow now.
        stalled: whether steps lately waited for data: the machine, and the share of their time.
        damaged: what could not be read.
    """

    state: str
    why: str = ""
    ages: dict[str, float] = field(default_factory=dict)
    step: int = 0
    steps: int | None = None
    seconds_left: float | None = None
    loss: float | None = None
    trend: tuple[float, float] | None = None
    validation: tuple[int, dict[str, float]] | None = None
    nan: int = 0
    spikes: int = 0
    left_out: int = 0
    rewinds: int = 0
    restarts: list[str] = field(default_factory=list)
    goodput: float | None = None
    checkpoint: Path | None = None
    slow: list[tuple[int, str, float]] = field(default_factory=list)
    stalled: tuple[str, float] | None = None
    damaged: list[str] = field(default_factory=list)


def read_status(path: Path, now: datetime | None = None) -> Status:
    """How the run in a folder stands.

    Args:
        path: the run's folder.
        now: the time to judge signs of life by; None: this machine's.

    Raises:
        UserError: the folder is not a run's.
    """
    folder, now = RunFolder(path), now or datetime.now(UTC)
    _check(folder)
    events, lost = read_events(folder.path)
    lines, lost_lines = read_lines(folder.path / metrics_file.FILE, metrics_file.METRICS)
    counts = {"events.jsonl": lost, metrics_file.FILE: lost_lines}
    damaged = [f"{count:,} lines of {name} cannot be read" for name, count in counts.items() if count]
    beats = read_heartbeats(folder.path)
    ages = {host: (now - beat["time"]).total_seconds() for host, beat in beats.items()}
    status = _state(folder, events, ages, now)
    status.damaged = damaged
    status.steps = _steps(folder, events, damaged)
    _read_metrics(status, lines)
    _read_events(status, events)
    saved = [step for step in steps_in(folder.checkpoints) if (step / MANIFEST).is_file() and not has_diverged(step)]
    status.checkpoint = saved[-1] if saved else None
    if status.state not in ("runs", "silent"):  # what was not saved is lost
        lines = [line for line in lines if line["step"] <= (step_of(saved[-1]) if saved else 0)]
    _time(status, lines, events, [beat["time"] for beat in beats.values()], now)
    return status


def _check(folder: RunFolder) -> None:
    path = folder.path
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a run's folder, such as runs/demo")
    signs = ("config.yaml", "events.jsonl", metrics_file.FILE, HEARTBEATS)
    if not any((path / sign).exists() for sign in signs) and not steps_in(folder.checkpoints):
        raise UserError(
            f"{path} is not a run's folder (it has none of {', '.join(signs)}): give one, such as runs/demo"
        )


def _state(folder: RunFolder, events: Sequence[dict[str, Any]], ages: dict[str, float], now: datetime) -> Status:
    """Whether the run works, from its last event of a start or an end and from the signs of life."""
    last = next((event for event in reversed(events) if event["event"] in (*STARTS, *ENDS)), None)
    if last is not None and last["event"] in ENDS:
        since = (now - (time_of(last) or now)).total_seconds()
        again = {host: age for host, age in ages.items() if age <= SILENT and age < since - SECONDS_TO_REPORT}
        if again:
            return Status("begins", "", again)
        is_finished = last["event"] == "finish"
        return Status("finished") if is_finished else Status("stopped", why_ended(list(events), folder.log))
    machines = last.get("machines") if last else None
    wanted = {host: ages.get(host) for host in (ages if machines is None else machines)}
    known = {host: age for host, age in wanted.items() if age is not None}
    working = [host for host, age in known.items() if age <= SILENT]
    if not working:
        if last is None:
            return Status("died" if ages else "begins", "before its first step" if ages else "", known)
        return Status("died", why_ended(list(events), folder.log), known)
    if last is None:
        return Status("begins", "", known)
    missing = sorted(set(wanted) - set(working))
    return Status("silent" if missing else "runs", ", ".join(missing), known)


def _steps(folder: RunFolder, events: Sequence[dict[str, Any]], damaged: list[str]) -> int | None:
    """Steps of the whole run, as its last start or its configuration says."""
    said = [event["steps"] for event in events if event["event"] in STARTS and "steps" in event]
    if said:
        return int(said[-1])
    try:
        return load_config(folder.config).steps if folder.config.exists() else None
    except UserError as error:
        damaged.append(str(error))
        return None


def _read_metrics(status: Status, lines: Sequence[dict[str, Any]]) -> None:
    losses = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    if losses:
        status.step, status.loss = losses[-1]
        recent = [loss for _, loss in losses[-RECENT:]]
        if len(recent) >= 4 and all(map(math.isfinite, recent)):
            status.trend = mean(recent[: len(recent) // 2]), mean(recent[len(recent) // 2 :])
    for line in reversed(lines):
        if sets := line.get("validation"):
            found = {name: scores.get("loss") for name, scores in sets.items()}
            status.validation = line["step"], {name: loss for name, loss in found.items() if loss is not None}
            break


def _read_events(status: Status, events: Sequence[dict[str, Any]]) -> None:
    count = [event["event"] for event in events].count
    status.nan, status.spikes, status.rewinds = count("nan"), count("spike"), count("rewind")
    numbers = [event.get("batches") for event in events if event["event"] in ("skip", "rewind")]
    status.left_out = len({number for batches in numbers if batches for number in batches})
    status.restarts = [str(event.get("reason", "unknown")) for event in events if event["event"] == "restart"]
    status.step = max([status.step, *(event["step"] for event in events[-1:] if event["event"] != "rewind")])
    slow: dict[int, tuple[int, str, float]] = {}
    for event in events:
        if event["event"] in STARTS:
            slow, status.stalled = {}, None
        elif event["event"] == "slow_rank":
            slow[event.get("rank", -1)] = event.get("rank", -1), str(event.get("host")), float(event.get("times", 0))
        elif event["event"] == "slow_rank_over":
            slow.pop(event.get("rank", -1), None)
        elif event["event"] in ("data_stall", "data_stall_over"):
            stalled = str(event.get("host")), float(event.get("share", 0))
            status.stalled = stalled if event["event"] == "data_stall" else None
    status.slow = sorted(slow.values(), key=lambda rank: -rank[2])


def _time(
    status: Status,
    lines: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]],
    beats: Sequence[datetime],
    now: datetime,
) -> None:
    """Goodput, and the time that is left."""
    seconds, before = 0.0, 0
    per_step: list[float] = []
    for line in lines:
        speed, tokens = line.get("tokens_per_second"), line.get("tokens")
        if speed and tokens is not None:
            seconds += (tokens - before) / speed  # with logging.every, of the step that is logged for all before it
            per_step.append(tokens / max(line["step"], 1) / speed)
            before = tokens
    times = [time for event in events if (time := time_of(event)) is not None]
    is_working = status.state in ("runs", "silent")
    if times:
        end = now if is_working else max([times[-1], *beats])
        wall = (end - times[0]).total_seconds()
        status.goodput = min(1.0, seconds / wall) if wall > 0 and seconds else None
    if is_working and per_step and status.steps is not None:
        pace = _pace(events, status.step, now, median(per_step[-RECENT:]))
        status.seconds_left = max(status.steps - status.step, 0) * pace


def _pace(events: Sequence[dict[str, Any]], step: int, now: datetime, seconds: float) -> float:
    """Seconds for a step with all that comes between: since the last start where enough steps were made since."""
    start = next(event for event in reversed(events) if event["event"] in STARTS)
    began, made = time_of(start), step - start["step"]
    if began is None or made < RECENT:
        return seconds
    return max(seconds, (now - began).total_seconds() / made)
