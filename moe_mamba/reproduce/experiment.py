"""An experiment as data, a file of ``configs/reproduce``: models, keys, rates, and what the paper has published.

No code knows a model by its name: a table is a file, and another table another file.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator

from moe_mamba.config import Config
from moe_mamba.config_file import load_config
from moe_mamba.config_types import FilledText, Fraction, PathText, Positive, Range, Section, Text, allowed
from moe_mamba.config_yaml import read_yaml
from moe_mamba.errors import UserError, shown
from moe_mamba.installation import CONFIGS

FOLDER = CONFIGS / "reproduce"
SCALES = ("mini", "paper")

Rate = Annotated[float, Range(1e-30, 100)]
Loss = Annotated[float | None, Range(0, 1000)]
Share = Annotated[float | None, Range(0, 1000)]


def _empty(value: object) -> object:
    """A mapping that was left empty in YAML."""
    return {} if value is None else value


Keys = Annotated[dict[str, Any], BeforeValidator(_empty)]


class Row(Section):
    """A model of a table, at whatever scale."""

    title: FilledText = Field(description="what people call it")
    series: Text = Field("", description="rows of one series are joined by a line in the picture over `axis`")
    at: Annotated[float | None, Range(0, 1e15)] = Field(None, description="its place on the table's axis")
    reference: Text = Field("", description="row to compare it with; empty: the version's")
    note: Text = Field("", description="said under the table")
    compares: bool = Field(
        True, description="false: its validation loss is not one to compare, as where experts look ahead"
    )


class Made(Section):
    """How a row's model is made at one scale."""

    config: PathText = Field("", description="configuration; empty: the scale's")
    keys: Keys = Field({}, description="keys of it that differ, dotted")
    rate_of: Text = Field("", description="takes the learning rate of this row, in the place of a sweep of its own")
    rate: Rate | None = Field(None, description="peak learning rate, in the place of a sweep of its own")


def _different(rates: list[float]) -> list[float]:
    """Rates of which each has a folder of its own, which is named by six digits."""
    if len({f"{rate:g}" for rate in rates}) < len(rates):
        raise ValueError("two of the sweep's rates are the same: leave one out")
    return rates


class Sweep(Section):
    """The search of each row's learning rate, with one budget for all."""

    rates: Annotated[list[Rate], Field(min_length=1), AfterValidator(_different)] = Field(
        description="peak learning rates that are tried"
    )
    share: Fraction = Field(0.2, description="share of the run's tokens; the schedule ends there")
    seed: Annotated[int, Range(0, 2**31)] = Field(1000, description="a seed that no run of the table has")


class Scale(Section):
    """A size at which the table is made."""

    config: PathText = Field("", description="configuration of the rows that name none")
    sweep: Sweep | None = Field(None, description="how learning rates are found; null: they stand in configurations")
    one_rate: Annotated[int, Range(0, 999)] = Field(
        0, description="runs of each row at the reference's rate, where its own differs"
    )
    seeds: Positive = Field(1, description="runs of each row")
    share: Fraction = Field(1.0, description="share of the scale's tokens that runs have; below 1: an early look")
    runs: dict[str, Made] = Field(description="row -> how it is made")
    notes: list[FilledText] = Field([], description="said under the table")


class Figures(Section):
    """What the paper says of a row."""

    total: Text = Field("", description="parameters")
    active: Text = Field("", description="parameters that a token meets")
    loss: Loss = Field(None, description="nats/token")
    share: Share = Field(None, description="steps to the reference's loss, as a share of the reference's steps")
    speed_up: Share = Field(None, description="the same, as the reference's steps by this row's")
    text: Text = Field("", description="in the place of a loss")


class Version(Section):
    """A table as one version of the paper has it."""

    source: FilledText = Field(description="where the figures stand")
    reference: FilledText = Field(description="row that others are compared with")
    published: dict[str, Figures] = Field({}, description="row -> the paper's figures")
    not_published: list[FilledText] = Field([], description="what the paper leaves open")
    paper: Scale | None = Field(None, description="the paper's own scale")


