"""Checkpoints that were changed and signed again: either the undamaged weights come out, or one line."""

import json
import os
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
from moe_mamba.commands import convert_to_hf, evaluate, generate, inspect_checkpoint, upcycle
from moe_mamba.commands.inspect_checkpoint import table
from moe_mamba.config import Config, TrainConfig
from moe_mamba.config_file import parse_config
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.run.restore import check_resumable, open_trained, restore_trained, weight_shards
from moe_mamba.train.recovery import Recovery
from moe_mamba.train.schedule import RateCurve
from tests.hostile import LONGEST, limits, mutated, mutated_bytes, refusal_of, text_of
from tests.train.runs import run as train_on
from tests.world import World

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
        "recovery": recovery, "rates": [{"begin": 0, "start": 0.0, "warm_end": 2, "end": 20}],
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
    kind = chance.choice((*JSON[:3], *JSON[1:], "config", "config", "header's tree", "header's bytes"))
    if kind == "config":
        section = chance.choice(("model", "model", "moe", "parallel"))

        def change(tree: Any) -> Any:
            tree["config"][section] = mutated(tree["config"][section], chance)
            return tree

        rewrite(step, "description.json", change)
    elif kind in JSON:
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
    rates = RateCurve.resumed(trained.config, 2, store.read_description(resolved))
    assert 0 <= rates.rate(3) <= trained.config.train.learning_rate
    model = restore_trained(trained, torch.device("cpu")).model
    assert all(torch.equal(expected[f"weights/{name}"], tensor) for name, tensor in model.logical_tensors().items())


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    said: list[str] = []
    return store.newest(folder, said.append, check_resumable), said


@pytest.mark.parametrize(("seed", "count"), [(15, 120), pytest.param(16, 1000, marks=pytest.mark.long)])
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
    assert len(lines) > count // 4, count


def weights_of(run: Path) -> list[str]:
    return list(store.logical_tensors(run / "checkpoints/step-00000002"))


def first(index: dict[str, Any]) -> dict[str, Any]:
    return index["weights/embedding.weight"]


