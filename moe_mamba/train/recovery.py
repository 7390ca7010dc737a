"""Batches that spoil a step: what is a NaN or a spike, and which batches a run leaves out.

Batches are numbered from 1 in the order of the data: batch n is the one that step n takes where none is left out. A run
only ever moves forward through them: a batch that is left out, or that was trained on in steps which a rewind takes
back, never comes again, and the next step takes the next one. So a step is always an update of the weights, a run makes
as many as it was asked for, and which batches made them is the list of those that are left out. All of it is decided
from values that are the same on every rank, and is kept in the checkpoints' descriptions.
"""

import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from moe_mamba.config import TrainConfig

# The least deviation that counts as usual, as a share of the median: a flat curve has none at all.
LEAST_DEVIATION = 0.01
Action = Literal["log", "stop", "skip", "rewind"]


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step: its loss or gradient is not finite, or far above the last ones."""

    kind: Literal["nan", "spike"]
    text: str


class Spikes:
    """A robust rule: a value is a spike where it lies far above the median of those before it.

    Far is `threshold` x MAD, the median of the absolute deviations from the median, which a few spikes among the values
    do not move (Hampel 1974), and which a normal distribution's standard deviation is 1.48 times of. Nothing is a spike
    until half of the window is filled.

    Args:
        window: how many values are looked back on.
        threshold: in MADs.
        recent: (loss, gradient norm) of the last steps.
    """

    def __init__(self, window: int, threshold: float, recent: Iterable[tuple[float, float]] = ()) -> None:
        self.threshold = threshold
        self.recent = deque(((loss, norm) for loss, norm in recent), maxlen=window)

    def find(self, loss: float, norm: float) -> Fault | None:
        """The spike that a step's loss (nats/token) or gradient norm is, or None."""
        if 2 * len(self.recent) < (self.recent.maxlen or 0):
            return None
        losses, norms = zip(*self.recent, strict=True)
        for name, value, before in (("loss", loss, losses), ("gradient's norm", norm, norms)):
            if value > (limit := self._limit(before)):
                return Fault("spike", f"the {name} is {value:.4g}, above {limit:.4g} (median + {self.threshold:g} MAD)")
        return None

    def _limit(self, before: Collection[float]) -> float:
        middle = median(before)
        deviation = median(abs(value - middle) for value in before)
        return middle + self.threshold * max(deviation, LEAST_DEVIATION * abs(middle))


class Recovery:
    """Which batches a run has left out, and what it does where a step is spoilt.

    Args:
        config: the policies and the rule.
        done: steps made.
        description: of the checkpoint that the run goes on from; empty at a fresh start. One of an older version says
            nothing of this: its run has left out no batch.

    Attributes:
        position: number of the last batch that was trained on or left out.
        skipped: numbers of the batches that were left out, ascending.
        fault: of the last step that was judged; None where it was right.
        is_again: the last fault followed on another one, with the same weights.
        without_targets: steps that changed nothing, because their batch had no target to count.
    """

    def __init__(self, config: TrainConfig, done: int, description: dict[str, Any]) -> None:
        self.config = config
        self.told = frozenset(config.skip_batches)
        self.fault: Fault | None = None
        self.is_again, self._last_bad = False, -1
        self.load(done, description)

    def load(self, done: int, description: dict[str, Any]) -> None:
        """Go on as a checkpoint's description says."""
        known = description.get("recovery", {})
        self.position: int = known.get("position", done)
        self.skipped: list[int] = known.get("skipped_batches", [])
        self.without_targets: int = known.get("without_targets", 0)
        self._bad, self._furthest = known.get("bad", 0), known.get("furthest", 0)
        self._spikes = Spikes(self.config.spike_window, self.config.spike_threshold, known.get("recent", ()))
        self._is_in_spike = False

    def describe(self) -> dict[str, Any]:
        """What a checkpoint keeps of this, as JSON."""
        return {
            "position": self.position,
            "skipped_batches": self.skipped,
            "without_targets": self.without_targets,
            "bad": self._bad,
            "furthest": self._furthest,
            "recent": list(self._spikes.recent),
        }

    @property
    def too_late(self) -> list[int]:
        """Batches that `train.skip_batches` names, but that were trained on before."""
        return sorted(number for number in self.told if number <= self.position and number not in self.skipped)

    def after(self, number: int) -> int:
        """The number of the batch that is trained on after `number`."""
        number += 1
        while number in self.told:
            number += 1
        return number

    def numbers(self) -> Iterator[int]:
        """Of the batches that are trained on from here, if none is bad."""
        number = self.position
        while True:
            number = self.after(number)
            yield number

    def judge(self, loss: float, norm: float) -> bool:
        """Whether a step is to be made, from its loss and gradient norm over all ranks; see `fault`.

        One that is made is remembered. Spikes that are only logged are made.
        """
        self.fault = None
        if not math.isfinite(loss):
            self.fault = Fault("nan", f"the loss is {loss}")
        elif not math.isfinite(norm):
            self.fault = Fault("nan", f"the loss is {loss:.4f} but its gradient's norm is {norm}")
        else:
            self.fault = self._spikes.find(loss, norm)
        if not self.is_refused:
            self._spikes.recent.append((loss, norm))
        return not self.is_refused

    @property
    def is_refused(self) -> bool:
        """Whether the step that was judged is not made."""
        return self.fault is not None and self._policy(self.fault) != "log"

    def made(self, number: int) -> tuple[Fault | None, list[int]]:
        """Note that the step of batch `number` was made.

        Returns:
            The spike that begins with it, if one does, and the batches before it that `train.skip_batches` left out.
        """
        self._last_bad = -1
        begins = self.fault if not self._is_in_spike else None
        self._is_in_spike = self.fault is not None
        return begins, self._pass(number, number - 1)

    def passed(self, number: int) -> list[int]:
        """Note that batch `number` had no target to count; the batches before it that `train.skip_batches` left out."""
        self.without_targets += 1
        return self._pass(number, number - 1)

    def action(self, step: int) -> Action:
        """What to do about `fault`, after `step` steps: the policy, or stop where it does not help.

        Bad batches are counted until the run is a window's length past the furthest of them: that many steps cannot be
        taken for ever, so that a run that only ever skips, or rewinds, comes to its end.
        """
        assert self.fault is not None
        self.is_again = step == self._last_bad
        self._last_bad = step
        if step >= self._furthest + self.config.spike_window:
            self._bad = 0
        self._bad, self._furthest = self._bad + 1, max(self._furthest, step)
        return "stop" if self._bad > self.config.skip_limit else self._policy(self.fault)

    @property
    def is_exhausted(self) -> bool:
        """Whether more bad batches came than `train.skip_limit` lets a run leave out."""
        return self._bad > self.config.skip_limit

    def leave_out(self, number: int) -> list[int]:
        """Leave out every batch after `position` up to `number`; their numbers."""
        return self._pass(number, number)

    def rewind(self, number: int, step: int, description: dict[str, Any]) -> list[int]:
        """Go on as a checkpoint of `step` says, but after batch `number`; the batches that this leaves out."""
        bad, furthest = self._bad, self._furthest
        self.load(step, description)
        self._bad, self._furthest = bad, furthest
        return self.leave_out(number)

    def _policy(self, fault: Fault) -> Action:
        return self.config.on_nan if fault.kind == "nan" else self.config.on_spike

    def _pass(self, number: int, last_skipped: int) -> list[int]:
        """Move to `number`; what lies between, up to `last_skipped`, is left out."""
        skipped = list(range(self.position + 1, last_skipped + 1))
        self.skipped = self.skipped + skipped
        self.position = number
        return skipped
