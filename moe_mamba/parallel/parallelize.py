"""Change a model for a layout, from outside: the model's own files never see a rank."""

import copy
import itertools
import shutil

import torch

from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import TrainConfig
from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.layer import ParallelMixers
from moe_mamba.model.mixers.routed_mamba import RoutedMamba
from moe_mamba.parallel.groups import Groups, expert_group_name
from moe_mamba.parallel.initialize import initialize_shards
from moe_mamba.parallel.placement import ParameterShard
from moe_mamba.parallel.run_plan import RunPlan


def build_model(plan: RunPlan, groups: Groups) -> LanguageModel:
    """This rank's part of a model, with the weights that the seed gives any layout.

    Sharded on the meta device, and only then given memory: no rank ever holds the whole.

    Args:
        plan: of the run.
        groups: of its layout.
    """
    return fill_model(shard_copy(plan, groups), plan, groups)


def shard_copy(plan: RunPlan, groups: Groups) -> LanguageModel:
    """This rank's part of a model, on the meta device: shapes without memory."""
    model = copy.deepcopy(plan.model)  # sharding changes it in place
    with torch.device("meta"):
        shard(model, groups, plan.shards)
    return model


def fill_model(model: LanguageModel, plan: RunPlan, groups: Groups) -> LanguageModel:
    """Give what ``shard_copy`` made memory on this rank's device, and the weights that the seed gives any layout."""
    config = plan.config
    if config.parallel.zero == 3:
        from moe_mamba.parallel.zero3 import partition_model

        partition_model(model, plan, groups)
    else:
        model.to_empty(device=groups.topology.world.device)
        initialize_shards(model, plan.model, plan.shards, config.run.seed)
        if config.train.precision == "bf16":
            cast_to_bf16(model)
    mark_parameters(model, groups, plan.shards)
    model.recompute = config.train.recompute
    if config.train.compile:
        if config.train.recompute and groups.topology.tensor > 1:
            _leave_graphs(model)
        for layer in model.layers:
            layer.compile()
    return model


def _leave_graphs(model: LanguageModel) -> None:
    """Let sums leave layers outside their compiled graphs, in place: for layers that are computed again.

    Recomputation ends at the last tensor that the backward pass needs, and a layer's last sum lies behind it. A graph
    runs to its end, and would make the sum once more.
    """
    from moe_mamba.parallel.expert import ExpertParallelMoE
    from moe_mamba.parallel.tensor import PartialLinear, ReducedLinear, RowLinear

    for module in model.modules():
        if isinstance(module, ParallelMixers | RoutedMamba):
            module.reduce = torch.compiler.disable(module.reduce)
        elif isinstance(module, ExpertParallelMoE):
            module.leave = torch.compiler.disable(module.leave)
        elif isinstance(module, RowLinear) and not isinstance(module, PartialLinear | ReducedLinear):
            module._reduce = torch.compiler.disable(module._reduce)  # type: ignore[method-assign]


def build_for_inference(plan: RunPlan, groups: Groups) -> LanguageModel:
    """This rank's part of a model for passes without gradients, in evaluation mode; a checkpoint is to fill it.

    Every tensor-parallel rank has the whole residual stream, so that a pass may have any number of tokens.

    Args:
        plan: of the run.
        groups: of its layout.
    """
    model = copy.deepcopy(plan.model)  # sharding changes it in place
    with torch.device("meta"):
        shard(model, groups, plan.shards, sequence_parallel=False)
    model.to_empty(device=groups.topology.world.device)
    for name, parameter in model.named_parameters():
        if plan.shards[name].is_padded:
            parameter.data.zero_()
    return model.eval()


def weight_shards(model: LanguageModel, held: dict[str, ParameterShard]) -> list[Shard]:
    """Every weight and buffer that this rank holds, for a checkpoint to fill.

    Args:
        model: this rank's part, with memory.
        held: what it holds of each name.
    """
    return [
        Shard(f"weights/{held[path].name}", held[path].shape, logical, tensor.data[local])
        for path, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        for logical, local in held[path].chunks()
    ]


def shard(
    model: LanguageModel, groups: Groups, held: dict[str, ParameterShard], sequence_parallel: bool = True
) -> None:
    """Shard a model on the meta device in place: layers by tensor parallelism, then experts by expert parallelism."""
    if groups.topology.tensor > 1:
        from moe_mamba.parallel.tensor import shard_layers

        shard_layers(model, groups, held, sequence_parallel)
    if groups.topology.is_sharded and model.routers():
        from moe_mamba.parallel.expert import spread_experts

        spread_experts(model, groups, held, sequence_parallel)


def mark_parameters(model: LanguageModel, groups: Groups, held: dict[str, ParameterShard]) -> None:
    """Tell DeepSpeed what each parameter is, and the optimizer step which ranks hold replicas of it.

    DeepSpeed wants `allreduce=False` and a group's name on experts; in the norm of the gradient it counts a parameter
    on the first tensor-parallel rank, and on the others where it is marked as `tensor_model_parallel`: each replica
    once.
    """
    for name, parameter in model.named_parameters():
        shard = held[name]
        parameter.tensor_model_parallel = shard.is_first_replica  # type: ignore[attr-defined]
        if shard.experts is not None and groups.topology.is_sharded:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = expert_group_name(groups.topology, shard.experts)  # type: ignore[attr-defined]
        group = groups.replicas[shard.replicas] if shard.replicas > 1 else None
        parameter.replica_group = group  # type: ignore[attr-defined]


def check_compiler(config: TrainConfig) -> None:
    """Refuse what torch.compile cannot do here.

    Raises:
        UserError: compilation is asked for on a CPU, and there is no C++ compiler.
    """
    if config.compile and not torch.cuda.is_available() and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UserError("train.compile=true needs a C++ compiler on a CPU: install g++, or set train.compile=false")


def cast_to_bf16(model: LanguageModel) -> None:
    """Make every parameter bf16 but those whose small steps bf16 would lose (A_log, D, dt_bias, norms, router)."""
    keep = model.fp32_parameter_names()
    for name, parameter in model.named_parameters():
        if name not in keep:
            parameter.data = parameter.data.to(torch.bfloat16)
