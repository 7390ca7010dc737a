"""A run before it is paid for: memory, time, traffic, the checkpoint, days and money, of one layout on one cluster."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from moe_mamba.config import Config
from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.routing import Router
from moe_mamba.parallel.placement import check_shards, parameter_shards
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.cluster import Cluster
from moe_mamba.planning.load import Load, fullest_rank
from moe_mamba.planning.memory import Memory, checkpoint_bytes, memory_of
from moe_mamba.planning.micro_batch import possible_micro_batches
from moe_mamba.planning.step_time import StepTime, flops_per_token, step_time
from moe_mamba.planning.traffic import Flow, traffic_of

SECONDS_PER_DAY = 86400
# Share of a GPU's memory that a plan fills: CUDA's context, NCCL's buffers and kernels lie in the rest. What the
# allocator loses is counted by itself (``memory.FRAGMENTATION``).
FILLED = 0.95


@dataclass(frozen=True)
class Estimate:
    """What a run will be like, as its fullest rank has it.

    Attributes:
        plan: of the run on that rank.
        cluster: where it runs.
        load: of the experts.
        micro_batch: sequences of a micro-step of a group of tensor-parallel ranks.
        tokens: budget of the run.
        price: money per GPU hour; None: not asked.
    """

    plan: RunPlan
    cluster: Cluster
    load: Load
    micro_batch: int
    tokens: int
    price: float | None = None

    @property
    def gpus(self) -> int:
        """Devices."""
        return self.plan.topology.world.size

    @property
    def accumulation(self) -> int:
        """Micro-steps of a step."""
        return self.plan.config.train.global_batch // (self.plan.topology.data * self.micro_batch)

    @cached_property
    def memory(self) -> Memory:
        """Of the rank, by kind."""
        return memory_of(self.plan, self.micro_batch, self.load, is_gpu=self.cluster.is_gpu)

    @cached_property
    def memory_otherwise(self) -> Memory:
        """The same with recomputation where there is none, and without it where there is."""
        return memory_of(
            with_keys(self.plan, train={"recompute": not self.plan.config.train.recompute}),
            self.micro_batch,
            self.load,
            is_gpu=self.cluster.is_gpu,
        )

    @property
    def room(self) -> float:
        """Bytes of a device that a plan may fill."""
        return self.cluster.memory * FILLED

    @property
    def host_room(self) -> float:
        """Bytes of the machine's own memory for each of its devices."""
        return self.cluster.host_memory * FILLED / min(self.cluster.gpus_per_machine, self.gpus)

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return self.memory.total <= self.room and self.memory.host <= self.host_room

    @cached_property
    def time(self) -> StepTime:
        """Of a step."""
        return step_time(self.plan, self.cluster, self.micro_batch, self.accumulation, self.load)

    @cached_property
    def flows(self) -> list[Flow]:
        """What the rank sends in a step."""
        return traffic_of(self.plan, self.micro_batch, self.accumulation, self.load)

    @property
    def tokens_per_step(self) -> int:
        """Of all devices."""
        return self.plan.config.train.global_batch * self.plan.config.data.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.tokens_per_step / self.time.seconds / self.gpus

    @property
    def flops_per_token(self) -> int:
        """Forward and backward, the scan's included."""
        return flops_per_token(self.plan.model, self.plan.config.data.sequence_length)

    @property
    def mfu(self) -> float:
        """The model's operations by what the device could do at most in the precision of the run."""
        peak = self.cluster.peak(self.plan.config.train.precision == "bf16")
        return self.flops_per_token * self.tokens_per_second / peak

    @property
    def days(self) -> float:
        """Of training, without validation, checkpoints and faults."""
        return self.tokens / (self.tokens_per_second * self.gpus) / SECONDS_PER_DAY

    @property
    def gpu_hours(self) -> float:
        """Of all devices together."""
        return self.days * 24 * self.gpus

    @property
    def cost(self) -> float | None:
        """Money."""
        return None if self.price is None else self.gpu_hours * self.price

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint."""
        return checkpoint_bytes(self.plan.model)

    @property
    def checkpoint_seconds(self) -> float:
        """To write one, every machine its part."""
        machines = math.ceil(self.gpus / self.cluster.gpus_per_machine)
        return self.checkpoint_bytes / (self.cluster.disk_rate * machines)


def with_keys(plan: RunPlan, **sections: dict[str, object]) -> RunPlan:
    """The same with other keys that change no shape, such as ``train={"recompute": True}``."""
    config = plan.config
    for section, keys in sections.items():
        config = config.model_copy(update={section: getattr(config, section).model_copy(update=keys)})
    return replace(plan, config=config)


def estimate(
    config: Config, cluster: Cluster, gpus: int, load: Load, tokens: int | None = None, price: float | None = None
) -> Estimate:
    """Plan a run as its configuration lays it out.

    Args:
        config: of the run; where ``train.micro_batch`` is null, the largest that fits is taken, or the smallest.
        cluster: where it runs.
        gpus: devices.
        load: of the experts.
        tokens: budget; None: the configuration's.
        price: money per GPU hour.

    Raises:
        UserError: model or batch do not fit the layout, as training would say.
    """
    plan = run_plan(config, cluster, gpus, load)
    wanted = tokens or config.steps * config.train.global_batch * config.data.sequence_length
    found = [Estimate(plan, cluster, load, size, wanted, price) for size in possible_micro_batches(plan)]
    return next((one for one in reversed(found) if one.fits), found[0])


def run_plan(config: Config, cluster: Cluster, gpus: int, load: Load, model: LanguageModel | None = None) -> RunPlan:
    """The plan of the rank whose experts get most rows, on machines of a cluster; ``model``: known already."""
    if gpus > cluster.gpus_per_machine and gpus % cluster.gpus_per_machine:
        raise UserError(
            f"--gpus={gpus} is no whole number of machines of {cluster.gpus_per_machine}: "
            f"give {gpus // cluster.gpus_per_machine * cluster.gpus_per_machine}, or --cluster.gpus_per_machine"
        )
    first = Topology.of(config, World(0, gpus, 0, min(gpus, cluster.gpus_per_machine)))
    check_shards(config, first)
    model = model or LanguageModel.on_meta(config.model, config.moe, config.run.kernels)
    rank = fullest(first, model.routers(), load)
    topology = replace(first, world=World(rank, gpus, rank % cluster.gpus_per_machine, first.world.local_size))
    return RunPlan(config, topology, model, parameter_shards(model, topology))


def fullest(topology: Topology, routers: dict[str, Router], load: Load) -> int:
    """The rank of the first expert group whose experts get most rows of all routers together."""
    if topology.expert == 1 or load.recorded is None:
        return 0  # the first expert is the fullest, or all are alike
    rows = 2**20
    received = [0] * topology.expert
    for name, router in routers.items():
        if router.config.experts % topology.expert == 0:
            received[fullest_rank(load.matrix(topology.expert, router.config.experts, rows, name))] += 1
    place = received.index(max(received))
    return place * topology.tensor if topology.expert_tensor else place
