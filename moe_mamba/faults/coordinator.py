"""Where the ranks' watches meet: a thread beside rank 0 that learns first who died, and tells all.

Each rank holds one TCP connection to it, and sends JSON lines. The kernel closes a connection when a process dies,
however it dies; probes (keepalive) notice a machine or a network that is gone. A process that is busy, or stopped,
keeps its connection: it is not taken for dead.
"""

import contextlib
import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moe_mamba.parallel.topology import name_ranks

# Secondary errors (collectives that fail because a rank is gone) may come before the root cause is known.
SECONDS_FOR_ROOT_CAUSE = 0.5
SECONDS_TO_ANSWER = 3.0
SECONDS_OF_SILENCE = 30


class Line:
    """A connection of JSON lines; `send` may be called from several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""
        self._lock = threading.Lock()
        connection.settimeout(5)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {
            "TCP_KEEPIDLE": 10,
            "TCP_KEEPINTVL": 5,
            "TCP_KEEPCNT": 4,
            "TCP_USER_TIMEOUT": 1000 * SECONDS_OF_SILENCE,
        }
        for name, value in options.items():
            if hasattr(socket, name):  # not every system has all of them
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def fileno(self) -> int:
        """For ``select``."""
        return self.connection.fileno()

    def send(self, **message: Any) -> None:
        """Send a message; one that cannot be sent is dropped, for the reader learns of the end of the connection."""
        try:
            with self._lock:
                self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come, once ``select`` says there are some; None: the other end is gone."""
        try:
            data = self.connection.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """End the connection."""
        self.connection.close()


@dataclass
class Member:
    """What the hub knows of a rank; `place` is where it stands, None until it answers."""

    rank: int
    host: str
    process: int
    line: Line
    place: str | None = None
    has_ended: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.process})"


class Hub(threading.Thread):
    """Hears of deaths, faults and hangs, decides which is the root cause, and sends every rank one abort message.

    Args:
        step: tells how many steps are done.
    """

    def __init__(self, step: Callable[[], int]) -> None:
        super().__init__(name="hub", daemon=True)
        self._step = step
        is_local = os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1")
        if is_local or not socket.has_dualstack_ipv6():
            self._server = socket.create_server(("127.0.0.1" if is_local else "", 0))
        else:
            self._server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        self.port: int = self._server.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._members: dict[int, Member] = {}
        self._secondary: tuple[float, str] | None = None
        self._question: tuple[float, int] | None = None
        self._is_decided = False
        self._closing = threading.Event()

    def run(self) -> None:
        """Serve until closed."""
        strangers: dict[int, Line] = {}
        while not self._closing.is_set():
            for key, _ in self._selector.select(0.1):
                if key.fileobj is self._server:
                    with contextlib.suppress(OSError):  # gone again
                        line = Line(self._server.accept()[0])
                        self._selector.register(line, selectors.EVENT_READ)
                        strangers[line.fileno()] = line
                elif isinstance(key.data, Member):
                    self._hear(key.data)
                else:
                    self._admit(strangers.pop(key.fd))
            self._decide()
        for member in self._members.values():
            member.line.send(bye=True)
            member.line.close()
        self._selector.close()
        self._server.close()

    def close(self) -> None:
        """End without anybody taking it for a death."""
        self._closing.set()
        self.join()

    def _admit(self, line: Line) -> None:
        """Let a rank in, whose first message is its name and the token; others are shut out."""
        try:
            messages = line.receive() or [{}]
            hello = messages[0]
            is_ours = hmac.compare_digest(str(hello.get("token")), self.token)
        except (ValueError, AttributeError):  # not JSON, or no object: anybody may connect
            is_ours = False
        self._selector.unregister(line)
        if not is_ours:
            line.close()
            return
        member = Member(hello["rank"], hello["host"], hello["process"], line)
        self._members[member.rank] = member
        self._selector.register(line, selectors.EVENT_READ, member)
        self._take(member, messages[1:])

    def _hear(self, member: Member) -> None:
        messages = member.line.receive()
        if messages is None:
            self._selector.unregister(member.line)
            if not member.has_ended:
                self._abort(f"{member} died without an error message (killed, or crashed) after step {self._step():,}")
            member.has_ended = True
        else:
            self._take(member, messages)

    def _take(self, member: Member, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if "bye" in message:
                member.has_ended = True
            if "place" in message:
                member.place = message["place"]
            if "fault" in message:
                member.has_ended = True
                line = f"{member} stopped after step {self._step():,}: {message['fault']}"
                if not message["is_secondary"]:
                    self._abort(line)
                elif self._secondary is None:
                    self._secondary = (time.monotonic() + SECONDS_FOR_ROOT_CAUSE, line)
            if "hung" in message and self._question is None:
                self._question = (time.monotonic() + SECONDS_TO_ANSWER, message["hung"])
                for other in self._members.values():
                    other.line.send(where=True)

    def _decide(self) -> None:
        """Abort where no more than a secondary error came, or where the ranks that were asked have had their time."""
        now = time.monotonic()
        if self._secondary is not None and now > self._secondary[0]:
            self._abort(self._secondary[1])
        if self._question is not None:
            deadline, seconds = self._question
            working = [member for member in self._members.values() if not member.has_ended]
            if now > deadline or all(member.place for member in working):
                places = {member.rank: member.place for member in working}
                self._abort(hang_line(places, seconds))

    def _abort(self, line: str) -> None:
        if not self._is_decided:
            self._is_decided = True
            for member in self._members.values():
                member.line.send(abort=line)


def hang_line(places: dict[int, str | None], seconds: int) -> str:
    """One line that says which ranks stand where.

    Args:
        places: rank -> where it stands; None where it did not answer.
        seconds: how long there has been no progress.
    """
    by_place: dict[str | None, list[int]] = {}
    for rank, place in sorted(places.items()):
        by_place.setdefault(place, []).append(rank)
    silent = by_place.pop(None, [])
    groups = sorted(by_place.items(), key=lambda group: -len(group[1]))
    parts = [f"{name_ranks(ranks)} at {place}" for place, ranks in groups]
    if silent:
        parts.append(f"no answer from {name_ranks(silent)}")
    return f"no progress for {seconds} s (parallel.timeout): {'; '.join(parts)}"
