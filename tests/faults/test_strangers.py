"""The hub among strangers: who comes in, what a rank may say, and that every death is still reported."""

import contextlib
import errno
import json
import os
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from moe_mamba.faults import admission
from moe_mamba.faults.admission import MOST_STRANGERS, join_hub
from moe_mamba.faults.coordinator import Hub
from moe_mamba.faults.messages import LONGEST, Challenge, Line, Order, Report, proof
from moe_mamba.parallel.messages import parse

HERE = ("127.0.0.1",)
DEATH = "died without an error message (killed, or crashed) after step 7"


class Ranks:
    """A hub and the lines of its ranks, in one process; step 7 is done."""

    def __init__(self, size: int) -> None:
        self.hub = Hub(lambda: 7, size)
        self.hub.start()
        self.lines: dict[int, Line] = {}
        self.is_closed = False

    def join(self, *ranks: int) -> None:
        for rank in ranks:
            self.lines[rank] = join_hub(*HERE, self.hub.port, self.hub.token, rank, 20)

    def connect(self) -> socket.socket:
        return socket.create_connection((*HERE, self.hub.port), timeout=20)

    def orders(self, rank: int, seconds: float = 10) -> list[Order]:
        """What the hub says to a rank next."""
        ready, _, _ = select.select([self.lines[rank]], [], [], seconds)
        lines = (self.lines[rank].receive() or []) if ready else []
        return [order for order in (parse(Order, line) for line in lines) if order is not None]

    def is_reported(self, victim: int) -> str:
        """Let a rank die; the line that all others get, within the usual time."""
        begin = time.monotonic()
        self.lines.pop(victim).close()
        lines = {order.abort for rank in self.lines for order in self.orders(rank, 5)}
        assert time.monotonic() - begin < 2, "not in the usual time"
        (line,) = lines
        assert line is not None
        return line

    def close(self) -> None:
        self.is_closed = True
        for line in self.lines.values():
            line.close()
        self.hub.close()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Ranks]]:
    """`ranks(3)`: a hub for three; its thread lives to the end, and no descriptor is left."""
    monkeypatch.setenv("MASTER_ADDR", *HERE)
    made: list[Ranks] = []
    before = psutil.Process().num_fds()

    def make(size: int) -> Ranks:
        made.append(Ranks(size))
        return made[-1]

    yield make
    for each in made:
        assert each.is_closed or each.hub.is_alive(), "the hub's thread died"
        each.close()
        assert not each.hub.is_alive()
    assert psutil.Process().num_fds() <= before, "descriptors are left"


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


def name(rank: int) -> str:
    return f"rank {rank} ({socket.gethostname()}, process {os.getpid()})"


