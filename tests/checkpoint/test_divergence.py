"""A diverged run never saves what no run can go on from, and always says where one can."""

import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launch.train import train
from moe_mamba.checkpoint import divergence, store
from moe_mamba.checkpoint.divergence import NextStep, is_finite, read_next_step
from moe_mamba.checkpoint.saver import Saver
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.errors import UserError
from moe_mamba.parallel.engine import state_shards
from moe_mamba.run.metrics import read_metrics
from tests.train.counting import Counted
from tests.train.runs import STEPS, curve, run, same_weights, save_as_before
from tests.train.seams import stepping_in
from tests.world import WorkerError, World

GOOD, BAD = NextStep(4.5, 0.25), NextStep(math.nan, None)


def whole(name: str, tensor: Tensor) -> Shard:
    return Shard(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def save_here(folder: Path, step: int, keep: int = 2, **description: object) -> Path:
    return store.save(folder, step, [whole("weights/w", torch.full((4, 3), float(step)))], description, keep)


def steps_of(folder: Path) -> list[int]:
    return sorted(store.step_of(path) for path in folder.glob("step-*"))


# What is finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("elements", [1, 7, 10_000])
def test_one_bad_number_anywhere_is_found(value: float, elements: int) -> None:
    others = [torch.zeros(3, 0), torch.tensor(7), torch.ones(2, dtype=torch.bfloat16), torch.full((2,), -3.38e38)]
    numbers = torch.randn(elements, 2)
    assert is_finite([*others, numbers.double(), numbers.t()])
    for position in {0, elements // 2, elements - 1}:
        bad = numbers.clone()
        bad[position, 1] = value
        for tensor in (bad, bad.t(), bad[:, 1], bad.double(), bad.bfloat16()):
            assert not is_finite([*others, tensor])


def save_with_a_bad_shard(folder: Path, kind: str, asynchronous: bool) -> str:
    """Two ranks with half of each tensor; the last number of rank 1 is NaN."""
    rank = dist.get_rank()
    shards = []
    for name in ("weights/w", "moment1/w", "moment2/w"):
        tensor = torch.ones(2, 3)
        if rank == 1 and name.startswith(kind):
            tensor[-1, -1] = math.nan
        shards.append(Shard(name, (4, 3), (2 * rank, 0), tensor))
    try:
        with Saver(folder, 2, asynchronous) as saver:
            saver.save(5, shards, {})
    except UserError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", ["weights", "moment2"])
def test_what_one_rank_must_not_save_no_rank_saves(world: World, tmp_path: Path, kind: str, asynchronous: bool) -> None:
    before = save_here(tmp_path, 1)
    expected = f"step 5 is not saved because {kind}/w holds NaN or Inf: lower train.learning_rate; "
    expected += "the last complete checkpoint, step-00000001, is kept"
    assert set(world.run(save_with_a_bad_shard, tmp_path, kind, asynchronous)) == {expected}
    assert list(tmp_path.iterdir()) == [before]


# What older versions wrote


def test_an_older_versions_poison_is_passed_over_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    before = save_here(folder, 1)
    good = save_as_before(folder, 2, [whole("weights/w", torch.ones(4, 3))])
    assert store.newest(folder) == good
    bad = torch.ones(2, 3)
    bad[1, 1] = math.inf
    parts = [Shard("moment2/w", (4, 3), (0, 0), torch.ones(2, 3)), Shard("moment2/w", (4, 3), (2, 0), bad)]
    poisoned = save_as_before(folder, 3, [whole("weights/w", torch.ones(4, 3)), *parts])
    said: list[str] = []
    assert store.newest(folder, said.append) == good
    assert said == [f"{poisoned}: moment2/w holds NaN or Inf: step-00000002 is used instead"]
    assert store.resolve(tmp_path / "run") == good
    with pytest.raises(UserError, match=r"step-00000003: moment2/w holds NaN or Inf: use another checkpoint$"):
        store.resolve(poisoned)
    for path in (before, good):
        shutil.rmtree(path)
    with pytest.raises(UserError, match=r"no checkpoint .* is valid \(.*moment2/w holds NaN or Inf\): remove them"):
        store.newest(folder)


def test_numbers_are_looked_at_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "PART", 5)
    for position in range(12):
        tensor = torch.zeros(4, 3)
        tensor.view(-1)[position] = math.nan
        path = save_as_before(tmp_path, 1, [whole("weights/w", tensor)])
        with pytest.raises(UserError, match="weights/w holds NaN or Inf"):
            store.resolve(path)
    assert store.resolve(save_as_before(tmp_path, 1, [whole("weights/w", torch.zeros(4, 3))]))


def test_a_poisoned_later_step_goes_when_an_earlier_one_is_saved(tmp_path: Path) -> None:
    save_as_before(tmp_path, 9, [whole("weights/w", torch.full((2,), math.nan))])
    save_here(tmp_path, 3)
    assert steps_of(tmp_path) == [3]


@pytest.mark.parametrize("explicit", [False, True])
def test_a_warm_start_from_poison_is_refused_before_the_run_begins(
    world: World, tiny: Path, plain: Path, tmp_path: Path, explicit: bool
) -> None:
    folder = tmp_path / "old"
    shutil.copytree(plain, folder)
    name = "weights/embedding.weight"
    for path in sorted((folder / "checkpoints").glob("step-*")):
        tensors = {name: store.read_tensor(path, name) for name in store.logical_tensors(path)}
        tensors[name][3, 5] = math.nan
        description = store.read_description(path)
        save_as_before(path.parent, store.step_of(path), [whole(*item) for item in tensors.items()], description)
    start = path if explicit else folder
    with pytest.raises(WorkerError, match=rf"Error: .*step-00000006: {name} holds NaN or Inf"):
        run(world, tiny, tmp_path / "run", train__warm_start=str(start))


# What is known of a checkpoint


def test_what_has_diverged_is_never_the_newest(tmp_path: Path) -> None:
    first, second = save_here(tmp_path, 1), save_here(tmp_path, 2)
    assert store.newest(tmp_path) == second
    store.note_next_step(tmp_path, 2, BAD, 2)
    said: list[str] = []
    assert store.newest(tmp_path, said.append) == first
    assert said == [f"{second} has diverged (step 3: loss nan): step-00000001 is used instead"]
    assert store.resolve(second) == second  # whoever names it means it
    shutil.rmtree(first)
    said.clear()
    assert store.newest(tmp_path, said.append) is None
    assert said == [f"{second} has diverged (step 3: loss nan): there is no older one"]
    with pytest.raises(UserError, match="has no usable checkpoint"):
        store.resolve(tmp_path)
    (save_here(tmp_path, 3) / "index.json").unlink()
    shutil.copytree(tmp_path / "step-00000003", tmp_path / "step-00000001")
    store.note_next_step(tmp_path, 3, BAD, 2)
    with pytest.raises(UserError, match=r"no checkpoint .* is valid \(.*has diverged.*; .*index\.json is missing.*\)"):
        store.newest(tmp_path)


@pytest.mark.parametrize("bad", [BAD, NextStep(math.inf, None), NextStep(4.5, math.inf), NextStep(4.5, math.nan)])
def test_notes_are_read_as_they_were_written(tmp_path: Path, bad: NextStep) -> None:
    path = save_here(tmp_path, 1)
    assert read_next_step(path) is None
    store.note_next_step(tmp_path, 1, bad, 2)
    assert str(read_next_step(path)) == str(bad)
    assert not bad.is_finite
    json.loads((path / "next_step.json").read_text(), parse_constant=pytest.fail)  # JSON has no NaN
    store.note_next_step(tmp_path, 1, GOOD, 2)
    assert read_next_step(path) == GOOD
    assert [entry.name for entry in path.iterdir() if "next" in entry.name] == ["next_step.json"]
    store.note_next_step(tmp_path, 7, GOOD, 2)  # which was never saved
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"loss": []}', '{"loss": "x", "gradient_norm": 1}', "[" * 10**5])
def test_a_note_that_is_none_says_nothing(tmp_path: Path, content: str) -> None:
    path = save_here(tmp_path, 1)
    (path / "next_step.json").write_text(content)
    assert read_next_step(path) is None
    assert store.newest(tmp_path) == path


