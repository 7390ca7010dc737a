"""Standard input, output and error of a command, whatever they are: closed, a pipe without reader, a full disk, ASCII.

Output that nobody reads ends a command as it ends other Unix tools, with exit code 141 and without a word. A character
that the terminal's encoding lacks is written as an escape. Errors are told where they can be told.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from moe_mamba.errors import RunStopped

CLOSED_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE ended


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """All three streams open, and such that writing to them raises nothing that a user would see as a traceback.

    Streams that something else has put in the place of the process's own, such as a test's, stay as they are.

    Raises:
        SystemExit: standard output is a pipe that is no longer read.
        RunStopped: standard output cannot be written for another reason.
    """
    _open_descriptors()
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - it lasts as long as the process
    if sys.stdout is sys.__stdout__:
        sys.stdout = _replaced(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _replaced(sys.stderr, 2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, RunStopped, SystemExit):
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _open_descriptors() -> None:
    """Open on nothing what is closed of the first three; else the next file would be opened there, and printed into."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _replaced(stream: Any, number: int) -> "_Output":
    if stream is None:  # it was closed
        return _Output(number, "utf-8", line_buffering=True)
    with contextlib.suppress(OSError):
        stream.flush()
    return _Output(number, stream.encoding, line_buffering=stream.line_buffering or stream.write_through)


class _Output(io.TextIOWrapper):
    """Standard output or error of which writing fails in one of three ways: not at all, as an exit, or as one line.

    Args:
        number: file descriptor, 1 or 2.
        encoding: of the terminal.
        line_buffering: flush at each line's end.
    """

    def __init__(self, number: int, encoding: str, line_buffering: bool) -> None:
        raw = open(number, "wb", closefd=False)  # noqa: SIM115 - the wrapper closes it
        super().__init__(raw, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)
        self.number = number

    def write(self, text: str) -> int:
        """Write, or end as the class says."""
        with self._failing():
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or end as the class says."""
        with self._failing():
            super().flush()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # What is still in the buffer goes nowhere, and so does all that comes.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.number)
            os.close(nowhere)
            if self.number != 1:
                return
            if isinstance(error, BrokenPipeError):
                sys.exit(CLOSED_PIPE)
            raise RunStopped(
                f"standard output cannot be written ({error.strerror}): free the disk, or redirect it elsewhere"
            ) from None
