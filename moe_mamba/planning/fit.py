"""Whether a run can fit the device it is to run on, by arithmetic alone: said before anything is prepared for it."""

from pathlib import Path

import psutil
import torch

from moe_mamba.errors import UserError
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.planning.memory import per_device, size
from moe_mamba.planning.micro_batch import activation_bytes_per_token

# The count of activations is rough and generous; what is a quarter of it is kept for sure.
SURE = 4
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def check_fit(plan: RunPlan) -> None:
    """Refuse a model of which not even the state, or a sequence of which not even the activations, find room.

    Raises:
        UserError: says what it takes, what there is, and which keys change it.
    """
    world, config, state = plan.topology.world, plan.config, per_device(plan)
    host = host_bytes() // world.local_size
    is_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_properties(world.device).total_memory if is_gpu else host
    kept = sum(state[kind] for kind in ("weight_bytes", "gradient_bytes", "optimizer_bytes"))
    for needed, there in ((kept, device), (state["host_bytes"] + (0 if is_gpu else kept), host)):
        if needed > there:
            raise UserError(
                f"weights, gradients and optimizer take {size(needed)} of memory, and this process has {size(there)}: "
                "lower model.d_model, model.repeat or moe.experts, or raise parallel.tensor, parallel.expert or "
                "parallel.zero; tools/plan.py counts"
            )
    batch, length = config.train.micro_batch or 1, config.data.sequence_length
    activations = batch * length * activation_bytes_per_token(config, plan.topology.tensor) // SURE
    if kept + activations > device:
        raise UserError(
            f"a micro-batch of {batch} x {length:,} tokens keeps more than {size(activations)} of activations, and "
            f"this process has {size(device)} of memory: lower data.sequence_length or train.micro_batch, raise "
            "parallel.tensor, or set train.recompute=true"
        )


def host_bytes() -> int:
    """Memory of this machine with its swap, or what a container may take of it."""
    there = psutil.virtual_memory().total + psutil.swap_memory().total
    for path in LIMITS:
        if path.is_file() and (text := path.read_text(encoding="ascii").strip()).isdecimal():
            there = min(there, int(text))
    return there
