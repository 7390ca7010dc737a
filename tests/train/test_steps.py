"""Steps that the device is given without waiting, and that are read one step late: what is read, and what is kept."""

import math
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from launch.train import train
from moe_mamba.parallel import engine as engines
from moe_mamba.run.events import read_events
from moe_mamba.train.reading import Reading
from moe_mamba.train.steps import Steps
from moe_mamba.train.trainer import Trainer
from tests.parallel.layouts import Layout, batch_of, build, config_of
from tests.train.counting import Counted
from tests.train.poison import train_poisoned
from tests.train.runs import STEPS, curve, read_metrics, same_weights
from tests.train.seams import stepping_in
from tests.world import WorkerError, World

NAN = math.nan


def count(**arguments: Any) -> list[Counter[str]]:
    """In a worker: train, and count from where a step begins to where the next one does."""
    steps: list[Counter[str]] = []
    counted, values = Counted(), Reading.values

    def begin(_: Trainer) -> None:
        steps.append(counted.counts)
        counted.counts = Counter()

    def read(reading: Reading) -> list[float]:
        counted.counts["steps read"] += 1
        return values(reading)

    with mock.patch.object(Reading, "values", read), stepping_in("step", begin), counted:
        train(**arguments)
    return steps[1:]


# ranks and keys -> reads besides, by DeepSpeed itself; all-reduces: of gradients (DeepSpeed's, even of one rank; of
# experts by themselves where they are spread), of the routers' statistics, and the step's own one.
CASES: dict[str, tuple[int, dict[str, Any], int, int]] = {
    "ZeRO 0": (1, {"parallel.zero": 0}, 0, 1),
    "ZeRO 1": (1, {}, 0, 1),
    "ZeRO 2": (1, {"parallel.zero": 2, "moe.balance": "bias"}, 0, 1),
    "ZeRO 3": (1, {"parallel.zero": 3, "model.pattern": "M-"}, 1, 0),  # a norm that we give it, on the host
    "offload": (1, {"parallel.offload_optimizer": True}, 0, 1),
    "data": (2, {"model.pattern": "M"}, 0, 2),
    "capacity": (2, {"parallel.expert": 2, "moe.capacity_factor": 1.0}, 0, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loop_reads_one_vector_a_step(world: World, tiny: Path, tmp_path: Path, case: str) -> None:
    ranks, keys, others, reduced = CASES[case]
    keys = {"run.folder": str(tmp_path / "run"), "train.validate_every": 0, "checkpoint.every": 0, **keys}
    keys |= {"train.sample_tokens": 0, "logging.every": 1}
    for steps in world.run(count, ranks=ranks, config=str(tiny), **keys):
        for step in steps[2:]:
            assert step["steps read"] == 1
            assert step["reads"] == others
            assert step["c10d::allreduce_"] == reduced


def order(**arguments: Any) -> list[tuple[str, int]]:
    """In a worker: train; in which order steps are made and taken."""
    found: list[tuple[str, int]] = []
    make, take = Steps.make, Trainer._take

    def note_make(self: Any, number: int, *rest: Any) -> Any:
        found.append(("make", number))
        return make(self, number, *rest)

    def note_take(self: Any, step: Any) -> bool:
        found.append(("take", step.number))
        return take(self, step)

    with mock.patch.object(Steps, "make", note_make), mock.patch.object(Trainer, "_take", note_take):
        train(**arguments)
    return found


def test_a_step_is_read_once_the_next_one_is_ordered_but_for_the_first_and_before_a_pause(
    world: World, tiny: Path, tmp_path: Path
) -> None:
    keys = {"run.folder": str(tmp_path / "run"), "train.validate_every": 0, "checkpoint.every": 4}
    (found,) = world.run(order, config=str(tiny), ranks=1, **keys)
    words = "make 1, take 1, make 2, make 3, take 2, make 4, take 3, take 4, make 5, make 6, take 5, take 6"
    assert ", ".join(f"{what} {number}" for what, number in found) == words


def train_at_once(*arguments: Any, **options: Any) -> None:
    """In a worker: as ``train_poisoned``, reading each step before its update."""
    with mock.patch.object(Trainer, "_is_read_at_once", True):
        train_poisoned(*arguments, **options)


@pytest.mark.parametrize(
    ("policy", "ranks", "keys"),
    [
        ("skip", 2, {"moe.balance": "bias", "train.micro_batch": 2}),
        ("rewind", 1, {}),
        *(
            pytest.param(policy, ranks, keys, marks=pytest.mark.slow)
            for policy, ranks, keys in (
                ("skip", 1, {"parallel.zero": 0}),
                ("skip", 2, {"parallel.zero": 2, "train.micro_batch": 2}),
                ("skip", 2, {"parallel.zero": 3, "model.pattern": "M-"}),
                ("rewind", 2, {"parallel.tensor": 2, "train.precision": "bf16"}),
                ("rewind", 2, {"parallel.offload_optimizer": True}),
            )
        ),
    ],
)
def test_reading_late_is_reading_at_once(
    world: World, tiny: Path, tmp_path: Path, policy: str, ranks: int, keys: dict[str, Any]
) -> None:
    """Bad batches behind each other, before a pause and as the last one."""
    folders = {train_poisoned: tmp_path / "late", train_at_once: tmp_path / "at_once"}
    keys = {"train.on_nan": policy, "train.validate_every": 0, "train.sample_tokens": 0, **keys}
    for function, folder in folders.items():
        factors = {2: NAN, 3: math.inf, 5: NAN, 9: NAN}
        world.run(
            function, factors, rank=ranks - 1, ranks=ranks, config=str(tiny), **keys | {"run.folder": str(folder)}
        )
    late, at_once = folders.values()
    assert curve(read_metrics(late)) == curve(read_metrics(at_once))
    assert len(curve(read_metrics(late))) == STEPS
    same_weights(late, at_once)
    assert events(late) == events(at_once)
    assert len([event for event in events(late) if event["event"] == "nan"]) >= 3


def events(folder: Path) -> list[dict[str, Any]]:
    """What happened, without times."""
    return [
        {key: value for key, value in event.items() if key not in ("time", "seconds")}
        for event in read_events(folder)[0]
        if event["event"] in ("nan", "skip", "rewind", "checkpoint", "finish")
    ]


def test_a_stop_is_told_alike(world: World, tiny: Path, tmp_path: Path) -> None:
    lines = []
    for function in (train_poisoned, train_at_once):
        keys = {"run.folder": str(tmp_path / function.__name__), "train.validate_every": 0}
        with pytest.raises(WorkerError) as stop:
            world.run(function, {4: NAN}, ranks=1, config=str(tiny), **keys)
        (line,) = (line for line in str(stop.value).splitlines() if "RunStopped: " in line)
        lines.append(line.replace(str(tmp_path / function.__name__), "run"))
    assert lines[0] == lines[1]
    assert "the loss is nan at step 4; the first bad value is in the loss" in lines[0]


def refuse_a_step(config: Any) -> list[bool]:
    """In a worker: two steps; the second one's gradient is NaN on the last rank. Whether each tensor is as it was."""
    built = build(config)
    engine = engines.build_engine(built.model, config, built.groups, config.train.micro_batch)
    before: list[torch.Tensor] = []
    for step in range(2):
        tokens, targets, document_starts = batch_of(step, config)
        output = engine(tokens, document_starts, targets=targets)
        factor = NAN if step and built.topology.world.rank == built.topology.world.size - 1 else 1.0
        engine.backward(output.cross_entropy * factor)
        if step:
            before = [tensor.clone() for tensor in state_of(engine)]
        (norm,) = engines.step(engine, config.train.gradient_clip).tolist()
        assert math.isfinite(norm) == (step == 0)
    return [torch.equal(old, new) for old, new in zip(before, state_of(engine), strict=True)]


def state_of(engine: Any) -> list[torch.Tensor]:
    """Running weights, masters, moments and counts of steps."""
    optimizer = engines.base_optimizer(engine)
    masters = [weights for weights in optimizer.state if weights.numel()]
    return [*engine.module.parameters(), *masters, *(t for w in masters for t in optimizer.state[w].values())]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_changes_nothing(world: World, zero: int) -> None:
    config = config_of("M-", Layout(2, zero=zero))
    for same in world.run(refuse_a_step, config, ranks=2):
        assert len(same) > 10
        assert all(same)
