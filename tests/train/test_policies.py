"""What a run does about NaN and spikes: which batches it leaves out, and that the rest is as if they had never been."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.train import train
from moe_mamba.checkpoint import store
from moe_mamba.config import TrainConfig
from moe_mamba.run.events import read_events
from moe_mamba.train.recovery import Recovery, Spikes
from tests.train.poison import nan_from, train_poisoned
from tests.train.runs import STEPS, curve, read_metrics, run, same_weights
from tests.train.seams import stepping_in
from tests.world import WorkerError, World

NAN = math.nan
FAST = {"train__validate_every": 0, "train__sample_tokens": 0}


def poisoned(world: World, tiny: Path, folder: Path, factors: Any, ranks: int = 1, **options: Any) -> list[dict]:
    """A run of which `factors` spoil batches, on the last rank's part; its lines of metrics."""
    keys = {key.replace("__", "."): value for key, value in (FAST | options).items() if "__" in key}
    rest = {key: value for key, value in options.items() if "__" not in key}
    keys["run.folder"] = str(folder)
    world.run(train_poisoned, factors, rank=ranks - 1, ranks=ranks, config=str(tiny), **rest, **keys)
    return read_metrics(folder)


def told(world: World, tiny: Path, folder: Path, batches: str, ranks: int = 1, **keys: Any) -> list[dict]:
    return run(world, tiny, folder, ranks, **FAST | keys | {"train__skip_batches": batches})


def same(folder: Path, other: Path) -> None:
    """Two runs ended alike: curves, weights and moments bit for bit, and the batches that were left out."""
    assert curve(read_metrics(folder)) == curve(read_metrics(other))
    same_weights(folder, other)
    assert left_out(folder) == left_out(other)


def left_out(folder: Path) -> list[int]:
    return store.read_description(store.resolve(folder))["recovery"]["skipped_batches"]


def events_of(folder: Path, *names: str) -> list[dict]:
    events, damaged = read_events(folder)
    assert damaged == 0
    return [event for event in events if event["event"] in names]


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        (2, {"train__micro_batch": 2, "parallel__expert": 2}),
        *(
            pytest.param(ranks, keys, marks=pytest.mark.slow)
            for ranks, keys in (
                (1, {"train__micro_batch": 4}),
                (2, {"parallel__zero": 0}),
                (2, {"parallel__zero": 2, "train__micro_batch": 2}),
                (2, {"parallel__zero": 3, "train__micro_batch": 2, "model__pattern": "M-"}),
                (2, {"parallel__tensor": 2, "train__precision": "bf16"}),
                (2, {"parallel__offload_optimizer": True, "train__micro_batch": 2}),
                (2, {"parallel__zero": 3, "parallel__offload_optimizer": True, "model__pattern": "M-"}),
                (2, {"checkpoint__asynchronous": True, "moe__balance": "bias"}),
            )
        ),
    ],
)
def test_a_batch_that_is_left_out_leaves_no_trace(
    world: World, tiny: Path, tmp_path: Path, ranks: int, keys: dict[str, Any]
) -> None:
    poisoned(world, tiny, tmp_path / "skips", {2: NAN, 5: math.inf}, ranks, train__on_nan="skip", **keys)
    told(world, tiny, tmp_path / "told", "2,5", ranks, **keys)
    assert left_out(tmp_path / "skips") == [2, 5]
    assert len(curve(read_metrics(tmp_path / "skips"))) == STEPS
    same(tmp_path / "skips", tmp_path / "told")
    nan = events_of(tmp_path / "skips", "nan")
    assert [(event["step"], event["batch"], event["action"]) for event in nan] == [(1, 2, "skip"), (3, 5, "skip")]
    assert [event["batches"] for event in events_of(tmp_path / "told", "skip")] == [[2], [5]]


