"""What the routers did in a step: measured on the device, put into words on the host once the step is read."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_mamba.model.mixers.routing import Router
from moe_mamba.run.metrics import router_label
from moe_mamba.train.objective import StepSums


class RoutingMetrics:
    """The routers' losses, the dropped share, each router's load and entropy.

    Dropped is a share of the assignments; where experts choose, of the tokens, those that none took.

    Args:
        routers: of the model, by name.
        micro_steps: of a step.
    """

    def __init__(self, routers: Mapping[str, Router], micro_steps: int) -> None:
        self._routers = routers
        self._micro_steps = micro_steps

    def measure(self, sums: StepSums) -> Tensor:
        """The figures of a step, on its device: (2 + routers x (2 + experts),) float64; without routers none."""
        found = [sums.statistics[name] for name in self._routers]
        if not found:
            return sums.balance.new_zeros(0, dtype=torch.float64)
        totals = [
            one.tokens if router.config.router == "expert_choice" else one.assigned.sum()
            for one, router in zip(found, self._routers.values(), strict=True)
        ]
        losses = torch.stack([sums.balance, sums.z]).double() / self._micro_steps
        dropped = torch.stack([one.dropped / total for one, total in zip(found, totals, strict=True)])
        entropy = torch.stack([one.entropy / one.tokens for one in found])
        load = [one.assigned / one.assigned.sum() for one in found]
        return torch.cat([losses, dropped.double(), entropy.double(), torch.cat(load).double()])

    def describe(self, figures: Sequence[float]) -> dict[str, Any]:
        """What `measure` gave, as metrics."""
        if not figures:
            return {}
        names = [router_label(name) for name in self._routers]
        balance, z, *rest = figures
        dropped, entropy, load = rest[: len(names)], rest[len(names) : 2 * len(names)], iter(rest[2 * len(names) :])
        return {
            "balance_loss": balance,
            "z_loss": z,
            "dropped": sum(dropped) / len(dropped),
            "expert_load": {
                name: [round(next(load), 5) for _ in range(router.config.experts)]
                for name, router in zip(names, self._routers.values(), strict=True)
            },
            "moe": {
                "dropped": dict(zip(names, dropped, strict=True)),
                "router_entropy": dict(zip(names, entropy, strict=True)),
            },
        }
