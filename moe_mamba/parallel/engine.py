"""From our configuration to DeepSpeed's engine, and from the engine's memory to logical tensors."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from torch import Tensor, nn

from moe_mamba.checkpoint.shards import Shard, chunks_of_flat_range
from moe_mamba.config import Config
from moe_mamba.lean_import import lean_import
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel import zero3
from moe_mamba.parallel.groups import Groups
from moe_mamba.parallel.optimizer import OPTIMIZER, parameter_groups
from moe_mamba.parallel.placement import ParameterShard

with lean_import():
    import deepspeed.runtime.zero.muon.muon_optimizer  # as every engine does
with lean_import("triton"):
    import deepspeed.ops.triton_ops  # as every engine does

BUCKET = 2**26  # elements that travel together; a buffer of as many lies on the device


def build_engine(model: LanguageModel, config: Config, groups: Groups, micro_batch: int) -> deepspeed.DeepSpeedEngine:
    """Wrap `model` in DeepSpeed's engine with the optimizer, ZeRO, clipping and accumulation as the configuration says.

    DeepSpeed's own bf16 mode stays off: it would cast A_log and the router too. The model comes already cast, its
    fp32 parameters in groups of their own; ZeRO keeps fp32 masters and accumulates gradients in fp32.
    """
    train, data = config.train, groups.topology.data
    optimizer = OPTIMIZER.build(parameter_groups(model, config), train)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        mpu=groups.mpu,
        config={
            "train_batch_size": train.global_batch,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": train.global_batch // (micro_batch * data),
            # Without ZeRO DeepSpeed would clip by a mean of the ranks' norms, wrong where experts are spread.
            "gradient_clipping": train.gradient_clip if config.parallel.zero else 0.0,
            "zero_allow_untested_optimizer": True,  # a subclass of AdamW
            "zero_optimization": _zero_settings(config),
            "zero_force_ds_cpu_optimizer": False,  # it would be compiled at the start
            "steps_per_print": 2**31,
        },
    )
    _materialize_state(engine)
    return engine


def _zero_settings(config: Config) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": config.parallel.zero,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
    }
    if config.parallel.zero == 3:
        zero |= zero3.settings()
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return zero


def base_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer inside the engine, whatever ZeRO has wrapped around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Set the rate of the coming step in every group."""
    for group in base_optimizer(engine).param_groups:
        group["lr"] = rate


def _always(_: float) -> bool:
    return True


def step(engine: deepspeed.DeepSpeedEngine, gradient_clip: float, accept: Callable[[float], bool] = _always) -> float:
    """Do the optimizer step, with clipping, if `accept` takes the norm of its gradient.

    A step that is refused leaves weights and optimizer as they are; its gradient is gone.

    Args:
        engine: after the backward pass of the last micro-step.
        gradient_clip: largest norm; 0: no clipping.
        accept: asked once on every rank, and must answer alike.

    Returns:
        The norm of the whole gradient over all ranks, before clipping; NaN or Inf where the gradient has one.
    """
    if engine.zero_optimization():
        answer = functools.cache(lambda: accept(float(engine.optimizer._global_grad_norm)))
        with _updating_if(base_optimizer(engine), answer):
            engine.step()
        answer()  # DeepSpeed leaves out the update of some gradients by itself, and then nobody has asked yet
        return float(engine.optimizer._global_grad_norm)
    norm = _gradient_norm(engine)
    is_accepted = accept(float(norm))
    if gradient_clip and is_accepted:
        torch.nn.utils.clip_grads_with_norm_(engine.module.parameters(), gradient_clip, norm)
    with _updating_if(base_optimizer(engine), lambda: is_accepted):
        engine.step()
    return float(norm)


@contextlib.contextmanager
def _updating_if(optimizer: torch.optim.Optimizer, answer: Callable[[], bool]) -> Iterator[None]:
    """Let `optimizer` update nothing unless `answer()`.

    ZeRO knows the norm only in the middle of its step, just before it lets the optimizer inside update each group.
    """
    update = optimizer.step

    def update_if(*arguments: Any, **options: Any) -> Any:
        return update(*arguments, **options) if answer() else None

    optimizer.step = update_if  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        optimizer.step = update  # type: ignore[method-assign]


