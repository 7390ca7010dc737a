"""From our configuration to DeepSpeed's engine, and from the engine's memory to logical tensors."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_mamba.checkpoint.shards import Shard, chunks_of_flat_range
from moe_mamba.config import Config
from moe_mamba.lean_import import lean_import
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel import buckets, zero3
from moe_mamba.parallel.gradients import squared_norm
from moe_mamba.parallel.groups import Groups
from moe_mamba.parallel.optimizer import OPTIMIZER, parameter_groups
from moe_mamba.parallel.placement import ParameterShard
from moe_mamba.parallel.replicas import reduce_replicas
from moe_mamba.parallel.topology import World

with lean_import():
    import deepspeed.runtime.zero.muon.muon_optimizer  # as every engine does
with lean_import("triton"):
    import deepspeed.ops.triton_ops  # as every engine does


def build_engine(model: LanguageModel, config: Config, groups: Groups, micro_batch: int) -> deepspeed.DeepSpeedEngine:
    """Wrap `model` in DeepSpeed's engine with the optimizer, ZeRO and accumulation as the configuration says.

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
            "gradient_clipping": 0.0,  # by `step`
            "zero_allow_untested_optimizer": True,  # a subclass of AdamW
            "zero_optimization": _zero_settings(model, config, groups.topology.world),
            "zero_force_ds_cpu_optimizer": False,  # it would be compiled at the start
            "steps_per_print": 2**31,
            "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a step
        },
    )
    _materialize_state(engine)
    _leave_the_norm_to_us(engine)
    if engine.zero_optimization():
        engine.module.register_forward_pre_hook(partial(_tell_zero_of_the_last_micro_step, engine))
    return engine


def _tell_zero_of_the_last_micro_step(engine: deepspeed.DeepSpeedEngine, *_: object) -> None:
    """Tell ZeRO, before a pass, what its hooks ask when a bucket is full: whether the update comes after this one.

    DeepSpeed tells it by hooks on the outputs of the forward pass, and finds none in our ``Output``; then ZeRO would
    believe what was true of the micro-step before.
    """
    engine.optimizer.set_gradient_accumulation_boundary(engine.is_gradient_accumulation_boundary())


def _zero_settings(model: LanguageModel, config: Config, world: World) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": config.parallel.zero,
        "overlap_comm": _reduces_beside_backward(model, config.parallel.zero, world),
        "reduce_bucket_size": buckets.BUCKET,
        "allgather_bucket_size": buckets.BUCKET,
    }
    if config.parallel.zero == 3:
        zero |= zero3.settings()
    if config.parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return zero


def _reduces_beside_backward(model: LanguageModel, stage: int, world: World) -> bool:
    """See ``buckets.reduces_beside_backward``."""
    largest = max(parameter.numel() for parameter in model.parameters())
    return buckets.reduces_beside_backward(stage, world.device.type, world.size, largest)


def base_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer inside the engine, whatever ZeRO has wrapped around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Set the rate of the coming step in every group."""
    for group in base_optimizer(engine).param_groups:
        group["lr"] = rate


def is_not_finite(shared: Tensor) -> Tensor:
    """1 where a step's norm or loss, or whatever else its ranks shared, has a NaN or Inf, else 0: () fp32."""
    return (~shared.isfinite()).any().float()


def step(
    engine: deepspeed.DeepSpeedEngine,
    gradient_clip: float,
    figures: Tensor | None = None,
    refuse: Callable[[Tensor], Tensor] = is_not_finite,
) -> Tensor:
    """Do the optimizer step, with clipping; nothing waits for the device.

    Args:
        engine: after the backward pass of the last micro-step.
        gradient_clip: largest norm; 0: no clipping.
        figures: (figures,) float64, what this rank has to say besides: its sum over all ranks travels with the norm.
        refuse: of the result, whether to leave weights and optimizer as they are: () fp32 on its device, 1 or 0. It is
            called on every rank, and must answer alike; the gradient is gone either way.

    Returns:
        (1 + figures,) float64 on the device, the same on every rank: the norm of the whole gradient over all ranks,
        before clipping, NaN or Inf where the gradient has one; and the figures' sums.
    """
    reduce_replicas(engine)
    shared = squared_norm(engine)[None]
    if figures is not None:
        shared = torch.cat([shared, figures])
    if dist.get_world_size() > 1:
        dist.all_reduce(shared)
    norm = shared[:1].sqrt_()[0]
    optimizer, device = base_optimizer(engine), _device_of_masters(engine)
    # AdamW's fused kernel divides the gradient by the one, and does nothing where the other is not 0.
    optimizer.found_inf = refuse(shared).to(device)  # type: ignore[attr-defined]
    if gradient_clip:
        optimizer.grad_scale = ((norm + 1e-6) / gradient_clip).clamp(min=1).float().to(device)  # type: ignore[attr-defined]
    engine.step()
    return shared


def _device_of_masters(engine: deepspeed.DeepSpeedEngine) -> torch.device:
    return torch.device("cpu" if engine.zero_cpu_offload() else engine.device)


def _leave_the_norm_to_us(engine: deepspeed.DeepSpeedEngine) -> None:
    """Keep DeepSpeed from computing the norm: it would wait for it, and takes a mean where experts are spread."""
    if engine.zero_optimization_partition_weights():
        engine.optimizer._get_norm_groups = lambda: [1.0]  # it reads this, on the host
    elif engine.zero_optimization():
        engine.optimizer.compute_grad_norm = False  # its configuration refuses this beside offloading, which needs none
        engine.optimizer.update_offload_overflow_tracker = lambda _: None  # it would wait for each gradient


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
