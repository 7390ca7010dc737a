"""What finished runs left, and what a table makes of it. Numbers only: `report.py` puts them into words."""

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import mean as average
from statistics import median
from typing import Any

from moe_mamba.model.language_model import LanguageModel
from moe_mamba.reproduce.runs import ONE_RATE, SWEEP, Run, Workspace
from moe_mamba.reproduce.statistics import Difference, Mean, mean, paired, share_of_steps
from moe_mamba.run.events import STARTS, read_events, time_of

LAST = 0.1  # share of the steps, at the end, over which load and dropped tokens are averaged


@dataclass(frozen=True)
class Trace:
    """What a finished run left.

    Attributes:
        steps: it made.
        tokens_per_step: of all sequences.
        curve: (step, validation loss in nats/token), in order.
        fullest: tokens of the fullest expert by the mean, over layers and the last steps; None: it has no experts.
        dropped: share of assignments dropped, over the same.
        tokens_per_second: the median; None: it was too short to measure any.
        hours: from its start to its end, validation and saving included, all its starts together.
    """

    steps: int
    tokens_per_step: int
    curve: list[tuple[int, float]]
    fullest: float | None
    dropped: float | None
    tokens_per_second: float | None
    hours: float

    @property
    def loss(self) -> float:
        """Validation loss at the end."""
        return self.curve[-1][1]


def read_trace(run: Run) -> Trace:
    """Read a finished run.

    Raises:
        UserError: its metrics are damaged, or lack the end.
    """
    lines = run.metrics()
    steps = run.config.steps
    end = [line for line in lines if line["step"] > (1 - LAST) * steps and "expert_load" in line]
    try:
        loads = [len(load) * max(load) for line in end for load in line["expert_load"].values()]
        fullest = average(loads) if loads else None
    except (TypeError, ValueError, AttributeError):
        raise run.damaged("has loads of experts that are none") from None
    speeds = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return Trace(
        steps=steps,
        tokens_per_step=run.config.train.global_batch * run.config.data.sequence_length,
        curve=run.curve(),
        fullest=fullest,
        dropped=average(line["dropped"] for line in end) if end else None,
        tokens_per_second=median(speeds) if speeds else None,
        hours=hours_of(run),
    )


def hours_of(run: Run) -> float:
    """Hours in which a run's process was at work, as far as its events tell: what a kill lost is not all in it."""
    events, _ = read_events(run.folder)
    seconds, begun, last = 0.0, None, None
    for event in events:
        time = time_of(event)
        if event["event"] in STARTS:
            seconds += (last - begun).total_seconds() if begun and last else 0.0
            begun = time
        last = time
    seconds += (last - begun).total_seconds() if begun and last else 0.0
    return seconds / 3600


def makers_of(run: Run) -> set[str]:
    """Device and libraries of each of a run's starts, in words; empty words where one did not note them."""
    events, _ = read_events(run.folder)
    return {_maker(event) for event in events if event["event"] in STARTS}


def _maker(start: dict[str, Any]) -> str:
    libraries = [f"{name} {number}" for name, number in start.get("versions", {}).items() if number != "none"]
    return f"{start['device']} with {', '.join(libraries)}" if "device" in start else ""


