"""A run that is started again says how often, why, and on what; and each machine gives signs of life."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.train import train
from moe_mamba.config import Config
from moe_mamba.faults.watchdog import Watch
from moe_mamba.parallel.topology import World as Ranks
from moe_mamba.run.console import Screen
from moe_mamba.run.events import read_events
from tests.train.runs import STEPS, curve, run
from tests.train.seams import stepping_in
from tests.world import WorkerError, World


def starts_of(folder: Path) -> list[dict]:
    return [event for event in read_events(folder)[0] if event["event"] in ("start", "restart")]


def break_off(trainer: Any) -> None:
    if trainer.made == 3 and trainer.world.rank == trainer.world.size - 1:
        raise RuntimeError("the roof fell in")


def train_and_break_off(**arguments: Any) -> None:
    with stepping_in("step", break_off):
        train(**arguments)


def train_restarted(**arguments: Any) -> None:
    """Train as torchrun's agent starts a job again."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    try:
        train(**arguments)
    finally:
        del os.environ["TORCHELASTIC_RESTART_COUNT"]


def test_a_restart_says_its_number_its_reason_and_the_new_world(world: World, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    keys = {"run.folder": str(folder), "train.validate_every": 0, "train.sample_tokens": 0}
    with pytest.raises(WorkerError, match="the roof fell in"):
        world.run(train_and_break_off, ranks=2, config=str(tiny), **keys)
    with pytest.raises(WorkerError, match=r"train.global_batch=8 is not divisible by the 3 processes.*start 2 process"):
        world.run(train, ranks=3, config=str(tiny), **keys)
    world.run(train_restarted, ranks=1, config=str(tiny), **keys)
    start, restart = starts_of(folder)
    host = socket.gethostname()
    assert (start["event"], start["step"], start["processes"], start["machines"]) == ("start", 0, 2, {host: 2})
    assert start["device"].startswith("cpu (") and start["versions"]["torch"] == torch.__version__
    assert (restart["event"], restart["step"], restart["number"], restart["processes"]) == ("restart", 2, 1, 1)
    assert restart["reason"].startswith("rank 1 (")
    assert restart["reason"].endswith("RuntimeError: the roof fell in (its traceback is in the log)")
    assert restart["launcher"] == {"TORCHELASTIC_RESTART_COUNT": "1"}
    log = (folder / "log.txt").read_text()
    assert f"restart   number 1, after step 2: {restart['reason']}\n" in log
    assert f"world     2 processes before, 1 now, on {host}\n" in log
    assert len(curve(run(world, tiny, folder, train__steps=STEPS + 2, train__sample_tokens=0))) == STEPS + 2
    assert starts_of(folder)[-1]["reason"] == "it was finished"


def test_a_machine_gives_signs_of_life_until_it_hangs(tmp_path: Path) -> None:
    config = Config.model_validate({"run": {"folder": str(tmp_path)}, "parallel": {"timeout": 100}})
    beat = tmp_path / "heartbeats" / socket.gethostname()
    watch = Watch(config, Screen(tmp_path / "log.txt"), Ranks(0, 1, 0, 1))
    told: list[bool] = []
    # still for so long, begun or not -> whether there is a sign of life
    for seconds, begun in ((0, False), (200, False), (99, True), (101, True)):
        beat.unlink(missing_ok=True)
        watch.stop.begun, watch.step, watch._next_heartbeat = begun, 7, 0.0
        watch._live(seconds)
        told.append(beat.exists())
        if told[-1]:
            content = json.loads(beat.read_text())
            assert (content["step"], content["process"]) == (7, os.getpid())
    assert told == [True, True, True, False]


def test_one_rank_a_machine_gives_them(world: World, tiny: Path, tmp_path: Path) -> None:
    run(world, tiny, tmp_path / "run", ranks=2, train__validate_every=0, train__sample_tokens=0)
    assert [path.name for path in (tmp_path / "run" / "heartbeats").iterdir()] == [socket.gethostname()]
