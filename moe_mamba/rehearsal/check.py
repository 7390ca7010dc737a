"""Whether a rank's part of a model is what the plan says, before it makes a step."""

import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch import Tensor

from moe_mamba.model.language_model import LanguageModel, shard_specs
from moe_mamba.parallel.groups import Groups, expert_group_name
from moe_mamba.parallel.placement import ParameterShard, local_length, place, segments_of_axis
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import name_ranks
from moe_mamba.planning.traffic import members
from moe_mamba.rehearsal.recording import Fault, Stage

# Kept in fp32 for the small steps that bf16 would lose, and used as what a product of the input would be in its place.
CAST = ("dt_B_C",)


def check_cover(plan: RunPlan) -> None:
    """Refuse shards that are not a whole: the ranks of a group must hold every element, and as many of them each.

    Raises:
        Fault: names the parameter.
    """
    for name, specs in shard_specs(plan.config.model, plan.config.moe).items():
        for spec in specs if name in plan.shards else ():
            size = place(spec.group, plan.topology)[1]
            widest = sum(block.width for block in spec.blocks)
            held: set[int] = set()
            for rank in range(size):
                for local, logical, length in segments_of_axis(spec, rank, size):
                    if local + length > local_length(spec, size):
                        raise Fault(
                            f"{name}: rank {rank} of {size} holds more of axis {spec.axis} than it has room for"
                        )
                    held.update(range(logical, logical + length))
            if len(held) != widest:
                raise Fault(f"{name}: {size} ranks hold {len(held):,} of the {widest:,} elements of axis {spec.axis}")


def check_groups(groups: Groups) -> None:
    """Refuse process groups of other ranks than the layout's: shapes may fit, and the sums be wrong.

    Raises:
        Fault: names the group.
    """
    topology = groups.topology
    made = {"tensor": groups.tensor, "data": groups.data}
    made |= {f"replicas {count}": group for count, group in groups.replicas.items() if count != topology.tensor}
    if topology.is_sharded:
        name = expert_group_name(topology, "expert")
        made["expert"] = deepspeed_groups._get_expert_parallel_group(name)
        made["expert_data"] = deepspeed_groups._get_expert_data_parallel_group(name)
    for name, group in made.items():
        expected = members(topology, name)
        found = expected if group is None else tuple(dist.get_process_group_ranks(group))
        if found != expected:
            raise Fault(f"the {name} group has {name_ranks(list(found))}, and must have {name_ranks(list(expected))}")


def check_model(model: LanguageModel, plan: RunPlan, stage: Stage) -> None:
    """Refuse a part of a model that is not as the plan says, and leave it where it is: DeepSpeed would move it.

    What is promised in fp32 is noted on the stage, which sees whether it is used so.

    Raises:
        Fault: names the parameter.
    """
    there, fp32 = plan.topology.world.device, model.fp32_parameter_names()
    in_bf16 = plan.config.train.precision == "bf16"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != there:
            raise Fault(f"{name} lies on {tensor.device}, and must lie on {there}")
        _check_shape(name, tensor, plan.shards[name])
        if name in fp32 and tensor.dtype != torch.float32:
            raise Fault(f"{name} is {tensor.dtype}, and is promised in fp32")
        if in_bf16 and name in fp32 and not name.endswith(CAST):
            stage.promised.setdefault(_whole_shape(tensor), []).append((name, tensor))
    model.to = lambda *_, **__: model  # type: ignore[method-assign, assignment]


def _check_shape(name: str, tensor: Tensor, shard: ParameterShard) -> None:
    shape = tuple(_whole_shape(tensor))
    if shape != shard.local_shape:
        raise Fault(f"{name} has shape {shape}, and the plan says {shard.local_shape}")


def _whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a parameter, of one that ZeRO-3 has sharded as well."""
    return getattr(tensor, "ds_shape", tensor.shape)
