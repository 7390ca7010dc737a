"""Calls into compiled tokenizer libraries: a panic, or a text that never ends, becomes an error of one line."""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from moe_mamba.errors import UserError, brief

T = TypeVar("T")
PANIC = "PanicException"  # of Rust through pyo3: a BaseException that cannot be imported
_alone = threading.Lock()  # standard error belongs to the whole process


class LibraryError(Exception):
    """A library refused or panicked; its message is one short line."""


class EncodingError(UserError):
    """A tokenizer cannot encode a text.

    Attributes:
        index: of the text in its batch.
        reason: the library's, in a few words.
    """

    def __init__(self, message: str, index: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.index, self.reason = index, reason


class DecodingError(UserError):
    """A tokenizer cannot decode its tokens; with more of them it may."""


def call_library(call: Callable[[], T]) -> T:
    """What ``call`` gives; a panic prints nothing.

    Raises:
        LibraryError: the library raised or panicked.
        TimeoutError: of ``call_within``.
    """
    try:
        with _panics_hidden():
            return call()
    except TimeoutError:  # of call_within
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == PANIC:
            raise LibraryError(brief(error, 100)) from None
        raise


def call_within(call: Callable[[], T], seconds: float) -> T:
    """What ``call`` gives or raises, in a thread of its own, so that Ctrl-C ends the process meanwhile.

    Raises:
        TimeoutError: it takes longer; the thread is left behind and ends with the process.
    """
    outcome: queue.SimpleQueue[tuple[bool, T | BaseException]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((True, call()))
        except BaseException as error:
            outcome.put((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        returned, value = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if returned:
        return value  # type: ignore[return-value]
    raise value  # type: ignore[misc]


@contextlib.contextmanager
def _panics_hidden() -> Iterator[None]:
    """Rust prints a panic on file descriptor 2 before Python sees it; anything else that is written there is kept."""
    with _alone:
        try:
            saved = os.dup(2)
        except OSError:  # it is closed
            yield
            return
        aside = os.memfd_create("stderr") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
        os.dup2(aside, 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ == PANIC:
                with contextlib.suppress(OSError):  # nowhere has no length
                    os.ftruncate(aside, 0)
            raise
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            written = os.lseek(aside, 0, os.SEEK_END)
            if written:
                os.lseek(aside, 0, os.SEEK_SET)
                with contextlib.suppress(OSError):
                    os.write(2, os.read(aside, written))
            os.close(aside)
