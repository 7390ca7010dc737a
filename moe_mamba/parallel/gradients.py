"""The gradients of a step as the engine holds them after its backward passes, at each stage of ZeRO, and their norm."""

from collections import defaultdict
from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
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


def squared_norm(engine: deepspeed.DeepSpeedEngine) -> Tensor:
    """This rank's share of the whole gradient's squared norm: the sum over all ranks counts every number once.

    Returns:
        () float64 on the engine's device; NaN or Inf where the gradient has one.
    """
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for parameter, gradient in held_gradients(engine):
        if parameter.tensor_model_parallel:  # type: ignore[attr-defined]
            by_copies[_copies(engine, parameter)].append(gradient)
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    for copies, gradients in by_copies.items():
        norm = torch.nn.utils.get_total_norm(gradients)
        total += norm.to(engine.device).double().square() / copies
    return total


def _copies(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> int:
    """How many ranks hold the same gradient: data ranks at ZeRO 0, only this one where each has its part."""
    if engine.zero_optimization():
        return 1
    if is_moe_param(parameter):
        return dist.get_world_size(engine.expert_data_parallel_group[parameter.group_name])  # type: ignore[attr-defined]
    return engine.dp_world_size