def test_what_was_left_out_is_known_after_a_resume(world: World, tiny: Path, tmp_path: Path) -> None:
    poisoned(world, tiny, tmp_path / "skips", {2: NAN}, stop_at=3, train__on_nan="skip")
    assert store.read_description(store.resolve(tmp_path / "skips"))["step"] == 4
    run(world, tiny, tmp_path / "skips", **FAST)
    told(world, tiny, tmp_path / "told", "2")
    same(tmp_path / "skips", tmp_path / "told")
    run(world, tiny, tmp_path / "told", **FAST, train__steps=STEPS + 1, train__skip_batches="2,3,8")
    assert "train.skip_batches: [3] were trained on before" in (tmp_path / "told" / "log.txt").read_text()
    assert left_out(tmp_path / "told") == [2, 8]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_rewind_takes_back_the_steps_since_a_checkpoint(world: World, tiny: Path, tmp_path: Path, ranks: int) -> None:
    metrics = poisoned(world, tiny, tmp_path / "rewinds", {4: NAN}, ranks, train__on_nan="rewind")
    told(world, tiny, tmp_path / "told", "3,4", ranks)
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, STEPS + 1))
    same(tmp_path / "rewinds", tmp_path / "told")
    (rewind,) = events_of(tmp_path / "rewinds", "rewind")
    assert (rewind["step"], rewind["to"], rewind["batches"]) == (3, 2, [3, 4])


