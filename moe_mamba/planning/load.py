"""How tokens spread over experts: what plan and rehearsal take in the place of routers' decisions, which need a run.

For each group of expert-parallel ranks one send matrix says how many rows each rank sends to each expert. A rank has
its row of it (what it sends) and its columns (what its experts receive), so a group's ranks agree by construction.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from moe_mamba.errors import UserError, brief
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.run.metrics import read_metrics, router_label

FORMS = "even, skewed:FACTOR such as skewed:1.5, or run:FOLDER of a run that has trained"
FACTOR = re.compile(r"\d{1,12}(\.\d{0,30})?", re.ASCII)
MOST = 10**6
PARTS = 10**5  # metrics.jsonl has shares of five digits


@dataclass(frozen=True)
class Travel:
    """What a rank of an expert group sends and receives.

    Attributes:
        sent_splits: rows to each rank of the group.
        received_splits: rows from each rank.
        received: rows from each rank for each of this rank's experts.
    """

    sent_splits: list[int]
    received_splits: list[int]
    received: list[list[int]]

    @classmethod
    def of(cls, matrix: Sequence[Sequence[int]], rank: int) -> "Travel":
        """The part of a send matrix that concerns a rank, which has one of as many equal parts of the experts."""
        ranks, experts = len(matrix), len(matrix[0]) // len(matrix)
        mine = slice(rank * experts, (rank + 1) * experts)
        sent = [sum(matrix[rank][other * experts : (other + 1) * experts]) for other in range(ranks)]
        received = [list(row[mine]) for row in matrix]
        return cls(sent, [sum(row) for row in received], received)

    @property
    def counts(self) -> list[int]:
        """Rows of each of this rank's experts."""
        return [sum(column) for column in zip(*self.received, strict=True)]


