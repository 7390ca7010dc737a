"""Worlds that torchrun's agent starts one after the other, over the one store that it keeps."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from moe_mamba.parallel.agent_store import agent_store, name_of_world
from moe_mamba.parallel.topology import World

SIZE = 3
TIMEOUT = timedelta(seconds=30)


@pytest.fixture
def agents() -> Iterator[dist.TCPStore]:
    """The agent's store."""
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT, wait_for_workers=False)


def client(agents: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", agents.port, timeout=TIMEOUT)


def test_worlds_of_one_store_have_names_of_their_own_whoever_comes_first(agents: dist.TCPStore) -> None:
    def join(rank: int, late: int) -> str:
        time.sleep(0.2 * (rank == late))
        return name_of_world(client(agents), World(rank, SIZE, rank, SIZE), TIMEOUT)

    with ThreadPoolExecutor(SIZE) as ranks:
        names = [set(ranks.map(join, range(SIZE), [late] * SIZE)) for late in (0, 1, 0)]
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


def test_a_rank_that_does_not_come_ends_the_wait(agents: dist.TCPStore) -> None:
    short = timedelta(seconds=0.3)
    store = dist.TCPStore("127.0.0.1", agents.port, timeout=short)
    for rank in (0, 1):
        with pytest.raises(dist.DistStoreError):
            name_of_world(store, World(rank, 2, rank, 2), short)


def test_without_an_agent_there_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert agent_store(World(0, 2, 0, 2), TIMEOUT) is None


ALONE = """
import torch, torch.distributed as dist
from moe_mamba.parallel.distributed import finish_world, start_world
from moe_mamba.parallel.launcher import fill_environment
from moe_mamba.parallel.topology import World
fill_environment()
start_world(World.from_environment())
dist.all_reduce(torch.ones(1))
finish_world()
"""


def test_a_world_of_one_needs_no_agent(agents: dist.TCPStore) -> None:
    """As of ``torchrun --nproc-per-node=1``, or of ``--nnodes=1:2`` when a machine is gone."""
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agents.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    command, started = [sys.executable, "-c", ALONE], {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0"}
    ended = subprocess.run(
        command, env=os.environ | ranks | agent | started, timeout=60, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
