"""See one rank of a job make one step, without the machines."""

import json as json_format
import logging
from collections.abc import Sequence
from typing import Annotated, Any

from moe_mamba.config_file import load_config
from moe_mamba.config_types import DEVICES, Range
from moe_mamba.errors import UserError, shown
from moe_mamba.output_file import output, save
from moe_mamba.planning.cluster import PRESETS
from moe_mamba.planning.load import Load


def main(
    *,
    gpus: str,
    rank: Annotated[int, Range(0, DEVICES)] = 0,
    ranks: str | None = None,
    config: str | None = None,
    gpus_per_machine: Annotated[int, Range(1, DEVICES)] = 8,
    gpu: str = "h100",
    load: str = "even",
    start: bool = False,
    json: str | None = None,
    **overrides: Any,
) -> None:
    """Make one training step of one rank of a job on a CPU: its real code, with tensors that have no numbers.

    Prints memory by kind, every collective, every wait for the device and every mix of devices. Ends with one line and
    exit code 1 where the real step would break.

    Args:
        gpus: processes of the job; with --start several numbers, as 8,1024,16384.
        rank: of the one that makes the step.
        ranks: all, or several numbers, as 0,17,1023: check instead that they agree on what they send to one another. Of
            all, two of each role make two micro-steps, and the others follow from the layout.
        config: YAML file; every key at its default where none is given.
        gpus_per_machine: processes on a machine.
        gpu: whose kernels are chosen: a100-80, h100, h200 or b200.
        load: how tokens spread over experts: even, skewed:FACTOR, or run:FOLDER of a run that has trained.
        start: in the place of a step, print what the start of a run takes of rank 0 and of the last rank in worlds of
            each number of processes.
        json: file to write everything to.
        overrides: any key of the configuration, as --section.key=value.
    """
    settings, spread = load_config(config, overrides), Load.parse(load)
    worlds = _numbers("gpus", gpus, 1)
    asked = {"rank": rank or None, "ranks": ranks, "load": None if load == "even" else load, "json": json}
    _check_flags(start, worlds, {name for name, value in asked.items() if value is not None})
    _check(worlds, rank, gpus_per_machine, gpu, start)
    some = None if ranks in (None, "all") else _several(str(ranks), worlds[0])
    file = None if json is None else output(json, ".json", "--json")
    logging.disable(logging.WARNING)  # of DeepSpeed: that there is no GPU, and more that is as it must be here
    if start:
        from moe_mamba.rehearsal.start_table import start_table

        print(start_table(settings, worlds, machine=gpus_per_machine, gpu=gpu))
        return
    if ranks is not None:
        from moe_mamba.rehearsal.all_ranks import check_all, check_some

        where: dict[str, Any] = {"machine": gpus_per_machine, "gpu": gpu}
        if some is None:
            check_all(settings, worlds[0], spread, print, **where)
        else:
            check_some(settings, worlds[0], some, spread, print, **where)
        return
    from moe_mamba.rehearsal.report import table, to_json  # DeepSpeed and Megatron load for seconds
    from moe_mamba.rehearsal.step import rehearse

    report = rehearse(settings, worlds[0], rank, spread, gpus_per_machine=gpus_per_machine, gpu=gpu)
    print(table(report), flush=True)
    if spread != Load() and not report.matrices:
        print(f"--load={spread.text} changes nothing here: each GPU has all experts (parallel.expert=1)")
    if file is not None:
        save(file, json_format.dumps(to_json(report)))


def _check_flags(start: bool, worlds: Sequence[int], given: set[str]) -> None:
    """Refuse flags that nothing would read."""
    if start and given:
        raise UserError("--start counts what the start takes: leave out --rank, --ranks, --load and --json")
    if "ranks" in given and given & {"rank", "json"}:
        raise UserError("--ranks compares ranks: leave out --rank and --json")
    if not start and len(worlds) > 1:
        raise UserError(
            f"--gpus={','.join(map(str, worlds))}: a step is made in one world: give one number, or --start"
        )


def _check(worlds: Sequence[int], rank: int, machine: int, gpu: str, start: bool) -> None:
    """Refuse what cannot be before DeepSpeed loads."""
    if gpu not in PRESETS:
        raise UserError(f"--gpu={shown(gpu)[1:-1]} is not known: choose one of {', '.join(PRESETS)}")
    for gpus in worlds:
        if gpus > machine and gpus % machine:
            raise UserError(
                f"--gpus={gpus} is no whole number of machines of {machine}: give {gpus // machine * machine}, or "
                "--gpus_per_machine"
            )
    if not start and rank >= worlds[0]:
        raise UserError(f"--rank={rank}: {worlds[0]:,} GPUs have ranks from 0 to {worlds[0] - 1:,}")


def _several(text: str, gpus: int) -> list[int]:
    """Ranks to compare.

    Raises:
        UserError: they are not several ranks of the world.
    """
    some = _numbers("ranks", text, 0)
    if max(some) >= gpus:
        raise UserError(f"--ranks={max(some)}: {gpus:,} GPUs have ranks from 0 to {gpus - 1:,}")
    if len(set(some)) == 1:
        raise UserError(f"--ranks={shown(text)[1:-1]} compares nothing: give several ranks, or --rank={some[0]}")
    return some


def _numbers(flag: str, text: str, least: int) -> list[int]:
    """Numbers with commas between them.

    Raises:
        UserError: they are none, or too small or large.
    """
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 4000 for part in parts):
        raise UserError(f"--{flag}={shown(text)[1:-1]} is no number, nor several with commas between them")
    numbers = [int(part) for part in parts]
    if wrong := [number for number in numbers if not least <= number <= DEVICES]:
        raise UserError(f"--{flag}={shown(wrong[0])} must be from {least} to {DEVICES:,}")
    return numbers
