"""The order of the data, in closed form: no list of what was seen, no walk over the past.

A position of a run -> the corpus it is taken from and its position there (by weights) -> epoch and window of that
corpus (by a pseudo-random permutation of the epoch). Each step is a function of only its arguments, so a run
resumes at any position, and one that is made longer sees the same past.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

ROUNDS = 6  # of the Feistel network; four already look random, two more cost nothing here
WEIGHT_STEPS = 1 << 20  # weights are rounded to so many steps in all; positions stay below 2^63 / WEIGHT_STEPS
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio


def permute(index: np.ndarray, size: int, key: str) -> np.ndarray:
    """A pseudo-random permutation of ``range(size)``, chosen by ``key``, at ``index``.

    A Feistel network over the least even number of bits that holds ``size``; what falls past ``size`` is sent
    through again until it falls inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        index: (n,) int64 in [0, size).
        size: length of the permuted range.
        key: any text; another one gives another permutation.

    Returns:
        (n,) int64 in [0, size).
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    keys = np.frombuffer(hashlib.shake_256(key.encode()).digest(8 * ROUNDS), dtype="<u8")
    value = _feistel(index.astype(np.uint64), half, keys)
    while (outside := value >= size).any():
        value[outside] = _feistel(value[outside], half, keys)
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass over words of 2 x ``half`` bits: (left, right) -> (right, left xor mix(right, key)) each round."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for key in keys:
        mixed = (right ^ key) * MULTIPLIER
        mixed = (mixed ^ (mixed >> np.uint64(29))) * MULTIPLIER
        left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
    return (left << half) | right


def blend(positions: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Which corpus each position of a run takes, and which position of that corpus it is.

    The first corpus takes the positions at which ``floor(position x share)`` rises, which are as even as can be;
    the others share what is left in the same way. After n positions each has its share of n, to within one for each
    corpus before it.

    Args:
        positions: (n,) int64, from 0.
        weights: one a corpus, above 0; they need not sum to one.

    Returns:
        The corpus (n,) and the position within it (n,), int64.
    """
    total = sum(weights)
    steps = [max(1, round(weight / total * WEIGHT_STEPS)) for weight in weights]
    corpus = np.full(len(positions), len(weights) - 1, dtype=np.int64)
    within = positions.astype(np.int64)  # position among what the corpora before this one left
    open_ = np.ones(len(positions), dtype=bool)
    for number, step in enumerate(steps[:-1]):
        rest = sum(steps[number:])
        before, after = within * step // rest, (within + 1) * step // rest
        taken = open_ & (after > before)
        corpus[taken] = number
        within = np.where(taken, before, np.where(open_, within - before, within))
        open_ &= ~taken
    return corpus, within