@dataclass
class RowResult:
    """What a row came to.

    Attributes:
        name: of the row.
        counts: parameters by kind.
        rate: peak learning rate; None: its sweep is not done.
        is_asked: the call was about it.
        swept: rate -> loss of the sweep, None where it diverged.
        traces: seed -> what its run left.
        missing: seed -> the state of its run, for those that are not finished, asked for or begun.
        one_rate: seed -> loss at the reference's rate, where that is another.
        difference: of the losses to the reference's; None for the reference.
        one_rate_difference: the same, both at the reference's rate.
        shares: seed -> steps to the reference's final loss, as a share of its steps; None: never.
    """

    name: str
    counts: Mapping[str, int]
    rate: float | None
    is_asked: bool
    swept: Mapping[float, float | None] = field(default_factory=dict)
    traces: Mapping[int, Trace] = field(default_factory=dict)
    missing: Mapping[int, str] = field(default_factory=dict)
    one_rate: Mapping[int, float] = field(default_factory=dict)
    difference: Difference | None = None
    one_rate_difference: Difference | None = None
    shares: Mapping[int, float | None] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """Whether a seed has diverged: what the others came to says nothing of the row, and compares with nothing."""
        return "diverged" in self.missing.values()

    @property
    def losses(self) -> dict[int, float]:
        """Seed -> validation loss at the end."""
        return {seed: trace.loss for seed, trace in self.traces.items()}

    @property
    def loss(self) -> Mean | None:
        """Over seeds."""
        return mean(list(self.losses.values()))

    @property
    def share(self) -> Mean | None:
        """Of steps to the reference's loss, where all seeds reach it."""
        values = list(self.shares.values())
        return None if None in values else mean([value for value in values if value is not None])

    @property
    def curve(self) -> dict[int, list[float]]:
        """Step -> validation losses there, of the seeds that have one."""
        found: dict[int, list[float]] = {}
        for trace in self.traces.values():
            for step, loss in trace.curve:
                found.setdefault(step, []).append(loss)
        return dict(sorted(found.items()))

    def over_seeds(self, name: str) -> float | None:
        """Mean of a figure of the traces."""
        values = [value for trace in self.traces.values() if (value := getattr(trace, name)) is not None]
        return average(values) if values else None


@dataclass
class Result:
    """A table's numbers.

    Attributes:
        workspace: its runs.
        rows: by name, in the table's order.
        hours: kind of runs -> hours of them all, those of other tables in the same folder left out.
        made_with: devices and libraries, in words (none where runs did not note them) -> how many of these runs they
            made, at least in part.
    """

    workspace: Workspace
    rows: dict[str, RowResult]
    hours: dict[str, float]
    made_with: Counter[str]

    @cached_property
    def missing(self) -> list[str]:
        """Runs that were asked for, or begun, and are not finished, in words."""
        lines = []
        for name, row in self.rows.items():
            if row.rate is None and row.is_asked:
                lines.append(f"{name}: its sweep is not done")
            lines += [f"{name} seed {seed}: {state}" for seed, state in row.missing.items()]
        return lines


def gather(workspace: Workspace, chosen: Container[str], seeds: Iterable[int]) -> Result:
    """Read what is there: every finished seed that has a folder.

    Args:
        workspace: of the table.
        chosen: rows of which `seeds` are asked for: what of them is not there is missing.
        seeds: of each of those.

    Raises:
        UserError: a run was made with another configuration, or is damaged.
    """
    table, wanted = workspace.table, list(seeds)
    rows: dict[str, RowResult] = {}
    spent: dict[str, dict[str, float]] = {SWEEP: {}, workspace.kind(): {}, workspace.kind(ONE_RATE): {}}
    made_with: dict[str, set[str]] = {}
    for name in table.rows:
        asked = wanted if name in chosen else []
        config = table.config(name, {} if workspace.text is None else {"model.vocab_size": workspace.text.vocab_size})
        counts = LanguageModel.on_meta(config.model, config.moe).parameter_counts()
        row = rows[name] = RowResult(name, counts, workspace.rate(name), name in chosen, workspace.swept(name))
        runs = _by_seed(workspace.runs(name, _all(workspace, workspace.kind(), name, asked)))
        row.traces = {seed: read_trace(run) for seed, run in runs.items() if run.state == "finished"}
        row.missing = {seed: run.state for seed, run in runs.items() if seed not in row.traces}
        others = _by_seed(workspace.one_rate(name, _all(workspace, workspace.kind(ONE_RATE), name, asked)))
        row.one_rate = {seed: loss for seed, run in others.items() if (loss := run.loss()) is not None}
        for run in (*workspace.sweep([name]), *runs.values(), *others.values()):
            run.check()
            spent[run.kind][run.name] = hours_of(run)
            made_with[run.name] = makers_of(run)
    for name, row in rows.items():
        reference = rows.get(table.reference_of(name))
        compares = table.experiment.rows[name].compares and not row.diverged
        if reference is not None and reference is not row and compares and not reference.diverged:
            _compare(row, reference)
    hours = {kind: sum(found.values()) for kind, found in spent.items()}
    return Result(workspace, rows, hours, Counter(maker for makers in made_with.values() for maker in makers))


