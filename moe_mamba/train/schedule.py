"""The learning rate as a pure function of the step, also where a run goes on with another budget."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from moe_mamba.config import Config, TrainConfig
from moe_mamba.config_file import parse_config

SHAPE = ("learning_rate", "schedule", "warmup", "decay", "minimum_rate")  # keys that the curve hangs on, and the budget


@dataclass(frozen=True)
class Stretch:
    """A warm-up and a decay, for the steps after `begin`.

    Attributes:
        begin: steps made before it; 0 for a run whose budget has never changed.
        start: the rate at `begin`, as a share of the peak.
        warm_end: the step at which the peak is reached; `begin`: there is no warm-up, and `start` is the highest.
        end: the last step.
    """

    begin: int
    start: float
    warm_end: int
    end: int

    @classmethod
    def planned(cls, config: Config) -> "Stretch":
        """As `config` plans a run from its first step."""
        return cls(0, 0.0, max(1, round(config.train.warmup * config.steps)), config.steps)

    def rate(self, step: int, config: TrainConfig) -> float:
        """Rate of optimizer step `step`, counted from 1.

        Linear warm-up; then a cosine to `minimum_rate` x peak (arXiv 2401.04081, Appendix), or the peak until the last
        `decay` x steps and a straight line to the same end (warm-up, stable, decay).
        """
        if step <= self.warm_end:
            risen = (self.start * (self.warm_end - step) + (step - self.begin)) / (self.warm_end - self.begin)
            return config.learning_rate * risen
        top, last = self._ends(config)
        if config.schedule == "cosine":
            share = 0.5 * (1 + math.cos(math.pi * (step - self.warm_end) / max(1, self.end - self.warm_end)))
        else:
            decay = self.decay_steps(config)
            share = min(1.0, (self.end - step) / decay) if decay else 1.0
        return config.learning_rate * (last + (top - last) * share)

    def decay_steps(self, config: TrainConfig) -> int:
        """For the schedule wsd: steps in which the rate falls; 0: it is constant to the end."""
        return min(max(1, round(config.decay * self.end)), self.end - self.warm_end) if config.decay else 0

    def _ends(self, config: TrainConfig) -> tuple[float, float]:
        """Shares of the peak from which, and to which, the rate falls."""
        top = 1.0 if self.warm_end > self.begin else self.start
        return top, min(config.minimum_rate, top)

    def describe(self, config: TrainConfig) -> str:
        """The curve in a line."""
        peak = config.learning_rate
        top, last = (share * peak for share in self._ends(config))
        line = f"{_short(self.start * peak)} at step {self.begin:,}, " if self.begin else ""
        if self.warm_end > self.begin:
            line += f"up to {_short(top)} at step {self.warm_end:,}, then "
        if top == last or (config.schedule == "wsd" and not config.decay):
            return f"{line}constant"
        if config.schedule == "cosine":
            return f"{line}a cosine to {_short(last)} at step {self.end:,}"
        return f"{line}constant, and over the last {self.decay_steps(config):,} steps a line to {_short(last)}"


@dataclass(frozen=True)
class RateCurve:
    """The learning rate of a whole run: a stretch, and one more for each time that its budget was changed.

    Attributes:
        config: of the run, as it is now.
        stretches: by the step that each begins after.
        note: what a resume has changed of the curve, in a line; empty: nothing.
    """

    config: Config
    stretches: tuple[Stretch, ...]
    note: str = ""

    def rate(self, step: int) -> float:
        """Rate of optimizer step `step`, counted from 1; before a seam (a rewind goes there), the rate of then."""
        stretch = next((one for one in reversed(self.stretches) if one.begin < step), self.stretches[0])
        return stretch.rate(step, self.config.train)

    def describe(self) -> str:
        """What lies ahead, in a line."""
        return self.stretches[-1].describe(self.config.train)

    def to_json(self) -> list[dict[str, Any]]:
        """For a checkpoint's description, which ``resumed`` reads."""
        return [dataclasses.asdict(stretch) for stretch in self.stretches]

    @classmethod
    def resumed(cls, config: Config, done: int, description: dict[str, Any]) -> "RateCurve":
        """The curve of a run that goes on after `done` steps from a checkpoint, or begins.

        Args:
            config: as it is asked for.
            done: steps that are made.
            description: of the checkpoint; empty for a run that begins.
        """
        planned = cls(config, (Stretch.planned(config),))
        if not description:
            return planned
        saved = parse_config(description["config"])
        told = tuple(Stretch(**values) for values in description.get("rates") or ())
        before = cls(saved, told or (Stretch.planned(saved),))
        if config.steps == saved.steps:
            same = cls(config, before.stretches if told else planned.stretches)
            return dataclasses.replace(same, note=_changed_shape(before, same, done))
        if config.train.on_longer_budget == "as_planned":
            curve = planned
        else:
            curve = cls(config, (*before.stretches, _next_stretch(before, config, done)))
        return dataclasses.replace(curve, note=_changed_budget(before, curve, planned, done))


def _next_stretch(before: RateCurve, config: Config, done: int) -> Stretch:
    """From the rate at `done` on, to the end of the new budget.

    It begins no higher than the last step's rate was, and no higher in the new curve than it was in the old one: a
    lower peak lowers it.
    """
    rate, peak = before.rate(done), config.train.learning_rate
    start = min(rate / before.config.train.learning_rate, rate / peak)
    warm_end = max(done, before.stretches[-1].warm_end)  # a warm-up that is under way goes on as it was
    if config.train.on_longer_budget == "rewarm" and config.steps > before.config.steps:
        warm_end = done + max(1, round(config.train.warmup * (config.steps - done)))
    return Stretch(done, start, warm_end, config.steps)


def _changed_shape(before: RateCurve, after: RateCurve, done: int) -> str:
    """What to say where the next step has another rate than it would have had, though the budget is the same."""
    was, now = before.rate(done + 1), after.rate(done + 1)
    if math.isclose(was, now, rel_tol=1e-9):
        return ""
    trains = before.config.train, after.config.train
    changed = [
        f"train.{key} was {old} and is now {new}"
        for key in SHAPE
        if (old := getattr(trains[0], key)) != (new := getattr(trains[1], key))
    ]
    return f"{', '.join(changed)}: the learning rate of step {done + 1:,} is {_short(now)} instead of {_short(was)}"


def _changed_budget(before: RateCurve, after: RateCurve, planned: RateCurve, done: int) -> str:
    """What to say where the budget has changed: the rate on both sides of the seam, and the other ways."""
    way = after.config.train.on_longer_budget
    line = (
        f"{before.config.steps:,} steps became {after.config.steps:,}: the learning rate goes from "
        f"{_short(before.rate(done))} at step {done:,} to {_short(after.rate(done + 1))} at step {done + 1:,} "
        f"(train.on_longer_budget={way}"
    )
    if way != "continue":
        return f"{line}; continue would not raise it)"
    return f"{line}; rewarm: up to the peak again; as_planned: {_short(planned.rate(done + 1))})"


def _short(rate: float) -> str:
    return f"{rate:.3g}"
