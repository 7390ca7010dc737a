"""The runs of a table: what each is, where it lies, how it stands, and which rate was the best of a sweep."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_mamba.config import Config
from moe_mamba.config_file import changed, load_config
from moe_mamba.errors import UserError, shown
from moe_mamba.reproduce.experiment import Sweep, Table
from moe_mamba.reproduce.text import Facts
from moe_mamba.run.events import read_events
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.metrics import FILE, read_metrics

SWEEP, RUNS, ONE_RATE = "sweep", "runs", "one_rate"
VALIDATIONS = 20  # of a run, and checkpoints, at equal distances, where a table is made at mini scale
APART = 10  # steps between validations at least: a short run would do little else
# What may differ between what a run was made with and what is asked for now, and makes no other run of it.
INERT = {
    "run.folder",
    "run.kernels",
    *(f"data.{key}" for key in ("train", "validation", "tokenizer", "cache", "verify")),
}
INERT_SECTIONS = {"checkpoint", "logging", "parallel"}


@dataclass(frozen=True)
class Run:
    """A run of a table.

    Attributes:
        kind: sweep, runs (runs_50 for half the tokens) or one_rate: the folder of the output that it lies in.
        row: name of the model.
        config: all that makes it.
    """

    kind: str
    row: str
    config: Config

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.config.run.folder)

    @property
    def name(self) -> str:
        """In words that sort: runs/mamba/seed1."""
        return "/".join((self.kind, self.row, self.folder.name))

    @property
    def state(self) -> str:
        """``new``, ``begun``, ``finished`` or ``diverged``: its loss became NaN or Inf, and would again."""
        events, _ = read_events(self.folder)
        if not events:
            return "new"
        last = events[-1]
        if last["event"] == "nan" and last.get("action") == "stop":
            return "diverged"
        return "finished" if last["event"] == "finish" and last["step"] == self.config.steps else "begun"

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to make of it."""
        return self.state in ("finished", "diverged")

    def loss(self) -> float | None:
        """Validation loss at the end, in nats/token; None: it is not finished, or has diverged."""
        if self.state != "finished":
            return None
        return self.curve()[-1][1]

    def curve(self) -> list[tuple[int, float]]:
        """Steps and validation losses in nats/token of a finished run, in order.

        Raises:
            UserError: that of the last step is not there, or one is no number.
        """
        found = [(line["step"], line["validation_loss"]) for line in self.metrics() if "validation_loss" in line]
        if not found or found[-1][0] != self.config.steps:
            raise self.damaged(f"has no validation loss of step {self.config.steps}, with which it finished")
        for step, loss in found:
            if not isinstance(loss, int | float) or not math.isfinite(loss):
                raise self.damaged(f"has {shown(loss)} for the validation loss of step {step}")
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of a finished run's metrics.

        Raises:
            UserError: there are none, or one is damaged.
        """
        if not (self.folder / FILE).is_file():
            raise self.damaged("does not exist, though the run has finished")
        return read_metrics(self.folder)

    def damaged(self, what: str) -> UserError:
        """What is to be said of its metrics."""
        return UserError(f"{self.folder / FILE} {what}: it is damaged; remove the folder, and the run is made again")

    def check(self) -> None:
        """Raise a UserError where its folder holds a run of another configuration, or of one that nobody knows."""
        folder = RunFolder(self.folder)
        if not (self.folder / FILE).is_file():
            return
        if not folder.config.is_file():
            raise UserError(
                f"{self.folder} has metrics and no {folder.config.name}, so that nobody knows what made them: remove "
                "the folder, and the run is made again"
            )
        for key, before, now in changed(load_config(folder.config), self.config):
            if key not in INERT and key.partition(".")[0] not in INERT_SECTIONS:
                raise UserError(
                    f"{self.folder} was made with {key}={before}, and is now to be {now}: give what it was made with, "
                    "move it away, or give another --output"
                )


@dataclass(frozen=True)
class Workspace:
    """A table's runs in an output folder.

    Attributes:
        table: what is made.
        output: where.
        text: of all runs; None: that of the configurations.
        tokens: budget of a run; None: that of the configurations.
        known: runs whose configurations were read.
    """

    table: Table
    output: Path
    text: Facts | None
    tokens: int | None
    known: dict[tuple[str, str, str, float], Run] = field(default_factory=dict, compare=False)

    def kind(self, of: str = RUNS) -> str:
        """The folder of the table's runs, or of those at one rate: only tables that train for as long share it."""
        share = self.table.made.share
        return of if share == 1 else f"{of}_{100 * share:g}"

    def sweep(self, rows: Iterable[str]) -> list[Run]:
        """Runs that look for the rates of rows."""
        found: dict[str, Run] = {}
        for row in map(self.owner, rows):
            if (sweep := self._sweep(row)) is not None:
                found |= {run.name: run for run in (self._sweep_run(row, rate, sweep) for rate in sweep.rates)}
        return list(found.values())

    def runs(self, row: str, seeds: Iterable[int]) -> list[Run]:
        """Runs of a row; none as long as its rate is not known."""
        rate = self.rate(row)
        if rate is None:
            return []
        return [self._run(self.kind(), row, rate, f"seed{seed}", seed, self.table.made.share) for seed in seeds]

    def planned(self, row: str) -> Run:
        """The first run of a row, at its configuration's rate where its own is not known: for what it takes."""
        rate = self.table.config(row, {}).train.learning_rate
        return self._run(self.kind(), row, rate, "seed1", 1, self.table.made.share)

    def one_rate(self, row: str, seeds: Iterable[int]) -> list[Run]:
        """Runs of a row at its reference's rate, of the first seeds; none where that is its own, or not known."""
        own, rate = self.rate(row), self.rate(self.table.reference_of(row))
        if own is None or rate is None or own == rate:
            return []
        first = list(seeds)[: self.table.made.one_rate]
        return [self._run(self.kind(ONE_RATE), row, rate, f"seed{seed}", seed, self.table.made.share) for seed in first]

    def rate(self, row: str) -> float | None:
        """A row's peak learning rate: given, the best of its sweep, or its configuration's; None: not known yet."""
        owner = self.owner(row)
        if (given := self.table.made.runs[owner].rate) is not None:
            return given
        sweep = self._sweep(owner)
        if sweep is None:
            return self.table.config(owner, {}).train.learning_rate
        losses = self.swept(row)
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        if len(losses) < len(sweep.rates) or not known:
            return None
        return min(known, key=lambda rate: (known[rate], rate))

    def swept(self, row: str) -> dict[float, float | None]:
        """Rate -> validation loss at the end of its run of the sweep, None where it diverged; those that are done."""
        owner = self.owner(row)
        sweep = self._sweep(owner)
        if sweep is None:
            return {}
        runs = {rate: self._sweep_run(owner, rate, sweep) for rate in sweep.rates}
        return {rate: run.loss() for rate, run in runs.items() if run.state in ("finished", "diverged")}

    def seeds(self, kind: str, row: str) -> list[int]:
        """Seeds of a row that have a folder."""
        folders = (self.output / kind / row).glob("seed*")
        return sorted(int(text) for path in folders if (text := path.name.removeprefix("seed")).isdecimal())

    def owner(self, row: str) -> str:
        """The row whose learning rate a row takes: itself, or another."""
        return self.table.made.runs[row].rate_of or row

    def _sweep(self, owner: str) -> Sweep | None:
        """The sweep of a row that has a rate of its own; None: it is given, or stands in its configuration."""
        return self.table.made.sweep if self.table.made.runs[owner].rate is None else None

    def _sweep_run(self, row: str, rate: float, sweep: Sweep) -> Run:
        return self._run(SWEEP, row, rate, f"rate{rate:g}", sweep.seed, sweep.share)

    def _run(self, kind: str, row: str, rate: float, name: str, seed: int, share: float = 1.0) -> Run:
        place = (kind, row, name, rate)
        if place in self.known:
            return self.known[place]
        keys: dict[str, Any] = {
            "run.folder": str(self.output / kind / row / name),
            "run.seed": seed,
            "train.learning_rate": rate,
            **self._budget(kind, row, share),
            **self._text(),
        }
        return self.known.setdefault(place, Run(kind, row, self.table.config(row, keys)))

    def _budget(self, kind: str, row: str, share: float) -> dict[str, Any]:
        plain = self.table.config(row, {})
        per_step = plain.train.global_batch * plain.data.sequence_length
        steps = max(1, (self.tokens or plain.steps * per_step) // per_step)
        if self.tokens is None and share == 1 and self.table.scale == "paper":
            return {}
        steps = max(1, round(share * steps))
        keys: dict[str, Any] = {"train.steps": steps, "train.tokens": None}
        if self.table.scale == "mini":
            keys["checkpoint.every"] = max(1, steps // VALIDATIONS)
            keys["train.validate_every"] = 0 if kind == SWEEP else max(APART, steps // VALIDATIONS)
        return keys

    def _text(self) -> dict[str, Any]:
        if self.text is None:
            return {}
        return {
            "data.train": self.text.train,
            "data.validation": {"validation": self.text.validation},
            "data.tokenizer": self.text.tokenizer,
            "data.cache": str(self.output / "text" / "cache"),
            "model.vocab_size": self.text.vocab_size,
        }


def chosen_rows(table: Table, only: str | None) -> list[str]:
    """Rows of a table that ``--only`` names; all of them where it is not given.

    Raises:
        UserError: a name is no row.
    """
    names = list(table.rows) if only is None else [name for name in only.split(",") if name]
    for name in names:
        if name not in table.rows:
            raise UserError(f"--only={shown(name)[1:-1]}: give some of {', '.join(table.rows)}")
    if not names:
        raise UserError(f"--only is empty: give some of {', '.join(table.rows)}")
    return list(dict.fromkeys(names))
