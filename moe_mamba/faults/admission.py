"""Who may speak to the hub: both ends of a connection prove that they know the run's token.

Strangers are port scanners, health checks, another job's ranks with an old port, and curious users of a shared cluster:
they can connect to every port, but neither read our traffic nor our memory. Each may stay for seconds, say one short
line, and is the first to go where there are too many; when all ranks are in, the port is closed.
"""

import errno
import os
import random
import secrets
import selectors
import socket
import time
from dataclasses import dataclass

from moe_mamba.faults.messages import Challenge, Hello, Line, Welcome, is_proof, proof
from moe_mamba.parallel.messages import parse

SECONDS_TO_PROVE = 10.0
MOST_STRANGERS = 128  # connections without proof, besides those of the ranks that are still to come
SECONDS_TO_JOIN = 60.0
# The process, the machine or the kernel has no descriptor or no memory for another connection.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
SECONDS_WITHOUT_DESCRIPTORS = 1.0


@dataclass(eq=False)
class Stranger:
    """A connection without proof."""

    line: Line
    challenge: str
    deadline: float


class Admission:
    """The hub's port, from its opening until all ranks are in.

    Args:
        selector: of the hub; the port and each stranger are registered in it.
        token: that ranks know.
        ranks: how many there are.
    """

    def __init__(self, selector: selectors.BaseSelector, token: str, ranks: int) -> None:
        self._selector, self._token = selector, token
        self._missing = set(range(ranks))
        self._strangers: dict[Stranger, None] = {}  # the oldest first
        self._closed_until = 0.0
        backlog = max(1024, ranks)  # so that a rank need not knock twice where strangers are many
        is_local = os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1")
        if is_local or not socket.has_dualstack_ipv6():
            self.server = socket.create_server(("127.0.0.1" if is_local else "", 0), backlog=backlog)
        else:
            self.server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
        self.server.setblocking(False)
        self.port: int = self.server.getsockname()[1]
        self._selector.register(self.server, selectors.EVENT_READ, self)

    def accept(self) -> None:
        """Take a connection, in the place of the oldest stranger where there are too many."""
        try:
            connection, _ = self.server.accept()
        except OSError as error:
            if error.errno in EXHAUSTED:
                self._make_room()
            return  # gone again
        if len(self._strangers) >= MOST_STRANGERS + len(self._missing):
            self._drop_oldest()
        try:
            stranger = Stranger(Line(connection), secrets.token_hex(16), time.monotonic() + SECONDS_TO_PROVE)
        except OSError:  # gone again
            connection.close()
            return
        stranger.line.send(Challenge(challenge=stranger.challenge))
        self._selector.register(stranger.line, selectors.EVENT_READ, stranger)
        self._strangers[stranger] = None

    def hear(self, stranger: Stranger) -> tuple[Hello, Line, list[bytes]] | None:
        """Read what a stranger says: a rank's hello, its line, and what it said since; None: it is none, or not yet."""
        if stranger not in self._strangers:  # dropped, since ``select`` spoke of it
            return None
        lines = stranger.line.receive()
        if lines == [] and not stranger.line.is_overlong:
            return None
        hello = parse(Hello, lines[0]) if lines else None
        if hello is None or not self._is_ours(hello, stranger):
            self._drop(stranger)
            return None
        assert lines is not None
        self._forget(stranger)
        self._missing.remove(hello.rank)
        stranger.line.send(Welcome(proof=proof(self._token, "hub", hello.challenge)))
        if not self._missing:
            self.close()
        return hello, stranger.line, lines[1:]

    def look(self) -> None:
        """Drop those whose time is over; open the port again."""
        now = time.monotonic()
        while self._strangers and next(iter(self._strangers)).deadline < now:
            self._drop_oldest()
        if self._closed_until and now > self._closed_until:
            self._closed_until = 0.0
            self._selector.register(self.server, selectors.EVENT_READ, self)

    def close(self) -> None:
        """Close the port, and all connections without proof."""
        while self._strangers:
            self._drop_oldest()
        if self.server.fileno() >= 0:
            if not self._closed_until:
                self._selector.unregister(self.server)
            self._closed_until = 0.0
            self.server.close()

    def _is_ours(self, hello: Hello, stranger: Stranger) -> bool:
        """Whether it is a rank that is not here yet, and knows the token."""
        who = f"rank {hello.rank}"
        return hello.rank in self._missing and is_proof(hello.proof, self._token, who, stranger.challenge)

    def _make_room(self) -> None:
        """Free a descriptor; where no stranger holds one, let the port rest, which would wake the hub for ever."""
        if self._strangers:
            self._drop_oldest()
        else:
            self._selector.unregister(self.server)
            self._closed_until = time.monotonic() + SECONDS_WITHOUT_DESCRIPTORS

    def _drop_oldest(self) -> None:
        self._drop(next(iter(self._strangers)))

    def _drop(self, stranger: Stranger) -> None:
        self._forget(stranger)
        stranger.line.close()

    def _forget(self, stranger: Stranger) -> None:
        self._selector.unregister(stranger.line)
        del self._strangers[stranger]


def join_hub(address: str, port: int, token: str, rank: int, seconds: float = SECONDS_TO_JOIN) -> Line:
    """Connect a rank to the hub; again, where strangers are many and this one was taken for one of them.

    Raises:
        OSError: nobody, or somebody else, answers there.
    """
    deadline = time.monotonic() + seconds
    while True:
        connection = socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic()))
        try:
            line = Line(connection)
            if _is_hub(line, token, rank, deadline):
                return line
            break
        except OSError:
            connection.close()
            pause = random.uniform(0.05, 0.2)
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
    connection.close()
    raise ConnectionError("another program answers there")


def _is_hub(line: Line, token: str, rank: int, deadline: float) -> bool:
    """Prove to the other end that this is a rank; whether it proves that it is the hub.

    Raises:
        OSError: it has closed the connection.
    """
    if (given := line.receive_one(Challenge, deadline)) is None:
        return False
    mine = secrets.token_hex(16)
    answer = proof(token, f"rank {rank}", given.challenge)
    line.send(Hello(rank=rank, host=socket.gethostname(), process=os.getpid(), proof=answer, challenge=mine))
    welcome = line.receive_one(Welcome, deadline)
    return welcome is not None and is_proof(welcome.proof, token, "hub", mine)
