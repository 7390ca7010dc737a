"""What a rank holds, roughly, until activations are counted layer by layer."""

from dataclasses import dataclass

from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.planning.load import Load
from moe_mamba.planning.memory import per_device
from moe_mamba.planning.micro_batch import activation_bytes_per_token, head_bytes
from moe_mamba.planning.state import FP32


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, by kind."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    communication: int
    update: int
    fragmentation: int
    host: int

    @property
    def total(self) -> int:
        """On the device."""
        passes = max(self.activations + self.communication, self.update)
        return self.weights + self.gradients + self.optimizer + passes + self.fragmentation


def memory_of(plan: RunPlan, micro_batch: int, load: Load, *, is_gpu: bool = True) -> Memory:
    """What a rank holds."""
    state, config = per_device(plan), plan.config
    tokens = micro_batch * config.data.sequence_length
    activations = tokens * activation_bytes_per_token(config, plan.topology.tensor)
    activations += head_bytes(config, plan.topology.tensor)
    communication = (2 if is_gpu else 1) * 2**26 * FP32 if config.parallel.zero else 0
    return Memory(
        state["weight_bytes"],
        state["gradient_bytes"],
        state["optimizer_bytes"],
        activations,
        communication,
        0,
        activations // 20,
        state["host_bytes"],
    )
