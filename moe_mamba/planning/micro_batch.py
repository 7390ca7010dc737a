"""How many sequences a device processes at once, when the configuration leaves it open."""

import math

import torch

from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.planning.cluster import FILLED, Cluster
from moe_mamba.planning.load import Load
from moe_mamba.planning.memory import memory_of

# On a CPU, more tokens at once only fall out of the caches.
CPU_TOKENS = 4096


def choose_micro_batch(plan: RunPlan) -> int:
    """Sequences of a micro-step: a divisor of a data rank's share of the batch that tensor-parallel ranks can share.

    On a GPU it is the largest that fits the memory that is free before the model lies there, by ``memory_of``, so the
    choice of one rank must be given to all.
    """
    device = plan.topology.world.device
    if device.type != "cuda":
        return _on_cpu(plan)
    free, _ = torch.cuda.mem_get_info(device)
    return _largest(plan, Load(), FILLED * free)


def micro_batch_on(plan: RunPlan, cluster: Cluster, load: Load) -> int:
    """What a run on a cluster would choose, if experts had this load.

    Raises:
        UserError: as ``possible_micro_batches``.
    """
    if not cluster.is_gpu:
        return _on_cpu(plan)
    return _largest(plan, load, cluster.room, cluster.host_room(plan.topology.world.size))


def _on_cpu(plan: RunPlan) -> int:
    sizes, most = possible_micro_batches(plan), CPU_TOKENS / plan.config.data.sequence_length
    return max((size for size in sizes if size <= most), default=sizes[0])


def _largest(plan: RunPlan, load: Load, room: float, host_room: float = math.inf) -> int:
    """The largest that fits a GPU, whether or not smaller ones do; the smallest where none does."""
    sizes = possible_micro_batches(plan)
    for size in reversed(sizes[1:]):
        memory = memory_of(plan, size, load)
        if memory.total <= room and memory.host <= host_room:
            return size
    return sizes[0]


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
