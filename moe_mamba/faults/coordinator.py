"""Where the ranks' watches meet: a thread beside rank 0 that learns first who died, and tells all.

Each rank holds one TCP connection to it, and sends JSON lines. The kernel closes a connection when a process dies,
however it dies; probes (keepalive) notice a machine or a network that is gone. A process that is busy, or stopped,
keeps its connection: it is not taken for dead.
"""

import secrets
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from moe_mamba.faults.admission import Admission, Stranger
from moe_mamba.faults.messages import Line, Order, Report
from moe_mamba.parallel.messages import parse
from moe_mamba.parallel.topology import name_ranks

SECONDS_BETWEEN_LOOKS = 0.1
# Secondary errors (collectives that fail because a rank is gone) may come before the root cause is known.
SECONDS_FOR_ROOT_CAUSE = 0.5
SECONDS_TO_ANSWER = 3.0


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
        ranks: how many there are.
    """

    def __init__(self, step: Callable[[], int], ranks: int) -> None:
        super().__init__(name="hub", daemon=True)
        self._step = step
        self.token = secrets.token_hex(16)
        self._selector = selectors.DefaultSelector()
        self._admission = Admission(self._selector, self.token, ranks)
        self.port = self._admission.port
        self._members: dict[int, Member] = {}
        self._secondary: tuple[float, str] | None = None
        self._question: tuple[float, int] | None = None
        self._is_decided = False
        self._closing = threading.Event()

    def run(self) -> None:
        """Serve until closed."""
        while not self._closing.is_set():
            for key, _ in self._selector.select(SECONDS_BETWEEN_LOOKS):
                if isinstance(key.data, Member):
                    self._hear(key.data)
                elif isinstance(key.data, Stranger):
                    self._admit(key.data)
                else:
                    self._admission.accept()
            self._admission.look()
            self._decide()
        self._admission.close()
        for member in self._members.values():
            member.line.send(Order(bye=True))
            member.line.close()
        self._selector.close()

    def close(self) -> None:
        """End without anybody taking it for a death."""
        self._closing.set()
        self.join()

    def _admit(self, stranger: Stranger) -> None:
        """Let a rank in."""
        if (admitted := self._admission.hear(stranger)) is None:
            return
        hello, line, lines = admitted
        member = Member(hello.rank, hello.host, hello.process, line)
        self._members[member.rank] = member
        self._selector.register(line, selectors.EVENT_READ, member)
        self._take(member, lines)

    def _hear(self, member: Member) -> None:
        lines = member.line.receive()
        if lines is None:
            self._selector.unregister(member.line)
            member.line.close()
            if not member.has_ended:
                self._abort(f"{member} died without an error message (killed, or crashed) after step {self._step():,}")
            member.has_ended = True
        else:
            self._take(member, lines)

    def _take(self, member: Member, lines: list[bytes]) -> None:
        """Take in a rank's reports; what is none is passed over, for its connection still tells of its death."""
        for report in filter(None, (parse(Report, line) for line in lines)):
            member.has_ended |= report.bye or report.fault is not None
            member.place = report.place or member.place
            if report.fault is not None:
                line = f"{member} stopped after step {self._step():,}: {report.fault}"
                if not report.is_secondary:
                    self._abort(line)
                elif self._secondary is None:
                    self._secondary = (time.monotonic() + SECONDS_FOR_ROOT_CAUSE, line)
            if report.hung is not None and self._question is None:
                self._question = (time.monotonic() + SECONDS_TO_ANSWER, report.hung)
                for other in self._members.values():
                    other.line.send(Order(where=True))

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
                member.line.send(Order(abort=line))


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
