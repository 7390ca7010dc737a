"""From our configuration to DeepSpeed's engine, and from the engine's memory to logical tensors."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from moe_mamba.config import Config
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.pieces import Piece, boxes_of_flat_range

MOMENTS = {"moment1": "exp_avg", "moment2": "exp_avg_sq"}


def build_engine(model: LanguageModel, config: Config, micro_batch: int, world_size: int) -> deepspeed.DeepSpeedEngine:
    """Wrap `model` in DeepSpeed's engine with AdamW, ZeRO, clipping and accumulation as the configuration says.

    DeepSpeed's own bf16 mode stays off: it would cast A_log and the router too. The model comes already cast, its
    fp32 parameters in groups of their own; ZeRO keeps fp32 masters and accumulates gradients in fp32.
    """
    train = config.train
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config), lr=train.learning_rate, betas=(train.beta1, train.beta2), eps=train.epsilon
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": train.global_batch,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": train.global_batch // (micro_batch * world_size),
            "gradient_clipping": train.gradient_clip,
            "zero_optimization": {"stage": config.parallel.zero, "overlap_comm": False},
            "steps_per_print": 2**31,
        },
    )
    _materialize_moments(base_optimizer(engine))
    return engine


def parameter_groups(model: LanguageModel, config: Config) -> list[dict[str, Any]]:
    """AdamW's groups: one for each dtype (ZeRO cannot mix them) with and without decay, bf16 first.

    Weight decay is for matrices; norms, biases, D and A_log have none, unless `train.decay_all`.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith("A_log")
        decay = config.train.weight_decay if is_matrix or config.train.decay_all else 0.0
        groups[parameter.dtype == torch.float32, decay].append(parameter)
    # The first group's dtype is the one by which ZeRO decides whether gradients need an fp32 accumulator.
    return [{"params": groups[key], "weight_decay": key[1]} for key in sorted(groups)]


def base_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The AdamW inside the engine, whatever ZeRO has wrapped around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def set_learning_rate(engine: deepspeed.DeepSpeedEngine, rate: float) -> None:
    """Set the rate of the coming step in every group."""
    for group in base_optimizer(engine).param_groups:
        group["lr"] = rate


def gradient_norm(engine: deepspeed.DeepSpeedEngine) -> float:
    """Norm of the whole gradient before clipping: of the last step under ZeRO, of the coming one at ZeRO 0."""
    if engine.zero_optimization():
        return float(engine.get_global_grad_norm())
    return float(torch.nn.utils.get_total_norm(p.grad for p in engine.module.parameters() if p.grad is not None))


def state_pieces(engine: deepspeed.DeepSpeedEngine) -> list[Piece]:
    """What this rank owns of the logical state: fp32 weights, both moments of AdamW, balancing biases.

    Each piece is a box of a logical tensor and a view of the engine's memory: saved from, or loaded into.
    """
    pieces = []
    for name, parameter in engine.module.named_parameters():
        shape = tuple(parameter.shape)
        for kind, start, flat in _owned_ranges(engine, parameter):
            for offsets, sizes, first in boxes_of_flat_range(shape, start, start + flat.numel()):
                box = flat.narrow(0, first - start, sizes.numel()).view(sizes)
                pieces.append(Piece(f"{kind}/{name}", shape, offsets, box))
    for name, buffer in engine.module.named_buffers():
        pieces.append(Piece(f"weights/{name}", tuple(buffer.shape), (0,) * buffer.ndim, buffer))
    return pieces


def finish_loading(engine: deepspeed.DeepSpeedEngine, optimizer_steps: int) -> None:
    """After the pieces were filled: AdamW's step count, and the running weights from the fp32 masters."""
    for state in base_optimizer(engine).state.values():
        state["step"].fill_(optimizer_steps)
    if engine.zero_optimization():
        engine.optimizer.update_lp_params()


def _owned_ranges(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter) -> Iterator[tuple[str, int, Tensor]]:
    """(kind, first element in the flat parameter, flat view of the memory) of all that this rank owns of it."""
    state = base_optimizer(engine).state
    if not engine.zero_optimization():
        yield "weights", 0, parameter.data.view(-1)
        for kind, key in MOMENTS.items():
            yield kind, 0, state[parameter][key].view(-1)
        return
    owned = parameter._hp_mapping  # type: ignore[attr-defined]
    if owned is None:
        return
    start, master = owned.lp_fragment_address.start, owned.hp_fragment_address
    partition = engine.optimizer.single_partition_of_fp32_groups[owned.param_group_index]
    yield "weights", start, partition.data.narrow(0, master.start, master.numel)
    for kind, key in MOMENTS.items():
        yield kind, start, state[partition][key].narrow(0, master.start, master.numel)


def _materialize_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make AdamW's state now, as its first step would: a checkpoint is loaded into it before any step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
