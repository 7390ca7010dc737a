"""How much one labelling of tokens says about another, in bits, and how much of that chance alone makes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
Measured = Callable[[Numbers, Numbers], float]


@dataclass(frozen=True)
class Measure:
    """A figure of two labellings, and the same where one of them is shuffled.

    A finite sample gives independent labellings information, too: about (a - 1) x (b - 1) / (2 n ln 2) bits for a and b
    labels and n tokens. What counts is the part above the shuffled figure. That part is rather too small: where labels
    depend on one another, fewer pairs occur, and chance adds less than it does to shuffled ones.

    Attributes:
        value: the figure.
        shuffled: its mean over shuffles.
        spread: its standard deviation over shuffles.
    """

    value: float
    shuffled: float
    spread: float

    @property
    def beyond(self) -> float:
        """What is above chance."""
        return self.value - self.shuffled


def entropy(labels: Numbers) -> float:
    """Entropy of the labels' frequencies, bits."""
    return _entropy(np.unique(labels, return_counts=True)[1])


def mutual_information(one: Numbers, other: Numbers) -> float:
    """Bits that a label of ``one`` says about the same token's in ``other``, both (tokens,) from 0."""
    joint = one.astype(np.int64) * (int(other.max(initial=0)) + 1) + other
    return max(0.0, entropy(one) + entropy(other) - entropy(joint))


def normalised_information(one: Numbers, other: Numbers) -> float:
    """Mutual information by the mean of both entropies: 1 where each labelling tells the other, NaN without any."""
    both = entropy(one) + entropy(other)
    return 2 * mutual_information(one, other) / both if both else math.nan


def against_chance(
    measured: Measured, one: Numbers, other: Numbers, shuffles: int, groups: Numbers | None = None
) -> Measure:
    """A figure of two labellings (tokens,), and the same after each of ``shuffles`` (two or more) of the first.

    With ``groups`` (tokens,), labels are shuffled only among tokens of the same group: that keeps what the group says.
    """
    generator = np.random.default_rng(0)
    if groups is None:
        groups = np.zeros_like(one)
    place, chance = np.argsort(groups, kind="stable"), []
    for _ in range(shuffles):
        shuffled = np.empty_like(one)
        shuffled[place] = one[np.lexsort((generator.random(len(one)), groups))]
        chance.append(measured(shuffled, other))
    return Measure(measured(one, other), float(np.mean(chance)), float(np.std(chance, ddof=1)))


def beyond_chance(counts: NDArray[np.int64], error: float = 0.01) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Which cells of a table (experts, words) of counts are larger than independence gives.

    A cell counts where Chernoff's bound says that so large a count has a chance below ``error`` by the number of cells:
    with independent rows and columns one table in a hundred has such a cell.

    Returns:
        Lift, the count by what independence gives, (experts, words), 0 in empty cells; and whether it is beyond chance.
    """
    total = counts.sum()
    expected = counts.sum(1, keepdims=True) * (counts.sum(0, keepdims=True) / max(1, total))
    lift = np.divide(counts, expected, out=np.zeros(counts.shape), where=counts > 0)
    rarity = np.zeros(counts.shape)
    np.log(lift, out=rarity, where=counts > 0)
    rarity = counts * rarity - counts + expected  # chance of such a count or a larger one: below e to minus this
    cells = int(np.count_nonzero(expected))
    return lift, (lift > 1) & (rarity >= math.log(max(1, cells) / error))


def _entropy(counts: Numbers) -> float:
    share = counts / max(1, counts.sum())
    return float(-(share * np.log2(share)).sum()) + 0.0
