"""Whether a run can fit the device it is to run on, by arithmetic alone: said before anything is prepared for it."""

from pathlib import Path

import psutil
import torch

from moe_mamba.errors import UserError
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.planning.load import Load
from moe_mamba.planning.memory import Memory, memory_of, size
from moe_mamba.planning.micro_batch import possible_micro_batches

SURE = 0.9  # of the activations counted, which are within 10 % of those that a run has
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
STATE = "lower model.d_model, model.repeat or moe.experts, or raise parallel.tensor, parallel.expert or parallel.zero"
ACTIVATIONS = "lower data.sequence_length or train.micro_batch, raise parallel.tensor, or set train.recompute=true"


def check_fit(plan: RunPlan) -> str | None:
    """Refuse what cannot find room: the state of a model, or the least that a micro-step keeps beside it.

    Returns:
        What to warn of: the count, which has margins, says that it does not fit; None: it says that it does.

    Raises:
        UserError: says what it takes, what there is, and which keys change it.
    """
    world, config = plan.topology.world, plan.config
    is_gpu = world.device.type == "cuda"
    host = host_bytes() // world.local_size
    device = torch.cuda.get_device_properties(world.device).total_memory if is_gpu else host
    batch, length = possible_micro_batches(plan)[0], config.data.sequence_length
    memory = memory_of(plan, batch, Load(), is_gpu=is_gpu)
    for needed, there in ((memory.state, device), (memory.host + (0 if is_gpu else memory.state), host)):
        if needed > there:
            raise UserError(
                f"weights, gradients and optimizer take {size(needed)} of memory, and this process has {size(there)}: "
                f"{STATE}; tools/plan.py counts"
            )
    needed = memory.total + (0 if is_gpu else memory.host)
    if needed <= device:
        return None
    # Gradients may grow while activations go, so they do not count together for sure.
    at_once = memory.weights + memory.optimizer + round(SURE * memory.activations) + (0 if is_gpu else memory.host)
    if at_once > device:
        raise UserError(
            f"a micro-batch of {batch} x {length:,} tokens takes {size(memory.activations)} of activations beside "
            f"{size(memory.weights + memory.optimizer)} of weights and optimizer, and this process has {size(device)} "
            f"of memory: {ACTIVATIONS}"
        )
    return (
        f"memory    this run may not fit: it needs about {size(needed)} ({kinds(memory)}), and this process has "
        f"{size(device)}: {ACTIVATIONS}"
    )


def kinds(memory: Memory) -> str:
    """What of the memory is what, for people, without kinds that need nothing."""
    names = ("weights", "gradients", "optimizer", "activations", "communication", "fragmentation", "host")
    return ", ".join(f"{name} {size(count)}" for name in names if (count := getattr(memory, name)))


def host_bytes() -> int:
    """Memory of this machine with its swap, or what a container may take of it."""
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    for path in LIMITS:
        if path.is_file() and (text := path.read_text(encoding="ascii").strip()).isdecimal():
            there = min(there, int(text))
    return there