def test_what_training_went_on_from_is_not_believed_to_have_diverged(tmp_path: Path) -> None:
    """A new machine with a broken kernel must not use up a run's checkpoints one after the other."""
    older, newer = save_here(tmp_path, 1), save_here(tmp_path, 2)
    store.note_next_step(tmp_path, 1, BAD, 2)  # step 2 was made from it
    store.note_next_step(tmp_path, 2, GOOD, 2)
    store.note_next_step(tmp_path, 2, BAD, 2)
    assert read_next_step(older) is None
    assert store.newest(tmp_path) == newer


def test_the_last_that_serves_stays_until_a_newer_one_does(tmp_path: Path) -> None:
    for step in range(1, 4):
        save_here(tmp_path, step, keep=1)
        assert steps_of(tmp_path) == [step - 1, step][-step:]
        store.note_next_step(tmp_path, step, GOOD, keep=1)
        assert steps_of(tmp_path) == [step]
    save_here(tmp_path, 4, keep=1)
    store.note_next_step(tmp_path, 4, BAD, keep=1)
    assert steps_of(tmp_path) == [3, 4]
    assert store.newest(tmp_path) == tmp_path / "step-00000003"
    save_here(tmp_path, 4, keep=1)  # again, at a lower rate
    assert steps_of(tmp_path) == [3, 4]
    assert store.newest(tmp_path) == tmp_path / "step-00000004"


