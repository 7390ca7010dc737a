"""What ranks tell each other before there is a process group, and what others write there."""

import socket
import struct
import threading
import time

import pytest
import torch.distributed as dist

from moe_mamba.errors import UserError
from moe_mamba.parallel.topology import World
from moe_mamba.preflight.exchange import Exchange
from moe_mamba.preflight.folders import ranges
from moe_mamba.preflight.network import Listener, connect

DAMAGED = [
    "",
    "\xff",
    "[]",
    "[null]",
    "{}",
    '{"refused": 5}',
    "[" * 10_000,
    "9" * 5000,
    "NaN",
    '[null, "text"]',
    "[5, 1]",
]


@pytest.mark.parametrize("value", DAMAGED, ids=lambda value: repr(value[:10]))
def test_what_another_program_writes_is_one_line(value: str) -> None:
    store = dist.HashStore()
    first, second = (Exchange(World(rank, 2, rank, 2), store, 1.0) for rank in (0, 1))
    second.to_first(1, int)
    store.set("1/1", value)
    with pytest.raises(UserError, match="was overwritten, by another job or program"):
        first.to_first(0, int)
    first.from_first([1.5], list[float])
    store.set("2/first", value)
    with pytest.raises(UserError, match="was overwritten, by another job or program"):
        second.from_first(kind=list[float])


def test_nothing_but_having_come_can_be_told() -> None:
    store = dist.HashStore()
    first, second = (Exchange(World(rank, 2, rank, 2), store, 1.0) for rank in (0, 1))
    assert second.to_first() is None
    assert first.to_first() == [None, None]
    assert first.from_first() is second.from_first() is None


def test_a_rank_is_told_what_concerns_it_alone() -> None:
    store = dist.HashStore()
    first, *others = (Exchange(World(rank, 3, rank, 3), store, 1.0) for rank in range(3))
    assert first.each_from_first(["a", "b", "c"], str) == "a"
    assert [other.each_from_first(None, str) for other in others] == ["b", "c"]
    store.set("2/own/1", "5")
    first.from_first()
    with pytest.raises(UserError, match="was overwritten, by another job or program"):
        others[0].each_from_first(None, str)


def test_what_most_see_is_said_in_two_numbers() -> None:
    assert ranges([]) == []
    assert ranges(range(16_384)) == [(0, 16_383)]
    assert ranges([0, 1, 3, 5, 6]) == [(0, 1), (3, 3), (5, 6)]


def test_a_door_stays_open_for_others_than_rude_ones() -> None:
    listener = Listener("127.0.0.1")
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", listener.port)) as rude:
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset in place of an end
    assert connect("127.0.0.1", listener.port, listener.token) is None
    listener.close()
    time.sleep(0.2)
    assert connect("127.0.0.1", listener.port, listener.token) == "Connection refused"


@pytest.mark.parametrize("words", [b"", b"HTTP/1.1 400 Bad Request\r\n", b"\xff" * 1000])
def test_another_program_at_an_address_is_told_apart(words: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            connection.sendall(words)
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        assert connect("127.0.0.1", server.getsockname()[1], "0" * 16) == "another process answers at this address"
