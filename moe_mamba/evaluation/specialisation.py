"""What experts specialise in: by token, by place in the document, and whether other seeds find the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from moe_mamba.evaluation.choices import Choices, Numbers, Text
from moe_mamba.evaluation.information import (
    Measure,
    against_chance,
    beyond_chance,
    entropy,
    mutual_information,
    normalised_information,
)

FEWEST = 8  # assignments an expert in a bucket of places, below which its loads say little


@dataclass(frozen=True)
class Word:
    """A token that an expert gets more often than chance.

    Attributes:
        id: of the token.
        text: decoded.
        count: assignments of it to this expert.
        share: of all its assignments.
        lift: count by what the expert's load alone would give.
    """

    id: int
    text: str
    count: int
    share: float
    lift: float


@dataclass(frozen=True)
class Expert:
    """What one expert gets.

    Attributes:
        number: its index.
        load: share of all assignments.
        special: share of its assignments that are of tokens beyond chance.
        words: of those, the ones with the largest lift.
        positions: load by place in the document, by the load as a whole, for each bucket; NaN: too few tokens are
            there, less than FEWEST an expert.
    """

    number: int
    load: float
    special: float
    words: list[Word]
    positions: list[float]


@dataclass(frozen=True)
class RouterFindings:
    """What one router's experts specialise in.

    Attributes:
        looks_ahead: experts choose tokens, among later ones, too.
        taken: share of the tokens that at least one expert took.
        entropy: of the expert of an assignment, bits.
        token: information of the expert about the token's identity, bits.
        position: the same about its place in the document, in buckets.
        experts: one by one.
    """

    looks_ahead: bool
    taken: float
    entropy: float
    token: Measure
    position: Measure
    experts: list[Expert]


@dataclass(frozen=True)
class Agreement:
    """Whether two runs divide the same tokens alike.

    Both figures are the normalised mutual information of the experts that took a token with the largest weight.

    Attributes:
        runs: their names.
        routers: label of the router -> against a shuffle over all tokens.
        equal_tokens: the same against a shuffle among tokens of the same id, which leaves what each router's liking for
            tokens explains.
    """

    runs: tuple[str, str]
    routers: dict[str, Measure]
    equal_tokens: dict[str, Measure]


def bucket(position: Numbers) -> Numbers:
    """Buckets of places in a document that double: 0; 1 and 2; 3 to 6; 7 to 14; ..."""
    return np.frexp(position + 1)[1].astype(np.int64) - 1


def bucket_starts(text: Text) -> list[int]:
    """The first place of each bucket that a text needs."""
    return [2**number - 1 for number in range(int(bucket(text.position).max()) + 1)]


def findings(
    text: Text, choices: Choices, decode: Callable[[int], str], shuffles: int = 10, words: int = 8
) -> RouterFindings:
    """What the experts of one router get.

    Args:
        text: what was read.
        choices: of the router.
        decode: the text of an id.
        shuffles: for the baselines.
        words: of each expert, at most.
    """
    seen, ids = np.unique(text.ids, return_inverse=True)
    ids, places = ids[choices.token], bucket(text.position)[choices.token]
    by_word = _table(choices.expert, ids, choices.experts, len(seen))
    by_place = _table(choices.expert, places, choices.experts, len(bucket_starts(text)))
    lift, special = beyond_chance(by_word)
    load = by_word.sum(1) / max(1, by_word.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        positions = by_place / by_place.sum(0) / load[:, None]
    positions[:, by_place.sum(0) < FEWEST * choices.experts] = np.nan
    experts = [
        Expert(
            number,
            float(load[number]),
            float(by_word[number, special[number]].sum() / max(1, by_word[number].sum())),
            _words(by_word, lift, special, number, seen, decode, words),
            positions[number].tolist(),
        )
        for number in range(choices.experts)
    ]
    return RouterFindings(
        choices.looks_ahead,
        float(np.mean(choices.first >= 0)),
        entropy(choices.expert),
        against_chance(mutual_information, choices.expert, ids, shuffles),
        against_chance(mutual_information, choices.expert, places, shuffles),
        experts,
    )


def _table(rows: Numbers, columns: Numbers, height: int, width: int) -> NDArray[np.int64]:
    """How often each pair occurs, (height, width)."""
    return np.bincount(rows * width + columns, minlength=height * width).reshape(height, width)


def _words(
    counts: NDArray[np.int64],
    lift: NDArray[np.float64],
    special: NDArray[np.bool_],
    expert: int,
    seen: Numbers,
    decode: Callable[[int], str],
    most: int,
) -> list[Word]:
    """The tokens of one expert that are beyond chance, by lift.

    For the order alone one assignment at chance is added on both sides, so that the rarest do not lead.
    """
    found = np.flatnonzero(special[expert])
    count = counts[expert, found]
    expected = count / lift[expert, found]
    order = found[np.lexsort((found, -(count + 1) / (expected + 1)))][:most]
    return [
        Word(
            int(seen[word]),
            decode(int(seen[word])),
            int(counts[expert, word]),
            float(counts[expert, word] / counts[:, word].sum()),
            float(lift[expert, word]),
        )
        for word in order
    ]


def agreements(ids: Numbers, runs: Mapping[str, Mapping[str, Choices]], shuffles: int = 10) -> list[Agreement]:
    """Of each pair of runs, whether routers of the same label divide the same tokens, ``ids`` (tokens,), alike.

    Tokens count that both took. Which expert has which number does not matter.
    """
    return [
        Agreement(
            (one, other),
            {label: _agreement(runs[one][label], runs[other][label], shuffles) for label in labels},
            {label: _agreement(runs[one][label], runs[other][label], shuffles, ids) for label in labels},
        )
        for one, other in combinations(runs, 2)
        if (labels := [label for label in runs[one] if label in runs[other]])
    ]


def _agreement(one: Choices, other: Choices, shuffles: int, groups: Numbers | None = None) -> Measure:
    both = (one.first >= 0) & (other.first >= 0)
    if groups is not None:
        groups = groups[both]
    return against_chance(normalised_information, one.first[both], other.first[both], shuffles, groups)
