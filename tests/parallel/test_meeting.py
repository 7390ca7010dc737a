"""Ranks that meet: what is wrong with a name, a port or a rank is found out before a run begins."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from moe_mamba.errors import LocalError, RunStopped, UserError
from moe_mamba.parallel.meeting import Meeting
from moe_mamba.parallel.network import Patience, interface_fault, loopback_fault, usable_interfaces, wait_for_name
from moe_mamba.parallel.topology import World
from tests import ROOT
from tests.world import free_port

SHORT = Patience(name=0.2, arrival=0.2, answer=0.5, silence=0.0, pause=0.01)
TIMEOUT = 60  # of what a test waits for, where it fails
LONG = Patience(answer=10.0, silence=0.0, pause=0.01)


def at(port: int, host: str = "127.0.0.1") -> dict[str, str]:
    return {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


def test_a_name_that_resolves_late_is_waited_for_and_said_once() -> None:
    def late(host: str, *rest: Any, **options: Any) -> list[Any]:
        asked.append(host)
        if len(asked) < 5:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return socket.getaddrinfo("127.0.0.1", *rest, **options)

    asked: list[str] = []
    said: list[str] = []
    assert wait_for_name("train-0.train", LONG, said.append, late) == "127.0.0.1"
    assert asked == ["train-0.train"] * 5
    (line,) = said
    assert line == "waiting   for the host name train-0.train (MASTER_ADDR) to resolve: Name or service not known"


def test_a_name_that_never_resolves_is_named() -> None:
    def never(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(UserError, match=r"MASTER_ADDR=nowhere-0 does not resolve on .*: Name or service not known"):
        wait_for_name("nowhere-0", SHORT, print, never)
    with pytest.raises(UserError, match="does not resolve"):
        wait_for_name("a" * 64, SHORT, print)


def test_a_taken_port_is_named_with_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as refused, Meeting(World(0, 2, 0, 2), print, SHORT, at(port)):
            pass
    line = str(refused.value)
    assert f"port {port} (MASTER_PORT) is taken by process {os.getpid()} ({psutil.Process().name()})" in line
    assert "\n" not in line


def test_a_master_address_of_another_machine_is_refused() -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR=198\.51\.100\.1 is not .*, the machine of rank 0"):
        Meeting(World(0, 2, 0, 2), print, SHORT, at(free_port(), "198.51.100.1")).__enter__()


def test_rank_0_that_cannot_be_reached_is_said_by_one_rank_of_the_machine() -> None:
    port, said = free_port(), []
    with pytest.raises(LocalError, match=f"cannot reach rank 0 at 127.0.0.1, port {port}: Connection refused"):
        Meeting(World(2, 4, 0, 2), said.append, SHORT, at(port)).__enter__()
    assert said == [f"waiting   for rank 0 at 127.0.0.1, port {port}: Connection refused"]
    with pytest.raises(UserError) as silent:
        Meeting(World(3, 4, 1, 2), said.append, SHORT, at(port)).__enter__()
    assert not isinstance(silent.value, LocalError)
    assert len(said) == 1


def test_a_port_of_another_program_does_not_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"does not answer .* as rank 0 at port {port}"):
            Meeting(World(1, 2, 1, 2), print, SHORT, at(port)).__enter__()


def meet(port: int, worlds: list[World], inside: Callable[[World], None] = lambda world: None) -> list[Any]:
    """Each world's rank in a thread; what it ended with, None for a run that may begin."""

    def rank(world: World) -> BaseException | None:
        try:
            if not world.is_first:
                is_open.wait(TIMEOUT)
            with Meeting(world, lambda line: is_open.set(), LONG, at(port)) as meeting:
                inside(world)
                meeting.start()
                begun.wait(TIMEOUT)  # as a process group that all join
        except (UserError, RunStopped) as error:
            return error
        return None

    begun = threading.Barrier(len(worlds))
    is_open = threading.Event()  # rank 0 says that it waits for the others
    with ThreadPoolExecutor(len(worlds)) as threads:
        return list(threads.map(rank, worlds))


def test_ranks_meet_and_begin() -> None:
    assert meet(free_port(), [World(rank, 3, rank, 3) for rank in range(3)]) == [None] * 3


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("no corpus"), None), (RunStopped("stopped", code=143), 143)], ids=["2", "143"]
)
def test_the_others_end_as_rank_0_does(error: Exception, code: int | None) -> None:
    def prepare(world: World) -> None:
        if world.is_first:
            raise error

    first, second = meet(free_port(), [World(0, 2, 0, 2), World(1, 2, 1, 2)], prepare)
    assert first is error
    assert type(second) is type(error)
    assert getattr(second, "code", None) == code


def test_two_processes_of_one_rank_and_two_sizes_are_refused() -> None:
    def inside(world: World) -> None:
        if world.is_first:
            have_met.set()
        is_refused.wait(TIMEOUT)

    have_met, is_refused = threading.Event(), threading.Event()
    port = free_port()
    with ThreadPoolExecutor(1) as threads:
        three = threads.submit(meet, port, [World(rank, 3, rank, 3) for rank in range(3)], inside)
        assert have_met.wait(TIMEOUT)
        with pytest.raises(LocalError, match="2 processes call themselves rank 1"):
            Meeting(World(1, 3, 1, 3), print, LONG, at(port)).__enter__()
        with pytest.raises(UserError, match=r"was started as one of 8 processes, rank 0 on .* as one of 3"):
            Meeting(World(7, 8, 0, 1), print, LONG, at(port)).__enter__()
        is_refused.set()
        assert three.result() == [None] * 3


