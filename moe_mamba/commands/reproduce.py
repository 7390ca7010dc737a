"""Make the paper's tables again."""

from pathlib import Path
from typing import Annotated, Any

from moe_mamba.config_types import Range
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.reproduce.document import to_markdown
from moe_mamba.reproduce.experiment import Table, read_table
from moe_mamba.reproduce.gathering import gather
from moe_mamba.reproduce.launching import Launcher, slots
from moe_mamba.reproduce.report import main_grid, write_report
from moe_mamba.reproduce.runs import Run, Workspace, chosen_rows
from moe_mamba.reproduce.text import Asked, prepare_text

FLAGS = {f"data.{name}": name for name in ("train", "validation", "tokenizer", "text_key")}


def main(
    *,
    table: str,
    version: str | None = None,
    scale: str = "mini",
    seeds: Annotated[int | None, Range(1, 999)] = None,
    tokens: Annotated[int | None, Range(1, 10**16)] = None,
    only: str | None = None,
    output: str | None = None,
    at_once: Annotated[int | None, Range(1, 4096)] = None,
    gpus_per_run: Annotated[int, Range(1, 64)] = 1,
    gather_only: bool = False,
    **overrides: Any,
) -> None:
    """Make the runs of a table, or go on with them, and write ours beside the paper's.

    Args:
        table: main, experts, lr, parallel, inner, ratio or designs: a file of configs/reproduce.
        version: of the paper, v1 or v2; the first that has the table, where none is given.
        scale: mini (two cores), or paper (GPUs).
        seeds: runs of each model, with seeds from 1.
        tokens: budget of each run, in the place of the scale's.
        only: models, by their names in the table's file, with commas between them.
        output: folder of the runs; of several tables at one scale, which then share what they have in common.
        at_once: runs beside one another; as many as there are cores, or GPUs.
        gpus_per_run: GPUs of each run, where there are GPUs.
        gather_only: start nothing: only gather what is there.
        overrides: the text, as --data.train, --data.validation, --data.tokenizer and --data.text_key.
    """
    made = read_table(table, version, scale)
    workspace = _workspace(made, Path(output or f"runs/reproduce/{scale}").expanduser(), tokens, overrides)
    rows, wanted = chosen_rows(made, only), range(1, (seeds or made.made.seeds) + 1)
    failed = {} if gather_only else _make(workspace, rows, wanted, at_once or slots(gpus_per_run), gpus_per_run)
    result = gather(workspace, wanted)
    print(to_markdown([main_grid(result)]))
    for path in write_report(result):
        print(path)
    if failed:
        for name, why in failed.items():
            print(f"failed    {name}: {why}")
        raise RunStopped(f"{len(failed)} runs have failed: the same command tries them again")


def _workspace(table: Table, output: Path, tokens: int | None, overrides: dict[str, Any]) -> Workspace:
    if unknown := [key for key in overrides if key not in FLAGS]:
        raise UserError(
            f"--{unknown[0]}: keys of the models stand in configs/reproduce; here are --{', --'.join(FLAGS)}"
        )
    asked = Asked(**{FLAGS[key]: str(value) for key, value in overrides.items()})
    if table.scale != "mini":
        if not asked.is_empty:
            raise UserError("--data flags are for --scale=mini: the paper's scale has the text of its configurations")
        return Workspace(table, output, None, tokens)
    config = table.config(table.published.reference, {})
    text = prepare_text(output / "text", asked, config.model.vocab_size, print)
    return Workspace(table, output, text, tokens)


def _make(workspace: Workspace, rows: list[str], seeds: range, at_once: int, gpus_per_run: int) -> dict[str, str]:
    """Make all runs, stage by stage; name of a run that failed -> why."""
    launcher = Launcher(workspace.output, at_once, gpus_per_run, print)
    failed: dict[str, str] = {}
    for stage in (_sweep, _runs, _one_rate):
        runs = stage(workspace, rows, seeds)
        for run in runs:
            run.check()
        failed |= launcher.make(runs)
    return failed


def _sweep(workspace: Workspace, rows: list[str], seeds: range) -> list[Run]:
    return workspace.sweep(rows)


def _runs(workspace: Workspace, rows: list[str], seeds: range) -> list[Run]:
    return [run for seed in seeds for row in rows for run in workspace.runs(row, [seed])]


def _one_rate(workspace: Workspace, rows: list[str], seeds: range) -> list[Run]:
    return [run for seed in seeds for row in rows for run in workspace.one_rate(row, [seed])]
