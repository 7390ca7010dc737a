"""What a step minimises: cross entropy by the number of targets, and the routers' losses over all ranks."""

from dataclasses import dataclass, fields

import torch
import torch.distributed.nn.functional as differentiable
from torch import Tensor

from moe_mamba.config import MoEConfig
from moe_mamba.model.loss import cross_entropy_sum
from moe_mamba.model.routing import RouterStatistics, balance_loss, z_loss


@dataclass
class StepSums:
    """Sums over the micro-steps of one optimizer step, on the device; no value leaves it before the step's end."""

    cross_entropy: Tensor
    balance: Tensor
    z: Tensor
    statistics: list[RouterStatistics]


class Objective:
    """The loss of a micro-step, and the sums that the step's metrics are made of.

    Args:
        config: weights of the routers' losses.
        targets: number of targets in the global batch.
        shares: micro-steps x ranks; the engine divides by both, and a sum by targets must not be divided.
        world_size: ranks to take the routers' statistics over.
    """

    def __init__(self, config: MoEConfig, targets: int, shares: int, world_size: int) -> None:
        self._config = config
        self._scale = shares / targets
        self._world_size = world_size
        self.sums: StepSums | None = None

    def __call__(self, logits: Tensor, targets: Tensor, statistics: list[RouterStatistics]) -> Tensor:
        """Loss to give to the engine's backward.

        Args:
            logits: (batch, length, vocab) of the micro-batch.
            targets: (batch, length) token ids, -100 where nothing is counted.
            statistics: of each MoE layer, on this rank.
        """
        cross_entropy, _ = cross_entropy_sum(logits, targets)
        statistics = over_all_ranks(statistics) if self._world_size > 1 and statistics else statistics
        balance = _mean([balance_loss(layer) for layer in statistics], like=cross_entropy)
        z = _mean([z_loss(layer) for layer in statistics], like=cross_entropy)
        self._add(cross_entropy, balance, z, statistics)
        loss = cross_entropy * self._scale
        if self._config.balance == "loss":
            loss = loss + self._config.balance_weight * balance
        return loss + self._config.z_loss_weight * z

    def _add(self, cross_entropy: Tensor, balance: Tensor, z: Tensor, statistics: list[RouterStatistics]) -> None:
        statistics = [_combine(layer) for layer in statistics]
        if self.sums is None:
            self.sums = StepSums(cross_entropy.detach(), balance.detach(), z.detach(), statistics)
            return
        self.sums.cross_entropy += cross_entropy.detach()
        self.sums.balance += balance.detach()
        self.sums.z += z.detach()
        self.sums.statistics = [
            _combine(mine, other) for mine, other in zip(self.sums.statistics, statistics, strict=True)
        ]


def over_all_ranks(statistics: list[RouterStatistics]) -> list[RouterStatistics]:
    """Sum every layer's statistics over all ranks, in one collective, with gradients.

    Each rank's loss then depends on every rank's router alike; the engine's mean over ranks gives the gradient of
    the loss of the whole micro-step.
    """
    names = [field.name for field in fields(RouterStatistics)]
    parts = [getattr(layer, name).reshape(-1) for layer in statistics for name in names]
    summed = differentiable.all_reduce(torch.cat(parts)).split([part.numel() for part in parts])
    shaped = iter(summed)
    return [
        RouterStatistics(**{name: next(shaped).view_as(getattr(layer, name)) for name in names}) for layer in statistics
    ]


def _combine(*layers: RouterStatistics) -> RouterStatistics:
    """The detached sum of statistics of the same layer."""
    return RouterStatistics(
        **{
            field.name: torch.stack([getattr(layer, field.name).detach() for layer in layers]).sum(0)
            for field in fields(RouterStatistics)
        }
    )


def _mean(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros_like(like)