def train_with_a_flipped_bit(rank: int, **arguments: Any) -> None:
    """Train; a weight in a rank's memory becomes NaN before step 4, once."""
    flipped = []

    def flip(trainer: Any) -> None:
        if trainer.made == 3 and trainer.world.rank == rank and not flipped:
            flipped.append(True)
            trainer.model.get_parameter("layers.0.mixer.x_proj.weight").data.view(-1)[0] = NAN

    with stepping_in("step", flip):
        train(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_rewind_brings_back_weights_that_memory_spoilt(world: World, tiny: Path, tmp_path: Path, zero: int) -> None:
    keys = {"run.folder": str(tmp_path / "run"), "train.validate_every": 0, "train.sample_tokens": 0}
    keys |= {"train.on_nan": "rewind", "parallel.zero": zero}
    world.run(train_with_a_flipped_bit, 1, ranks=2, config=str(tiny), **keys)
    told(world, tiny, tmp_path / "told", "3,4", 2, parallel__zero=zero)
    same(tmp_path / "run", tmp_path / "told")


def test_a_rewind_before_any_checkpoint_leaves_the_batch_out(world: World, tiny: Path, tmp_path: Path) -> None:
    poisoned(world, tiny, tmp_path / "run", {2: NAN}, train__on_nan="rewind")
    assert left_out(tmp_path / "run") == [2]
    assert "batch 2 is left out, for there is no checkpoint to go back to" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize("policy", [pytest.param("skip", marks=pytest.mark.slow), "rewind"])
def test_nan_without_end_ends_the_run(world: World, tiny: Path, tmp_path: Path, policy: str) -> None:
    with pytest.raises(WorkerError, match=r"RunStopped: the loss is nan at step \d.*train.skip_limit=3 bad batches"):
        poisoned(
            world,
            tiny,
            tmp_path / "run",
            functools.partial(nan_from, 5),
            train__on_nan=policy,
            train__skip_limit=3,
        )
    assert len(events_of(tmp_path / "run", "nan")) == 4
    assert len(events_of(tmp_path / "run", "stop")) == 1
    # The weights of step 4 gave NaN with every batch: no run goes on from there.
    assert store.step_of(store.resolve(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("policy", "expected"), [("log", []), pytest.param("skip", [6], marks=pytest.mark.slow), ("rewind", [5, 6])]
)
def test_a_spike_is_treated_as_told(world: World, tiny: Path, tmp_path: Path, policy: str, expected: list[int]) -> None:
    keys = {"train__steps": 8, "train__spike_window": 8, "train__spike_threshold": 30}
    metrics = poisoned(world, tiny, tmp_path / "run", {6: 1e3}, 2, train__on_spike=policy, **keys)
    assert left_out(tmp_path / "run") == expected
    (spike,) = events_of(tmp_path / "run", "spike")
    assert (spike["step"], spike["batch"], spike["action"]) == (5, 6, policy)
    assert "the loss is " in spike["text"]
    assert len(curve(metrics)) == 8
    if expected:
        told(world, tiny, tmp_path / "told", ",".join(map(str, expected)), 2, **keys)
        same(tmp_path / "run", tmp_path / "told")


@pytest.mark.slow
def test_a_spike_may_end_a_run(world: World, tiny: Path, tmp_path: Path) -> None:
    keys = {"train__spike_window": 8, "train__on_spike": "stop", "train__spike_threshold": 30}
    with pytest.raises(WorkerError, match=r"RunStopped: the loss is .* above .* at step 5.*step-00000004 is kept"):
        poisoned(world, tiny, tmp_path / "run", {5: 1e3}, **keys)
    assert store.step_of(store.resolve(tmp_path / "run")) == 4  # finite weights serve


# The rule, and the order of batches


def test_a_spike_is_far_above_the_median_of_a_window_that_is_half_full() -> None:
    rule = Spikes(8, 10.0, [(3.0, 1.0), (3.1, 1.1), (2.9, 0.9)])
    assert rule.find(100.0, 100.0) is None
    rule.recent.append((3.0, 1.0))  # medians 3 and 1, MAD 0.05 each
    assert rule.find(3.4, 1.4) is None
    assert rule.find(0.1, 0.1) is None
    loss, norm = rule.find(3.6, 1.0), rule.find(3.0, 1.6)
    assert loss is not None and loss.text == "the loss is 3.6, above 3.5 (median + 10 MAD)"
    assert norm is not None and norm.text.startswith("the gradient's norm is 1.6, above 1.5")
    flat = Spikes(8, 10.0, [(2.0, 1.0)] * 8)  # no deviation at all: 1% of the median counts
    assert flat.find(2.19, 1.0) is None
    assert flat.find(2.21, 1.0) is not None


def test_batches_that_are_left_out_are_counted_until_the_run_is_well_past_them() -> None:
    recovery = Recovery(TrainConfig(on_nan="skip", skip_limit=2, spike_window=8), 0, {})
    actions = []
    for number, step in enumerate([1, 2, 10, 10, 10], 1):
        assert not recovery.judge(NAN, 1.0)
        actions.append(recovery.action(step))
        recovery.leave_out(number)
    assert actions == ["skip", "skip", "skip", "skip", "stop"]
    assert recovery.skipped == [1, 2, 3, 4, 5]


def test_the_next_batch_is_the_first_that_is_not_to_be_left_out() -> None:
    recovery = Recovery(TrainConfig(skip_batches=[1, 2, 5]), 0, {})
    assert [recovery.after(number) for number in (0, 3, 4)] == [3, 4, 6]
    recovery.judge(3.0, 1.0)
    assert recovery.made(3) == (None, [1, 2])
    again = Recovery(TrainConfig(skip_batches=[3, 5]), 1, {"recovery": recovery.describe()})
    assert (again.position, again.skipped, again.too_late) == (3, [1, 2], [3])


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--train.on_nan=ignore", "train.on_nan='ignore'"),
        ("--train.on_spike=drop", "train.on_spike='drop'"),
        ("--train.spike_window=4", "train.spike_window='4'"),
        ("--train.spike_threshold=0", "train.spike_threshold='0'"),
        ("--train.skip_batches=0,3", "train.skip_batches='0'"),
        (
            "--train.skip_batches=4,1000000",
            "names batch 1000000, but a run of 420 steps",
        ),
        ("--train.skip_limit=0", "train.skip_limit='0'"),
    ],
)
def test_a_policy_that_does_not_exist_is_refused(refusal: Callable[..., str], flag: str, named: str) -> None:
    assert named in refusal(train, flag)
