"""The whole content of shards compared with what is known of it, and what was compared before remembered.

Reading a corpus whole takes minutes to hours. What was found good is remembered with the file's size, inode and time
of change: while these stay, a later start reads nothing of it.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from moe_mamba.atomic_file import write_atomically
from moe_mamba.errors import UserError

FORMAT_VERSION = 1
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class ContentCheck:
    """What is to be found out of one file.

    Attributes:
        path: the file.
        expected: what makes another check of the same file: the checksum that a manifest gives, or a tokenizer.
        run: reads the file; raises UserError where its content is wrong.
    """

    path: Path
    expected: str
    run: Callable[[], None]

    @property
    def size(self) -> int:
        """Bytes to read.

        Raises:
            UserError: the file is gone.
        """
        return stamp(self.path)[0]


class Remembered:
    """Files whose content was found good, in a JSON file; one that is damaged is as good as none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = _read(path)

    def has(self, check: ContentCheck) -> bool:
        """Whether this was found good of the file as it is now."""
        return self.known.get(_key(check)) == (check.expected, stamp(check.path))

    def pending(self, checks: Iterable[ContentCheck]) -> list[ContentCheck]:
        """Those of which nothing is known, each once, though several sources may have it."""
        return list({_key(check): check for check in checks if not self.has(check)}.values())

    def add(self, passed: Iterable[tuple[str, str, Stamp]]) -> None:
        """Remember what ``compare`` gave, for good; where that cannot be written, the next start reads again."""
        self.known |= {key: (expected, stamp) for key, expected, stamp in passed}
        files = {key: [expected, *stamp] for key, (expected, stamp) in self.known.items()}
        try:
            write_atomically(self.path, json.dumps({"format_version": FORMAT_VERSION, "files": files}, indent=1) + "\n")
        except OSError:
            return


def compare(check: ContentCheck) -> tuple[str, str, Stamp]:
    """Read a file whole; what to remember of it.

    Raises:
        UserError: its content is wrong, it cannot be read, or it changed meanwhile.
    """
    before = stamp(check.path)
    try:
        check.run()
    except OSError as error:
        raise UserError(f"{check.path}: cannot be read ({error.strerror}): restore it") from None
    if stamp(check.path) != before:
        raise UserError(f"{check.path} changed while it was read: wait until it is written, then start again")
    return _key(check), check.expected, before


def stamp(path: Path) -> Stamp:
    """Size in bytes, time of change in ns, and inode of a file.

    Raises:
        UserError: it is gone.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: a file of these shards cannot be seen ({error.strerror}): restore it") from None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _key(check: ContentCheck) -> str:
    return os.path.abspath(check.path)


def _read(path: Path) -> dict[str, tuple[str, Stamp]]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format_version"] != FORMAT_VERSION:
            return {}
        return {key: (expected, (size, time, inode)) for key, (expected, size, time, inode) in values["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}
