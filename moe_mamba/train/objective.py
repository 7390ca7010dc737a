"""What a step minimises: cross entropy by the number of targets, and the routers' losses over all ranks."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_mamba.config import MoEConfig
from moe_mamba.model.mixers.base import Statistics
from moe_mamba.model.mixers.routing import RouterStatistics, balance_loss, z_loss
from moe_mamba.parallel.topology import Topology


@dataclass
class StepSums:
    """Sums over the micro-steps of one optimizer step, on the device; no value leaves it before the step's end."""

    cross_entropy: Tensor
    balance: Tensor
    z: Tensor
    statistics: Statistics


class Objective:
    """The loss of a micro-step, and the sums that the step's metrics are made of.

    Args:
        config: weights of the routers' losses.
        targets: number of targets in the global batch, at least 1; a tensor () float64 where no host has read it.
        micro_steps: of the step; the engine divides by them and by the data ranks, and a sum by targets must not be.
        topology: the ranks to take the routers' statistics over.
        balanced: names of the routers that have a balance loss.
    """

    def __init__(
        self,
        config: MoEConfig,
        targets: int | Tensor,
        micro_steps: int,
        topology: Topology,
        balanced: Collection[str],
    ) -> None:
        self._config = config
        self._balanced = frozenset(balanced)
        self._scale = torch.as_tensor(micro_steps * topology.data / targets, dtype=torch.float64)
        self._topology = topology
        self.sums: StepSums | None = None

    def __call__(self, cross_entropy: Tensor, statistics: Statistics) -> Tensor:
        """Loss to give to the engine's backward.

        Args:
            cross_entropy: the model's, summed over the targets of the micro-batch, ().
            statistics: of each router, on this rank.
        """
        shared = over_all_ranks(statistics, self._topology)
        balance, z = _losses_of_each(shared)
        self._add(cross_entropy, _mean(balance.values(), cross_entropy), _mean(z.values(), cross_entropy), shared)
        share = 1.0
        if self._config.balance_over == "device":
            # Tensor-parallel ranks' gradients of the router are summed, and each has a loss of its own here.
            balance, z = _losses_of_each(statistics)
            share = 1.0 / self._topology.tensor
        loss = cross_entropy * self._scale.to(cross_entropy)
        if balanced := [balance[name] for name in balance if name in self._balanced]:
            loss = loss + self._config.balance_weight * (_mean(balanced, cross_entropy) * share)
        return loss + self._config.z_loss_weight * (_mean(z.values(), cross_entropy) * share)

    def _add(self, cross_entropy: Tensor, balance: Tensor, z: Tensor, statistics: Statistics) -> None:
        statistics = {name: _combine(router) for name, router in statistics.items()}
        if self.sums is None:
            self.sums = StepSums(cross_entropy.detach(), balance.detach(), z.detach(), statistics)
            return
        self.sums.cross_entropy += cross_entropy.detach()
        self.sums.balance += balance.detach()
        self.sums.z += z.detach()
        self.sums.statistics = {name: _combine(mine, statistics[name]) for name, mine in self.sums.statistics.items()}


def over_all_ranks(statistics: Statistics, topology: Topology) -> Statistics:
    """Sum every router's statistics over all ranks, in one collective, with gradients."""
    if topology.world.size == 1 or not statistics:
        return statistics
    names = [field.name for field in fields(RouterStatistics)]
    parts = [getattr(router, name).reshape(-1) for router in statistics.values() for name in names]
    summed = _SumOverRanks.apply(torch.cat(parts), topology.data).split([part.numel() for part in parts])
    shaped = iter(summed)
    return {
        router: RouterStatistics(**{name: next(shaped).view_as(getattr(measured, name)) for name in names})
        for router, measured in statistics.items()
    }


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, of which every rank then computes the same loss.

    The engine takes the mean of gradients over data ranks, while this one loss is of all of them: so its gradient is
    taken that many times. Nothing travels in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, data_ranks: int) -> Tensor:
        ctx.data_ranks = data_ranks
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.data_ranks, None


def _combine(*parts: RouterStatistics) -> RouterStatistics:
    """The detached sum of statistics of the same router."""
    return RouterStatistics(
        **{
            field.name: torch.stack([getattr(part, field.name).detach() for part in parts]).sum(0)
            for field in fields(RouterStatistics)
        }
    )


def _losses_of_each(statistics: Statistics) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The balance loss and the z-loss of each router."""
    balance, z = ({name: loss(one) for name, one in statistics.items()} for loss in (balance_loss, z_loss))
    return balance, z


def _mean(values: Collection[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(values)).mean() if values else torch.zeros_like(like)
