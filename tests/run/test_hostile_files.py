"""The files of a run's folder, changed: its status and its pictures say what is damaged, in a line."""

import json
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_mamba.commands.status import describe
from moe_mamba.run.events import Events
from moe_mamba.run.heartbeats import read_heartbeats, write_heartbeat
from moe_mamba.run.plots import plot_expert_load, plot_loss
from moe_mamba.run.status import read_status
from tests.hostile import limits, mutated, refusal_of, text_of

EVENTS: list[dict[str, Any]] = [
    {"event": "start", "step": 0, "steps": 20, "machines": {"a": 1}, "processes": 1, "log_bytes": 0},
    {"event": "slow_rank", "step": 3, "rank": 1, "host": "a", "times": 2.0},
    {"event": "data_stall", "step": 4, "rank": 1, "host": "a", "share": 0.5},
    {"event": "skip", "step": 5, "batches": [6, 7], "reason": "spike"},
    {"event": "restart", "step": 5, "number": 1, "reason": "killed", "steps": 20, "machines": {"a": 1}},
]
METRICS: list[dict[str, Any]] = [
    {
        **{"step": step, "tokens": 64 * step, "loss": 3.0 - step / 10, "tokens_per_second": 1e3},
        **{"expert_load": {"1": [0.5, 0.5]}, "moe": {"dropped": {"1": 0.0}, "router_entropy": {"1": 0.5}}},
        "validation": {"held out": {"loss": 2.5}},
    }
    for step in range(1, 7)
]


def write(folder: Path, name: str, lines: list[Any]) -> None:
    (folder / name).write_bytes(b"".join(text_of(line) + b"\n" for line in lines))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    log = Events(tmp_path, enabled=True)
    for event in EVENTS:
        details = {key: value for key, value in event.items() if key not in ("event", "step")}
        log.write(event["event"], event["step"], **details)
    write(tmp_path, "metrics.jsonl", METRICS)
    write_heartbeat(tmp_path, "a", 6)
    return tmp_path


def look(folder: Path) -> str:
    return "\n".join(text for _, text in describe("run", read_status(folder)))


def test_changed_lines(run: Path) -> None:
    chance, count = random.Random(15), 600
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    beat = json.loads((run / "heartbeats" / "a").read_text())
    for _ in range(count):
        write(run, "events.jsonl", mutated(events, chance))
        write(run, "metrics.jsonl", mutated(METRICS, chance))
        (run / "heartbeats" / "a").write_bytes(text_of(mutated(beat, chance)))
        with limits():
            look(run)
    print(f"{count} run folders with changed lines")


def test_changed_metrics_in_pictures(run: Path, tmp_path: Path) -> None:
    chance, count, refused = random.Random(15), 15, 0
    for _ in range(count):
        write(run, "metrics.jsonl", mutated(METRICS, chance))
        for draw in (partial(plot_loss, {"run": run}), partial(plot_expert_load, run)):
            refused += refusal_of(partial(draw, tmp_path / "picture.png")) is not None
    print(f"{count} changed metrics, each drawn twice: {refused} refused")
    assert refused > count // 2, count


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file(run: Path, make: Callable[[Path], None]) -> None:
    for name in ("events.jsonl", "metrics.jsonl", "heartbeats/a"):
        (run / name).unlink()
        make(run / name)
    with limits():
        assert "1 lines of events.jsonl cannot be read" in look(run)
        assert read_heartbeats(run) == {}
    assert "does not exist" in (refusal_of(partial(plot_loss, {"run": run}, run / "picture.png")) or "")
