"""What a run leaves for the script that started it."""

from pathlib import Path

import pytest

from moe_mamba.errors import RunStopped, UserError
from moe_mamba.run.folder import InUse
from moe_mamba.run.outcome import FILE, STOPPED_CODE, outcome_left


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FILE, str(tmp_path / "outcome"))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path / "outcome"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such\nkey"), "mistake: no such key\n"),
        (InUse("in use"), "failed: in use\n"),
        (RunStopped("the loss is nan"), "failed: the loss is nan\n"),
        (KeyError("x"), "failed: 'x'\n"),
    ],
)
def test_an_error_is_left_and_raised(file: Path, error: Exception, line: str) -> None:
    with pytest.raises(type(error)), outcome_left():
        assert file.read_text() == "running\n"
        raise error
    assert file.read_text() == line


def test_a_run_that_was_stopped_ends_with_the_code_that_is_wanted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with outcome_left():
        pass
    assert file.read_text() == "stopped\n"
    monkeypatch.setenv(STOPPED_CODE, "75")
    with pytest.raises(SystemExit, match="75"), outcome_left():
        pass
    assert file.read_text() == "stopped\n"
    with outcome_left() as outcome:
        outcome.is_finished = True
    assert file.read_text() == "finished\n"


@pytest.mark.parametrize("code", ["-1", "256", "yes"])
def test_a_code_that_is_none_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setenv(STOPPED_CODE, code)
    with pytest.raises(UserError, match=f"{STOPPED_CODE}={code} is no exit code"), outcome_left():
        pass


def test_only_rank_0_writes(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with outcome_left():
        pass
    assert not file.exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(FILE, str(file / "nowhere"))
    with pytest.raises(UserError, match="cannot be written"), outcome_left():
        pass