HUGE = {"shape": [2**20, 2**20], "boxes": [{"offsets": [0, 0], "sizes": [2**20, 2**20], "file": DATA, "start": 0}]}


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("index.json", lambda index: first(index).update(HUGE), "do not lie in the checkpoint's files"),
        ("index.json", lambda index: first(index).update(shape=[2**60, 4]), "is too large"),
        ("index.json", lambda index: first(index).update(shape=["257", 4]), "embedding.weight.shape.0 is 257: "),
        ("index.json", lambda index: first(index).update(shape=[257.0, 4]), "shape.0 is 257.0: "),
        ("index.json", lambda index: first(index).update(shape=[257, True]), "shape.1 is True: "),
        ("index.json", lambda index: first(index).update(shape=[1] * 9), "shape is "),
        ("index.json", lambda index: first(index).update(dtype="F128"), "dtype is F128: "),
        ("index.json", lambda index: first(index).update(dtype="I32"), f"{DATA} and index.json differ"),
        ("index.json", lambda index: first(index).pop("boxes"), "boxes: field required"),
        ("index.json", lambda index: first(index)["boxes"].pop(), "hold 512 of 1,028 elements"),
        ("index.json", lambda index: first(index)["boxes"][1].update(offsets=[0, 0]), "overlap, and leave holes"),
        ("index.json", lambda index: first(index)["boxes"][1].update(start=2**50), "do not lie in the checkpoint's"),
        ("index.json", lambda index: first(index)["boxes"][1].update(start=8), f"{DATA} and index.json differ"),
        ("index.json", lambda index: first(index)["boxes"][1].update(file="../x"), "the checkpoint's files (../x)"),
        ("index.json", lambda index: first(index)["boxes"].extend(first(index)["boxes"] * 10**4), "hold "),
        ("manifest.json", lambda tree: tree["files"].update({"../x": tree["files"][DATA]}), "files.../x"),
        ("manifest.json", lambda tree: tree["files"][DATA].update(bytes=float("inf")), "which is no number of JSON"),
        ("manifest.json", lambda tree: tree.update(files=[]), "files is []: "),
        ("manifest.json", lambda tree: tree.update(version="@digits"), "cannot be read as JSON"),
        ("description.json", lambda tree: tree.update(step=-1), "step is -1: "),
        ("description.json", lambda tree: (tree.update(step=7), tree.pop("recovery")), "is of step 7"),
        ("description.json", lambda tree: tree.update(corpora=[]), "corpora is []: "),
        ("description.json", lambda tree: tree["recovery"].update(position="@deep"), "it is too deep"),
        (
            "description.json",
            lambda tree: tree["recovery"].update(position=9),
            "recovery.position is not the number of steps",
        ),
        ("description.json", lambda tree: tree.pop("tokenizer"), "does not say tokenizer"),
        ("description.json", lambda tree: tree["config"]["model"].update(repeat=10**9), "1000000000 x M- layers"),
        (
            "description.json",
            lambda tree: tree["config"]["model"].update(repeat="1000000000"),
            "1000000000 x M- layers",
        ),
        ("description.json", lambda tree: tree["config"]["model"].update(repeat=1e9), "1000000000.0 x M- layers"),
        ("description.json", lambda tree: tree["config"]["model"].update(d_model=2**16), "is of another model"),
        ("description.json", lambda tree: tree["config"]["model"].update(d_model=2**70), "has a wrong config"),
        ("description.json", lambda tree: tree["config"]["model"].update(vocab_size=None), "has a wrong config"),
        ("description.json", lambda tree: tree["config"]["model"].update(pattern="x\ny"), "has a wrong config"),
    ],
)
def test_what_was_changed_is_named(run: Path, tmp_path: Path, name: str, change: Any, says: str) -> None:
    step = restored_copy(run, tmp_path / "copy")

    def changed(tree: Any) -> Any:
        change(tree)
        return tree

    rewrite(step, name, changed)
    line = refusal_of(lambda: (store.resolve(step), open_trained(step)))
    assert line is not None and says in line and str(step) in line
    assert line.endswith("use another checkpoint") or "give the folder its name again" in line
    found, said = newest(step.parent)
    assert found == step.with_name("step-00000001") and len(said) == 1


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
@pytest.mark.parametrize("name", [*JSON, DATA])
def test_what_is_no_file(run: Path, tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    step = restored_copy(run, tmp_path / "copy")
    (step / name).unlink()
    make(step / name)
    with limits():
        found, said = newest(step.parent)
    if name == "next_step.json":  # then it is not known
        assert (found, said) == (step, [])
    else:
        assert found == step.with_name("step-00000001") and name in said[0]


def test_a_key_twice_is_refused(run: Path, tmp_path: Path) -> None:
    step = restored_copy(run, tmp_path / "copy")
    text = (step / "index.json").read_text()
    (step / "index.json").write_text(text[:-1] + ", " + text[1:])
    sign(step)
    assert "is there twice" in (refusal_of(lambda: store.resolve(step)) or "")


@pytest.mark.slow
def test_commands_end_in_that_line(refusal: Callable[..., str], run: Path, tmp_path: Path) -> None:
    step = restored_copy(run, tmp_path / "copy")
    commands = {
        generate.main: ("--prompt=x",),
        evaluate.main: ("--input=builtin",),
        convert_to_hf.main: (f"--output={tmp_path / 'out'}",),
        upcycle.main: (f"--output={tmp_path / 'out'}", "--experts=2"),
        inspect_checkpoint.main: (),
    }
    chance, tried = random.Random(17), 0
    for main, flags in commands.items():
        for kind in ("index.json", "manifest.json", "description.json", "header"):
            changed = ""
            while changed != kind or refusal_of(partial(open_trained, step)) is None:
                restored_copy(run, tmp_path / "copy")
                changed = damage(step, chance).partition("'")[0]
            if main is inspect_checkpoint.main and kind == "description.json":
                continue  # it lists what it finds there
            line = refusal(main, f"--checkpoint={step}", *flags)
            assert len(line) <= LONGEST + len("error: "), line
            tried += 1
    print(f"{tried} commands on changed checkpoints")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_resumes_from_the_one_before(world: World, tiny: Path, tmp_path: Path) -> None:
    train_on(world, tiny, tmp_path / "run", train__steps=4)
    newest_step = tmp_path / "run" / "checkpoints" / "step-00000004"
    rewrite(newest_step, "description.json", lambda tree: {key: tree[key] for key in tree if key != "micro_batch"})
    lines = train_on(world, tiny, tmp_path / "run", train__steps=6)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    said = (tmp_path / "run" / "log.txt").read_text()
    assert "description.json does not say micro_batch: step-00000002 is used instead" in said