@pytest.mark.parametrize("next_saved", [4, 6])
def test_what_has_diverged_goes_with_the_next_save(tmp_path: Path, next_saved: int) -> None:
    for step in (2, 3, 5):
        save_here(tmp_path, step)
    store.note_next_step(tmp_path, 5, BAD, 2)
    save_here(tmp_path, next_saved)
    assert steps_of(tmp_path) == [3, next_saved]


def test_the_best_stays_even_if_it_has_diverged(tmp_path: Path) -> None:
    save_here(tmp_path, 1, validation_loss=3.0)
    save_here(tmp_path, 2, validation_loss=2.0)
    store.note_next_step(tmp_path, 2, BAD, 2)
    for step in (3, 4, 5):
        save_here(tmp_path, step, validation_loss=2.5)
    assert steps_of(tmp_path) == [2, 4, 5]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2


def note_while_the_disk_is_full(folder: Path) -> None:
    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        store.note_next_step(folder, 1, GOOD, 2)


def test_a_note_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save_here(tmp_path, 1)
    note_while_the_disk_is_full(tmp_path)
    assert "step-00000001: its next step (loss 4.5000, gradient norm 0.25) could not be noted" in caplog.text
    assert store.newest(tmp_path) == path


# Whole runs

CONSTANT = {"train__schedule": "wsd", "train__warmup": 0.0, "train__decay": 0.0, "train__minimum_rate": 1.0}
AS_PLANNED = {"train__on_longer_budget": "as_planned"}  # a rate that is raised with the budget
# Each step multiplies every weight by 1 - rate x decay.
DIVERGING = {"train__learning_rate": 100.0, "train__weight_decay": 1000.0, "train__decay_all": True}


def diverge(world: World, tiny: Path, folder: Path, **overrides: Any) -> str:
    """The line that a run ends with."""
    with pytest.raises(WorkerError) as stop:
        run(world, tiny, folder, **overrides)
    return next(line for line in str(stop.value).splitlines() if "RunStopped: " in line).partition(": ")[2]


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        pytest.param(1, {"parallel__zero": 0}, marks=pytest.mark.slow),
        (2, {"parallel__zero": 2, "train__precision": "bf16", "checkpoint__asynchronous": True}),
        pytest.param(2, {"parallel__zero": 3, "model__pattern": "M-"}, marks=pytest.mark.slow),
    ],
)
def test_a_diverged_run_goes_on_from_the_checkpoint_that_it_names(
    world: World, tiny: Path, tmp_path: Path, ranks: int, overrides: dict
) -> None:
    """The weights after step 4 are finite, but their loss is NaN; only one checkpoint is to be kept."""
    keys = {"ranks": ranks, "checkpoint__every": 1, "checkpoint__keep": 1, "train__validate_every": 0}
    keys |= CONSTANT | overrides
    folder, other = tmp_path / "run", tmp_path / "other"
    run(world, tiny, folder, train__steps=3, **keys)
    shutil.copytree(folder, other)
    line = diverge(world, tiny, folder, train__steps=6, **DIVERGING, **keys, **AS_PLANNED)
    assert line.startswith("the loss is nan at step 5; the first bad value is in the output of ")
    assert "step-00000003 is kept: lower train.learning_rate" in line
    assert steps_of(folder / "checkpoints") == [3, 4]
    found = run(world, tiny, folder, train__steps=6, **keys)
    log = (folder / "log.txt").read_text()
    assert "step-00000004 has diverged (step 5: loss nan): step-00000003 is used instead" in log
    assert curve(found) == curve(run(world, tiny, other, train__steps=6, **keys))
    same_weights(folder, other)


