"""A trained model in a layout, for commands that train nothing: joining the processes, restoring each one's part."""

import contextlib
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from moe_mamba.checkpoint import store
from moe_mamba.config import Config, ParallelConfig
from moe_mamba.config_file import parse_config
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.parallel.distributed import (
    finish_world,
    has_lost_a_rank,
    on_all,
    on_first,
    start_world,
)
from moe_mamba.parallel.groups import start_groups
from moe_mamba.parallel.parallelize import build_for_inference, weight_shards
from moe_mamba.parallel.placement import check_shards
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.run.restore import Restored, Trained, read_trained, restore_trained

LAYOUT = ("tensor", "expert", "expert_tensor", "timeout")  # keys of the section ``parallel`` that mean something here


@contextlib.contextmanager
def joined(local_rank: int | None = None) -> Iterator[World]:
    """The processes that a launcher started, as a world; without a launcher this one, and no process group.

    What is called in it raises a ``UserError`` on every rank or on none, so that no rank waits for another. Rank 0 may
    prepare things for long; what comes after that calls ``limit_collectives``.

    Args:
        local_rank: what a launcher's flag `--local_rank` says, if there is one.

    Raises:
        LocalError: the launcher's variables are impossible, or contradict one another.
        RunStopped: a rank is gone, or a GPU's memory is full.
    """
    world = World.from_environment(local_rank)
    if world.size == 1:
        yield world
        return
    world.check_devices()
    with _quiet():
        start_world(world)
    try:
        with warnings.catch_warnings():
            # megatron-core calls torch's collectives by names that newer versions of torch write otherwise.
            warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
            yield world
    except UserError:
        finish_world()
        raise
    except torch.OutOfMemoryError:
        line = f"rank {world.rank}: the GPU's memory is full: lower --batch, or shard the model over more ranks"
        print(f"error: {line}", file=sys.stderr)
        raise RunStopped(line, said=True) from None
    except Exception as error:
        if not has_lost_a_rank(error):
            raise
        reason = re.sub(r"^\[.*?\] ", "", str(error).partition("\n")[0])  # without a place in a library's source
        raise RunStopped(
            f"another rank is gone or stands still ({reason}): look for what it said, and give the same command again"
        ) from error
    finish_world()


def layout_from(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the section ``parallel`` among a command's further flags.

    Raises:
        UserError: a flag is none of them.
    """
    layout = {}
    for flag, value in flags.items():
        section, _, key = flag.partition(".")
        if section != "parallel" or not key:
            raise UserError(f"unknown flag --{flag}: --help lists the flags")
        if key in ParallelConfig.model_fields and key not in LAYOUT:
            raise UserError(
                f"{flag}={value} is for training: leave it out; a model is divided by parallel.tensor and "
                "parallel.expert"
            )
        layout[key] = value
    return layout


def restore_in_layout(run_or_step: str | Path, layout: Mapping[str, Any], world: World) -> Restored:
    """This rank's part of a run's newest checkpoint, or of one step's folder; every rank calls it.

    A rank reads the shards that it holds, and no more.

    Args:
        run_or_step: the folder, seen by every rank.
        layout: keys of the section ``parallel``, as ``layout_from`` gives them; the run's own layout does not matter.
        world: from ``joined``.

    Raises:
        UserError: as ``open_trained``, or the layout does not fit; on every rank.
    """
    path = on_first(lambda: store.resolve(run_or_step))  # reads all of it, so only once
    trained, topology = on_all(lambda: _open(path, layout, world))
    if world.size == 1:
        return restore_trained(trained, world.device)
    plan = RunPlan.of(trained.config, topology)
    with _quiet():
        groups = start_groups(plan)
        model = build_for_inference(plan, groups)
    store.load(path, weight_shards(model, plan.shards))
    return Restored(model, trained.tokenizer, trained.config, path, topology)


def _open(path: Path, layout: Mapping[str, Any], world: World) -> tuple[Trained, Topology]:
    """The checkpoint, its configuration in another layout, and that layout."""
    trained = read_trained(path)
    config = parse_config(trained.config.model_dump() | {"parallel": layout})
    topology = Topology.of(_with_any_batch(config, world), world)
    check_shards(_with_any_batch(config, world), topology)
    return Trained(path, config, trained.description, trained.tokenizer), topology


def _with_any_batch(config: Config, world: World) -> Config:
    """The same with a global batch that every layout near this one divides: nothing is trained, so none is refused."""
    parallel = config.parallel
    sizes = range(1, world.size + 2 * parallel.tensor * parallel.expert)
    batch = {"global_batch": math.lcm(*sizes) * parallel.tensor, "micro_batch": None}
    return config.model_copy(update={"train": config.train.model_copy(update=batch)})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries print when they are loaded and connected; the output is the command's."""
    saved = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(nowhere.fileno(), number)
        try:
            yield
        finally:
            for stream, number, descriptor in zip((sys.stdout, sys.stderr), (1, 2), saved, strict=True):
                stream.flush()
                os.dup2(descriptor, number)
                os.close(descriptor)
