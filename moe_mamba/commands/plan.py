"""Know a model before paying for it."""

import json as json_format
from typing import Annotated, Any

from moe_mamba.config_file import load_config, reference
from moe_mamba.config_types import DEVICES, Range
from moe_mamba.errors import UserError
from moe_mamba.installation import command
from moe_mamba.planning.memory import plan, table
from moe_mamba.planning.shards import shards_table

USAGE = """Say what a model is and what it takes, before anything starts.

  {command} [--config FILE] [--gpus N] [--json] [--shards] [--section.key=value ...]

Every key, its default and its meaning:
"""


def main(
    *,
    config: str | None = None,
    gpus: Annotated[int | None, Range(1, DEVICES)] = None,
    json: bool = False,
    shards: bool = False,
    help: bool = False,
    **overrides: Any,
) -> None:
    """Print the parameters of a configuration, the work that a token of training takes, and what each device holds.

    Args:
        config: YAML file; every key at its default where none is given.
        gpus: devices to lay it over; as few as parallel.tensor and parallel.expert need where none are given.
        json: print one JSON object instead of a table.
        shards: print how each parameter is sharded, and which stay fp32, instead.
        help: print every key with its default and meaning.
        overrides: any key of the configuration, as --section.key=value.
    """
    if help:
        print(f"{USAGE.format(command=command('plan'))}\n{reference()}")
        return
    if shards and (json or gpus is not None):
        raise UserError("--shards prints a table that is the same for any layout: leave out --json and --gpus")
    settings = load_config(config, overrides)
    if not settings.has_vocabulary:
        raise UserError("model.vocab_size=null is only known once a run has its tokenizer: give --model.vocab_size=N")
    if shards:
        print(shards_table(settings))
        return
    print(json_format.dumps(plan(settings, gpus)) if json else table(settings, gpus))
