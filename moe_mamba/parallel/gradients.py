"""The gradients of a step as the engine holds them after its backward passes, at each stage of ZeRO."""

from collections.abc import Iterator

import deepspeed
from torch import Tensor, nn

from moe_mamba.parallel import zero3


def held_gradients(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter, and what this rank holds of its gradient: all of it at ZeRO 0, else the part that it updates.

    Gradients are means over the data ranks. An offloaded optimizer's lie in the CPU's memory.
    """
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        yield from ((p, p.grad) for p in engine.module.parameters() if p.grad is not None)
    elif engine.zero_cpu_offload():
        yield from _offloaded(engine)
    elif engine.zero_optimization_partition_weights():
        for number, parameters in enumerate(optimizer.fp16_groups):
            yield from zip(parameters, optimizer.averaged_gradients[number], strict=True)
    else:
        for number, parameters in enumerate(optimizer.params_in_partition):
            yield from zip(parameters, optimizer.averaged_gradients[number], strict=False)  # filling comes behind


def _offloaded(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The same from the flat gradients of the masters, which DeepSpeed fills on the way."""
    optimizer = engine.optimizer
    if engine.zero_optimization_partition_weights():
        for parameter in engine.module.parameters():
            master, first, count, _ = zero3.owned_range(engine, parameter)
            yield parameter, master.grad.narrow(0, first, count)  # type: ignore[union-attr]
        return
    optimizer._wait_for_offload_copies()
    for number, parameters in enumerate(optimizer.params_in_partition):
        flat = optimizer.single_partition_of_fp32_groups[number].grad
        for parameter in parameters:
            owned = parameter._hp_mapping.hp_fragment_address
            yield parameter, flat.narrow(0, owned.start, owned.numel)
