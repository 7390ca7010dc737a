"""One uninterrupted curve in metrics.jsonl, whatever happened to the run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from moe_mamba.config import LoggingConfig
from moe_mamba.errors import UserError
from moe_mamba.run.metrics import MetricsWriter, lacks_validation, read_metrics
from tests import ROOT

QUIET = LoggingConfig()


def write(folder: Path, start: int, stop: int, logging: LoggingConfig = QUIET) -> None:
    writer = MetricsWriter(folder, start, logging, {"model": {"pattern": "ME"}})
    for step in range(start + 1, stop + 1):
        writer.write(
            {"step": step, "loss": 1 / step, "expert_load": {"1": [0.25, 0.75]}, "moe": {"dropped": {"1": 0.1}}}
        )
    writer.close()


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, QUIET, {})
    writer.write({"step": 1, "loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_resumed_run_leaves_the_file_of_one_never_stopped(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write(tmp_path / "a", 0, 10)
    write(tmp_path / "b", 0, 7)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')
    assert [line["step"] for line in read_metrics(tmp_path / "b")] == list(range(1, 8))
    write(tmp_path / "b", 4, 10)
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == (tmp_path / "a" / "metrics.jsonl").read_text()
    write(tmp_path / "b", 10, 10)
    assert (tmp_path / "b" / "metrics.jsonl").read_text() == (tmp_path / "a" / "metrics.jsonl").read_text()
    write(tmp_path / "b", 0, 2)
    assert len(read_metrics(tmp_path / "b")) == 2


def test_a_truncated_line_at_the_step_of_resumption_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 3')
    write(tmp_path, 3, 4)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, QUIET, {})
    writer.write({"step": 1, "gradient_norm": math.inf, "moe": {"dropped": {"1": math.nan}}, "list": [math.nan]})
    assert read_metrics(tmp_path) == [
        {"step": 1, "gradient_norm": None, "moe": {"dropped": {"1": None}}, "list": [None]}
    ]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, LoggingConfig(wandb="p", tensorboard=True), {}, enabled=False)
    writer.write({"step": 1})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_no_metrics_and_foreign_lines_are_the_users_to_fix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl does not exist: give the folder of a run"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a line of metrics"):
        read_metrics(tmp_path)


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, 0, 3, LoggingConfig(tensorboard=True))
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "expert_load/1/largest", "moe/dropped/1"}
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3]
    assert found.Scalars("expert_load/1/largest")[0].value == 0.75


@pytest.mark.parametrize(
    ("name", "logging"), [("wandb", LoggingConfig(wandb="p")), ("tensorboard", LoggingConfig(tensorboard=True))]
)
def test_a_service_that_cannot_write_is_said_and_left(tmp_path: Path, name: str, logging: LoggingConfig) -> None:
    pytest.importorskip(name)
    (tmp_path / name).write_text("in its way")
    said: list[str] = []
    writer = MetricsWriter(tmp_path, 0, logging, {}, say=said.append)
    writer.write({"step": 1})
    writer.close()
    assert len(said) == 1
    assert said[0].endswith("the run goes on, its figures stay in metrics.jsonl")
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_service_that_fails_later_is_said_once(tmp_path: Path) -> None:
    class Failing:
        NAME = "the service"

        def write(self, step: int, figures: dict[str, float]) -> None:
            if step == 2:
                raise RuntimeError("the disk\nis full")

        def close(self) -> None:
            raise AssertionError("it is left")

    said: list[str] = []
    writer = MetricsWriter(tmp_path, 0, LoggingConfig(), {}, say=said.append)
    writer.services.append(Failing())
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 1.0})
    writer.close()
    assert said == [
        "warning   the service cannot be written (the disk is full): the run goes on, its figures stay in metrics.jsonl"
    ]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


WITH_WANDB = """
import sys
sys.path.insert(0, "tests/train")
from pathlib import Path
from tests.run.test_metrics import write
from moe_mamba.config import LoggingConfig
write(Path(sys.argv[1]), 0, 2, LoggingConfig(wandb="project"))
"""


def test_wandb_without_a_key_is_offline_and_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", WITH_WANDB, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])) == 4


def test_scores_that_are_missing_are_known_beside_damaged_lines(tmp_path: Path) -> None:
    assert not lacks_validation(tmp_path, 3), "there are no metrics to lack any"
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\nnothing\n{"step": 2, "validation": {}}\n')
    assert lacks_validation(tmp_path, 3)
    assert not lacks_validation(tmp_path, 2)
