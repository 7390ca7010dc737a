"""A run's folder is tried before the run, and goes without what a file system lacks."""

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_mamba.config import Config
from moe_mamba.errors import UserError
from moe_mamba.run.folder import RunFolder


def fifo(path: Path) -> None:
    os.mkfifo(path)


def file(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("log.txt", Path.mkdir),
        ("config.yaml", Path.mkdir),
        ("metrics.jsonl", fifo),
        ("events.jsonl", fifo),
        ("checkpoints", file),
        ("tokenizer", file),
        ("plots", fifo),
    ],
)
def test_what_stands_where_a_run_would_write_is_named_before_it_begins(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"cannot be written \({name}: .*\): choose another"):
        RunFolder(tmp_path).open(Config())


@pytest.mark.parametrize("path", ["/proc", "/proc/run", "/dev/null", "/dev/null/run", "a" * 300])
def test_a_folder_that_cannot_be_written_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        RunFolder(path).open(Config())


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("before\n")
    RunFolder(tmp_path / "run").open(Config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.txt"]
    assert (tmp_path / "run" / "log.txt").read_text() == "before\n"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    said: list[str] = []
    with RunFolder(tmp_path).locked(said.append):
        pass
    assert len(said) == 1
    assert "has no locks" in said[0]
