"""The world that a rehearsed rank believes to be in: fake process groups, which hold all ranks and send nothing."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_mamba.rehearsal.device import RehearsedWorld, fake_accelerator, replaced

# What keeps groups, or counts what ranks compare: module -> attributes, as they are before any world.
MEMORY: dict[str, dict[str, Any]] = {
    "deepspeed.comm.comm": {"cdb": None},
    "deepspeed.utils.groups": {"mpu": None, "mesh_device": None},
}


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
            _forget_groups()
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


def _forget_groups() -> None:
    """Empty what megatron-core and DeepSpeed keep of process groups in their modules."""
    if parallel_state := sys.modules.get("megatron.core.parallel_state"):
        parallel_state.destroy_model_parallel()
    if groups := sys.modules.get("deepspeed.utils.groups"):
        for name, value in vars(groups).items():
            if name.startswith("_") and name.isupper() and isinstance(value, dict):
                value.clear()
            elif name.startswith("_") and name.isupper() and not isinstance(value, str):
                setattr(groups, name, None)
    for module, attributes in MEMORY.items():
        if module in sys.modules:
            for name, value in attributes.items():
                setattr(sys.modules[module], name, value)
    if stage3 := sys.modules.get("deepspeed.runtime.zero.parameter_offload"):
        # Modules and parameters are numbered by process, and ranks compare the numbers.
        stage3.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        stage3.Init.param_id = 0
        stage3.FWD_MODULE_STACK.clear()
