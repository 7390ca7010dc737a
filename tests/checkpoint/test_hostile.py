"""Checkpoints that were changed and signed again: either the undamaged weights come out, or one line."""

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.divergence import NextStep, has_diverged
from moe_mamba.checkpoint.inspection import inspect
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.commands.inspect_checkpoint import table
from moe_mamba.config import Config, TrainConfig
from moe_mamba.config_file import parse_config
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.run.restore import check_resumable, open_trained, restore_trained, weight_shards
from moe_mamba.train.recovery import Recovery
from tests.hostile import limits, mutated, mutated_bytes, refusal_of, text_of

JSON = ("manifest.json", "index.json", "description.json", "next_step.json")
DATA = "rank-00000.safetensors"
SIZES = {"pattern": "M-", "repeat": 1, "d_model": 4, "d_state": 2, "d_ff": 4, "vocab_size": 257}


@pytest.fixture(scope="module")
def run() -> Iterator[Path]:
    """A run's folder with two steps, whose tensors lie in halves; its name is short, as the lines hold it."""
    folder = Path(tempfile.mkdtemp(prefix="run"))
    config = parse_config({"model": SIZES, "run": {"folder": str(folder)}})
    model = LanguageModel(config.model, config.moe)
    initialize(model, 0)
    BytesTokenizer().save(folder / "tokenizer")
    for step in (1, 2):
        shards = [half for shard in weight_shards(model) for half in halves(shard)]
        shards.append(Shard("moment1/empty", (0, 3), (0, 0), torch.zeros(0, 3)))
        store.save(folder / "checkpoints", step, shards, description(config, step), keep=5)
    store.note_next_step(folder / "checkpoints", 2, NextStep(2.5, 0.5), 5)
    yield folder
    shutil.rmtree(folder)


def halves(shard: Shard) -> list[Shard]:
    if not shard.shape or shard.shape[0] < 2:
        return [shard]
    middle, rest = shard.shape[0] // 2, (0,) * (len(shard.shape) - 1)
    parts = ((0, shard.tensor[:middle]), (middle, shard.tensor[middle:]))
    return [Shard(shard.name, shard.shape, (first, *rest), part) for first, part in parts]


def description(config: Config, step: int) -> dict[str, Any]:
    """As a run writes it."""
    recovery = {"position": step + 1, "skipped_batches": [1], "bad": 1, "furthest": 1, "recent": [[2.5, 0.5]] * 3}
    return {
        "config": config.model_dump(), "tokenizer": BytesTokenizer().fingerprint, "corpora": {"builtin": "ab" * 32},
        "tokens": 64 * step, "processes": 1, "micro_batch": 2, "micro_steps": 1, "validation_loss": 2.5,
        "recovery": recovery,
    }  # fmt: skip


def sign(step: Path) -> None:
    """Make sizes and checksums in the manifest fit the files again."""
    manifest = json.loads((step / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (step / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "xxh3": xxhash.xxh3_64(data).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(manifest))


def rewrite(step: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file, and sign."""
    data = text_of(change(json.loads((step / name).read_text())))
    (step / name).write_bytes(data)
    if name != "manifest.json":
        sign(step)


def rewrite_header(step: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the header of the tensors' file (its length and JSON), and sign."""
    data = (step / DATA).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    (step / DATA).write_bytes(change(data[:end]) + data[end:])
    sign(step)


def with_header(header: bytes, change: Callable[[Any], Any]) -> bytes:
    """A header with another tree, and the length of it."""
    text = text_of(change(json.loads(header[8:])))
    return len(text).to_bytes(8, "little") + text


def damage(step: Path, chance: random.Random) -> str:
    """One random change of a step's folder, signed; what was changed."""
    kind = chance.choice((*JSON[:3], *JSON[1:], "header's tree", "header's bytes"))
    if kind in JSON:
        rewrite(step, kind, lambda tree: mutated(tree, chance))
    elif kind == "header's tree":
        rewrite_header(step, lambda header: with_header(header, lambda tree: mutated(tree, chance)))
    else:
        rewrite_header(step, lambda header: mutated_bytes(header, chance))
    return kind


def restored_copy(run: Path, copy: Path) -> Path:
    """A copy of the run, whose newest step is fresh."""
    step = copy / "checkpoints" / "step-00000002"
    shutil.rmtree(step, ignore_errors=True)
    shutil.copytree(run if not copy.exists() else run / "checkpoints" / step.name, step if copy.exists() else copy)
    return step


def same(step: Path, expected: dict[str, torch.Tensor]) -> None:
    assert store.logical_tensors(step) == {name: (tuple(t.shape), t.dtype) for name, t in expected.items()}
    found = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    store.load(step, [Shard(name, tuple(t.shape), (0,) * t.dim(), t) for name, t in found.items()])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def use_all(step: Path, expected: dict[str, torch.Tensor]) -> None:
    """Everything that reads a step's folder."""
    resolved = store.resolve(step)
    same(resolved, expected)
    table(inspect(resolved))
    check_resumable(resolved)
    recovery = Recovery(TrainConfig(), 2, store.read_description(resolved))
    recovery.made(recovery.after(recovery.position))
    recovery.judge(2.0, 0.5)
    trained = open_trained(resolved)
    model = restore_trained(trained, torch.device("cpu")).model
    assert all(torch.equal(expected[f"weights/{name}"], tensor) for name, tensor in model.logical_tensors().items())


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    said: list[str] = []
    return store.newest(folder, said.append, check_resumable), said


@pytest.mark.parametrize(("seed", "count"), [(15, 800), pytest.param(16, 3000, marks=pytest.mark.slow)])
def test_changed_and_signed_again(run: Path, seed: int, count: int) -> None:
    chance, refused, lines = random.Random(seed), Counter[str](), set()
    expected = {name: store.read_tensor(run / "checkpoints/step-00000002", name) for name in weights_of(run)}
    copy = run.with_name(f"{run.name}x")
    try:
        for number in range(count):
            step = restored_copy(run, copy)
            kind = damage(step, chance)
            line = refusal_of(partial(use_all, step, expected))
            refused[f"{kind}: {'refused' if line else 'whole'}"] += 1
            lines |= {line}
            if number % 4 or "checkpoint format" in (line or ""):
                continue
            with limits():
                found, said = newest(step.parent)
            if line is None and not has_diverged(step):
                assert (found, said) == (step, [])
            elif "is not the tokenizer" not in (line or ""):
                assert found == step.with_name("step-00000001"), line
                assert len(said) == 1 and said[0].endswith(": step-00000001 is used instead")
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    print(f"{count} changed checkpoints: {dict(refused)}")
    assert sum(number for kind, number in refused.items() if kind.endswith("refused")) > count // 2, count
    assert len(lines) > 100, count


def weights_of(run: Path) -> list[str]:
    return list(store.logical_tensors(run / "checkpoints/step-00000002"))
