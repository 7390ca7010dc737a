"""The ranks meet before anything costs time: rank 0 opens its port, and every rank says that it is there.

So a wrong address, a port that is taken, a machine that others cannot reach and a rank that never comes are found
within minutes, and while rank 0 prepares the run, the others know whether it is alive. It is one store of
torch.distributed (rank 0's, or the agent's of torchrun) beside the one that the process groups use later.
"""

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from moe_mamba.errors import LocalError, RunStopped, UserError
from moe_mamba.parallel.agent_store import name_of_world
from moe_mamba.parallel.messages import Message, Text
from moe_mamba.parallel.network import (
    Patience,
    Say,
    check_port,
    interface_fault,
    is_own_address,
    loopback_fault,
    wait_for_name,
    wait_for_port,
)
from moe_mamba.parallel.store import read_key, wait_for_keys
from moe_mamba.parallel.topology import World, name_ranks

PATIENCE = Patience()
SECONDS_TO_HEAR = 3.0


class Arrival(Message):
    """What a rank says of itself: its machine, what tells that apart, its process, and what is wrong there."""

    host: Text
    machine: str
    process: int
    size: int
    fault: Text | None
    loopback: Text | None


class Start(Message):
    """How rank 0 lets the run begin: with 0, or the exit code with which it ends."""

    code: int


