"""Any layout loads any other's checkpoint; nothing is lost by a kill, a full disk or a truncated file."""

import errno
import json
import math
import pickle
import shutil
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_mamba.checkpoint import storage, store
from moe_mamba.checkpoint.shards import Shard, chunks_of_flat_range
from moe_mamba.errors import UserError
from tests.train.kills import kill_at_any_instant
from tests.world import World

TENSORS = {
    "weights/embedding.weight": torch.arange(12 * 5, dtype=torch.float32).view(12, 5),
    "weights/layers.0.experts": torch.arange(4 * 6 * 3, dtype=torch.float64).view(4, 6, 3) / 7,
    "moment1/layers.0.experts": torch.arange(4 * 6 * 3).view(4, 6, 3).bfloat16(),
    "balance_bias/layers.1": torch.arange(7, dtype=torch.int64) * 2**40,
    "weights/scale": torch.tensor(3.5),
}


def whole(name: str, tensor: Tensor) -> Shard:
    return Shard(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def layout(tensors: dict[str, Tensor], kind: str, rank: int, ranks: int) -> list[Shard]:
    """This rank's shards, views of `tensors`: replicated, sharded along a dimension, or flat ranges as in ZeRO."""
    shards = []
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if kind == "replicated" or not shape:
            shards.append(whole(name, tensor))
        elif kind == "flat":
            ends = [tensor.numel() * edge // ranks for edge in (rank, rank + 1)]
            for offsets, sizes, first in chunks_of_flat_range(shape, *ends):
                view = tensor.view(-1)[first : first + sizes.numel()].view(sizes)
                shards.append(Shard(name, shape, tuple(offsets), view))
        else:
            dimension = int(kind) % len(shape)
            start, stop = (shape[dimension] * edge // ranks for edge in (rank, rank + 1))
            offsets = [0] * len(shape)
            offsets[dimension] = start
            shards.append(Shard(name, shape, tuple(offsets), tensor.narrow(dimension, start, stop - start)))
    return shards


def save_here(folder: Path, step: int = 1, tensors: dict[str, Tensor] = TENSORS, **description: object) -> Path:
    return store.save(folder, step, layout(tensors, "replicated", 0, 1), description)


def save_as(folder: Path, kind: str) -> str:
    shards = layout(TENSORS, kind, dist.get_rank(), dist.get_world_size())
    return str(store.save(folder, 3, shards, {"rank": dist.get_rank()}))


def load_as(path: Path, kind: str) -> bool:
    """Load as `kind`; whether this rank's shards, and nothing else, were filled rightly."""
    empty = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    expected = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    mine = layout(empty, kind, dist.get_rank(), dist.get_world_size())
    store.load(path, mine)
    for target, source in zip(
        layout(expected, kind, dist.get_rank(), dist.get_world_size()),
        layout(TENSORS, kind, dist.get_rank(), dist.get_world_size()),
        strict=True,
    ):
        target.tensor.copy_(source.tensor)
    return all(torch.equal(empty[name], expected[name]) for name in TENSORS)


@pytest.mark.parametrize("shape", [(), (1,), (9,), (3, 4), (4, 1, 5), (2, 3, 4), (2, 3, 2, 3)])
def test_chunks_of_a_flat_range_hold_each_element_once_and_are_few(shape: tuple[int, ...]) -> None:
    flat = torch.arange(math.prod(shape))
    for start in range(flat.numel() + 1):
        for stop in range(start, flat.numel() + 1):
            chunks = chunks_of_flat_range(shape, start, stop)
            assert len(chunks) <= max(1, 2 * len(shape) - 1)
            found = []
            for offsets, sizes, first in chunks:
                chunk = flat.view(shape)
                for dimension, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                    chunk = chunk.narrow(dimension, offset, size)
                assert torch.equal(chunk.reshape(-1), flat[first : first + sizes.numel()])
                found.append(chunk.reshape(-1))
            assert torch.equal(torch.cat(found) if found else flat[:0], flat[start:stop])


@pytest.mark.parametrize(
    ("save_ranks", "save_kind", "load_ranks", "load_kind"),
    [
        (2, "flat", 3, "flat"),
        (3, "flat", 2, "1"),
        (2, "1", 3, "0"),
        (3, "2", 2, "replicated"),
        (2, "replicated", 3, "2"),
    ],
)
def test_any_layout_loads_any_other(
    world: World, tmp_path: Path, save_ranks: int, save_kind: str, load_ranks: int, load_kind: str
) -> None:
    paths = world.run(save_as, tmp_path, save_kind, ranks=save_ranks)
    assert set(paths) == {str(tmp_path / "step-00000003")}
    assert store.read_description(Path(paths[0])) == {"step": 3, "rank": 0}
    assert all(world.run(load_as, Path(paths[0]), load_kind, ranks=load_ranks))
    for name, tensor in TENSORS.items():
        assert torch.equal(store.read_tensor(Path(paths[0]), name), tensor)


def test_one_process_without_a_group_saves_and_loads(tmp_path: Path) -> None:
    path = save_here(tmp_path, tokens=5)
    assert store.logical_tensors(path) == {name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()}
    empty = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    store.load(path, layout(empty, "flat", 0, 1))
    assert all(torch.equal(empty[name], tensor) for name, tensor in TENSORS.items())
    assert store.read_description(path) == {"step": 1, "tokens": 5}


def test_shards_that_several_ranks_hold_are_written_once(world: World, tmp_path: Path) -> None:
    path = Path(world.run(save_as, tmp_path, "replicated", ranks=3)[0])
    data = sum(tensor.nbytes for tensor in TENSORS.values())
    files = list(path.glob("*.safetensors"))
    heads = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert sum(file.stat().st_size for file in files) == heads + data


def test_views_that_are_not_contiguous_and_other_dtypes_are_filled(tmp_path: Path) -> None:
    source = torch.randn(6, 8)
    path = store.save(tmp_path, 1, [whole("weights/w", source.t())], {})
    target = torch.zeros(6, 8, dtype=torch.bfloat16)
    store.load(path, [whole("weights/w", target.t())])
    assert torch.equal(target, source.bfloat16())


def test_shards_with_holes_or_that_disagree_are_refused(tmp_path: Path) -> None:
    half = Shard("weights/w", (4, 2), (0, 0), torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="weights/w: the shards hold 4 of 8 elements"):
        store.save(tmp_path, 1, [half], {})
    other = Shard("weights/w", (4, 2), (2, 0), torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="disagree on its shape or dtype"):
        store.save(tmp_path, 1, [half, other], {})
    assert store.newest(tmp_path) is None


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    path = save_here(tmp_path)
    with pytest.raises(UserError, match=r"has no tensor weights/other: it is another model's checkpoint"):
        store.load(path, [whole("weights/other", torch.zeros(2))])
    with pytest.raises(UserError, match=r"weights/embedding.weight has shape \[12, 5\] there and \[12, 6\] here"):
        store.load(path, [whole("weights/embedding.weight", torch.zeros(12, 6))])
    with pytest.raises(UserError, match="has no tensor nothing"):
        store.read_tensor(path, "nothing")


def load_other_model_on_rank_1(path: Path) -> str:
    name = "weights/other" if dist.get_rank() else "weights/scale"
    try:
        store.load(path, [whole(name, torch.zeros(()))])
    except UserError as error:
        return str(error)
    return "loaded"


def test_a_fault_of_one_rank_is_raised_on_all(world: World, tmp_path: Path) -> None:
    errors = world.run(load_other_model_on_rank_1, save_here(tmp_path))
    assert all("has no tensor weights/other" in error for error in errors)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, loss in enumerate([3.0, 2.0, 2.5, math.nan, 2.0], 1):
        save_here(tmp_path, step * 10, validation_loss=loss)
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [f"step-{n:08d}" for n in (20, 40, 50)]
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "step": 20,
        "checkpoint": "step-00000020",
        "validation_loss": 2.0,
    }


def test_the_same_step_again_replaces_it_and_leftovers_go(tmp_path: Path) -> None:
    save_here(tmp_path, 1, {"w": torch.zeros(2)})
    (tmp_path / ".step-00000007.partial").mkdir()
    path = save_here(tmp_path, 1, {"w": torch.ones(2)})
    assert store.read_tensor(path, "w").tolist() == [1, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_a_step_moved_aside_by_a_killed_save_gets_its_name_back(tmp_path: Path) -> None:
    path = save_here(tmp_path)
    path.rename(tmp_path / ".step-00000001.replaced")
    assert store.newest(tmp_path) == path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", ["manifest.json", "index.json", "description.json", "rank-00000.safetensors"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path: Path, harm, name: str) -> None:
    before, after = save_here(tmp_path, 1), save_here(tmp_path, 2)
    harm(after / name)
    said: list[str] = []
    assert store.newest(tmp_path, said.append) == before
    assert len(said) == 1
    assert "step-00000002/" in said[0]
    assert said[0].endswith(": step-00000001 is used instead")
    with pytest.raises(UserError, match=r"step-00000002/.*: use another checkpoint$"):
        store.resolve(after)
    shutil.rmtree(before)
    with pytest.raises(UserError, match=r"no checkpoint in .* is valid .*step-00000002.*: remove them to start over"):
        store.newest(tmp_path)


def test_a_damaged_later_step_goes_when_an_earlier_one_is_saved(tmp_path: Path) -> None:
    truncate(save_here(tmp_path, 30) / "index.json")
    kept = [save_here(tmp_path, 10), save_here(tmp_path, 20)]
    assert sorted(tmp_path.glob("step-*")) == kept


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    save_here(tmp_path, 1)
    manifest = save_here(tmp_path, 2) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(UserError, match="format 99, but this program reads 1: use the version that wrote it"):
        store.newest(tmp_path)


def test_runs_and_steps_are_resolved(tmp_path: Path) -> None:
    step = save_here(tmp_path / "run" / "checkpoints", 4)
    assert store.resolve(tmp_path / "run") == step
    assert store.resolve(step.parent) == step
    assert store.resolve(str(step)) == step
    with pytest.raises(UserError, match="is not a folder"):
        store.resolve(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no usable checkpoint"):
        store.resolve(tmp_path / "empty")


def save_on_a_disk_that_is_full_for_rank_1(folder: Path, fault: int) -> str:
    def no_space(self: storage.HashedFile, data: bytes) -> None:
        raise OSError(fault, "as planned")

    original = storage.HashedFile.write
    try:
        if dist.get_rank() == 1:
            storage.HashedFile.write = no_space  # type: ignore[method-assign]
        store.save(folder, 5, layout(TENSORS, "flat", dist.get_rank(), dist.get_world_size()), {})
    except UserError as error:
        return str(error)
    finally:
        storage.HashedFile.write = original  # type: ignore[method-assign]
    return "saved"


def test_a_full_disk_is_one_line_on_all_ranks_and_keeps_the_last_checkpoint(world: World, tmp_path: Path) -> None:
    before = save_here(tmp_path, 1)
    errors = world.run(save_on_a_disk_that_is_full_for_rank_1, tmp_path, errno.ENOSPC, ranks=3)
    expected = f"no space left for the checkpoint of step 5 in {tmp_path}: free some, or lower checkpoint.keep; "
    assert set(errors) == {expected + "the last complete checkpoint, step-00000001, is kept"}
    assert list(tmp_path.iterdir()) == [before]
    assert store.newest(tmp_path) == before
    errors = world.run(save_on_a_disk_that_is_full_for_rank_1, tmp_path, errno.EIO, ranks=2)
    assert all("could not be written" in error and "\n" not in error for error in errors)


class Marker:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


def test_a_planted_pickle_never_runs(tmp_path: Path) -> None:
    marker, poison = tmp_path / "marker", pickle.dumps(Marker(str(tmp_path / "marker")))
    pickle.loads(poison).close()
    assert marker.exists(), "the poison works"
    marker.unlink()
    path = save_here(tmp_path / "run" / "checkpoints")
    names = [file.name for file in path.iterdir()]
    assert len(names) == 4
    for name in [*names, ".metadata", "__0.metadata"]:
        original = (path / name).read_bytes() if name in names else None
        (path / name).write_bytes(poison)
        target = torch.zeros_like(TENSORS["weights/embedding.weight"])
        shard = whole("weights/embedding.weight", target)
        if original is None:  # a foreign file is ignored
            assert store.newest(path.parent) == path
            store.load(path, [shard])
            assert torch.equal(target, TENSORS["weights/embedding.weight"])
            (path / name).unlink()
        else:
            for use in (lambda shard=shard: store.load(path, [shard]), lambda: store.newest(path.parent)):
                with pytest.raises(UserError, match=rf"{name} ") as error:
                    use()
                assert "\n" not in str(error.value)
            (path / name).write_bytes(original)
        assert not marker.exists(), f"a pickle in {name} ran"


def save_for_ever(connection: Connection, folder: Path, step: int) -> None:
    torch.set_num_threads(1)
    while True:
        step += 1
        shards = [whole(name, torch.full((64, 64), float(step))) for name in "abc"]
        store.save(folder, step, shards, {}, keep=1)
        connection.send(step)


def test_a_kill_at_any_instant_leaves_a_complete_checkpoint(world: World, tmp_path: Path) -> None:
    step = kill_at_any_instant(world, tmp_path, save_for_ever, kills=12, words=1)
    save_here(tmp_path, step + 1)
    assert not list(tmp_path.glob(".step*"))
