"""What lies on disk: plain safetensors and JSON, written and read slab by slab."""

import io
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from moe_mamba.checkpoint import storage, store
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.errors import UserError
from moe_mamba.safetensors_header import DTYPES
from tests.world import World


def halves(tensor: torch.Tensor) -> list[Shard]:
    shape, middle = tuple(tensor.shape), tensor.shape[0] // 2
    rest = (0,) * (len(shape) - 1)
    return [Shard("w", shape, (0, *rest), tensor[:middle]), Shard("w", shape, (middle, *rest), tensor[middle:])]


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_every_dtype_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.arange(24).view(4, 6) % 5).to(dtype)
    path = store.save(tmp_path, 1, [Shard("w", (4, 6), (0, 0), tensor)], {})
    assert torch.equal(store.read_tensor(path, "w"), tensor)


def test_any_reader_of_safetensors_opens_the_files(tmp_path: Path) -> None:
    tensor, scalar = torch.randn(4, 3), torch.tensor(7, dtype=torch.int64)
    odd = torch.ones(3, dtype=torch.bfloat16)
    shards = [Shard("odd", (3,), (0,), odd), *halves(tensor), Shard("scalar", (), (), scalar)]
    path = store.save(tmp_path, 1, shards, {})
    found = load_file(path / "rank-00000.safetensors")
    assert set(found) == {"w@0,0", "w@2,0", "scalar", "odd"}
    assert torch.equal(torch.cat([found["w@0,0"], found["w@2,0"]]), tensor)
    assert torch.equal(found["scalar"], scalar)
    assert torch.equal(found["odd"], odd)


@pytest.mark.parametrize("slab", [8, 24, 40, 100, 10**6])
def test_slabs_of_any_size_write_and_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    tensor = torch.randn(5, 4, 3, dtype=torch.float64)
    reference = store.save(tmp_path / "whole", 1, halves(tensor), {}) / "rank-00000.safetensors"
    monkeypatch.setattr(storage, "SLAB", slab)
    path = store.save(tmp_path / "slabs", 1, halves(tensor), {})
    assert (path / "rank-00000.safetensors").read_bytes() == reference.read_bytes()
    target = torch.zeros(5, 2, 2, dtype=torch.float64)
    store.load(path, [Shard("w", (5, 4, 3), (0, 1, 1), target)])
    assert torch.equal(target, tensor[:, 1:3, 1:])
    turned = store.save(tmp_path / "turned", 1, halves(tensor.permute(2, 0, 1)), {})
    assert torch.equal(store.read_tensor(turned, "w"), tensor.permute(2, 0, 1))


def test_a_rank_reads_only_rows_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(64, 32)
    path = store.save(tmp_path, 1, [Shard("w", (64, 32), (0, 0), tensor)], {})
    data = path / "rank-00000.safetensors"
    begin = data.stat().st_size - tensor.nbytes
    wanted = tensor[16:24].clone()
    with data.open("r+b") as stream:  # all other rows are spoilt
        stream.seek(begin)
        stream.write(b"\xff" * tensor[:16].nbytes)
    read = []
    original = storage.read_chunk
    monkeypatch.setattr(storage, "read_chunk", lambda *a: (read.append(a[4].nbytes), original(*a)))
    target = torch.zeros(8, 32)
    store.load(path, [Shard("w", (64, 32), (16, 0), target)])
    assert torch.equal(target, wanted)
    assert read == [wanted.nbytes]


class CountingReader(io.BufferedReader):
    """A file that counts the bytes that are asked of it."""

    counted = 0

    def readinto(self, buffer: memoryview) -> int:
        count = super().readinto(buffer)
        CountingReader.counted += count
        return count


def load_and_count(path: Path, part: tuple[slice, ...], target: torch.Tensor, whole: torch.Tensor) -> int:
    """Fill `target` with a part of `w` on this process; the bytes of tensors that were read for it."""
    CountingReader.counted = 0
    original = Path.open
    Path.open = lambda self, mode: (  # type: ignore[assignment, method-assign]
        CountingReader(io.FileIO(self)) if self.suffix == ".safetensors" else original(self, mode)
    )
    try:
        shard = Shard("w", tuple(whole.shape), tuple(p.start or 0 for p in part), target)
        store.load(path, [shard])
    finally:
        Path.open = original  # type: ignore[method-assign]
    assert torch.equal(target, whole[part])
    return CountingReader.counted


def load_half_of_the_rows(path: Path, whole: torch.Tensor) -> int:
    """A rank's half of the rows, counted."""
    middle = len(whole) // 2
    part = slice(middle) if dist.get_rank() == 0 else slice(middle, None)
    return load_and_count(path, (part, slice(None)), torch.zeros(middle, whole.shape[1]), whole)


def test_each_rank_reads_the_bytes_that_it_needs(world: World, tmp_path: Path) -> None:
    whole = torch.randn(64, 32)
    path = store.save(tmp_path, 1, [Shard("w", (64, 32), (0, 0), whole)], {})
    assert world.run(load_half_of_the_rows, path, whole, ranks=2) == [whole.nbytes // 2] * 2
    columns = slice(None), slice(8, 16)
    assert load_and_count(path, columns, torch.zeros(64, 8), whole) == whole.nbytes  # whole rows, as is documented
    shards = [Shard("w", (64, 32), (0, first), whole[:, first : first + 8]) for first in (0, 8, 16, 24)]
    path = store.save(tmp_path, 2, shards, {})
    assert load_and_count(path, columns, torch.zeros(64, 8), whole) == whole.nbytes // 4


@pytest.mark.parametrize(
    "change",
    [
        lambda chunk: chunk.update(file="../secret"),
        lambda chunk: chunk.update(start=10**9),
        lambda chunk: chunk.update(start=-8),
        lambda chunk: chunk.update(sizes=[400, 3]),
        lambda chunk: chunk.update(offsets=[0]),
        lambda chunk: chunk.pop("sizes"),
        lambda chunk: chunk.update(sizes="no"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path, change) -> None:
    path = store.save(tmp_path, 1, [Shard("w", (4, 3), (0, 0), torch.zeros(4, 3))], {})
    index = json.loads((path / "index.json").read_text())
    change(index["w"]["boxes"][0])
    text = json.dumps(index)
    (path / "index.json").write_text(text)
    recorded = json.loads((path / "manifest.json").read_text())
    recorded["files"]["index.json"]["bytes"] = len(text)
    (path / "manifest.json").write_text(json.dumps(recorded))
    with pytest.raises(UserError, match=r"index\.json: (the chunks of w |w\.boxes\.0).*: use another checkpoint$"):
        store.read_tensor(path, "w")


def test_a_missing_chunk_is_noticed(tmp_path: Path) -> None:
    path = store.save(tmp_path, 1, halves(torch.zeros(4, 3)), {})
    index = json.loads((path / "index.json").read_text())
    del index["w"]["boxes"][1]
    text = json.dumps(index)
    (path / "index.json").write_text(text.ljust((path / "index.json").stat().st_size))
    with pytest.raises(UserError, match=r"index\.json: the chunks of w hold 6 of 12 elements"):
        store.read_tensor(path, "w")