def _compare(row: RowResult, reference: RowResult) -> None:
    row.difference = paired(row.losses, reference.losses)
    row.one_rate_difference = paired(row.one_rate, reference.losses)
    row.shares = {
        seed: share_of_steps(trace.curve, reference.traces[seed].loss, reference.traces[seed].steps)
        for seed, trace in row.traces.items()
        if seed in reference.traces
    }


def _all(workspace: Workspace, kind: str, row: str, asked: list[int]) -> list[int]:
    return sorted({*asked, *workspace.seeds(kind, row)})


def _by_seed(runs: Iterable[Run]) -> dict[int, Run]:
    return {run.config.run.seed: run for run in runs}


def over_tokens(row: RowResult, reference: RowResult, shares: Iterable[float]) -> dict[int, Difference]:
    """Tokens -> paired difference there, at about these shares of the steps, where both have validated."""
    common = sorted(set(row.curve) & set(reference.curve))
    found: dict[int, Difference] = {}
    for share in shares:
        trace = next(iter(row.traces.values()), None)
        if trace is None or not common:
            return found
        step = min(common, key=lambda step: abs(step - share * trace.steps))
        at = [{seed: dict(one.curve).get(step) for seed, one in each.traces.items()} for each in (row, reference)]
        losses: list[dict[int, float]] = [
            {seed: loss for seed, loss in side.items() if loss is not None} for side in at
        ]
        difference = paired(*losses)
        if difference is not None:
            found[step * trace.tokens_per_step] = difference
    return found


def to_json(result: Result) -> dict[str, Any]:
    """All numbers of a table."""
    table, text = result.workspace.table, result.workspace.text
    return {
        "table": table.name,
        "version": table.version,
        "scale": table.scale,
        "share_of_tokens": table.made.share,
        "source": table.published.source,
        "reference": table.published.reference,
        "text": text.public() if text else None,
        "hours": result.hours,
        "made_with": dict(result.made_with),
        "rows": {name: _row(result, row) for name, row in result.rows.items()},
        "missing": result.missing,
    }


def _row(result: Result, row: RowResult) -> dict[str, Any]:
    table = result.workspace.table
    figures = table.published.published.get(row.name)
    return {
        "title": table.rows[row.name].title,
        "parameters": dict(row.counts),
        "learning_rate": row.rate,
        "sweep": [{"learning_rate": rate, "loss": loss} for rate, loss in row.swept.items()],
        "loss": row.loss._asdict() if row.loss else None,
        "difference": row.difference._asdict() if row.difference else None,
        "share_of_steps": row.share._asdict() if row.share else None,
        "one_rate": {"losses": dict(row.one_rate), "difference": _dict(row.one_rate_difference)},
        "fullest_expert": row.over_seeds("fullest"),
        "dropped": row.over_seeds("dropped"),
        "tokens_per_second": row.over_seeds("tokens_per_second"),
        "hours": row.over_seeds("hours"),
        "seeds": {
            seed: {"loss": trace.loss, "share_of_steps": row.shares.get(seed), "curve": trace.curve}
            for seed, trace in row.traces.items()
        },
        "paper": figures.model_dump() if figures else None,
    }


def _dict(difference: Difference | None) -> dict[str, Any] | None:
    return difference._asdict() if difference else None
