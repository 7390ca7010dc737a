"""Kills, torn files and full disks: nothing is lost, and the curve is the uninterrupted one."""

import errno
import os
import random
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from train.runs import STEPS, curve, run, weights
from world import WorkerError, World

from launch.train import train
from moe_mamba.train.metrics import read_metrics


def train_until_killed(seconds: float, **arguments: Any) -> None:
    """Train, and be killed some seconds after the start, wherever the run is then."""
    import moe_mamba.train.trainer  # noqa: F401  (so that the time is the run's, not the libraries')

    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.start()
    train(**arguments)
    timer.cancel()


def test_kills_at_any_instant_change_no_bit(world: World, tiny: Path, tmp_path: Path) -> None:
    overrides = {"train.steps": 60, "checkpoint.every": 1, "train.validate_every": 10}
    world.run(train, ranks=1, config=str(tiny), **{"run.folder": str(tmp_path / "whole")} | overrides)
    killed = {"run.folder": str(tmp_path / "killed")} | overrides
    instants, kills = random.Random(0), 0
    while kills < 4 and not (tmp_path / "killed" / "checkpoints" / "step-00000060").exists():
        with pytest.raises(WorkerError, match="the process died") if kills < 2 else suppress(WorkerError):
            world.run(train_until_killed, instants.uniform(0.2, 1.0), ranks=1, config=str(tiny), **killed)
        kills += 1
    world.run(train, ranks=1, config=str(tiny), **killed)
    assert curve(read_metrics(tmp_path / "killed")) == curve(read_metrics(tmp_path / "whole"))
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_truncated_checkpoint_is_passed_over_and_said(world: World, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    whole = curve(run(world, tiny, folder))
    (file,) = (folder / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    resumed = curve(run(world, tiny, folder))
    log = (folder / "log.txt").read_text()
    assert "step-00000004 is used" in log
    assert resumed == whole


def train_on_a_full_disk(step: str, **arguments: Any) -> None:
    """Train, where no tensor of step `step` can be written."""
    from moe_mamba.train.storage import HashedFile

    write = HashedFile.write

    def no_space(file: HashedFile, *parts: Any) -> Any:
        if step in str(file.stream.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, *parts)

    HashedFile.write = no_space  # type: ignore[method-assign]
    try:
        train(**arguments)
    finally:
        HashedFile.write = write  # type: ignore[method-assign]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_stops_the_run_and_keeps_what_was_saved(
    world: World, tiny: Path, tmp_path: Path, ranks: int
) -> None:
    folder = tmp_path / "run"
    keys = {"run.folder": str(folder)}
    with pytest.raises(WorkerError, match=r"RunStopped: no space left.*step-00000002, is kept"):
        world.run(train_on_a_full_disk, "step-00000004", ranks=ranks, config=str(tiny), **keys)
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000002"]
    assert len(curve(run(world, tiny, folder, ranks=ranks))) == STEPS


def train_without_a_compiler(**arguments: Any) -> None:
    """Train where no program at all is found."""
    path = os.environ.pop("PATH")
    try:
        train(**arguments)
    finally:
        os.environ["PATH"] = path


def test_a_machine_without_a_compiler_trains(world: World, tiny: Path, tmp_path: Path) -> None:
    world.run(train_without_a_compiler, ranks=1, config=str(tiny), **{"run.folder": str(tmp_path / "run")})
    assert len(curve(read_metrics(tmp_path / "run"))) == STEPS
