"""The store that torchrun's agent keeps for its workers, made safe for restarts.

All worlds that an agent starts share one store, and so the keys of those before: a rank that joins first would read the
address at which the last world's rank 0 listened, and fail to connect (torch 2.13, gloo). The number of the restart
cannot keep worlds apart, for agents count by themselves: one that restarts its workers because another one has, does
not count that. So rank 0 names each world, and tells the name to nobody but the processes of now.
"""

import os
import secrets
import time
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from moe_mamba.parallel.topology import World

SECONDS_BETWEEN_LOOKS = 0.1


def agent_store(world: World, timeout: timedelta) -> Store | None:
    """A store that only the processes of this world use, inside the agent's; None where no agent keeps one.

    Args:
        world: the processes; MASTER_ADDR and MASTER_PORT say where the agent's store is.
        timeout: how long to wait for the other ranks.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, timeout=timeout)
    return PrefixStore(f"world/{name_of_world(store, world, timeout)}", store)


def name_of_world(store: Store, world: World, timeout: timedelta) -> str:
    """The name that rank 0 has given to this world, the same on every rank, and never that of a world before.

    Each rank asks with a number that is new; rank 0 answers every question that it finds, those of ranks that are gone
    as well, until all ranks have confirmed.

    Raises:
        torch.distributed.DistStoreError: not all ranks came in time.
    """
    if world.is_first:
        return _give_name(store, world.size, timeout)
    question = secrets.token_hex(8)
    store.set(f"question/{world.rank}", question)
    name = store.get(f"answer/{question}").decode(errors="replace")
    store.set(f"confirmed/{name}/{world.rank}", "")
    return name


def _give_name(store: Store, size: int, timeout: timedelta) -> str:
    name, end = secrets.token_hex(8), time.monotonic() + timeout.total_seconds()
    answered: set[str] = set()
    missing = list(range(1, size))
    while missing and time.monotonic() < end:
        for rank in missing:
            if (
                store.check([f"question/{rank}"])
                and (question := store.get(f"question/{rank}").decode(errors="replace")) not in answered
            ):
                store.set(f"answer/{question}", name)
                answered.add(question)
        missing = [rank for rank in missing if not store.check([f"confirmed/{name}/{rank}"])]
        time.sleep(SECONDS_BETWEEN_LOOKS if missing else 0)
    if missing:
        store.get(f"confirmed/{name}/{missing[0]}")  # fails as a wait for it does
    return name
