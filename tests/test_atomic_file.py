"""Files and folders that are there whole or not at all."""

import errno
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from moe_mamba import atomic_file
from moe_mamba.atomic_file import remove_leftovers, rename, synchronize, synchronize_tree, write_atomically
from moe_mamba.errors import UserError
from moe_mamba.run.atomic import whole_folder

KILLED = 77


def die_at(line: int, function: Callable[[], None]) -> bool:
    """Whether `function`, in a process of its own, is killed before the `line`-th line that it runs of our modules."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    files, left = (atomic_file.__file__, whole_folder.__wrapped__.__code__.co_filename), line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        left -= event == "line"
        if left == 0:
            os._exit(KILLED)
        return trace

    try:
        sys.settrace(trace)
        function()
    finally:
        os._exit(0)


def in_a_small_process(function: Callable[[Path], None], folder: Path) -> None:
    """Call it where a fork is quick, which it is not beside torch."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(function, folder).result(60)


def kill_writers_of_a_file(folder: Path) -> None:
    path, line, found = folder / "file", 1, set()
    path.write_text("old")
    while die_at(line, lambda: write_atomically(path, "new content")):
        found.add(path.read_text())
        path.write_text("old")
        line += 1
    assert found == {"old", "new content"}
    assert len(list(folder.iterdir())) > 1  # what the killed ones had begun
    remove_leftovers(folder)
    assert [entry.name for entry in folder.iterdir()] == ["file"]


def kill_writers_of_a_folder(folder: Path) -> None:
    output, aside = folder / "out", folder / ".out.replaced"

    def write(content: str) -> None:
        with whole_folder(output, True, "mark") as partial:
            (partial / "mark").write_text(content)

    line, found = 1, set()
    write("old")
    while die_at(line, lambda: write("new")):
        place = output if output.exists() else aside
        found.add((place.name, (place / "mark").read_text()))
        write("old")  # the next command goes on from whatever is left
        assert [entry.name for entry in folder.iterdir()] == ["out"]
        line += 1
    assert found == {("out", "old"), (".out.replaced", "old"), ("out", "new")}


@pytest.mark.parametrize("kill", [kill_writers_of_a_file, kill_writers_of_a_folder])
def test_a_kill_at_any_line_leaves_the_old_or_the_new(tmp_path: Path, kill: Callable[[Path], None]) -> None:
    in_a_small_process(kill, tmp_path)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is asked of the disk, in order: the call, and the file's or the folder's number."""
    calls: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        calls.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    return calls


def test_the_content_is_on_the_disk_before_its_name_and_then_the_folder(
    tmp_path: Path, done: list[tuple[str, int]]
) -> None:
    write_atomically(tmp_path / "file", b"content")
    number = (tmp_path / "file").stat().st_ino
    assert done == [("fsync", number), ("replace", number), ("fsync", tmp_path.stat().st_ino)]


def test_all_that_a_folder_holds_is_on_the_disk_before_its_name(tmp_path: Path, done: list[tuple[str, int]]) -> None:
    with whole_folder(tmp_path / "out", False, "mark") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
    *before, renamed, last = done
    assert {number for _, number in before} == {
        path.stat().st_ino for path in (tmp_path / "out", *(tmp_path / "out").rglob("*"))
    }
    assert renamed == ("replace", (tmp_path / "out").stat().st_ino) and last == ("fsync", tmp_path.stat().st_ino)


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_keeps_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(fault, os.strerror(fault))

    (tmp_path / "file").write_text("old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(fault)) as error:
            patch.setattr(os, name, fail)
            write_atomically(tmp_path / "file", "new")
        assert error.value.errno == fault
        assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be written"):
        patch.setattr(os, "fsync", fail)
        with whole_folder(tmp_path / "out", False, "mark") as folder:
            (folder / "mark").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "file", "content")
    tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder, kind in (("file", NotADirectoryError), ("missing", FileNotFoundError)):
        with pytest.raises(kind):
            write_atomically(tmp_path / folder / "name", "content")


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_atomically(tmp_path / "name", "content")
    assert error.value.filename == str(tmp_path / "name") and error.value.filename2 is None
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_a_file_system_that_cannot_synchronize_folders_still_holds_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    write_atomically(tmp_path / "file", "content")
    synchronize_tree(tmp_path)
    assert (tmp_path / "file").read_text() == "content"
    monkeypatch.setattr(os, "fsync", lambda _: of_files_only(os.open(tmp_path, os.O_RDONLY)))
    with pytest.raises(OSError, match="Invalid argument"):  # of a file it is a fault
        synchronize(tmp_path / "file")


def test_names_and_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "file", "größer")
    assert (tmp_path / "file").read_bytes() == "größer".encode()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    rename(tmp_path / "file", tmp_path / "plain")
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]
