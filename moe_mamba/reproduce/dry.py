"""What a table takes, before anything is made: parameters, tokens, operations, hours."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from moe_mamba.config import Config
from moe_mamba.errors import RunStopped
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.planning.cluster import Cluster
from moe_mamba.planning.estimate import estimate
from moe_mamba.planning.load import Load
from moe_mamba.reproduce.document import Grid, Paragraph, Part
from moe_mamba.reproduce.launching import Launcher
from moe_mamba.reproduce.runs import Run, Workspace
from moe_mamba.run.metrics import read_metrics

MEASURED, WARM_UP = 8, 3  # steps that are made of each row, and the first of them that do not count
CLUSTER, WORLDS = "h100", (1, 8)
FORWARD = 1 / 3  # share of a training step that a validation of as many tokens takes


def describe_dry(
    workspace: Workspace, rows: list[str], seeds: Iterable[int], at_once: int, say: Callable[[str], None]
) -> list[Part]:
    """The runs of a table, a line for each row, and the hours of all.

    Args:
        workspace: of the table.
        rows: to be made.
        seeds: of each.
        at_once: runs beside one another.
        say: prints a line.
    """
    wanted = list(seeds)
    if workspace.table.scale == "paper":
        return _paper(workspace, rows, wanted)
    speeds = measure(workspace, rows, at_once, say)
    lines, total, extra, longest = [], 0.0, 0.0, 0.0
    sweep = {run.name: run for run in workspace.sweep(rows) if not run.is_done}
    for row in rows:
        hours, count = _hours(workspace.planned(row).config, speeds[row]), _left(workspace, row, wanted)
        # A sweep that rows share counts once, with the row that it is of, or else with the first of the others.
        theirs = workspace.owner(row)
        is_here = theirs == row or theirs not in rows
        own = [sweep.pop(run.name) for run in workspace.sweep([row]) if is_here and run.name in sweep]
        total += count * hours + sum(_hours(run.config, speeds[row]) for run in own)
        longest = max(longest, hours * (count > 0))
        extra += (workspace.table.reference_of(row) != row) * min(len(wanted), workspace.table.made.one_rate) * hours
        lines.append([*_figures(workspace, row), f"{speeds[row]:,.0f}", str(len(own)), str(count), f"{hours:.2f}"])
    header = ["model", "parameters", "active", "tokens", "FLOPs", "tokens/s"]
    header += ["runs of the sweep left", "runs left", "hours of one"]
    hours = max(total / at_once, longest)
    said = (
        f"Together {total:.1f} core hours, {hours:.1f} hours with {at_once} at once. Speeds are measured: "
        f"{MEASURED - WARM_UP} steps of each model, {at_once} at once, here and now. Validation is in the hours, a "
        "start (some seconds) is not."
    )
    parts: list[Part] = [Grid(header, lines), Paragraph(said)]
    if workspace.table.made.one_rate:
        parts.append(Paragraph(f"Runs at the reference's rate, where rates differ: at most {extra:.1f} hours more."))
    return parts


def _left(workspace: Workspace, row: str, seeds: list[int]) -> int:
    """Runs of a row that are not done; all, where its rate is not known yet."""
    return len(seeds) - sum(run.is_done for run in workspace.runs(row, seeds))


def _figures(workspace: Workspace, row: str) -> list[str]:
    config = workspace.planned(row).config
    model = LanguageModel.on_meta(config.model, config.moe, config.run.kernels)
    counts = model.parameter_counts()
    tokens = config.steps * config.train.global_batch * config.data.sequence_length
    flops = tokens * model.flops_per_token(config.data.sequence_length)
    title = workspace.table.rows[row].title
    return [f"{title} ({row})", f"{counts['total']:,}", f"{counts['active']:,}", f"{tokens:,}", f"{flops:.3g}"]


def _hours(config: Config, tokens_per_second: float) -> float:
    """Of a run with its validations."""
    train, length = config.train, config.data.sequence_length
    validations = config.steps // train.validate_every if train.validate_every else 1
    read = validations * (train.validation_batches or 0) * train.global_batch * length
    return (config.steps * train.global_batch * length + FORWARD * read) / tokens_per_second / 3600


def measure(workspace: Workspace, rows: list[str], at_once: int, say: Callable[[str], None]) -> dict[str, float]:
    """Tokens per second of each row in a few real steps, as many rows at once as the table's runs will be.

    The steps are on the built-in corpus in bytes, since a vocabulary need not be trained yet; the model's is of the
    size that it will have.

    Raises:
        RunStopped: a model cannot be trained here, or a signal came.
    """
    with tempfile.TemporaryDirectory() as folder:
        say(f"measuring {MEASURED} steps of each of {len(rows)} models")
        runs = {row: _short_run(workspace, row, Path(folder)) for row in rows}
        try:
            failed = Launcher(Path(folder), at_once, 1, lambda line: None).make(runs.values())
        except RunStopped as stopped:
            raise RunStopped("stopped while it measured: nothing was made", code=stopped.code) from None
        for name, why in failed.items():
            raise RunStopped(f"{name} cannot be measured: {why}")
        return {row: _speed(run) for row, run in runs.items()}


def _short_run(workspace: Workspace, row: str, folder: Path) -> Run:
    keys: dict[str, Any] = {
        "run.folder": str(folder / "runs" / row / "dry"),
        "data.train": ["builtin"],
        "data.validation": {"validation": "builtin:validation"},
        "data.tokenizer": "bytes",
        "data.cache": str(folder / "cache"),
        "train.steps": MEASURED,
        "train.tokens": None,
        "train.validate_every": 0,
        "train.validation_batches": 1,
        "checkpoint.every": 0,
        "logging.every": 1,
    }
    if workspace.text is not None:
        keys["model.vocab_size"] = workspace.text.vocab_size
    return Run("dry", row, workspace.table.config(row, keys))


def _speed(run: Run) -> float:
    return median(
        line["tokens_per_second"]
        for line in read_metrics(run.folder)
        if line["step"] > WARM_UP and "tokens_per_second" in line
    )


def _paper(workspace: Workspace, rows: list[str], seeds: list[int]) -> list[Part]:
    lines, total = [], dict.fromkeys(WORLDS, 0.0)
    for row in rows:
        config, cells, count = workspace.planned(row).config, [], _left(workspace, row, seeds)
        for gpus in WORLDS:
            one = estimate(config, Cluster.of(CLUSTER), gpus, Load())
            total[gpus] += count * one.gpu_hours / gpus
            cells.append(_said(one.days * 24, one.fits))
        lines.append([*_figures(workspace, row), str(count), *cells])
    header = ["model", "parameters", "active", "tokens", "FLOPs", "runs left"]
    header += [f"hours of one on {gpus} H100{'s' * (gpus > 1)}" for gpus in WORLDS]
    said = ", ".join(f"{hours:,.1f} hours on {gpus}" for gpus, hours in total.items())
    note = (
        f"Together, one after the other: {said}. Hours are those of tools/plan.py (docs/planning.md), an estimate that "
        "no GPU has confirmed: without validation, checkpoints and faults."
    )
    return [Grid(header, lines), Paragraph(note)]


def _said(hours: float, fits: bool) -> str:
    return f"{hours:,.1f}" if fits else f"does not fit its memory ({hours:,.1f} if it did)"
