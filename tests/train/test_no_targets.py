"""Batches without a target to count: steps without loss, in every layout, and the same after a resume."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_mamba.checkpoint import store
from moe_mamba.errors import UserError
from moe_mamba.run.events import read_events
from tests.data.conftest import END, write_foreign
from tests.train.runs import curve, read_metrics, run, same_weights
from tests.world import WorkerError, World
from tools.evaluate import main as evaluate
from tools.status import main as status

LENGTH = 32
FAST = {"train__validate_every": 0, "train__sample_tokens": 0, "train__steps": 8, "moe__capacity_factor": "null"}


@pytest.fixture(scope="session")
def padded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards that are mostly padding: of 200 windows 16 have text."""
    path = tmp_path_factory.mktemp("padded") / "padded"
    texts = [list(f"{number} plus 1 is {number + 1}".encode()) for number in range(16)]
    documents = [[*text, END] + [END] * (LENGTH * 12 - len(text) - 1) for text in texts]
    write_foreign(path, [*documents, [END] * (LENGTH * 8 + 1)])
    return str(path)


def train(world: World, tiny: Path, folder: Path, padded: str, ranks: int = 1, **keys: Any) -> list[dict]:
    return run(world, tiny, folder, ranks, **FAST | {"data__train": padded, "data__validation": padded} | keys)


def without_loss(metrics: list[dict]) -> list[int]:
    return [line["step"] for line in metrics if line.get("targets") == 0]


@pytest.fixture(scope="session")
def whole(world: World, tiny: Path, padded: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, some of whose batches have no target."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(world, tiny, folder, padded)
    return folder


def test_a_step_without_loss_is_counted_and_said_once(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = read_metrics(whole)
    empty = without_loss(metrics)
    assert 2 <= len(empty) <= 6
    steps = [line for line in metrics if "validation" not in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in steps if "loss" in line] == [n for n in range(1, 9) if n not in empty]
    assert all(math.isfinite(loss) for loss in curve(metrics))
    log = (whole / "log.txt").read_text()
    assert log.count("has no target to count") == 1
    assert f"{len(empty)} of 8 steps had no target to count, and changed nothing" in log
    (event,) = [event for event in read_events(whole)[0] if event["event"] == "no_targets"]
    assert event["step"] + 1 == empty[0]
    assert not [event for event in read_events(whole)[0] if event["event"] in ("nan", "spike", "skip")]
    description = store.read_description(store.resolve(whole))
    assert description["recovery"]["without_targets"] == len(empty)
    assert description["recovery"]["position"] == 8
    status(str(whole))
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("done", [1, 2, 5])
def test_a_resume_passes_the_same_steps(
    world: World, tiny: Path, padded: str, whole: Path, tmp_path: Path, done: int
) -> None:
    for steps in (done, 8):  # the schedule follows train.steps, so the curves differ; which batches count does not
        metrics = train(world, tiny, tmp_path / "run", padded, train__steps=steps, train__learning_rate=1e-9)
    assert without_loss(metrics) == without_loss(read_metrics(whole))
    assert (tmp_path / "run" / "log.txt").read_text().count("has no target to count") == 1


def test_it_changes_nothing(world: World, tiny: Path, padded: str, whole: Path, tmp_path: Path) -> None:
    """A run that is told to leave these batches out makes the same weights, at one rate that never changes."""
    empty = without_loss(read_metrics(whole))
    constant = {"train__warmup": 0, "train__minimum_rate": 1}
    train(world, tiny, tmp_path / "passes", padded, **constant)
    told = {"train__skip_batches": ",".join(map(str, empty)), "train__steps": 8 - len(empty)}
    train(world, tiny, tmp_path / "told", padded, **constant, **told)
    assert curve(read_metrics(tmp_path / "passes")) == curve(read_metrics(tmp_path / "told"))
    same_weights(tmp_path / "passes", tmp_path / "told")


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        (2, {"parallel__expert": 2}),
        *(
            pytest.param(ranks, keys, marks=pytest.mark.slow)
            for ranks, keys in (
                (2, {"train__micro_batch": 1}),
                (2, {"parallel__tensor": 2}),
                (4, {"parallel__tensor": 2, "parallel__expert": 4}),
                (2, {"parallel__zero": 2, "moe__balance": "bias"}),
            )
        ),
    ],
)
def test_every_layout_passes_the_same_steps(
    world: World, tiny: Path, padded: str, tmp_path: Path, ranks: int, keys: dict[str, Any]
) -> None:
    """Ranks that have no target beside others that have some take their part in the step."""
    balance = {"moe__balance": keys.get("moe__balance", "none"), "moe__z_loss_weight": 0}
    alone = train(world, tiny, tmp_path / "alone", padded, **balance)
    metrics = train(world, tiny, tmp_path / "shared", padded, ranks, **balance | keys)
    assert without_loss(metrics) == without_loss(alone) != []
    assert curve(metrics) == pytest.approx(curve(alone), abs=1e-4)


def test_sequences_of_one_token(world: World, tiny: Path, padded: str, tmp_path: Path) -> None:
    metrics = train(world, tiny, tmp_path / "run", padded, data__sequence_length=1, train__steps=12)
    assert len(without_loss(metrics)) > 3
    assert all(math.isfinite(loss) for loss in curve(metrics))


def test_a_source_without_any_target_is_refused(world: World, tiny: Path, padded: str, tmp_path: Path) -> None:
    write_foreign(tmp_path / "ends", [[END] * 600])
    write_foreign(tmp_path / "single", [[number % 256] for number in range(600)])
    for source in ("ends", "single"):
        for key in ("data__train", "data__validation"):
            with pytest.raises(WorkerError, match=r"UserError: .*is followed by one of the same document, so there is"):
                train(world, tiny, tmp_path / f"{source}-{key}", padded, **{key: str(tmp_path / source)})
    train(world, tiny, tmp_path / "run", str(tmp_path / "single"), data__reset_at_document=False, train__steps=1)


def test_evaluation_of_a_source_without_any_target_is_one_line(plain: Path, tmp_path: Path) -> None:
    write_foreign(tmp_path / "single", [[number % 256] for number in range(600)])
    with pytest.raises(UserError, match="there is nothing to predict: give longer documents, or set") as error:
        evaluate(str(plain), input=str(tmp_path / "single"))
    assert "\n" not in str(error.value)


def test_evaluation_reads_another_field(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"{number} plus 1" for number in range(30)]
    for key in ("text", "content"):
        (tmp_path / f"{key}.jsonl").write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    found = []
    for flags in ({"input": "text.jsonl"}, {"input": "content.jsonl", "text_key": "content"}):
        evaluate(str(plain), json=True, **flags | {"input": str(tmp_path / flags["input"])})
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    with pytest.raises(UserError, match="name the field of the text with --text_key"):
        evaluate(str(plain), input=str(tmp_path / "content.jsonl"))
