"""What the ranks' watches and the hub tell each other: lines of JSON, checked before they are believed."""

import hmac
import socket
import threading
import time
from multiprocessing.connection import wait
from typing import Annotated

from pydantic import Field

from moe_mamba.parallel.messages import M, Message, Text, parse

LONGEST = 4096  # bytes of a line; a fault is a line for people, and those are short
SECONDS_TO_SEND = 5
SECONDS_OF_SILENCE = 30

Hex = Annotated[str, Field(pattern=r"\A[0-9a-f]{32,64}\z")]


class Challenge(Message):
    """The hub's first word to whoever connects: what a rank's proof must be made of."""

    challenge: Hex


class Hello(Message):
    """A rank's first word: who it is, the proof that it knows the token, and what the hub's must be made of."""

    rank: int = Field(ge=0)
    host: Text
    process: int
    proof: Hex
    challenge: Hex


class Welcome(Message):
    """The hub's proof that it knows the token, and that this rank is let in."""

    proof: Hex


class Report(Message):
    """What a rank says: that it ends, of what, where it stands, or for how many seconds it has not moved."""

    bye: bool = False
    fault: Text | None = None
    is_secondary: bool = False
    place: Text | None = None
    hung: int | None = Field(None, gt=0)


class Order(Message):
    """What the hub says: that it ends, the line with which all end, or the question where a rank stands."""

    bye: bool = False
    abort: Text | None = None
    where: bool = False


def proof(token: str, who: str, challenge: str) -> str:
    """What only the ranks of this run can answer to a challenge; the token itself is never sent."""
    return hmac.new(token.encode(), f"{who} {challenge}".encode(), "sha256").hexdigest()


def is_proof(given: str, token: str, who: str, challenge: str) -> bool:
    """Whether `given` is the `proof`."""
    return hmac.compare_digest(given, proof(token, who, challenge))


class Line:
    """A connection of lines; `send` may be called from several threads.

    Raises:
        OSError: it has ended already.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._rest = b""
        self._lock = threading.Lock()
        connection.settimeout(SECONDS_TO_SEND)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a short message waits for no other
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

    def send(self, message: Message) -> None:
        """Send a message; one that cannot be sent is dropped, for the reader learns of the end of the connection."""
        line = message.model_dump_json(exclude_defaults=True).encode() + b"\n"
        try:
            with self._lock:
                self.connection.sendall(line)
        except OSError:
            pass

    def receive(self) -> list[bytes] | None:
        """The lines that have come, once ``select`` says there is something; None: the other end is gone.

        Of a line that is too long no more is kept than shows it, so that it is no message when its end comes.
        """
        try:
            data = self.connection.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[: LONGEST + 1]
        return [line[: LONGEST + 1] for line in lines]

    @property
    def is_overlong(self) -> bool:
        """Whether the line that is coming is longer than any message."""
        return len(self._rest) > LONGEST

    def receive_one(self, kind: type[M], deadline: float) -> M | None:
        """Wait for one message; None: something else came. What follows it is left unread.

        Args:
            kind: of the message.
            deadline: of the monotonic clock.

        Raises:
            OSError: the other end is gone, or says nothing in time.
        """
        line = b""
        while not line.endswith(b"\n") and len(line) <= LONGEST:
            if not wait([self.connection], max(0.0, deadline - time.monotonic())):
                raise TimeoutError("it does not answer")
            if not (byte := self.connection.recv(1)):
                raise ConnectionResetError("it closed the connection")
            line += byte
        return parse(kind, line)

    def close(self) -> None:
        """End the connection."""
        self.connection.close()
