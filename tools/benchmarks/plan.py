"""The benchmark's row ``plan``: steps as the plan expects them, against steps that are made, on this machine's CPU.

The plan's constants are those that ``launch/preflight.py`` measures right before, in as many processes; nothing is
fitted to a step.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pairs import Row
from benchmarks.scaling import Processes, ScalingShapes, start_server
from moe_mamba.config import Config, DataConfig, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from moe_mamba.config_file import save_config
from moe_mamba.errors import UserError
from moe_mamba.planning.cluster import Cluster
from moe_mamba.planning.estimate import estimate
from moe_mamba.planning.load import Load
from moe_mamba.preflight.measured import cluster_of

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # that a preflight may take
# Name -> processes, tensor, expert, ZeRO.
LAYOUTS = {
    "one process": (1, 1, 1, 1),
    "data 2, ZeRO 1": (2, 1, 1, 1),
    "data 2, ZeRO 2": (2, 1, 1, 2),
    "tensor 2": (2, 2, 1, 1),
    "expert 2": (2, 1, 2, 1),
    "tensor 2, expert 2": (2, 2, 2, 1),
}


@dataclass(frozen=True)
class PlanRow(Row):
    """A row that says as well how far steps lie apart, and what the plan is made of.

    Attributes:
        spread: least and most of the measured steps, ms.
        parts: of the expected step, ms.
    """

    spread: tuple[float, float]
    parts: dict[str, float]


@dataclass(frozen=True)
class PlanShapes(ScalingShapes):
    """A model of some 12 M parameters with every kind of layer."""

    layouts: tuple[str, ...] = tuple(LAYOUTS)
    steps: int = 10
    repeat: int = 2

    @staticmethod
    def choose(tiny: bool) -> "PlanShapes":
        """The shapes that docs/measurements.md reports, or tiny ones."""
        if tiny:
            return PlanShapes(tokens=32, length=16, d_model=16, layouts=("one process", "expert 2"), steps=2, repeat=1)
        return PlanShapes()

    def config(self, ranks: int, layout: str) -> Config:
        """``ME*-`` with 8 dropless experts; tensor-parallel ranks share the tokens of as many processes."""
        _, tensor, expert, zero = LAYOUTS[layout]
        micro_batch = self.tokens // self.length * tensor
        return Config(
            model=ModelConfig(pattern="ME*-", repeat=self.repeat, d_model=self.d_model, vocab_size=2048),
            moe=MoEConfig(experts=8, capacity_factor=None),
            data=DataConfig(sequence_length=self.length),
            train=TrainConfig(global_batch=micro_batch * ranks // tensor, micro_batch=micro_batch),
            parallel=ParallelConfig(tensor=tensor, expert=expert, zero=zero),
        )


def plan_rows(shapes: PlanShapes) -> list[Row]:
    """For each layout the step that the plan expects, and the median of those that are made; a thread a process."""
    start_server(shapes)
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        worlds = sorted({LAYOUTS[layout][0] for layout in shapes.layouts})
        clusters = {ranks: _measured(ranks, shapes, Path(folder)) for ranks in worlds}
    return [_row(layout, clusters[LAYOUTS[layout][0]], shapes) for layout in shapes.layouts]


def _measured(ranks: int, shapes: PlanShapes, folder: Path) -> Cluster:
    """What a preflight of as many processes says of this machine."""
    layout = next(name for name in shapes.layouts if LAYOUTS[name][0] == ranks)
    config, report = folder / f"{ranks}.yaml", folder / f"{ranks}.json"
    save_config(shapes.config(ranks, layout), config)
    command = [sys.executable, "launch/preflight.py", "--config", str(config), "--output", str(report)]
    command.append(f"--run.folder={folder / 'run'}")
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port = asked.getsockname()[1]
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    processes = []
    for rank in range(ranks):
        own = {name: str(value) for name, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=os.environ | common | own, stdout=sys.stderr, stdin=subprocess.DEVNULL
            )
        )
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if not report.is_file():
        raise UserError(f"the preflight of {ranks} processes ended with {codes}: see what it says above")
    return cluster_of(report)


def _row(layout: str, cluster: Cluster, shapes: PlanShapes) -> Row:
    ranks = LAYOUTS[layout][0]
    expected = estimate(shapes.config(ranks, layout), cluster, ranks, Load()).time
    times = []
    with Processes(ranks, layout, shapes) as world:
        world.step()
        for _ in range(shapes.steps):
            begin = time.perf_counter()
            world.step()
            times.append(1e3 * (time.perf_counter() - begin))
    made, ours = statistics.median(times), 1e3 * expected.seconds
    parts = {name: 1e3 * seconds for name, seconds in expected.parts.items() if seconds}
    name = f"plan of a step, {layout}, ME*- x {shapes.repeat}, d {shapes.d_model}, {shapes.tokens:,} tokens a process"
    against = f"median of {shapes.steps} steps, {min(times):,.0f} to {max(times):,.0f}"
    return PlanRow(name, against, "ms", ours, made, ours / made, 1.0, spread=(min(times), max(times)), parts=parts)
