"""Steps of the optimizer that the device is given without waiting for it, and that are read one step late.

While the device works on a step, the host orders the next one. What a step came to, its loss, its gradient's norm, and
what the ranks tell each other, is one small vector, summed over all ranks by one collective. Two things make reading it
late as good as reading it at once. A step whose loss or norm is not finite changes nothing: the device itself decides
that, between the norm and AdamW. And no step after it changes anything either, until the host has seen it (`forget`),
so that there is nothing to take back.
"""

from collections.abc import Callable
from dataclasses import dataclass

import deepspeed
import torch
from torch import Tensor

from moe_mamba.faults.signals import REASONS, Stop
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.routing import update_balance_bias
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.distributed import reduce_over_data
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.train.feed import GlobalBatch
from moe_mamba.train.objective import Objective, StepSums
from moe_mamba.train.pace import Pace
from moe_mamba.train.reading import Moment, Reading, to_device
from moe_mamba.train.routing_metrics import RoutingMetrics

Judge = Callable[[float, float], bool]


@dataclass(frozen=True)
class Outcome:
    """What a step came to, the same on all ranks.

    Attributes:
        loss: in nats/token; NaN where the batch had no target.
        norm: of the gradient, before clipping.
        targets: that were counted.
        reason: why to stop after it, if any rank is asked to.
        pace: figures of all ranks' pace, if there were any.
        routing: figures of the routers, if they were measured.
        seconds: that the step took.
    """

    loss: float
    norm: float
    targets: int
    reason: str | None
    pace: list[float]
    routing: list[float]
    seconds: float


@dataclass(frozen=True)
class Step:
    """A step that the device was given.

    Attributes:
        number: of the step, from 1.
        batch: what it is made from, on the device.
        rate: of learning.
    """

    number: int
    batch: GlobalBatch
    rate: float
    _reading: Reading
    _since: Moment
    _pace: int

    def read(self) -> Outcome:
        """What it came to; waits until the device is done with it."""
        norm, loss, targets, *rest = self._reading.values()
        stops, pace, routing = _split(rest, [len(REASONS), self._pace])
        count = round(targets)
        return Outcome(
            loss / count if count else float("nan"),
            norm,
            count,
            _reason(stops),
            pace,
            routing,
            self._reading.moment.seconds_since(self._since),
        )


def _split(values: list[float], sizes: list[int]) -> list[list[float]]:
    parts = []
    for size in sizes:
        parts.append(values[:size])
        values = values[size:]
    return [*parts, values]


def _reason(stops: list[float]) -> str | None:
    return next((reason for reason, share in zip(REASONS, stops, strict=True) if share), None)