class Meeting(contextlib.AbstractContextManager["Meeting"]):
    """From the first word of the ranks to one another to the start of the run; a world of one needs none.

    Inside ``with``, rank 0 prepares the run. Every rank then calls ``start`` before it joins a process group; where
    rank 0 fails before, the others end with its exit code.

    Args:
        world: the processes.
        shout: prints a line on the screen, from whatever rank.
        patience: how long to wait for what.
        environment: where MASTER_ADDR and MASTER_PORT are.
    """

    def __init__(
        self, world: World, shout: Say, patience: Patience = PATIENCE, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.world, self.shout, self.patience, self.environment = world, shout, patience, environment
        self._store: dist.Store | None = None
        self._is_agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._is_told = False
        self._arrived = 1
        self._server = "torchrun's agent" if self._is_agents else "rank 0"

    def __enter__(self) -> "Meeting":
        if self.world.size == 1 or dist.is_initialized():
            return self
        try:
            self._open()
            self._arrive()
            if self.world.is_first:
                self._call_roll()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            if isinstance(error, dist.DistError):
                raise self._lost() from None
            if isinstance(error, UserError) and self._speaks:
                raise LocalError(str(error)) from None
            raise
        return self

    @property
    def store(self) -> dist.Store:
        """What the ranks tell each other before the start; of a world of one, its own."""
        return dist.PrefixStore("before the start", self._store or dist.HashStore())

    def start(self) -> None:
        """Let the run begin, on rank 0; wait for that, on the others.

        Raises:
            RunStopped: rank 0 has failed or ended.
            UserError: it was refused.
        """
        if self._store is None or self._is_told:
            return
        self._is_told = True
        if self.world.is_first:
            self._store.set("start", Start(code=0).model_dump_json())
            return
        code = self._wait_for_start()
        if code == 2:
            raise UserError("rank 0 was refused")  # and says why
        if code:
            raise RunStopped("rank 0 ended", code=code, said=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world.is_first and self._store is not None and not self._is_told:
            self._is_told = True
            code = 2 if isinstance(error, UserError) else getattr(error, "code", None) or 1
            with contextlib.suppress(dist.DistError):
                self._store.set("start", Start(code=code).model_dump_json())
                self._until_heard()

    def say(self, line: str) -> None:
        """Print a line, once a machine."""
        if self.world.local_rank == 0:
            self.shout(line)

    @property
    def _speaks(self) -> bool:
        """Whether this rank prints what rank 0 cannot know: one on each machine."""
        return self.world.local_rank == 0 or self.world.rank == 1

    def _open(self) -> None:
        """Open rank 0's store, or connect to it.

        Raises:
            UserError: the name, the port or the machine is wrong.
        """
        host, port = self.environment["MASTER_ADDR"], int(self.environment["MASTER_PORT"])
        self._address = wait_for_name(host, self.patience, self.say)
        serves = self.world.is_first and not self._is_agents
        if serves:
            check_port(port)
        else:
            wait_for_port(host, port, self.patience, self.say)
        try:
            store = _in_time(lambda: self._connect(host, port, serves), 2 * self.patience.answer)
        except (dist.DistError, TimeoutError):
            here = socket.gethostname()
            if serves and not is_own_address(self._address):
                problem = f"is not {here}, the machine of rank 0: set MASTER_ADDR to an address of {here}"
            else:
                problem = f"does not answer {here} as rank 0 at port {port}: is the port another program's?"
            named = host if host == self._address else f"{host} ({self._address})"
            raise UserError(f"MASTER_ADDR={named} {problem}") from None
        prefix = "meeting"
        if self._is_agents:  # whose store outlives a restart, and holds what the ranks said before
            prefix += f"/{name_of_world(store, self.world, timedelta(seconds=self.patience.arrival))}"
        self._store = dist.PrefixStore(prefix, store)

    def _connect(self, host: str, port: int, serves: bool) -> dist.Store:
        timeout = timedelta(seconds=self.patience.answer)
        return dist.TCPStore(
            host, port, is_master=serves, timeout=timeout, wait_for_workers=False, multi_tenant=True
        )  # the process groups' store then shares its server

    def _arrive(self) -> None:
        """Say that this rank is there, and what it knows to be wrong with its machine."""
        assert self._store is not None
        is_alone = self.world.local_size == self.world.size
        here = Arrival(
            host=socket.gethostname(),
            machine=_machine(),
            process=os.getpid(),
            size=self.world.size,
            fault=interface_fault(self.environment),
            loopback=None if is_alone else loopback_fault(self.environment, self._address),
        )
        if not self._is_agents and (number := self._store.add(f"count/{self.world.rank}", 1)) > 1:
            self._store = None  # it is the others'
            raise UserError(
                f"{number} processes call themselves rank {self.world.rank}, one on {here.host}: give each its own "
                "rank (deepspeed's --node_rank, torchrun's --node-rank, RANK)"
            )
        self._store.set(f"rank/{self.world.rank}", here.model_dump_json())
        if not self.world.is_first and self._wait("rank/0", self.patience.arrival):
            first = read_key(self._store, "rank/0", Arrival)
            if first.size != self.world.size:
                raise UserError(
                    f"rank {self.world.rank} on {here.host} was started as one of {self.world.size} processes, "
                    f"rank 0 on {first.host} as one of {first.size}: give all the same WORLD_SIZE"
                )
            if not self._is_agents:
                self._server = f"rank 0 ({first.host}, process {first.process})"

    def _call_roll(self) -> None:
        """Wait for all ranks; rank 0 only.

        Raises:
            UserError: some do not come, or a machine among several cannot be reached by others.
        """
        assert self._store is not None
        begin, is_said = time.monotonic(), False
        missing = list(range(self.world.size))
        while missing := [rank for rank in missing if not self._store.check([f"rank/{rank}"])]:
            self._arrived = self.world.size - len(missing)
            waited = time.monotonic() - begin
            names = f"{name_ranks(missing)} of {self.world.size}"
            if waited > self.patience.arrival:
                raise UserError(
                    f"{names} did not come within {self.patience.arrival:g} s: look at what they and their launcher "
                    "say, and start them all together"
                )
            if waited >= self.patience.silence and not is_said:
                self.say(f"waiting   for {names} to start")
                is_said = True
            time.sleep(self.patience.pause)
        self._arrived = self.world.size
        here: list[Arrival] = [read_key(self._store, f"rank/{rank}", Arrival) for rank in range(self.world.size)]
        is_one = len({each.machine for each in here}) == 1
        wrong = {each.machine: each.fault or (None if is_one else each.loopback) for each in here}
        faults = list(filter(None, wrong.values()))
        if faults:
            more = f" ({len(faults) - 1} other machines likewise)" if len(faults) > 1 else ""
            raise UserError(f"{faults[0]}{more}")

    def _wait_for_start(self) -> int:
        """Wait as long as rank 0 prepares the run.

        Returns:
            Its exit code; 0: the run begins.
        """
        assert self._store is not None
        try:
            self._wait("start", math.inf)
            start: Start = read_key(self._store, "start", Start)
            self._store.add("heard", 1)
            return start.code
        except dist.DistError:
            raise self._lost() from None
        except UserError as error:
            raise (LocalError if self._speaks else UserError)(str(error)) from None

    def _lost(self) -> RunStopped:
        """What ends a rank whose store is gone; printed by one rank of each machine."""
        line = f"{self._server} ended before the run began, without an error message (killed, or crashed)"
        if self._speaks:
            self.shout(f"error: {line}")
        return RunStopped(line, said=True)

    def _wait(self, key: str, seconds: float) -> bool:
        """Whether a key is there within some time."""
        assert self._store is not None
        return wait_for_keys(self._store, [key], seconds)

    def _until_heard(self) -> None:
        """Keep the store open until all that came have read how rank 0 ends."""
        assert self._store is not None
        deadline = time.monotonic() + SECONDS_TO_HEAR
        while self._store.add("heard", 0) < self._arrived - 1 and time.monotonic() < deadline:
            time.sleep(0.05)


def _in_time(function: Callable[[], Any], seconds: float) -> Any:
    """What `function` returns or raises, which may never come back: a stranger's port answers nothing.

    Raises:
        TimeoutError: it takes longer.
    """
    results: list[Any] = []

    def work() -> None:
        try:
            results.append((function(), None))
        except Exception as error:
            results.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not results:
        raise TimeoutError
    result, error = results[0]
    if error is not None:
        raise error
    return result


def _machine() -> str:
    """What tells machines apart, also where two have one name; containers of one host differ in theirs."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return socket.gethostname()
