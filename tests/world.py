"""A small world of gloo processes, started once a session, that tests run functions in."""

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

PROCESSES = 8
PRELOADED = [
    *("moe_mamba.train.trainer", "deepspeed", "megatron.core.tensor_parallel", "torch.distributed.checkpoint"),
    *("datasets", "matplotlib.pyplot"),
]


def free_port() -> int:
    """A port that the kernel says is free, for a process that is started at once and cannot ask itself."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


class WorkerError(AssertionError):
    """A function failed in a worker; the message holds the workers' tracebacks."""


class World:
    """Processes that run module-level functions, each call in a fresh process group of its own."""

    def __init__(self) -> None:
        # the fork server imports these once, so that a new process costs milliseconds
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.workers: list[tuple[BaseProcess, Connection]] = []
        self.folder = tempfile.TemporaryDirectory(prefix="world-")
        self.calls = 0

    def run(
        self, function: Callable[..., Any], *arguments: Any, ranks: int = 2, timeout: float = 120, **options: Any
    ) -> list[Any]:
        """Call `function(*arguments, **options)` on the first `ranks` processes, as ranks of a gloo world of that size.

        The function must be importable (module-level); it finds torch.distributed initialized and RANK, WORLD_SIZE,
        LOCAL_RANK, MASTER_ADDR and MASTER_PORT set. Tensors may be passed in and returned.

        Returns:
            The results, rank by rank.

        Raises:
            WorkerError: a rank raised, died or did not answer in `timeout` seconds; the world goes on.
        """
        assert ranks <= PROCESSES, f"the world has {PROCESSES} processes"
        self._start(ranks)
        self.calls += 1
        store = Path(self.folder.name) / f"store-{self.calls}"
        port = free_port()
        payload = pickle.dumps((function, arguments, options))
        for rank in range(ranks):
            self.workers[rank][1].send_bytes(pickle.dumps((sys.path, rank, ranks, str(store), port, timeout, payload)))
        answers = self._collect(ranks, timeout)
        failures = [f"rank {rank}:\n{text}" for rank, (is_valid, text) in enumerate(answers) if not is_valid]
        if failures:
            raise WorkerError(f"{function.__name__} failed\n" + "\n".join(failures))
        return [pickle.loads(result) for _, result in answers]

    def _start(self, ranks: int) -> None:
        """Start the workers that do not run yet."""
        while len(self.workers) < ranks:
            here, there = self.context.Pipe()
            process = self.context.Process(target=_work, args=(there,), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))

    def _collect(self, ranks: int, timeout: float) -> list[tuple[bool, Any]]:
        """Every rank's answer; where one dies or stays silent, all are replaced by fresh processes."""
        answers: dict[int, tuple[bool, Any]] = {}
        by_connection = {self.workers[rank][1]: rank for rank in range(ranks)}
        deadline = time.monotonic() + timeout
        while len(answers) < ranks:
            waiting = [connection for connection, rank in by_connection.items() if rank not in answers]
            ready = wait(waiting, max(0, deadline - time.monotonic()))
            for connection in ready:
                rank = by_connection[connection]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    process = self.workers[rank][0]
                    process.join(5)
                    answers[rank] = (False, f"the process died (exit code {process.exitcode})")
                    deadline = min(deadline, time.monotonic() + 5)
            if not ready:
                for rank in set(range(ranks)) - answers.keys():
                    answers[rank] = (False, "no answer in time")
                break
        if any(not process.is_alive() for process, _ in self.workers) or any(
            text == "no answer in time" for is_valid, text in answers.values() if not is_valid
        ):
            self._stop()
        return [answers[rank] for rank in range(ranks)]

    def _stop(self) -> None:
        for process, connection in self.workers:
            connection.close()
            process.kill()
            process.join()
        self.workers = []

    def close(self) -> None:
        """End all processes."""
        self._stop()
        self.folder.cleanup()


def _work(connection: Connection) -> None:
    """A worker's life: take a call, answer, forget, until the other end closes."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            path, rank, ranks, store, port, timeout, payload = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        sys.path[:] = path
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a run's end ignores it, and a shell's background
        try:
            with _group(rank, ranks, store, port, timeout):
                function, arguments, options = pickle.loads(payload)
                answer = (True, pickle.dumps(function(*arguments, **options)))
        except BaseException:
            answer = (False, traceback.format_exc())
        gc.collect()  # engines, with their groups, whose threads look around a hundred times a second each
        gc.freeze()  # what is left now stays: neither this nor `_destroy_engines` need look through it after each call
        connection.send_bytes(pickle.dumps(answer))


@contextlib.contextmanager
def _group(rank: int, ranks: int, store: str, port: int, timeout: float) -> Iterator[None]:
    """A gloo world of `ranks`; whatever the function made of groups is forgotten at the end."""
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout)
    )
    dist.barrier()  # a function that is quicker than others are to connect would leave them before they have
    try:
        yield
    finally:
        from moe_mamba.parallel.groups import forget_groups

        _destroy_engines()
        forget_groups()
        if dist.is_initialized():
            dist.destroy_process_group()


def _destroy_engines() -> None:
    """Let go of DeepSpeed's engines, whose hooks would keep them, their groups and the groups' threads for ever."""
    if engines := sys.modules.get("deepspeed.runtime.engine"):
        for engine in [each for each in gc.get_objects() if type(each) is engines.DeepSpeedEngine]:
            with contextlib.suppress(AssertionError):  # it wants to say so, but its world may be left already
                engine.destroy()


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Up to eight gloo processes: `world.run(function, *arguments, ranks=2)`."""
    world = World()
    yield world
    world.close()
