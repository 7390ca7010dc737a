"""Batches that spoil a step: the loss of chosen ones is multiplied, by NaN or by much, on one rank."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from launch.train import train
from tests.train.seams import stepping_in


@contextmanager
def poisoned(
    factors: Mapping[int, float] | Callable[[int], float], rank: int = 0, stop_at: int | None = None
) -> Iterator[None]:
    """Where `rank` takes a batch, its cross entropy is multiplied by what `factors` says of its number.

    Args:
        factors: number of the batch -> factor; those that are left out are as they are.
        rank: whose part of the batch it is.
        stop_at: ask to stop where the step after so many steps begins.
    """
    from moe_mamba.train import trainer as loop

    factor_of = factors if callable(factors) else lambda number: factors.get(number, 1.0)
    current = [0]

    class Poisoned(loop.Objective):
        def __init__(self, *arguments: Any) -> None:
            self.factor = factor_of(current[0]) if int(os.environ["RANK"]) == rank else 1.0
            super().__init__(*arguments)

        def __call__(self, cross_entropy: Any, statistics: Any) -> Any:
            return super().__call__(cross_entropy * self.factor, statistics)

    def note(trainer: Any) -> None:
        current[0] = trainer.recovery.after(trainer.recovery.position)
        if trainer.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, stepping_in("step", note):
        patch.setattr(loop, "Objective", Poisoned)
        yield


def train_poisoned(
    factors: Mapping[int, float] | Callable[[int], float],
    rank: int = 0,
    stop_at: int | None = None,
    **arguments: Any,
) -> None:
    """Train with batches that are `poisoned`; `arguments` are those of the run."""
    with poisoned(factors, rank, stop_at):
        train(**arguments)


def nan_from(first: int, number: int) -> float:
    """NaN for every batch from `first` on."""
    return float("nan") if number >= first else 1.0
