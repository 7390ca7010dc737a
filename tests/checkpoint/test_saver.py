"""Saving in the background: the same files, of the values at the call, with the same promises."""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_mamba.checkpoint import storage, store
from moe_mamba.checkpoint.saver import Copies, Saver
from moe_mamba.checkpoint.shards import Shard, chunks_of_flat_range
from moe_mamba.errors import UserError
from moe_mamba.run.metrics import read_metrics
from tests.faults.test_faults import train_on_a_full_disk
from tests.train.kills import kill_at_any_instant
from tests.train.runs import STEPS, curve, run, weights
from tests.world import WorkerError, World

STATE = {
    "weights/w": torch.arange(60, dtype=torch.float32).view(12, 5),
    "weights/experts": torch.arange(72).view(4, 6, 3).bfloat16(),
    "steps": torch.tensor(7, dtype=torch.int64),
}


def shards_of(state: dict[str, torch.Tensor], rank: int = 0, ranks: int = 1) -> list[Shard]:
    """Flat ranges as ZeRO has them, and scalars on every rank."""
    shards = []
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        ends = [tensor.numel() * edge // ranks for edge in (rank, rank + 1)] if shape else [0, 1]
        for offsets, sizes, first in chunks_of_flat_range(shape, *ends):
            chunk = tensor.view(-1)[first : first + sizes.numel()].view(sizes)
            shards.append(Shard(name, shape, tuple(offsets), chunk))
    return shards


@contextlib.contextmanager
def held_back(fault: int | None = None) -> Iterator[threading.Event]:
    """Storage that writes nothing before the event that this gives is set, and then may fail."""
    told, write = threading.Event(), storage.HashedFile.write

    def wait(file: storage.HashedFile, data: bytes | memoryview) -> None:
        assert told.wait(60)
        if fault is not None:
            raise OSError(fault, "as planned")
        write(file, data)

    storage.HashedFile.write = wait  # type: ignore[method-assign]
    try:
        yield told
    finally:
        told.set()
        storage.HashedFile.write = write  # type: ignore[method-assign]


def save_while_the_state_changes(folder: Path, saves: int) -> list[float]:
    """Save in the background, changing the state and talking to the other ranks meanwhile; sums that were talked."""
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    sums = []
    with Saver(folder, keep=9, asynchronous=True) as saver:
        for step in range(1, saves + 1):
            with held_back() as told:
                saver.save(step, shards_of(state, dist.get_rank(), dist.get_world_size()), {"step_said": step})
                for tensor in state.values():
                    tensor.add_(1)
                for value in range(20):  # training's collectives, while the background has its own
                    total = torch.tensor(float(value))
                    dist.all_reduce(total)
                    sums.append(float(total))
                assert not (folder / f"step-{step:08d}").exists()
                told.set()
                saver.wait()
            assert (folder / f"step-{step:08d}").is_dir()
    return sums


def test_what_is_written_is_what_was_at_the_call_while_training_goes_on(world: World, tmp_path: Path) -> None:
    sums = world.run(save_while_the_state_changes, tmp_path, 2, ranks=2)
    assert sums == [[2.0 * value for value in range(20)] * 2] * 2
    for step in (1, 2):
        path = tmp_path / f"step-{step:08d}"
        assert store.read_description(path) == {"step": step, "step_said": step}
        for name, tensor in STATE.items():
            assert torch.equal(store.read_tensor(path, name), tensor + (step - 1))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_both_ways_give_the_same_bytes(tmp_path: Path, asynchronous: bool) -> None:
    expected = store.save(tmp_path / "plain", 3, shards_of(STATE), {"validation_loss": 1.5})
    with Saver(tmp_path / "saver", 2, asynchronous) as saver:
        for step in (1, 2, 3):
            saver.save(step, shards_of(STATE), {"validation_loss": 1.5})
    folder = tmp_path / "saver"
    assert {path.name for path in folder.iterdir()} == {*(f"step-0000000{n}" for n in (1, 2, 3)), "best.json"}
    for file in expected.iterdir():
        assert (folder / expected.name / file.name).read_bytes() == file.read_bytes()


def test_copies_are_whole_whatever_the_strides_and_reuse_their_memory() -> None:
    base = torch.randn(6, 8, 4)
    views = [base[:, 2:5], base.permute(2, 0, 1), base[1, :, 3], base[0, 0, 0], base[:0], base.bool()[:, :3]]
    shards = [Shard(str(n), tuple(view.shape), (0,) * view.dim(), view) for n, view in enumerate(views)]
    copies = Copies()
    made = copies.make(shards)
    memory = copies.memory.data_ptr()
    for copy, view in zip(made, views, strict=True):
        assert torch.equal(copy.tensor, view)
        assert copy.tensor.is_contiguous()
    base.zero_()
    assert made[0].tensor.all()
    copies.make(shards)
    assert copies.memory.data_ptr() == memory
    assert not made[0].tensor.any()


@pytest.mark.gpu
def test_a_gpu_is_copied_into_pinned_memory(tmp_path: Path) -> None:
    state = {name: tensor.cuda() for name, tensor in STATE.items()}
    with Saver(tmp_path, 2, asynchronous=True) as saver:
        saver.save(1, shards_of(state), {})
        for tensor in state.values():
            tensor.zero_()
        saver.wait()
        assert saver._copies.memory.is_pinned()
    for name, tensor in STATE.items():
        assert torch.equal(store.read_tensor(tmp_path / "step-00000001", name), tensor)


def fail_on_rank_1(folder: Path, ends: str) -> str:
    """The background fails on one rank: what every rank is told, at the next save, by wait, or at the end."""
    shards = shards_of(STATE, dist.get_rank(), dist.get_world_size())
    try:
        with Saver(folder, 2, asynchronous=True) as saver:
            with held_back(errno.ENOSPC if dist.get_rank() == 1 else None) as told:
                saver.save(5, shards, {})
                told.set()
                if ends == "save":
                    saver.save(6, shards, {})
                elif ends == "wait":
                    saver.wait()
                else:
                    assert saver._pending is not None
                    assert isinstance(saver._pending.exception(), UserError)
            if ends == "error":
                raise KeyError("training went wrong first")
    except (UserError, KeyError) as error:
        return str(error)
    return "saved"


def test_a_full_disk_is_one_line_on_all_ranks_later(world: World, tmp_path: Path) -> None:
    before = store.save(tmp_path, 1, shards_of(STATE), {})
    expected = f"no space left for the checkpoint of step 5 in {tmp_path}: free some, or lower checkpoint.keep; "
    expected += "the last complete checkpoint, step-00000001, is kept"
    for ends in ("save", "wait", "end"):
        assert set(world.run(fail_on_rank_1, tmp_path, ends)) == {expected}
        assert list(tmp_path.iterdir()) == [before]
    assert set(world.run(fail_on_rank_1, tmp_path, "error")) == {"'training went wrong first'"}


def save_for_ever(connection: Connection, folder: Path, step: int) -> None:
    torch.set_num_threads(1)
    state = {name: torch.zeros(64, 64) for name in "abc"}
    with Saver(folder, keep=1, asynchronous=True) as saver:
        while True:
            step += 1
            for tensor in state.values():
                tensor.fill_(step)
            saver.save(step, shards_of(state), {})
            connection.send(step - 1)  # is complete, or this save had not begun


def test_a_kill_while_the_background_writes_leaves_a_complete_checkpoint(world: World, tmp_path: Path) -> None:
    kill_at_any_instant(world, tmp_path, save_for_ever, kills=8, words=2)


def test_a_run_that_saves_in_the_background_is_the_same_run(world: World, tiny: Path, tmp_path: Path) -> None:
    run(world, tiny, tmp_path / "plain", ranks=2)
    run(world, tiny, tmp_path / "background", ranks=2, checkpoint__asynchronous=True)
    assert curve(read_metrics(tmp_path / "background")) == curve(read_metrics(tmp_path / "plain"))
    expected, found = weights(tmp_path / "plain"), weights(tmp_path / "background")
    assert store.step_of(store.resolve(tmp_path / "background")) == STEPS
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    assert expected.keys() == found.keys()


def test_a_full_disk_in_the_background_stops_the_run_and_keeps_what_was_saved(
    world: World, tiny: Path, tmp_path: Path
) -> None:
    keys = {"run.folder": str(tmp_path), "checkpoint.asynchronous": True}
    with pytest.raises(WorkerError, match=r"RunStopped: no space left.*step-00000002, is kept"):
        world.run(train_on_a_full_disk, "step-00000004", config=str(tiny), **keys)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]


def connections() -> int:
    """In a worker: sockets that a saver opens before it saves."""
    before = len(os.listdir("/proc/self/fd"))
    with Saver(Path("none"), keep=1):
        return len(os.listdir("/proc/self/fd")) - before


def test_a_saver_connects_to_no_rank_before_it_talks_to_it(world: World) -> None:
    assert max(world.run(connections, ranks=8)) <= 4  # one that listens, and what waits for it; with all ranks 7 more