def test_a_run_without_a_usable_checkpoint_starts_over(world: World, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):  # the same command diverges again, and loses nothing
        line = diverge(world, tiny, folder, **DIVERGING, checkpoint__every=1)
        assert "the loss is nan at step 2" in line
        assert "There is no valid checkpoint: lower train.learning_rate, or look at the data of this step" in line
        assert line.endswith("; the same command then starts over")
    found = run(world, tiny, folder, checkpoint__every=1)
    log = (folder / "log.txt").read_text()
    assert "step-00000001 has diverged (step 2: loss nan): there is no older one\nrestart " in log
    assert curve(found) == curve(run(world, tiny, tmp_path / "other", checkpoint__every=1))
    same_weights(folder, tmp_path / "other")


def test_a_finished_model_whose_validation_is_nan_is_not_saved(world: World, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(world, tiny, folder, train__steps=2, **CONSTANT)
    line = diverge(world, tiny, folder, train__steps=3, **DIVERGING, **CONSTANT, **AS_PLANNED)
    assert line.startswith("the loss on validation is nan after step 3. ")
    assert "step-00000002 is kept" in line
    assert steps_of(folder / "checkpoints") == [2]
    assert len(curve(run(world, tiny, folder, train__steps=3, **CONSTANT))) == 3


def train_with_poison(step: int, kind: str, name: str, value: float, stop: bool, **arguments: Any) -> None:
    """Train; after `step`, one number that the last rank owns becomes `value`; perhaps SIGTERM has come before."""

    @torch.no_grad()
    def poison(trainer: Any) -> None:
        if trainer.world.rank != trainer.world.size - 1:
            return
        if stop and trainer.step == step - 2:
            trainer.watch.stop.ask("SIGTERM")  # told with the next step that begins, which is read once it is followed
        if trainer.step == step:
            state = state_shards(trainer.engine, trainer.plan.shards)
            named = (shard for shard in state if shard.name.startswith(f"{kind}/") and name in shard.name)
            shard = next(shard for shard in named if shard.tensor.numel())
            shard.tensor[(0,) * shard.tensor.dim()] = value

    with stepping_in("made", poison):
        train(**arguments)


@pytest.mark.parametrize(
    ("step", "kind", "name", "value", "keys"),
    [
        (4, "weights", "", math.inf, {"parallel.zero": 0}),
        (3, "moment2", "", math.inf, {}),
        (4, "moment1", "", math.nan, {"parallel.zero": 2}),
        (4, "weights", "", -math.inf, {"parallel.zero": 3, "model.pattern": "M-"}),
        (4, "weights", "in_proj", 3.4e38, {"train.precision": "bf16"}),  # which is Inf where it runs
        (4, "weights", "balance_bias", math.nan, {"moe.balance": "bias"}),
        (6, "moment2", "", math.inf, {}),  # the last step
        (3, "moment1", "", math.nan, {"checkpoint.every": 0}),  # SIGTERM
    ],
)
def test_nothing_that_is_not_finite_is_saved(
    world: World, tiny: Path, tmp_path: Path, step: int, kind: str, name: str, value: float, keys: dict
) -> None:
    folder = tmp_path / "run"
    keys = {"run.folder": str(folder), "train.validate_every": 0, "train.sample_tokens": 0} | keys
    stops = keys.get("checkpoint.every") == 0
    if step == STEPS:
        keys["checkpoint.every"] = 5
    with pytest.raises(WorkerError) as stop:
        world.run(train_with_poison, step, kind, name, value, stops, config=str(tiny), **keys)
    line = next(line for line in str(stop.value).splitlines() if "RunStopped: " in line)
    saved = [] if stops else [5 if step == STEPS else 2]
    assert f"step {step + (step == 3 and not stops)} is not saved because {kind}/" in line
    assert f"{name} holds NaN" in line or name != "balance_bias"
    assert line.endswith(f"checkpoint, step-{saved[0]:08d}, is kept" if saved else "there is no earlier checkpoint")
    assert steps_of(folder / "checkpoints") == saved
    assert not list((folder / "checkpoints").glob(".step*"))


@pytest.mark.slow
@pytest.mark.parametrize(("step", "kind", "name"), [(3, "moment2", ""), (4, "weights", "in_proj")])
def test_saving_in_the_background_refuses_it_as_well(
    world: World, tiny: Path, tmp_path: Path, step: int, kind: str, name: str
) -> None:
    """The fault is told with the next save; or the next loss is NaN before that."""
    folder = tmp_path / "run"
    keys = {"run.folder": str(folder), "checkpoint.asynchronous": True, "parallel.zero": 0}
    with pytest.raises(WorkerError) as stop:
        world.run(train_with_poison, step, kind, name, math.inf, False, config=str(tiny), **keys)
    line = next(line for line in str(stop.value).splitlines() if "RunStopped: " in line)
    diverged = "the loss is nan at step 5; the first bad value"
    told = f"step 4 is not saved because {kind}/" if kind == "moment2" else diverged
    assert told in line
    assert "step-00000002" in line
    assert "is kept" in line
    assert steps_of(folder / "checkpoints") == [2]
    keys.pop("run.folder")
    found = run(world, tiny, folder, ranks=2, **{key.replace(".", "__"): value for key, value in keys.items()})
    assert curve(found) == curve(run(world, tiny, tmp_path / "other", ranks=2, parallel__zero=0))


def train_until_killed(step: int, **arguments: Any) -> None:
    """Train; end at once and silently, when `step` is saved and no step was made from it."""
    import os

    saved = store.save

    def then_end(*rest: Any, **options: Any) -> Path:
        path = saved(*rest, **options)
        if store.step_of(path) == step:
            os._exit(9)
        return path

    store.save = then_end
    train(**arguments)


def test_a_save_that_nothing_is_known_of_is_used(world: World, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    keys = {"run.folder": str(folder), "checkpoint.keep": 1}
    with pytest.raises(WorkerError, match="exit code 9"):
        world.run(train_until_killed, 4, ranks=1, config=str(tiny), **keys)
    assert steps_of(folder / "checkpoints") == [2, 4]
    found = run(world, tiny, folder, checkpoint__keep=1)
    assert "step-00000004, step 4" in (folder / "log.txt").read_text()
    assert curve(found) == curve(run(world, tiny, tmp_path / "other"))


# What it costs


def count(looks: bool, **arguments: Any) -> tuple[list[Counter], list[Counter]]:
    """Train, and count within each step and within each save, with or without a look for what is not finite."""
    steps: list[Counter] = []
    saves: list[Counter] = []
    counted = Counted()

    def begin(_: Any) -> None:
        counted.counts = Counter()

    with pytest.MonkeyPatch.context() as patch:
        if not looks:
            patch.setattr(store, "first_not_finite", lambda _: None)
        with (
            stepping_in("step", before=begin),
            stepping_in("made", before=lambda _: steps.append(counted.counts.copy())),
            stepping_in("save", before=begin, after=lambda _: saves.append(counted.counts.copy())),
            counted,
        ):
            train(**arguments)
    return steps, saves


def test_a_step_reads_and_talks_no_more_and_a_save_reads_once(world: World, tiny: Path, tmp_path: Path) -> None:
    keys = {"train.validate_every": 0}
    with_look, without = (
        world.run(count, looks, config=str(tiny), **keys | {"run.folder": str(tmp_path / str(looks))})
        for looks in (True, False)
    )
    for (steps, saves), (plain_steps, plain_saves) in zip(with_look, without, strict=True):
        assert len(steps) == STEPS
        assert len(saves) == STEPS // 2
        assert steps == plain_steps
        assert steps[2] == steps[3]  # the step after a save, which is noted, and another
        assert steps[2]["reads"] == 0  # of the device; tests/train/test_steps.py
        assert steps[2]["c10d::allreduce_"] > 0
        for save, plain in zip(saves, plain_saves, strict=True):
            assert save - plain == Counter(reads=1)
            assert not plain - save
    assert read_next_step(tmp_path / "True" / "checkpoints" / "step-00000004").is_finite  # type: ignore[union-attr]
    assert curve(read_metrics(tmp_path / "True")) == curve(read_metrics(tmp_path / "False"))