class Steps:
    """Makes the steps of a run.

    Args:
        engine: around the model.
        plan: of the run.
        micro_steps: of a step.
        stop: whether this rank is asked to stop.
        pace: measures the steps.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, plan: RunPlan, micro_steps: int, stop: Stop, pace: Pace
    ) -> None:
        self.engine = engine
        self.config, self.topology = plan.config, plan.topology
        self.micro_steps = micro_steps
        self.stop, self.pace = stop, pace
        self.device = plan.topology.world.device
        model: LanguageModel = engine.module
        self._routers, self._balanced = model.routers(), model.balanced_routers()
        self.routing = RoutingMetrics(self._routers, micro_steps)
        self._bias_rate = torch.tensor(self.config.moe.bias_rate, device=self.device)
        self._targets: Tensor  # of the coming step's batch, over all ranks
        self.forget()

    def forget(self) -> None:
        """Go on after a step that was refused: the host has seen it."""
        self._is_bad = torch.zeros((), device=self.device)
        self.pace.forget()
        self.pause()

    def pause(self) -> None:
        """Go on after the host did something else: it is not counted as the coming step's time."""
        self._previous: Moment | None = None

    def asked(self) -> str | None:
        """Why to stop, if any rank is asked to; the same on all ranks. Waits for them."""
        stops = reduce_over_data(to_device(self.stop.asked, self.device), self.topology)
        return _reason(stops.tolist())

    def begin(self, batch: GlobalBatch) -> str | None:
        """As `asked`, before a step that follows on none: its `batch` is told to all ranks."""
        shared = reduce_over_data(to_device([batch.counted, *self.stop.asked], self.device), self.topology)
        self._targets = shared[0].round()
        return _reason(shared[1:].tolist())

    def make(
        self, number: int, batch: GlobalBatch, following: GlobalBatch, rate: float, judge: Judge | None = None
    ) -> Step:
        """Give the device a step.

        Args:
            number: of the step.
            batch: to make it from, which `begin` or the step before was told of.
            following: what the step after it is to be made from.
            rate: of learning.
            judge: of loss and norm, whether the step may be made; where it is given, the step is read before its
                update. A batch without targets and a step that is not finite change nothing in any case.
        """
        since = self._previous or Moment(self.device)
        targets, batch = self._targets, batch.to(self.device)
        pace = self.pace.row(number)
        engines.set_learning_rate(self.engine, rate)
        with self.pace.measured(number, self._previous):
            sums = self._gradient(batch, targets)
            own = to_device([following.counted, *self.stop.asked, *pace], self.device)
            own = torch.cat([sums.cross_entropy.double()[None], own])
            refusal = _Refusal(self._is_bad, targets, self.topology.tensor, judge)
            shared = engines.step(self.engine, self.config.train.gradient_clip, own, refusal)
            self._update_balance_biases(sums, refusal.refused)
        self._is_bad = refusal.is_bad
        shared[1:] /= self.topology.tensor
        self._targets = shared[2].round()
        numbers = [shared[:2], targets[None], shared[3:]]
        if number % self.config.logging.every == 0 or number == self.config.steps:
            numbers.append(self.routing.measure(sums))
        reading = Reading(torch.cat(numbers))
        self._previous = reading.moment
        return Step(number, batch, rate, reading, since, len(pace))

    def _gradient(self, batch: GlobalBatch, targets: Tensor) -> StepSums:
        """Forward and backward of all micro-steps; their sums."""
        objective = Objective(self.config.moe, targets.clamp(min=1), self.micro_steps, self.topology, self._balanced)
        for number, part in enumerate(batch.parts, 1):
            output = self.engine(part.tokens, part.document_starts, targets=part.targets)
            self.engine.backward(objective(output.cross_entropy, output.statistics))
            if number < self.micro_steps:
                self.engine.step()
        assert objective.sums is not None
        return objective.sums

    def _update_balance_biases(self, sums: StepSums, refused: Tensor) -> None:
        rate = self._bias_rate * (1 - refused)
        for name, router in self._routers.items():
            if router.config.balance == "bias":
                # Ranks that count the same tokens answer for shares, whose sum may be a rounding away from a number.
                update_balance_bias(router, sums.statistics[name].assigned.round(), rate)


class _Refusal:
    """Decides, between norm and AdamW, whether a step changes anything: on the device, unless a judge is asked.

    Args:
        is_bad: () 1 where a step before this one was not finite, and nobody has seen it.
        targets: () of the batch.
        tensor: tensor-parallel ranks, which have the same loss.
        judge: as in `Steps.make`.

    Attributes:
        is_bad: the same after this step.
        refused: () 1 where this step changes nothing.
    """

    def __init__(self, is_bad: Tensor, targets: Tensor, tensor: int, judge: Judge | None) -> None:
        self.is_bad = self.refused = is_bad
        self._targets, self._tensor, self._judge = targets, tensor, judge

    def __call__(self, shared: Tensor) -> Tensor:
        """Decide by [norm, loss, ...], sums over all ranks."""
        if self._judge is not None:
            norm, loss, targets = torch.cat([shared[:2], self._targets[None]]).tolist()
            is_refused = not targets or not self._judge(loss / self._tensor / targets, norm)
            self.refused = to_device([is_refused], shared.device)[0].float()
            return self.refused
        is_empty = self._targets == 0
        is_finite = shared[:2].isfinite().all()
        self.is_bad = torch.maximum(self.is_bad, (~is_finite & ~is_empty).float())
        self.refused = torch.maximum(self.is_bad, is_empty.float())
        return self.refused
