"""A process of its own for rehearsals: the device that they make stays in a process for ever."""

import logging
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from moe_mamba.errors import RunStopped, UserError
from tests.world import PRELOADED


class Rehearsals:
    """One process, started at the first call, that calls module-level functions one after the other."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._connection: Connection | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 300, **options: Any) -> Any:
        """What `function` gives there.

        Raises:
            UserError, RunStopped: as it raises them.
            AssertionError: it raised another error, whose traceback is the message, or gave no answer.
        """
        if self._connection is None:
            self._connection, there = self._context.Pipe()
            self._process = self._context.Process(target=_work, args=(there,), daemon=True)
            self._process.start()
            there.close()
        self._connection.send((function, arguments, options))
        if not self._connection.poll(timeout):
            self.close()
            raise AssertionError(f"no answer in {timeout} s")
        kind, answer = self._connection.recv()
        if kind in ("UserError", "RunStopped"):
            raise {"UserError": UserError, "RunStopped": RunStopped}[kind](answer)
        assert kind == "done", answer
        return answer

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._process.kill()
            self._process.join()
            self._connection = None


def _work(connection: Connection) -> None:
    logging.disable(logging.WARNING)
    while True:
        try:
            function, arguments, options = connection.recv()
        except EOFError:
            return
        try:
            answer = ("done", function(*arguments, **options))
            pickle.dumps(answer)
        except (UserError, RunStopped) as error:
            answer = (type(error).__name__, str(error))
        except BaseException:
            answer = ("error", traceback.format_exc())
        connection.send(answer)


@pytest.fixture(scope="session")
def rehearsals() -> Iterator[Rehearsals]:
    """A process that rehearses: `rehearsals.run(function, *arguments)`."""
    process = Rehearsals()
    yield process
    process.close()
