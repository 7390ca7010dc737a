"""Gradients of replicas: what several tensor-parallel ranks hold alike, and each saw other tokens for.

Their sum over these ranks and ZeRO's mean over data ranks commute, so they are summed once per optimizer step, between
the last backward pass and the update, where DeepSpeed has accumulated them: a whole gradient at ZeRO 0, this rank's
part of it at the other stages. Tensor-parallel ranks with one data rank own the same parts of parameters, since
parameters have one shape on all of them. By then no hook of ZeRO's is left to run, and what its hooks reduced stands.

All gradients of one group and dtype travel in one call, in the order of the optimizer's groups, which is the same on
every rank; all calls are started before the first is waited for. They are summed in the accumulator's dtype: fp32,
where the parameters are bf16 too.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe_mamba.parallel import zero3


def mark_replica(parameter: nn.Parameter, group: ProcessGroup | None) -> None:
    """Note which ranks hold the same part of a parameter, and sum its gradient; None: no other rank does."""
    parameter.replica_group = group  # type: ignore[attr-defined]


def reduce_replicas(engine: deepspeed.DeepSpeedEngine) -> None:
    """Sum the accumulated gradients of replicas over the ranks that hold them, in place.

    Args:
        engine: after the backward pass of the last micro-step; its parameters are marked.
    """
    if engine.mpu is None:  # no tensor-parallel ranks
        return
    marked = [(p, gradient) for p, gradient in accumulated_gradients(engine) if p.replica_group is not None]
    sum_over_replicas(((gradient, p.replica_group) for p, gradient in marked), engine.device)
    if engine.zero_cpu_offload():
        optimizer = engine.optimizer
        for parameter, gradient in marked:  # DeepSpeed took their norms while they travelled to the CPU
            optimizer.norm_for_param_grads[optimizer.get_param_id(parameter)] = gradient.norm()


def sum_over_replicas(gradients: Iterable[tuple[Tensor, ProcessGroup]], device: torch.device) -> None:
    """Sum each gradient over its group, in place; those of one group and dtype travel together.

    Args:
        gradients: of any shapes, in the same order on all ranks of a group.
        device: where the groups communicate; gradients may lie on the CPU instead (optimizer offload).
    """
    together: dict[tuple[ProcessGroup, torch.dtype], list[Tensor]] = defaultdict(list)
    for gradient, group in gradients:
        together[group, gradient.dtype].append(gradient)
    started = []
    for (group, _), parts in together.items():
        flat = torch.cat([part.flatten() for part in parts]).to(device)
        started.append((parts, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for parts, flat, work in started:
        work.wait()
        summed = flat.split([part.numel() for part in parts])
        torch._foreach_copy_(parts, [one.view_as(part) for one, part in zip(summed, parts, strict=True)])


def accumulated_gradients(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter of which this rank steps a part, and the gradient of that part, as the update will read it.

    Args:
        engine: after the backward pass of the last micro-step.

    Yields:
        The parameter, and memory of DeepSpeed's: at ZeRO 0 the whole gradient; at ZeRO 1 and 2 the elements that lie in
        this rank's partition; at ZeRO 3 this rank's part, padded as the parameter's parts are.
    """
    optimizer = engine.optimizer
    if not engine.zero_optimization():
        yield from ((p, p.grad) for p in engine.module.parameters() if p.grad is not None)
    elif engine.zero_cpu_offload():
        yield from _offloaded_gradients(engine)
    else:
        is_sharded = engine.zero_optimization_partition_weights()
        for number, parameters in enumerate(optimizer.fp16_groups if is_sharded else optimizer.params_in_partition):
            # after the last part there may be padding
            yield from zip(parameters, optimizer.averaged_gradients[number], strict=False)


def _offloaded_gradients(engine: deepspeed.DeepSpeedEngine) -> Iterator[tuple[nn.Parameter, Tensor]]:
    optimizer = engine.optimizer
    if engine.zero_optimization_partition_weights():
        for parameter in engine.module.parameters():
            master, first, count, _ = zero3.owned_range(engine, parameter)
            if count:
                yield parameter, master.grad.narrow(0, first, count)  # type: ignore[union-attr]
        return
    optimizer._wait_for_offload_copies()
    for parameters, master in zip(
        optimizer.params_in_partition, optimizer.single_partition_of_fp32_groups, strict=True
    ):
        for parameter in parameters:
            _, _, first, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
            yield parameter, master.grad.narrow(0, first, count)
