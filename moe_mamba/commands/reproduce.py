"""Make the paper's tables again."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from moe_mamba.config_types import Range
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.reproduce.archive import check_archive, write_archive
from moe_mamba.reproduce.document import to_markdown
from moe_mamba.reproduce.dry import describe_dry
from moe_mamba.reproduce.experiment import Table, read_table
from moe_mamba.reproduce.gathering import gather as gathered
from moe_mamba.reproduce.jobs import write_jobs, write_slurm
from moe_mamba.reproduce.launching import Launcher, slots
from moe_mamba.reproduce.report import main_grid, write_report
from moe_mamba.reproduce.runs import Run, Workspace, chosen_rows
from moe_mamba.reproduce.text import Asked, expected_text, prepare_text, text_of

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
    dry: bool = False,
    gather: bool = False,
    jobs: str | None = None,
    slurm: str | None = None,
    archive: str | None = None,
    **overrides: Any,
) -> None:
    """Make the runs of a table, or go on with them, and write ours beside the paper's.

    Args:
        table: main, experts, lr, parallel, inner, ratio or designs of the paper; routers, resets or rates beyond it: a
            file of configs/reproduce.
        version: of the paper, v1 or v2, or ours; the first that has the table, where none is given.
        scale: mini (two cores), or paper (GPUs).
        seeds: runs of each model, with seeds from 1.
        tokens: budget of each run, in the place of the scale's.
        only: models, by their names in the table's file, with commas between them.
        output: folder of the runs; tables of mini scale share it by default, and so the runs that they have in common.
        at_once: runs beside one another; as many as there are cores, or GPUs.
        gpus_per_run: GPUs of each run, where there are GPUs.
        dry: start nothing: print what would be made, and what it takes.
        gather: start nothing: gather what is there.
        jobs: start nothing: write the commands of the next runs into this file.
        slurm: start nothing: write the same and the script of a SLURM array into this folder.
        archive: in the end, also write the raw metrics of the table's runs into this file (.tar.xz); unpacked, it is an
            --output for --gather.
        overrides: the text, as --data.train, --data.validation, --data.tokenizer and --data.text_key.
    """
    _check_paths({"output": output, "jobs": jobs, "slurm": slurm, "archive": archive})
    _check_modes({"dry": dry, "gather": gather, "jobs": jobs is not None, "slurm": slurm is not None}, archive)
    made = read_table(table, version, scale)
    rows, wanted = chosen_rows(made, only), range(1, (seeds or made.made.seeds) + 1)
    asked = _asked(made, overrides)
    default = f"runs/reproduce/{scale}" if scale == "mini" else f"runs/reproduce/{scale}/{made.label}"
    where = Path(output or default).expanduser()
    at_once = at_once or slots(gpus_per_run)
    if dry:
        text = (text_of(where / "text", asked) or expected_text(asked, _vocab_size(made))) if scale == "mini" else None
        print(to_markdown(describe_dry(Workspace(made, where, text, tokens), rows, wanted, at_once, print)))
        return
    workspace = _workspace(made, where, tokens, asked, gather)
    if jobs is not None or slurm is not None:
        _write_jobs(workspace, rows, wanted, gpus_per_run, jobs, slurm)
        return
    failed = {} if gather else _make(workspace, rows, wanted, Launcher(where, at_once, gpus_per_run, print))
    result = gathered(workspace, rows, wanted)
    if gather and not any(row.traces for row in result.rows.values()):
        raise UserError(f"--gather: {where} holds no finished run of this table ({'; '.join(result.missing)})")
    print(f"\n{to_markdown([main_grid(result)])}")
    for path in write_report(result):
        print(path)
    if archive is not None:
        write_archive(result, Path(archive))
        print(archive)
    for line in result.missing if gather else []:
        print(f"missing   {line}")
    for name, why in failed.items():
        print(f"failed    {name}: {why}")
    if failed:
        raise RunStopped(f"{_counted(len(failed), 'run')} failed: the same command tries them again")


def _check_paths(paths: dict[str, str | None]) -> None:
    for name, path in paths.items():
        if path == "":
            raise UserError(f"--{name} is empty: give a path, or leave it out")


def _check_modes(modes: dict[str, bool], archive: str | None) -> None:
    given = [name for name, is_given in modes.items() if is_given]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} are two things to do: give one of them")
    if archive is not None:
        if given and given != ["gather"]:
            raise UserError(f"--archive with --{given[0]}, which makes no table: give one of them")
        check_archive(Path(archive))


def _asked(table: Table, overrides: dict[str, Any]) -> Asked:
    for key in overrides:
        if key not in FLAGS:
            raise UserError(
                f"unknown flag --{key}: models' keys stand in configs/reproduce; here are --{', --'.join(FLAGS)}"
            )
    asked = Asked(**{FLAGS[key]: str(value) for key, value in overrides.items()})
    if table.scale != "mini" and not asked.is_empty:
        raise UserError(f"--{next(iter(overrides))} is for --scale=mini: configurations name the text of the paper's")
    return asked


def _workspace(table: Table, output: Path, tokens: int | None, asked: Asked, is_there: bool) -> Workspace:
    if table.scale != "mini":
        return Workspace(table, output, None, tokens)
    if not is_there:
        return Workspace(table, output, prepare_text(output / "text", asked, _vocab_size(table), print), tokens)
    text = text_of(output / "text", asked)
    if text is None:
        raise UserError(f"--gather: {output} holds no runs: make them first, or give another --output")
    return Workspace(table, output, text, tokens)


def _vocab_size(table: Table) -> int:
    """Words of the vocabulary that is trained where none is given."""
    return table.config(table.published.reference, {}).model.vocab_size


Stage = Callable[[Workspace, list[str], range], list[Run]]


def _make(workspace: Workspace, rows: list[str], seeds: range, launcher: Launcher) -> dict[str, str]:
    """Make all runs, stage by stage, since rates follow from the sweep; name of a run that failed -> why."""
    failed: dict[str, str] = {}
    for stage in STAGES:
        failed |= launcher.make(_checked(stage(workspace, rows, seeds)))
    return failed


def _checked(runs: list[Run]) -> list[Run]:
    for run in runs:
        run.check()
    return runs


def _sweep(workspace: Workspace, rows: list[str], seeds: range) -> list[Run]:
    return workspace.sweep(rows)


def _runs(workspace: Workspace, rows: list[str], seeds: range) -> list[Run]:
    return _by_seed(run for row in rows for run in workspace.runs(row, seeds))


def _one_rate(workspace: Workspace, rows: list[str], seeds: range) -> list[Run]:
    return _by_seed(run for row in rows for run in workspace.one_rate(row, seeds))


def _by_seed(runs: Iterable[Run]) -> list[Run]:
    """The first seed of all rows first: a table without its other seeds is one already."""
    return sorted(runs, key=lambda run: run.config.run.seed)


STAGES: tuple[Stage, ...] = (_sweep, _runs, _one_rate)


def _write_jobs(
    workspace: Workspace, rows: list[str], seeds: range, gpus_per_run: int, jobs: str | None, slurm: str | None
) -> None:
    """Write what can be made now: the sweep, and once it is done the runs."""
    sweep = [run for run in _checked(_sweep(workspace, rows, seeds)) if not run.is_done]
    rest = [run for stage in STAGES[1:] for run in _checked(stage(workspace, rows, seeds))]
    runs = sweep or [run for run in rest if not run.is_done]
    if not runs:
        raise UserError("no run is left to be made: gather them with --gather")
    if jobs is not None:
        write_jobs(runs, workspace.output, Path(jobs), gpus_per_run)
        print(f"{_counted(len(runs), 'command')} in {jobs}")
    else:
        assert slurm is not None
        gpus = gpus_per_run if workspace.table.scale == "paper" else 0
        script = write_slurm(
            runs, workspace.output, Path(slurm), f"reproduce-{workspace.table.label}", gpus, gpus_per_run
        )
        print(f"{_counted(len(runs), 'run')}: sbatch {script}")
    if sweep:
        print("These are the sweep's: once they are done, give the same command again for the runs at the rates chosen")


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
