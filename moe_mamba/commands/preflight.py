"""Look at machines, network, folders and data before a run: what ``launch/preflight.py`` runs, under any launcher."""

import os
from pathlib import Path
from typing import Any

from moe_mamba.command_line import run_command
from moe_mamba.config_file import load_config, reference
from moe_mamba.config_types import LocalRank
from moe_mamba.errors import UserError
from moe_mamba.installation import CONFIGS
from moe_mamba.parallel.launcher import fill_environment

USAGE = """Say in words what is wrong with the machines that a run is to have, and measure them, in under two minutes.

  deepspeed launch/preflight.py [--config FILE] [--output FILE] [--section.key=value ...]     in a checkout
  deepspeed --module moe_mamba.commands.preflight [--config FILE] [--output FILE] [...]       installed

Launcher, configuration and keys as for training; nothing of the run is begun. A line for each finding: ok, a warning,
or refused, which ends in exit code 2. Numbers and findings go to preflight.json in run.folder, or to --output:
"""


def main(
    *,
    config: str | Path | None = None,
    output: str | None = None,
    help: bool = False,
    local_rank: LocalRank = None,
    **overrides: Any,
) -> None:
    """Look at the world that this launcher starts, and measure it.

    Args:
        config: YAML file; configs/demo.yaml where none is given.
        output: file for the report; preflight.json in run.folder where none is given.
        help: print what the report holds, and every key.
        local_rank: launchers add it; the environment says the same.
        overrides: any key of the configuration, as --section.key=value.
    """
    if help:
        from moe_mamba.preflight.report import schema

        print(f"{USAGE}\n{schema()}\n\nEvery key of the configuration, its default and its meaning:\n\n{reference()}")
        return
    fill_environment(local_rank)
    settings = load_config(config or CONFIGS / "demo.yaml", overrides)

    from moe_mamba.run.console import Screen
    from moe_mamba.run.folder import RunFolder

    folder = RunFolder(settings.run.folder)
    try:
        folder.open(settings)
        log = folder.log
    except UserError:  # what is wrong with the folder is a finding, which all ranks are to hear
        log = Path(os.devnull)
    with Screen(log) as screen:
        from moe_mamba.preflight.full_form import preflight

        report = Path(output) if output else folder.preflight
        if output:
            _check_writable(report)
        refused = preflight(settings, report, screen)
    if refused:
        number = f"{len(refused)} findings are" if len(refused) > 1 else "a finding is"
        raise UserError(f"{number} refused, see above; first: {refused[0].line}")


def _check_writable(report: Path) -> None:
    """Refuse, before two minutes are spent, a report that rank 0 cannot write."""
    if int(os.environ["RANK"]) == 0 and not os.access(report.parent, os.W_OK | os.X_OK):
        raise UserError(f"{report} cannot be written: make the folder {report.parent}, or give another --output")


if __name__ == "__main__":
    run_command(main)
