"""The optimizer: what it steps in groups, how it is made, and the state that checkpoints hold of it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from torch import Tensor

from moe_mamba.config import Config, TrainConfig
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel import zero3
from moe_mamba.parallel.grouping import Member, decay, group_members


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
    """The optimizer's groups, see ``grouping.py``; DeepSpeed knows those of experts by ``moe``, and a group's name."""
    parameters, not_decayed = dict(model.named_parameters()), model.not_decayed()
    members = []
    for name, parameter in parameters.items():
        shape = zero3.gathered_shape(parameter)
        is_decayed = len(shape) >= 2 and name not in not_decayed
        experts = parameter.group_name if is_moe_param(parameter) else None  # type: ignore[attr-defined]
        is_fp32 = parameter.dtype == torch.float32
        members.append(Member(name, shape.numel(), is_fp32, decay(config, is_decayed), experts))
    made = []
    for group in group_members(members):
        first = group[0]
        made.append(
            {
                "params": [parameters[member.name] for member in group],
                "weight_decay": first.decay,
                "name": first.experts or f"{first.is_fp32, first.decay}",
            }
            | ({"moe": True} if first.experts else {})
        )
    return made
