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
from collections.abc import Iterable

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from moe_mamba.parallel.gradients import held_gradients


def group_of_replicas(parameter: nn.Parameter) -> ProcessGroup | None:
    """The ranks that hold the same part of a parameter (`parallelize.mark_parameters`); None: no other rank does."""
    return parameter.replica_group  # type: ignore[attr-defined, no-any-return]


def reduce_replicas(engine: deepspeed.DeepSpeedEngine) -> None:
    """Sum the accumulated gradients of replicas over the ranks that hold them, in place.

    Args:
        engine: after the backward pass of the last micro-step; its parameters are marked.
    """
    if engine.mpu is None:  # no tensor-parallel ranks
        return
    groups = ((gradient, group_of_replicas(parameter)) for parameter, gradient in held_gradients(engine))
    sum_over_replicas(((gradient, group) for gradient, group in groups if group is not None), engine.device)


def sum_over_replicas(gradients: Iterable[tuple[Tensor, ProcessGroup]], device: torch.device) -> None:
    """Sum each gradient over its group, in place; those of one group and dtype travel together.

    Args:
        gradients: of any shapes, in the same order on all ranks of a group; those without elements are left out.
        device: where the groups communicate; gradients may lie on the CPU instead (optimizer offload).
    """
    together: dict[tuple[ProcessGroup, torch.dtype], list[Tensor]] = defaultdict(list)
    for gradient, group in gradients:
        if gradient.numel():
            together[group, gradient.dtype].append(gradient)
    started = []
    for (group, _), parts in together.items():
        flat = torch.cat([part.flatten() for part in parts]).to(device)
        started.append((parts, flat, dist.all_reduce(flat, group=group, async_op=True)))
    for parts, flat, work in started:
        work.wait()
        summed = flat.split([part.numel() for part in parts])
        torch._foreach_copy_(parts, [one.view_as(part) for one, part in zip(summed, parts, strict=True)])
