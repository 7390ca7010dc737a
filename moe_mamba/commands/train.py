"""Train a model: what ``launch/train.py`` and ``moe-mamba train`` run, on one process or under a launcher."""

from pathlib import Path
from typing import Any

from moe_mamba.command_line import run_command
from moe_mamba.config_file import load_config, reference
from moe_mamba.config_types import LocalRank
from moe_mamba.faults.signals import end_before_the_run
from moe_mamba.installation import CONFIGS
from moe_mamba.parallel.launcher import fill_environment
from moe_mamba.run.outcome import outcome_left

USAGE = """Train a model, or go on with a run where it stopped.

  deepspeed launch/train.py [--config FILE] [--section.key=value ...]                 in a checkout
  moe-mamba train [--config FILE] [--section.key=value ...]                           installed, one process
  deepspeed --module moe_mamba.commands.train [--config FILE] [--section.key=value ...]   installed, several

Without --config, configs/demo.yaml. The same line again resumes the run in run.folder. Every key, its default
and its meaning:
"""


def main(
    *, config: str | Path | None = None, help: bool = False, local_rank: LocalRank = None, **overrides: Any
) -> None:
    """Train the model that `config` and `overrides` describe.

    Args:
        config: YAML file; configs/demo.yaml where none is given.
        help: print every key with its default and meaning.
        local_rank: launchers add it; LOCAL_RANK in the environment says the same.
        overrides: any key of the configuration, as --section.key=value.
    """
    if help:
        print(f"{USAGE}\n{reference()}")
        return
    end_before_the_run()
    fill_environment(local_rank)
    with outcome_left() as outcome:
        settings = load_config(config or CONFIGS / "demo.yaml", overrides)

        from moe_mamba.run.console import Screen
        from moe_mamba.run.folder import RunFolder

        folder = RunFolder(settings.run.folder)
        folder.open(settings)
        with Screen(folder.log) as screen:
            # Imported with the screen in place: these libraries chatter as soon as they are loaded.
            from moe_mamba.train.run import train

            outcome.is_finished = train(settings, folder, screen)


if __name__ == "__main__":
    run_command(main)