class Experiment(Section):
    """A table of the paper, or one beyond it."""

    title: FilledText = Field(description="what is compared")
    axis: Text = Field("", description="what `at` of the rows is, on a logarithmic scale")
    rows: dict[str, Row] = Field(description="name, as in folders -> row, in the table's order")
    mini: Scale | None = Field(None, description="the scale of two cores, the same for all versions")
    versions: dict[Literal["v1", "v2", "ours"], Version] = Field(
        description="those of the paper that have this table; ours: none has"
    )

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        scales = [("mini", self.mini)] if self.mini else []
        for name, version in self.versions.items():
            scales += [(f"versions.{name}.paper", version.paper)] if version.paper else []
            self._check_names(f"versions.{name}.published", version.published)
            self._check_names(f"versions.{name}.reference", [version.reference])
        for place, scale in scales:
            self._check_names(f"{place}.runs", scale.runs)
            if scale.sweep and scale.sweep.seed <= scale.seeds:
                raise ValueError(f"{place}.sweep.seed={scale.sweep.seed} is a seed of the table's runs: give another")
            for row, made in scale.runs.items():
                self._check_names(f"{place}.runs.{row}.rate_of", [made.rate_of] * bool(made.rate_of))
                if made.rate_of and made.rate is not None:
                    raise ValueError(f"{place}.runs.{row} has rate and rate_of: give one of them")
                if made.rate_of and (made.rate_of not in scale.runs or scale.runs[made.rate_of].rate_of):
                    raise ValueError(f"{place}.runs.{row}.rate_of: {made.rate_of} has no rate of its own at this scale")
                if not (made.config or scale.config):
                    raise ValueError(f"{place}.runs.{row} has no config, and neither has {place}: give one")
        self._check_names("rows", [row.reference for row in self.rows.values() if row.reference])
        return self

    def _check_names(self, place: str, names: Any) -> None:
        if unknown := [name for name in names if name not in self.rows]:
            raise ValueError(f"{place}: {shown(unknown[0])} is no row: give one of {', '.join(self.rows)}")


class Table:
    """An experiment in one version and at one scale.

    Attributes:
        name: of the table, as in ``--table``.
        version: of the paper, v1 or v2; ours, where it has no such table.
        scale: mini or paper.
        experiment: the whole file.
        published: what the version says.
        made: how the rows are made.
    """

    def __init__(self, name: str, version: str, scale: str, experiment: Experiment) -> None:
        if scale not in SCALES:
            raise UserError(f"--scale={shown(scale)[1:-1]}: give one of {', '.join(SCALES)}")
        if version not in experiment.versions:
            has = " or ".join(experiment.versions)
            raise UserError(f"--table={name} --version={shown(version)[1:-1]}: of this table there is {has}: give that")
        self.name, self.version, self.scale, self.experiment = name, version, scale, experiment
        self.published: Version = experiment.versions[version]  # type: ignore[index]
        made = experiment.mini if scale == "mini" else self.published.paper
        if made is None:
            raise UserError(f"--table={name} --version={version} has no --scale={scale}: leave it out")
        self.made: Scale = made

    @property
    def label(self) -> str:
        """Of the table's own folder: main-v1."""
        return f"{self.name}-{self.version}"

    @property
    def rows(self) -> dict[str, Row]:
        """Those that this scale makes, in the table's order."""
        return {name: row for name, row in self.experiment.rows.items() if name in self.made.runs}

    def reference_of(self, row: str) -> str:
        """The row that a row is compared with; a reference's is itself."""
        return self.experiment.rows[row].reference or self.published.reference

    def config(self, row: str, overrides: dict[str, Any]) -> Config:
        """The configuration of a row's runs.

        Raises:
            UserError: a key of the experiment or of `overrides` is wrong.
        """
        made = self.made.runs[row]
        return load_config(made.config or self.made.config, {**made.keys, **overrides})


def tables() -> list[str]:
    """Names of the tables that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_table(name: str, version: str | None, scale: str) -> Table:
    """Read a table.

    Args:
        name: of a file of ``configs/reproduce``.
        version: of the paper; None: the first that has the table.
        scale: mini or paper.

    Raises:
        UserError: there is no such table, version or scale, or the file is wrong.
    """
    if name not in tables():
        raise UserError(f"--table={shown(name)[1:-1]}: give one of {', '.join(tables())}")
    experiment = read_experiment(FOLDER / f"{name}.yaml")
    return Table(name, version or next(iter(experiment.versions)), scale, experiment)


def read_experiment(path: Path) -> Experiment:
    """Read an experiment's file, strictly.

    Raises:
        UserError: it cannot be read, or says something unknown or wrong; names the key.
    """
    tree = read_yaml(path)
    try:
        return Experiment.model_validate(tree)
    except ValidationError as error:
        found = error.errors()  # a key that is misspelt is missing, too: say which one is unknown
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UserError(f"config file {path}: unknown key {place}: correct its name, or leave it out") from None
        if first["type"] == "value_error":
            what = first["msg"].removeprefix("Value error, ")
        elif first["type"] == "missing":
            what = f"{place} is missing: give it"
        else:
            what = f"{place}={shown(first['input'])}: {allowed(first)}"
        raise UserError(f"config file {path}: {what}") from None
