"""The world that a rehearsed rank believes to be in: fake process groups, which hold all ranks and send nothing."""

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_mamba.parallel.groups import forget_groups
from moe_mamba.rehearsal.device import RehearsedWorld, fake_accelerator, replaced


@contextlib.contextmanager
def fake_world(world: RehearsedWorld) -> Iterator[None]:
    """Be a rank of a world while the block lasts; whatever libraries keep of its groups is forgotten at the end.

    It does what ``parallel.distributed.start_world`` does, with groups that need no other process.
    """
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    names = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank, "MASTER_PORT": 0}
    changed = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    with fake_accelerator(world.local_size), _agreeing():
        dist.init_process_group("fake", store=FakeStore(), rank=world.rank, world_size=world.size)
        try:
            deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
            yield
        finally:
            forget_groups()
            dist.destroy_process_group()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _agreeing() -> Iterator[None]:
    """Let ZeRO-3 find, where it asks rank 0 for a list to compare with its own, that it has the same."""
    from deepspeed.runtime.zero import utils

    ask, compare_lengths = utils.get_lst_from_rank0, utils.assert_lst_len_same_as_other_ranks

    def agree(numbers: list[int]) -> list[int]:
        ask(numbers)
        return numbers

    def agree_on_length(numbers: list[int]) -> None:
        with contextlib.suppress(RuntimeError):  # what it reads is no length
            compare_lengths(numbers)

    lengths = replaced(utils, "assert_lst_len_same_as_other_ranks", agree_on_length)
    with replaced(utils, "get_lst_from_rank0", agree), lengths:
        yield
