"""A fuzzer of the hub: thousands of hostile connections and messages, while honest ranks live and one of them dies."""

import contextlib
import json
import random
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import psutil

from moe_mamba.faults.messages import Challenge, Hello, Line, Order, Report, Welcome, proof
from moe_mamba.parallel.messages import parse
from tests.faults.test_strangers import DEATH, Ranks, name, ranks  # noqa: F401  (a fixture)

ODD = [
    *("null", "true", "-1", "0", "1.5", "1e400", "NaN", "-Infinity", "9" * 30, "9" * 5000, '""', '"é"', '"\\ud800"'),
    *('"\\u0000"', '"\\u001b[2J"', '"a\\nb"', '"' + "x" * 5000 + '"', "[]", "{}", "[" * 2000, '{"a":' * 500, "[1]"),
]
ROUNDS, STRANGERS, REPORTS, PARSED = 20, 200, 100, 20_000


def valid(chance: random.Random, token: str) -> bytes:
    """A message of any kind, as ranks and hub send them."""
    rank, challenge = chance.randrange(4), f"{chance.getrandbits(128):032x}"
    hello = Hello(rank=rank, host="here", process=1, proof=proof(token, f"rank {rank}", challenge), challenge=challenge)
    messages = [hello, Challenge(challenge=challenge), Welcome(proof="0" * 64), Order(bye=True), Order(abort="all")]
    messages += [Order(where=True), Report(place="a"), Report(fault="b", is_secondary=True), Report(hung=5)]
    return chance.choice(messages).model_dump_json(exclude_defaults=True).encode()


def damaged(chance: random.Random, line: bytes) -> bytes:
    """The line with a value of another type, some other bytes, a part missing, or a part twice."""
    kind, place = chance.randrange(6), chance.randrange(len(line) + 1)
    if kind == 0:
        return chance.randbytes(chance.randrange(300))
    if kind == 1:
        return line[:place] + chance.randbytes(chance.randrange(1, 4)) + line[place + 1 :]
    if kind == 2:
        return line[:place]
    if kind == 3:
        return line[:place] + line
    words = json.loads(line)
    key = chance.choice([*words, chance.choice(["rank", "token", "fault", "place", "hung", "abort", "x"])])
    marked = json.dumps(words | {key: "ODD"})
    return marked.replace('"ODD"', chance.choice(ODD)).encode()


def attack(chance: random.Random, world: Ranks, held: list[socket.socket]) -> bool:
    """One hostile connection; some are kept open. Whether the port was open."""
    try:
        stranger = socket.create_connection(("127.0.0.1", world.hub.port), timeout=5)
    except OSError:
        return False
    if kept := chance.random() < 0.3:
        held.append(stranger)
    with contextlib.suppress(OSError):
        words = damaged(chance, valid(chance, f"{chance.getrandbits(128):032x}"))
        words += chance.choice([b"", b"\n", b"\n" + words + b"\n"])
        while words and chance.random() < 0.95:
            size = chance.choice([1, 10, len(words)])
            stranger.sendall(words[:size])
            words = words[size:]
        if chance.random() < 0.2:
            stranger.shutdown(chance.choice([socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR]))
        if chance.random() < 0.2:  # a reset in place of an end
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if not kept:
        stranger.close()
    return True


def attack_until_told(chance: random.Random, world: Ranks, held: list[socket.socket], ended: Event) -> int:
    """How many connections were made."""
    made = 0
    while not ended.is_set():
        made += attack(chance, world, held)
    return made


def test_nothing_hostile_changes_how_a_death_is_reported(ranks: Callable[[int], Ranks]) -> None:  # noqa: F811
    tried, begin = 0, psutil.Process().memory_info().rss
    pool = ThreadPoolExecutor(1)
    for seed in range(ROUNDS):
        chance, held = random.Random(seed), list[socket.socket]()
        world = ranks(4)
        world.join(0, 1, 2)
        before = sum(attack(chance, world, held) for _ in range(STRANGERS))
        during = pool.submit(attack_until_told, random.Random(-seed - 1), world, held, ended := Event())
        if seed % 2:  # else it dies before all are in, and the strangers go on
            world.join(3)
        line = world.lines[2].connection  # a rank that has lost its mind, but neither ends nor aborts
        for _ in range(REPORTS):
            words = damaged(chance, valid(chance, world.hub.token))
            report = parse(Report, words)
            if b"\n" not in words and (report is None or not (report.bye or report.fault or report.hung)):
                line.sendall(words + b"\n")
                tried += 1
        said = world.is_reported(1)
        assert said == f"{name(1)} {DEATH}", f"seed {seed}"
        ended.set()
        tried += before + during.result()
        for stranger in held:
            stranger.close()
        assert world.hub.is_alive(), f"seed {seed}"
        world.close()
    grown = psutil.Process().memory_info().rss - begin
    pool.shutdown()
    print(f"{tried:,} hostile connections and reports, memory grew by {grown >> 20} MiB")
    assert grown < 64 << 20, f"after {tried:,} hostile connections and reports"
    assert tried > 5000


def test_what_is_read_is_a_message_or_nothing() -> None:
    chance, read, begin = random.Random(0), 0, time.monotonic()
    for number in range(PARSED):
        words = damaged(chance, valid(chance, "token"))
        for kind in (Hello, Challenge, Welcome, Report, Order):
            message = parse(kind, words)
            read += message is not None
            for value in dict(message or {}).values():
                assert not isinstance(value, str) or (value.isprintable() and len(value) <= 290), (number, words)
    print(f"{PARSED:,} damaged lines, of which {read:,} were messages all the same")
    assert 0 < read < PARSED
    assert time.monotonic() - begin < 60


def test_a_line_comes_whole_however_it_is_cut() -> None:
    chance = random.Random(1)
    for number in range(200):
        with socket.create_server(("127.0.0.1", 0)) as server:
            sender = socket.create_connection(server.getsockname())
            line = Line(server.accept()[0])
        sent = [chance.randbytes(chance.randrange(6000)).replace(b"\n", b"") for _ in range(5)]
        words = b"".join(each + b"\n" for each in sent)
        got: list[bytes] = []
        while words:
            size = chance.randrange(1, 5000)
            sender.sendall(words[:size])
            words = words[size:]
            got += line.receive() or []
        sender.close()
        while (more := line.receive()) is not None:
            got += more
        assert [each[:4097] for each in sent] == got, number
        line.close()
