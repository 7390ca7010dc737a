"""Statistics of a table: means over seeds, paired differences with Student's t, steps to a loss. Only numpy."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Mean(NamedTuple):
    """A mean over seeds; its standard error is None of fewer than two."""

    value: float
    error: float | None
    seeds: int


class Difference(NamedTuple):
    """A mean of paired differences and its 95 % interval by Student's t; None of fewer than two."""

    value: float
    low: float | None
    high: float | None
    seeds: int


def mean(values: Sequence[float]) -> Mean | None:
    """Mean and standard error (the deviation with n - 1, by the root of n); None of nothing."""
    if not values:
        return None
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return Mean(float(np.mean(values)), error, len(values))


def paired(values: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Differences of the seeds that both have: seed -> loss."""
    found = mean([values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())])
    if found is None:
        return None
    if found.error is None:
        return Difference(found.value, None, None, found.seeds)
    reach = t_quantile(found.seeds - 1) * found.error
    return Difference(found.value, found.value - reach, found.value + reach, found.seeds)


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t of which ``confidence`` of Student's distribution lies between -t and t."""
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def t_probability(t: float, freedom: int) -> float:
    """Probability between -t and t, of a whole number of degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term = cosine if is_odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + is_odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


def share_of_steps(curve: Sequence[tuple[int, float]], target: float, steps: int) -> float | None:
    """When a loss is first reached, as a share of ``steps``; straight lines join the points of the curve.

    Args:
        curve: (step, loss), in order.
        target: the reference's loss at its end.
        steps: of the reference.

    Returns:
        The share; None: never reached.
    """
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            if before is None:
                return step / steps
            part = (before[1] - target) / (before[1] - loss)
            return (before[0] + part * (step - before[0])) / steps
        before = step, loss
    return None


def crossing(points: Sequence[tuple[float, float]]) -> float | None:
    """Where a difference to the reference first falls to zero, by straight lines over the logarithm of ``at``.

    Args:
        points: (at, difference), by ``at``.
    """
    for (left, above), (right, below) in pairwise(points):
        if above > 0 >= below:
            return left * (right / left) ** (above / (above - below))
    return None
