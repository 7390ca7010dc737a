"""A run's corpora are read whole once: at once where they are small, else beside the first steps."""

from pathlib import Path

import pytest

from moe_mamba.data import shards
from moe_mamba.data.manifest import checksum
from moe_mamba.errors import RunStopped
from moe_mamba.run.metrics import read_metrics
from moe_mamba.train import verification
from tests.train.runs import STEPS, curve, run
from tests.world import World


def _train(tiny: str, folder: str, **options: str) -> list[str]:
    """On a rank: train; the names of the files that were read whole, or how the run ended."""
    from launch.train import train

    read: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "AT_ONCE", 0)  # every corpus is a large one
        patch.setattr(shards, "checksum", lambda path: read.append(str(path)) or checksum(path))
        try:
            train(config=tiny, **{"run.folder": folder}, **options)
        except RunStopped as error:
            return [f"stopped: {error}"]
    return read


def test_ranks_share_the_reading_and_a_restart_reads_nothing(world: World, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = {"data.cache": str(tmp_path / "cache")}
    first, second = world.run(_train, str(tiny), str(folder), **{**options, "train.steps": "4"})
    assert first
    assert second
    assert len({*first, *second}) == len(first) + len(second) == 4  # .bin and .idx of training and validation
    assert (folder / "checksums.json").is_file()
    assert world.run(_train, str(tiny), str(folder), **options) == [[], []]
    assert len(curve(read_metrics(folder))) == STEPS


def test_damage_stops_the_run_before_its_first_checkpoint(world: World, tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    run(world, tiny, tmp_path / "fine", data__cache=str(cache), train__steps=1)
    part = max(cache.glob("*/part-00000.bin"), key=lambda path: path.stat().st_size)
    content = bytearray(part.read_bytes())
    content[0] ^= 1
    part.write_bytes(content)
    lines = world.run(_train, str(tiny), str(tmp_path / "run"), **{"data.cache": str(cache)})
    assert all("part-00000.bin: its checksum differs" in line for (line,) in lines)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))
