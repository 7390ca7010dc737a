"""See one rank of a job make one step, without the machines."""

import json as json_format
import logging
from pathlib import Path
from typing import Annotated, Any

from moe_mamba.atomic_file import write_atomically
from moe_mamba.config_file import load_config
from moe_mamba.config_types import DEVICES, Range
from moe_mamba.planning.load import Load


def main(
    *,
    gpus: Annotated[int, Range(1, DEVICES)],
    rank: Annotated[int, Range(0, DEVICES)] = 0,
    config: str | None = None,
    gpus_per_machine: Annotated[int, Range(1, DEVICES)] = 8,
    gpu: str = "h100",
    load: str = "even",
    json: str | None = None,
    **overrides: Any,
) -> None:
    """Make one training step of one rank of a job on a CPU: its real code, with tensors that have no numbers.

    Prints memory by kind, every collective, every wait for the device and every mix of devices. Ends with one line and
    exit code 1 where the real step would break.

    Args:
        gpus: processes of the job.
        rank: of the one that makes the step.
        config: YAML file; every key at its default where none is given.
        gpus_per_machine: processes on a machine.
        gpu: whose kernels are chosen: a100, h100, h200 or b200.
        load: how tokens spread over experts: even, skewed:FACTOR, or run:FOLDER of a run that has trained.
        json: file to write everything to.
        overrides: any key of the configuration, as --section.key=value.
    """
    settings, spread = load_config(config, overrides), Load.parse(load)
    logging.disable(logging.WARNING)  # of DeepSpeed: that there is no GPU, and more that is as it must be here
    from moe_mamba.rehearsal.report import table, to_json  # DeepSpeed and Megatron load for seconds
    from moe_mamba.rehearsal.step import rehearse

    report = rehearse(settings, gpus, rank, spread, gpus_per_machine=gpus_per_machine, gpu=gpu)
    if json is not None:
        write_atomically(Path(json), json_format.dumps(to_json(report)))
    print(table(report))
