"""Kills, truncated files and full disks: nothing is lost, and the curve is the uninterrupted one."""

import errno
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.train import train
from moe_mamba.checkpoint import store
from moe_mamba.run.metrics import read_metrics
from tests.train.runs import STEPS, curve, run, same_weights
from tests.world import WorkerError, World

# Where a kill is aimed: anywhere in time, or inside a save (writing data, the manifest, naming it, pruning).
AIMS = ("anywhere", "data", "manifest", "name", "removal")
KILLED = {"checkpoint.every": 1, "train.validate_every": 10, "train.sample_tokens": 0}
# Layers of every design: mixers that read one input, Mamba with and without experts inside.
DESIGNS = {
    "model.pattern": "(ME)M", "model.repeat": 2, "moe.inner.projections": "conv,gate,out", "moe.inner.router": "shared",
    "moe.inner.every": 2, "moe.inner.top_k": 2,
}  # fmt: skip


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(aim: str, victim: int, instant: float, **arguments: Any) -> None:
    """Train, and be killed as rank `victim`: after `instant` seconds, or inside a save."""
    import moe_mamba.train.run  # noqa: F401  (so that the time is the run's, not the libraries')

    if int(os.environ["RANK"]) != victim:
        train(**arguments)
        return
    if aim == "anywhere":
        timer = threading.Timer(instant, kill_self)
        timer.start()
        train(**arguments)
        timer.cancel()
        return
    with aimed(aim, skipped=int(instant * 4)):
        train(**arguments)


@contextmanager
def aimed(aim: str, skipped: int) -> Iterator[None]:
    """Kill this process inside a save, after the place aimed at was passed `skipped` times; before or after it."""
    from moe_mamba.checkpoint import storage

    owner: Any = {"data": storage.HashedFile, "manifest": storage.Writer, "name": Path, "removal": store.shutil}
    owner, name = owner[aim], {"data": "write", "manifest": "finish", "name": "rename", "removal": "rmtree"}[aim]
    whole, passed = getattr(owner, name), 0

    def broken(*rest: Any, **options: Any) -> Any:
        nonlocal passed
        passed += 1
        if passed == skipped + 1 and skipped % 2:
            kill_self()
        result = whole(*rest, **options)
        if passed == skipped + 1:
            kill_self()
        return result

    setattr(owner, name, broken)
    try:
        yield
    finally:
        setattr(owner, name, whole)


@pytest.mark.parametrize(
    ("kills", "keys"),
    [
        pytest.param(3, DESIGNS, marks=pytest.mark.slow),
        pytest.param(100, {}, marks=pytest.mark.long),
        pytest.param(100, {"checkpoint.asynchronous": True}, marks=pytest.mark.long),
    ],
)
def test_kills_at_any_instant_change_no_bit(
    world: World, tiny: Path, tmp_path: Path, kills: int, keys: dict[str, Any]
) -> None:
    steps = 10 * kills
    keys = KILLED | {"train.steps": steps} | keys
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    world.run(train, ranks=2, config=str(tiny), timeout=900, **keys | {"run.folder": str(whole)})
    keys["run.folder"] = str(killed)
    chance, died, tries = random.Random(0), 0, 0
    while died < kills and not (killed / "checkpoints" / f"step-{steps:08d}").exists():
        aim, victim = AIMS[tries % len(AIMS)], chance.randrange(2)
        if aim in ("manifest", "name", "removal"):
            victim = 0  # only it does these
        before = newest_step(killed)
        try:
            world.run(train_until_killed, aim, victim, chance.uniform(0.2, 1.5), ranks=2, config=str(tiny), **keys)
        except WorkerError as error:
            assert "the process died (exit code -9)" in str(error)
            died += 1
        tries += 1
        assert newest_step(killed) >= before
    world.run(train, ranks=2, config=str(tiny), timeout=900, **keys)
    assert died >= 0.8 * kills
    assert curve(read_metrics(killed)) == curve(read_metrics(whole))
    same_weights(killed, whole)


def newest_step(folder: Path) -> int:
    """The last complete checkpoint's step, 0 before the first."""
    found = store.newest(folder / "checkpoints")
    return store.step_of(found) if found else 0


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
    from moe_mamba.checkpoint.storage import HashedFile

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