def _gradient_norm(engine: deepspeed.DeepSpeedEngine) -> Tensor:
    """Norm of the gradients that lie whole on their ranks (ZeRO 0); each part of a parameter counts once."""
    counted = [p for p in engine.module.parameters() if p.grad is not None and p.tensor_model_parallel]
    everywhere = torch.nn.utils.get_total_norm(p.grad for p in counted if not is_moe_param(p)) ** 2
    if engine.mpu is not None:
        dist.all_reduce(everywhere, group=engine.mpu.get_model_parallel_group())
    total = everywhere
    if engine.has_moe_layers:
        for name, group in engine.expert_data_parallel_group.items():
            own = (p.grad for p in counted if is_moe_param(p) and p.group_name == name)
            experts = torch.nn.utils.get_total_norm(own) ** 2
            dist.all_reduce(experts)
            total = total + experts / dist.get_world_size(group)  # as many ranks have the same ones
    return total.sqrt()


def state_shards(engine: deepspeed.DeepSpeedEngine, held: dict[str, ParameterShard]) -> list[Shard]:
    """What this rank owns of the logical state: fp32 weights, the optimizer's state, balancing biases.

    Each shard is a chunk of a logical tensor and a view of the engine's memory: saved from, or loaded into.
    """
    shards = []
    for name, parameter in engine.module.named_parameters():
        placed = held[name]
        for kind, start, flat in _owned_ranges(engine, parameter):
            for offsets, sizes, first in chunks_of_flat_range(placed.local_shape, start, start + flat.numel()):
                chunk = flat.narrow(0, first - start, sizes.numel()).view(sizes)
                for logical, local in placed.chunks(offsets, sizes):
                    shards.append(Shard(f"{kind}/{placed.name}", placed.shape, logical, chunk[local]))
    for name, buffer in engine.module.named_buffers():
        shards.append(Shard(f"weights/{held[name].name}", tuple(buffer.shape), (0,) * buffer.ndim, buffer))
    return shards


def finish_loading(engine: deepspeed.DeepSpeedEngine, optimizer_steps: int) -> None:
    """After the shards were filled: the optimizer's step count, and the running weights from the fp32 masters."""
    for state in base_optimizer(engine).state.values():
        state["step"].fill_(optimizer_steps)
    if engine.zero_optimization_partition_weights():
        zero3.refresh(engine)
    elif engine.zero_optimization():
        engine.optimizer.update_lp_params()


def _owned_ranges(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> Iterator[tuple[str, int, Tensor]]:
    """(kind, first element in the flat parameter, flat view of the memory) of all that this rank owns of it."""
    state = base_optimizer(engine).state
    if not engine.zero_optimization():
        yield "weights", 0, parameter.data.view(-1)
        for kind, key in OPTIMIZER.state.items():
            yield kind, 0, state[parameter][key].view(-1)
        return
    if engine.zero_optimization_partition_weights():
        partition, first, count, start = zero3.owned_range(engine, parameter)
    elif (owned := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]
        partition = engine.optimizer.single_partition_of_fp32_groups[owned.param_group_index]
        first, count = owned.hp_fragment_address.start, owned.hp_fragment_address.numel
        start = owned.lp_fragment_address.start
    else:
        return
    yield "weights", start, partition.data.narrow(0, first, count)
    for kind, key in OPTIMIZER.state.items():
        yield kind, start, state[partition][key].narrow(0, first, count)


def _materialize_state(engine: deepspeed.DeepSpeedEngine) -> None:
    """Make the optimizer's state now, as its first step would: a checkpoint is loaded into it before any step."""
    optimizer = base_optimizer(engine)
    if engine.zero_optimization_partition_weights():
        stepped = zero3.masters(engine)
    else:
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for weights in stepped:
        optimizer.state[weights] = OPTIMIZER.initial_state(weights)
