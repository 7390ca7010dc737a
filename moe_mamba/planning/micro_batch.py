"""How many sequences a device processes at once, when the configuration leaves it open."""

import torch

from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.planning.load import Load
from moe_mamba.planning.memory import memory_of

# On a CPU, more tokens at once only fall out of the caches.
CPU_TOKENS = 4096
# Bytes of a GPU that libraries take for themselves: NCCL's buffers, cuBLAS's workspace, kernels' code.
LIBRARIES = 2**30


def choose_micro_batch(plan: RunPlan) -> int:
    """Sequences of a micro-step: a divisor of a data rank's share of the batch that tensor-parallel ranks can share.

    On a GPU it is the largest that fits the memory that is free before the model lies there, by ``memory_of``, so the
    choice of one rank must be given to all.
    """
    config, device = plan.config, plan.topology.world.device
    fitting = possible_micro_batches(plan)
    if config.train.micro_batch:
        return config.train.micro_batch
    if device.type != "cuda":
        most = CPU_TOKENS / config.data.sequence_length
        return max((n for n in fitting if n <= most), default=fitting[0])
    free, _ = torch.cuda.mem_get_info(device)
    return largest_micro_batch(plan, free)


def largest_micro_batch(plan: RunPlan, free: float) -> int:
    """The largest that a GPU with ``free`` bytes holds; the smallest where it holds none.

    Raises:
        UserError: as ``possible_micro_batches``.
    """
    chosen, *larger = possible_micro_batches(plan)
    for number in larger:
        if memory_of(plan, number, Load()).total > free - LIBRARIES:
            break
        chosen = number
    return chosen


def possible_micro_batches(plan: RunPlan) -> list[int]:
    """Those into which the batch can be divided, the smallest first; only the configuration's, where it has one.

    Raises:
        UserError: the batch cannot be shared among the ranks.
    """
    config, topology = plan.config, plan.topology
    share = topology.sequences_per_data_rank(config.train.global_batch, config.train.micro_batch)
    if config.train.micro_batch:
        return [config.train.micro_batch]
    multiple = topology.micro_batch_multiple(config)
    return [n for n in range(multiple, share + 1, multiple) if share % n == 0]
