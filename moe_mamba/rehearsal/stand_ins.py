"""A process that holds the hub's connections of all ranks that are not there, which another process starts.

It reads the hub's port, its token and how many ranks from standard input, lets them join one after the other as ranks
do, says that they are in, and keeps their connections until its input ends.
"""

import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from moe_mamba.faults.admission import join_hub

SPARE = 128  # descriptors beside the connections
PORTS = 28_000  # that a machine has for connections to one port, by Linux's default
SECONDS = 600.0  # to join


class StandIns:
    """The process, from outside."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def join(self, port: int, token: str, ranks: int) -> None:
        """Let ranks 1 to ``ranks`` join.

        Raises:
            RuntimeError: they cannot.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{port} {token} {ranks}\n")
        self._process.stdin.flush()
        if self._process.stdout.readline() != "joined\n":
            raise RuntimeError("the ranks that stand in could not join the hub")


@contextmanager
def stand_ins() -> Iterator[StandIns]:
    """Keep the process while the block lasts."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as process:  # type: ignore[call-overload]
        yield StandIns(process)
        process.stdin.close()


def most_connections() -> int:
    """How many one process may hold, once it asks for all that it may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return PORTS if hard == resource.RLIM_INFINITY else max(1, min(hard - SPARE, PORTS))


def main() -> None:
    """Stand in."""
    most_connections()
    port, token, ranks = sys.stdin.readline().split()
    lines = [join_hub("127.0.0.1", int(port), token, rank, SECONDS) for rank in range(1, int(ranks) + 1)]
    print("joined", flush=True)
    sys.stdin.read()
    for line in lines:
        line.connection.shutdown(socket.SHUT_RDWR)
