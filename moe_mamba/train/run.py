"""A training run, from top to bottom: world, what rank 0 prepares, corpora, and the loop over steps (`trainer.py`)."""

import os
from contextlib import nullcontext

import torch

from moe_mamba.config import Config
from moe_mamba.faults.stopping import stopping
from moe_mamba.faults.watchdog import Watch
from moe_mamba.parallel.distributed import from_first, start_world
from moe_mamba.parallel.meeting import Meeting
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import World
from moe_mamba.preflight.short_form import check_machines
from moe_mamba.run.console import Screen
from moe_mamba.run.folder import RunFolder
from moe_mamba.train import report
from moe_mamba.train.corpora import open_corpora
from moe_mamba.train.setup import check, prepare_run
from moe_mamba.train.start_up import StartUp
from moe_mamba.train.trainer import Trainer


def train(config: Config, folder: RunFolder, screen: Screen) -> bool:
    """Train as `config` says, in `folder`, going on from its newest checkpoint if there is one.

    Returns:
        Whether all steps are made; where not, the run was stopped, and is saved.

    Raises:
        UserError: the input is wrong; raised before any process group is made.
        RunStopped: the run has diverged, or the disk or a GPU's memory is full.
    """
    start_up = StartUp()
    start_up.reached("imports")
    world = World.from_environment()
    topology = check(config, world)
    if config.train.deterministic:
        # cuBLAS varies from run to run unless its workspace is fixed before the first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    alone = folder.locked(screen.say) if world.is_first else nullcontext()
    with Meeting(world, screen.shout) as meeting, alone, Watch(config, screen, world) as watch:
        check_machines(config, world, meeting.store, screen.say)
        start_up.reached("machines")
        start, plan, corpora = prepare_run(config, folder, screen, topology) if world.is_first else (None, None, None)
        start_up.reached("corpora")
        meeting.start()
        start_world(world)
        with stopping(folder, world):
            watch.join()
            start = from_first(start)
            assert start is not None
            start_up.reached("groups")
            config = start.config
            if start.done >= config.steps and not start.is_unvalidated:
                watch.is_done = True
                report.finished(config, folder, screen, start.done, world)
                return True
            corpora = corpora or open_corpora(config, folder, screen.say)
            plan = plan or RunPlan.of(config, topology)
            start_up.reached("corpora")
            return Trainer(plan, folder, screen, corpora, start, watch, start_up).run()
