"""The optimizer: what it steps in groups, how it is made, and the state that checkpoints hold of it."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from moe_mamba.config import Config, TrainConfig
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel import zero3


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of torch's, as engine and checkpoints know it.

    A fused one: its kernel takes from the device a divisor of the gradient (clipping), and a flag to do nothing.

    Attributes:
        build: makes it of parameter groups and the configuration.
        state: kind of a logical tensor in a checkpoint (``moment1``) -> its key in the state of a parameter, as
            large as the parameter; beside these the state has a ``step``.
    """

    build: Callable[[list[dict[str, Any]], TrainConfig], torch.optim.Optimizer]
    state: Mapping[str, str]

    def initial_state(self, weights: Tensor) -> dict[str, Tensor]:
        """The state of ``weights`` before the first step."""
        moments = {key: torch.zeros_like(weights, requires_grad=False) for key in self.state.values()}
        return {"step": torch.zeros((), device=weights.device), **moments}


class AdamW(torch.optim.AdamW):
    """torch's, without its wrappers for torch.compile, which nobody lets see an optimizer here.

    Their first call imports the compiler, which would take a quarter of a command's start.
    """

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)


def _adamw(groups: list[dict[str, Any]], train: TrainConfig) -> torch.optim.Optimizer:
    betas = (train.beta1, train.beta2)
    return AdamW(groups, lr=train.learning_rate, betas=betas, eps=train.epsilon, fused=True)


OPTIMIZER = Optimizer(_adamw, {"moment1": "exp_avg", "moment2": "exp_avg_sq"})


def parameter_groups(model: LanguageModel, config: Config) -> list[dict[str, Any]]:
    """The optimizer's groups: one for each dtype (ZeRO cannot mix them) with and without decay, bf16 first.

    Weight decay is for matrices; norms, biases, D and A_log have none, unless `train.decay_all`.
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    not_decayed = model.not_decayed()
    for name, parameter in model.named_parameters():
        is_matrix = len(zero3.gathered_shape(parameter)) >= 2 and name not in not_decayed
        decay = config.train.weight_decay if is_matrix or config.train.decay_all else 0.0
        groups[parameter.dtype == torch.float32, decay].append(parameter)
    # The first group's dtype is the one by which ZeRO decides whether gradients need an fp32 accumulator.
    ordered = [{"params": groups[key], "weight_decay": key[1], "name": f"{key}"} for key in sorted(groups)]
    split = split_params_into_different_moe_groups_for_optimizer(ordered)
    return [group for group in split if group["params"]]