WORDS = {
    "http": b"GET / HTTP/1.0\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "list": b"[]\n",
    "empty object": b"{}\n",
    "no utf-8": b"\xff\xfe\n",
    "nothing": b"",
    "another alphabet": '{"token": "é"}\n'.encode(),
    "deep": b"[" * 3000 + b"\n",
    "deep token": b'{"token": ' * 300 + b"\n",
    "digits": b'{"rank": ' + b"9" * 4000 + b"}\n",
    "nan": b'{"rank": NaN, "process": Infinity, "proof": null}\n',
    "surrogate": b'{"rank": 0, "host": "\\ud800", "proof": "\\udfff"}\n',
    "nul": b"\0" * 100 + b"\n",
    "long": b"x" * (1 << 20),
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_a_stranger_is_shut_out_and_a_fault_still_reported(ranks: Callable[[int], Ranks], words: bytes) -> None:
    world = ranks(2)
    with world.connect() as stranger, contextlib.suppress(ConnectionError):
        stranger.sendall(words)
    world.join(0, 1)
    world.lines[1].send(Report(fault="the disk is full"))
    (order,) = world.orders(0)
    assert order.abort == f"{name(1)} stopped after step 7: the disk is full"


def hello(world: Ranks, given: Challenge, **changes: Any) -> bytes:
    """A rank's first word, with some of it changed."""
    rank = changes.get("rank", 1)
    words = {
        "rank": rank, "host": "here", "process": 1, "challenge": "0" * 32,
        "proof": proof(world.hub.token, f"rank {rank}", given.challenge),
    } | changes  # fmt: skip
    return json.dumps(words).encode() + b"\n"


LIES: dict[str, dict[str, Any]] = {
    "another alphabet": {"proof": "é" * 64},
    "no text": {"proof": 5},
    "none": {"proof": None},
    "zeros": {"proof": "0" * 64},
    "empty": {"proof": ""},
    "rank as text": {"rank": "1"},
    "rank as truth": {"rank": True},
    "rank below 0": {"rank": -1},
    "rank of no one": {"rank": 2},
    "rank as list": {"rank": [1]},
    "rank as fraction": {"rank": 1.0},
    "huge rank": {"rank": 10**30},
    "host of no text": {"host": ["a"]},
    "no challenge": {"challenge": "\n"},
    "more": {"token": "x"},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_hello_that_is_not_right_is_shut_out(ranks: Callable[[int], Ranks], lie: dict[str, Any]) -> None:
    world = ranks(2)
    with world.connect() as stranger:
        given = Line(stranger).receive_one(Challenge, time.monotonic() + 5)
        assert given is not None
        stranger.sendall(hello(world, given, **lie))
        assert stranger.recv(1) == b""
    world.join(0, 1)
    assert world.is_reported(1) == f"{name(1)} {DEATH}"


def test_the_token_is_never_sent_and_a_proof_serves_once(ranks: Callable[[int], Ranks]) -> None:
    world = ranks(2)
    with world.connect() as first, world.connect() as second:
        heard = Line(first).receive_one(Challenge, time.monotonic() + 5)
        Line(second).receive_one(Challenge, time.monotonic() + 5)
        assert heard is not None
        words = hello(world, heard)
        assert world.hub.token.encode() not in words
        second.sendall(words)
        assert second.recv(1) == b""
        first.sendall(words)
        assert first.recv(9) == b'{"proof":'


def test_another_rank_of_the_same_number_is_shut_out(ranks: Callable[[int], Ranks]) -> None:
    world = ranks(3)
    world.join(0, 1)
    with pytest.raises(OSError, match=r"closed the connection|timed out"):  # the last try may have no time left
        join_hub(*HERE, world.hub.port, world.hub.token, 1, 0.5)
    world.join(2)
    assert world.is_reported(1) == f"{name(1)} {DEATH}"


def test_the_port_is_closed_when_all_are_in(ranks: Callable[[int], Ranks]) -> None:
    world = ranks(2)
    strangers = [world.connect() for _ in range(5)]
    world.join(0, 1)
    for stranger in strangers:
        Line(stranger).receive_one(Challenge, time.monotonic() + 5)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        stranger.close()
    with pytest.raises(ConnectionRefusedError):
        world.connect()
    assert world.is_reported(1) == f"{name(1)} {DEATH}"


def test_a_rank_comes_in_past_a_thousand_silent_strangers(ranks: Callable[[int], Ranks]) -> None:
    world = ranks(2)
    world.join(0)
    before = psutil.Process().num_fds()
    strangers = [world.connect() for _ in range(1000)]
    wait_until(lambda: psutil.Process().num_fds() - before <= 1000 + MOST_STRANGERS + 1)
    begin = time.monotonic()
    world.join(1)
    assert time.monotonic() - begin < 2
    assert world.is_reported(1) == f"{name(1)} {DEATH}"
    for stranger in strangers:
        stranger.close()


def test_who_proves_nothing_is_dropped_in_time(ranks: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "SECONDS_TO_PROVE", 1.0)
    world = ranks(2)
    with world.connect() as silent, world.connect() as slow:
        begin = time.monotonic()
        with pytest.raises(OSError):  # however slowly it speaks
            while time.monotonic() < begin + 5:
                slow.sendall(b" ")
                time.sleep(0.05)
        assert 1 < time.monotonic() - begin < 2
        assert silent.recv(200).count(b"\n") == 1
        assert silent.recv(1) == b""


def test_a_gigabyte_without_a_line_takes_no_memory(ranks: Callable[[int], Ranks]) -> None:
    world = ranks(2)
    world.join(0)
    before, sent = psutil.Process().memory_info().rss, 0
    with world.connect() as stranger, contextlib.suppress(OSError):
        for _ in range(1024):
            sent += stranger.send(bytes(1 << 20))
    assert sent < 32 << 20, "it was listened to"
    world.join(1)
    world.lines[1].connection.settimeout(20)
    world.lines[1].connection.sendall(bytes(64 << 20))  # a rank's is read, and not kept
    assert psutil.Process().memory_info().rss - before < 128 << 20
    assert world.is_reported(1) == f"{name(1)} {DEATH}"


def test_without_descriptors_the_hub_rests_and_goes_on(
    ranks: Callable[[int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = ranks(2)
    world.join(0)
    with contextlib.ExitStack() as opened:
        waiting = [opened.enter_context(socket.socket()) for _ in range(3)]
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 4, hard))
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with contextlib.suppress(OSError):
            while True:
                opened.enter_context(open(os.devnull))
        for each in waiting:
            each.connect((*HERE, world.hub.port))
        busy = os.times()
        time.sleep(1)
        now = os.times()
        assert now.user + now.system - busy.user - busy.system < 0.3, "it spins"
        with pytest.raises(OSError) as full:
            os.dup(0)
        assert full.value.errno == errno.EMFILE
    world.join(1)
    assert world.is_reported(1) == f"{name(1)} {DEATH}"


REPORTS = {
    "types": b'{"fault": 5}\n{"place": ["a"]}\n{"hung": "long"}\n{"hung": NaN}\n{"bye": "yes"}\n{"is_secondary": 1}\n',
    "values": b'{"hung": -1}\n{"hung": 0}\n{"hung": 1e400}\n{"fault": null}\n{"place": null}\n',
    "no objects": b"[]\n1\nnull\n\n\xff\n" + b"[" * 4000 + b"\n" + b"9" * 4096 + b"\n",
    "orders": b'{"abort": "all"}\n{"where": true}\n{"rank": 0}\n',
    "long": b'{"fault": "' + b"x" * LONGEST + b'"}\n' + b"y" * 10 * LONGEST + b"\n",
}


@pytest.mark.parametrize("words", REPORTS.values(), ids=REPORTS)
def test_a_report_that_is_none_is_passed_over(ranks: Callable[[int], Ranks], words: bytes) -> None:
    world = ranks(2)
    world.join(0, 1)
    world.lines[1].connection.sendall(words)
    assert world.orders(0, 0.7) == []
    assert world.is_reported(1) == f"{name(1)} {DEATH}"


def test_a_report_is_one_line_for_people(ranks: Callable[[int], Ranks]) -> None:
    world = ranks(2)
    world.join(0, 1)
    text = "a\x1b[2Jb\r\nerror: c\u202e\udcff" + "x" * 1000
    world.lines[1].connection.sendall(json.dumps({"fault": text.replace("\udcff", "")}).encode() + b"\n")
    (order,) = world.orders(0)
    assert order.abort is not None and order.abort.isprintable() and len(order.abort) <= 290
    assert order.abort.startswith(f"{name(1)} stopped after step 7: a\\x1b[2Jb error: c")
    assert Report(fault=text).fault is not None  # a file's name may hold what UTF-8 does not


def peer(*words: bytes) -> tuple[socket.socket, int]:
    """Another program at a port: it says something to each who comes, and waits."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                kept.append(connection)
                for each in words:
                    connection.sendall(each)
                if not words:
                    connection.close()

    kept: list[socket.socket] = []
    server = socket.create_server((*HERE, 0))
    threading.Thread(target=serve, daemon=True).start()
    return server, server.getsockname()[1]


CHALLENGE = b'{"challenge":"' + b"0" * 32 + b'"}\n'
OTHERS = {
    "http": (b"HTTP/1.1 400 Bad Request\r\n\r\n",),
    "binary": (os.urandom(10000),),
    "long": (b"x" * 10000,),
    "another run's hub": (CHALLENGE, b'{"proof":"' + b"0" * 64 + b'"}\n'),
    "no text": (b'{"challenge": 5}\n',),
}


@pytest.mark.parametrize("words", OTHERS.values(), ids=OTHERS)
def test_a_rank_believes_no_other_program(words: tuple[bytes, ...]) -> None:
    server, port = peer(*words)
    with server, pytest.raises(ConnectionError, match="another program answers there"):
        join_hub(*HERE, port, "token", 1, 1.0)


@pytest.mark.parametrize(
    ("words", "why"), [((), "it closed"), ((b"",), "not answer"), ((CHALLENGE,), "not answer")], ids=str
)
def test_a_rank_that_is_not_let_in_gives_up(words: tuple[bytes, ...], why: str) -> None:
    server, port = peer(*words)
    with server, pytest.raises(OSError, match=why):
        join_hub(*HERE, port, "token", 1, 1.0)