def test_a_rank_that_never_comes_is_named() -> None:
    said: list[str] = []
    with pytest.raises(UserError, match=r"ranks 1-2 of 3 did not come within 0.2 s"):
        Meeting(World(0, 3, 0, 3), said.append, SHORT, at(free_port())).__enter__()
    assert said == ["waiting   for ranks 1-2 of 3 to start"]


@pytest.mark.slow
def test_rank_0_that_is_killed_while_it_prepares_is_noticed_at_once() -> None:
    port, said = free_port(), []
    code = f"""
import os, signal
from moe_mamba.parallel.meeting import Meeting
from moe_mamba.parallel.topology import World
with Meeting(World(0, 2, 0, 2), print, environment={at(port)}):
    input()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdin=subprocess.PIPE)
    try:
        with pytest.raises(RunStopped) as stopped, Meeting(World(1, 2, 1, 2), said.append, LONG, at(port)) as meeting:
            first.send_signal(signal.SIGKILL)
            meeting.start()
    finally:
        first.kill()
        first.communicate()
    assert stopped.value.code == 1
    assert said[-1].startswith(
        f"error: rank 0 ({socket.gethostname()}, process {first.pid}) ended before the run began"
    )


@pytest.mark.parametrize(
    ("addresses", "what"),
    [
        (["127.0.1.1"], "resolves to 127.0.1.1"),
        (["198.51.100.1"], "resolves to 198.51.100.1"),
        ([], "does not resolve"),
    ],
)
def test_a_host_name_that_others_cannot_use_is_refused(addresses: list[str], what: str) -> None:
    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    line = loopback_fault({}, "127.0.0.1", "node7", resolve)
    assert line is not None
    assert line.startswith(f"the host name node7 {what} on its own machine")
    assert "node7's /etc/hosts" in line
    for interface, address in list(usable_interfaces("127.0.0.1").items())[:1]:
        assert f"GLOO_SOCKET_IFNAME={interface}" in line
        assert loopback_fault({"GLOO_SOCKET_IFNAME": interface}, "127.0.0.1", "node7", resolve) is None
        addresses[:] = ["127.0.1.1", address]
        assert loopback_fault({}, "127.0.0.1", "node7", resolve) is not None  # gloo takes the first that is its own
        addresses[:] = [address]
        assert loopback_fault({}, "127.0.0.1", "node7", resolve) is None


def test_an_interface_that_is_not_there_or_is_loopback_is_refused() -> None:
    assert interface_fault({}) is None
    assert interface_fault({"GLOO_SOCKET_IFNAME": "lo"}) is None
    line = interface_fault({"GLOO_SOCKET_IFNAME": "lo,nothere0"})
    assert line is not None
    assert line.startswith("GLOO_SOCKET_IFNAME=lo,nothere0, but the interfaces of ")
    line = loopback_fault({"GLOO_SOCKET_IFNAME": "lo"}, "127.0.0.1", "node7")
    assert line is not None
    assert line.startswith("GLOO_SOCKET_IFNAME=lo of node7 is down or loopback")


def test_what_is_wrong_with_one_machine_is_rank_0s_line() -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as threads:
        other = at(port) | {"GLOO_SOCKET_IFNAME": "nothere0"}
        second = threads.submit(lambda: Meeting(World(1, 2, 0, 1), print, LONG, other).__enter__().start())
        with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME=nothere0"):
            Meeting(World(0, 2, 0, 1), print, LONG, at(port)).__enter__()
        with pytest.raises(UserError, match="rank 0 was refused"):
            second.result()


DAMAGED = [
    b"",
    b"\xff",
    b"[]",
    b"null",
    b"[" * 100_000,
    b"9" * 5000,
    b'{"code": NaN}',
    b'{"host": 5, "size": "2"}',
    b"x" * (1 << 20),
]


def overwrite(port: int, key: str, value: bytes) -> None:
    """What any program can do that reaches the port."""
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT)
    )
    store.set(f"meeting/{key}", value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", DAMAGED, ids=lambda value: repr(value[:10]))
def test_what_another_program_writes_is_one_line(value: bytes) -> None:
    port = free_port()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(Meeting(World(0, 2, 0, 2), print, LONG, at(port)).__enter__)
        overwrite(port, "rank/1", value)
        with pytest.raises(UserError, match="was overwritten, by another job or program: give this job a port") as why:
            first.result()
        assert len(str(why.value)) < 290
    said: list[str] = []
    with ThreadPoolExecutor(1) as threads:
        port = free_port()
        first = threads.submit(Meeting(World(0, 2, 0, 2), said.append, LONG, at(port)).__enter__)
        with Meeting(World(1, 2, 1, 2), said.append, LONG, at(port)) as meeting:
            first.result()
            overwrite(port, "start", value)
            with pytest.raises(LocalError, match="was overwritten"):
                meeting.start()


def test_ranks_meet_though_strangers_are_at_the_port() -> None:
    def knock(world: World) -> None:
        for words in (b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 1000, b'{"token": "\xc3\xa9"}\n', b""):
            strangers.append(socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT))
            strangers[-1].sendall(words)

    port, strangers = free_port(), list[socket.socket]()
    assert meet(port, [World(rank, 2, rank, 2) for rank in range(2)], knock) == [None] * 2
    for stranger in strangers:
        stranger.close()
