"""Batches that spoil a step: the loss of chosen ones is multiplied, by NaN or by much, on one rank."""

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from launch.train import train
from moe_mamba.model.language_model import LanguageModel
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
    from moe_mamba.train import steps

    factor_of = factors if callable(factors) else lambda number: factors.get(number, 1.0)
    known: dict[int, float] = {}  # where a micro-batch lies -> its factor
    make, forward = steps.Steps.make, LanguageModel.forward

    def stop(trainer: Any) -> None:
        if trainer.made == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def make_known(self: Any, number: int, batch: Any, *rest: Any) -> Any:
        if int(os.environ["RANK"]) == rank:
            known.update((part.tokens.data_ptr(), factor_of(batch.number)) for part in batch.parts)
        return make(self, number, batch, *rest)

    def forward_poisoned(model: Any, tokens: Any, *rest: Any, **options: Any) -> Any:
        output = forward(model, tokens, *rest, **options)
        if model.training:
            output = dataclasses.replace(output, cross_entropy=output.cross_entropy * known.get(tokens.data_ptr(), 1.0))
        return output

    with pytest.MonkeyPatch.context() as patch, stepping_in("step", stop):
        patch.setattr(LanguageModel, "forward", forward_poisoned)
        patch.setattr(steps.Steps, "make", make_known)
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