@dataclass(frozen=True)
class Load:
    """Shares of the rows that experts get.

    Attributes:
        text: as the user wrote it.
        factor: the fullest expert's rows by the mean; the first expert of each router is the fullest, the others have
            alike less; 1: all have alike.
        recorded: router's label in metrics -> shares of its experts, of a run; None: none was recorded.
    """

    text: str = "even"
    factor: Fraction = Fraction(1)
    recorded: tuple[tuple[str, tuple[float, ...]], ...] | None = None

    @classmethod
    def parse(cls, text: str) -> "Load":
        """Read a load: ``even``, ``skewed:1.5`` or ``run:FOLDER``.

        Raises:
            UserError: it is none of these, the factor is below 1, or the run has recorded none.
        """
        kind, _, value = text.partition(":")
        if text == "even":
            return cls()
        if kind == "skewed":
            return cls(text, _factor(text, value))
        if kind == "run" and value:
            return cls(text, recorded=_recorded(value))
        raise UserError(f"load={brief(text)} is not known: give {FORMS}")

    def check(self, model: LanguageModel) -> None:
        """Refuse a load that a model's experts cannot have; that no layer reads it is one.

        Raises:
            UserError: as ``matrix``, or no layer sends experts as many rows as their routers choose.
        """
        if self.factor == 1 and self.recorded is None:
            return
        experts_of = dropless(model)
        if not experts_of:
            why = "experts take their capacity at any load" if model.routers() else "the model has no experts"
            raise UserError(f"load={brief(self.text)} changes nothing, for {why}: leave out --load")
        for name, experts in experts_of.items():
            self._weights(experts, name)

    def matrix(self, ranks: int, experts: int, rows_per_rank: int, router: str | None = None) -> list[list[int]]:
        """Rows that each rank of a group sends to each expert, (ranks, experts).

        Every rank has the same shares. Rows are whole numbers: what rounding leaves of a row goes to the experts that
        the ranks before have given too little, so that columns are as exact as rows.

        Args:
            ranks: of the group.
            experts: of the router.
            rows_per_rank: what a rank sends in all: its tokens by experts per token.
            router: its name in the model, such as ``layers.1.mixer.router``; None: the mean of all recorded ones.

        Raises:
            UserError: the factor is larger than the number of experts, or the run has recorded no such router.
        """
        weights = self._weights(experts, router)
        whole = sum(weights)
        owed = [0] * experts  # rows, in parts of 1 / whole
        rows = []
        for _ in range(ranks):
            owed = [left + rows_per_rank * weight for left, weight in zip(owed, weights, strict=True)]
            # What is owed may be less than nothing where rounding gave more than was due before.
            row = [max(0, left // whole) for left in owed]
            owed = [left - given * whole for left, given in zip(owed, row, strict=True)]
            _correct(row, owed, whole, rows_per_rank - sum(row))
            rows.append(row)
        return rows

    def _weights(self, experts: int, router: str | None) -> list[int]:
        """Shares of the experts in whole numbers, whatever their sum."""
        if self.recorded is not None:
            return self._recorded_weights(experts, router)
        if self.factor > experts:
            raise UserError(f"load={self.text}: {experts} experts have at most {experts} times the mean: lower it")
        fullest, mean = self.factor.numerator, self.factor.denominator
        return [fullest * max(1, experts - 1)] + [mean * experts - fullest] * (experts - 1)

    def _recorded_weights(self, experts: int, router: str | None) -> list[int]:
        assert self.recorded is not None
        label = None if router is None else router_label(router)
        found = [shares for name, shares in self.recorded if label in (None, name) and len(shares) == experts]
        if not found:
            known = ", ".join(f"{name} ({len(shares)} experts)" for name, shares in self.recorded)
            asked = f"router {label}" if label is not None else "a router"
            raise UserError(
                f"load={brief(self.text)} has no load of {asked} with {experts} experts, only of {known}: "
                "give a run of the same model"
            )
        return [sum(round(PARTS * share) for share in shares) for shares in zip(*found, strict=True)]


def dropless(model: LanguageModel) -> dict[str, int]:
    """Routers whose experts take all rows that are chosen for them, by name, and their experts: what a load is for."""
    routers = model.routers().items()
    return {name: router.config.experts for name, router in routers if router.config.capacity_factor is None}


def _correct(row: list[int], owed: list[int], whole: int, missing: int) -> None:
    """Make a row's sum exact, in place: one row more where most is owed, or less where least is."""
    order = sorted(range(len(row)), key=lambda expert: (-owed[expert], expert))
    if missing < 0:
        order = [expert for expert in reversed(order) if row[expert]]
    one = 1 if missing > 0 else -1
    for expert in order[: abs(missing)]:
        row[expert] += one
        owed[expert] -= one * whole


def _factor(text: str, value: str) -> Fraction:
    if FACTOR.fullmatch(value) is None:  # Fraction would write down all digits of 1e999999999
        raise UserError(f"load={brief(text)}: {brief(value)} is no number such as 1.5: give {FORMS}")
    factor = Fraction(value)
    if not 1 <= factor <= MOST:
        what = "at least the mean" if factor < 1 else f"no more than {MOST:,} times the mean"
        raise UserError(f"load={brief(text)}: the fullest expert has {what}: give a factor from 1 to {MOST:,}")
    return factor.limit_denominator(MOST)


def _recorded(folder: str) -> tuple[tuple[str, tuple[float, ...]], ...]:
    """The newest load of each router in a run's metrics."""
    loads = [line["expert_load"] for line in read_metrics(folder) if line.get("expert_load")]
    if not loads or not isinstance(loads[-1], dict):
        raise UserError(f"{folder} has recorded no load of experts: give a run with experts, that has trained")
    for name, shares in loads[-1].items():
        if not _are_shares(shares):
            raise UserError(f"{folder}: the load of router {brief(name)} is no list of shares: give another run")
    return tuple((name, tuple(shares)) for name, shares in loads[-1].items())


def _are_shares(shares: object) -> bool:
    return (
        isinstance(shares, list)
        and all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares)
        and math.isclose(sum(shares), 1, abs_tol=1e-2 + len(shares) / PARTS)
    )


def fullest_rank(matrix: Sequence[Sequence[int]]) -> int:
    """The rank of an expert group whose experts receive most rows; of equal ones the first."""
    received = [sum(Travel.of(matrix, rank).received_splits) for rank in range(len(matrix))]
    return received.index(max(received))
