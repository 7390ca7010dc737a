"""The benchmark's row ``scaling``: training steps of 1, 2 and 4 gloo processes, each with as much work as one alone."""

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.pairs import Row, compare
from moe_mamba.config import Config, DataConfig, ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from moe_mamba.parallel.topology import Topology, World

LAYOUTS = {"data": "data-parallel", "expert": "experts over all processes", "tensor": "tensor-parallel over 2"}
# Imported once, by the server that the processes are forked from.
PRELOADED = ["moe_mamba.parallel.engine", "moe_mamba.parallel.expert", "moe_mamba.train.objective"]
KINDS = {
    "allreduce": "all-reduce",
    "allgather": "all-gather",
    "reducescatter": "reduce-scatter",
    "alltoall": "all-to-all",
}


@dataclass(frozen=True)
class ScalingRow(Row):
    """A row that says as well how many cores the processes share, and what part of the step each collective takes."""

    cores: int
    collectives: dict[str, float]


@dataclass(frozen=True)
class ScalingShapes:
    """What is measured: ``tokens`` of a process and step, in sequences of ``length``."""

    tokens: int = 1024
    length: int = 256
    d_model: int = 256
    pairs: int = 4  # of Mamba and experts
    worlds: tuple[int, ...] = (2, 4)
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    warming: int = 5  # steps before any is timed
    timed: int = 3  # steps in which collectives are timed
    precision: Literal["fp32", "bf16"] = "fp32"

    @staticmethod
    def choose(tiny: bool) -> "ScalingShapes":
        """The shapes that docs/measurements.md reports, or tiny ones."""
        return ScalingShapes(32, 16, 16, 1, (2,), ("expert",), 1, 1) if tiny else ScalingShapes()

    def config(self, ranks: int, layout: str) -> Config:
        """``ME`` with 8 dropless experts under ZeRO 1; tensor-parallel ranks share the tokens of as many processes."""
        tensor = 2 if layout == "tensor" else 1
        micro_batch = self.tokens // self.length * tensor
        return Config(
            model=ModelConfig(pattern="ME", repeat=self.pairs, d_model=self.d_model, vocab_size=512),
            moe=MoEConfig(experts=8, capacity_factor=None),
            data=DataConfig(sequence_length=self.length),
            train=TrainConfig(
                global_batch=micro_batch * ranks // tensor, micro_batch=micro_batch, precision=self.precision
            ),
            parallel=ParallelConfig(tensor=tensor, expert=ranks if layout == "expert" else 1, zero=1),
        )


def scaling_rows(shapes: ScalingShapes, repeats: int) -> list[Row]:
    """Steps of several processes of one thread each against the step of one, in turns; the other world waits.

    The ratio is time of one / time of several: 1 is perfect weak scaling, and the goal, cores / processes where there
    are fewer cores, is what processes that never wait for one another could reach. The first row measures one process
    against itself: how far it is from 1 is noise.
    """
    start_server(shapes)
    with Processes(1, "data", shapes) as single:
        rows = [_row(single, single, shapes, repeats)]
        for layout in shapes.layouts:
            for ranks in shapes.worlds:
                with Processes(ranks, layout, shapes) as several:
                    rows.append(_row(several, single, shapes, repeats))
    return rows


def _row(several: "Processes", single: "Processes", shapes: ScalingShapes, repeats: int) -> Row:
    ranks, cores = several.ranks, os.cpu_count() or 1
    pair = compare(several.step, single.step, repeats)
    collectives = several.collectives(shapes.timed)
    kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in sorted(collectives.items()))
    share = f"{sum(collectives.values()):.1%} in collectives" + (f" ({kinds})" if kinds else "")
    world = f"{ranks} processes, {LAYOUTS[several.layout]}" if ranks > 1 else "1 process"
    name = f"weak scaling, {world}, ME x {shapes.pairs}, d {shapes.d_model}, {shapes.tokens:,} tokens each, {share}"
    against = f"1 process, {cores} cores"
    return ScalingRow(name, against, "ms", *pair, goal=min(1.0, cores / ranks), cores=cores, collectives=collectives)


class Processes:
    """A world of gloo processes that holds a model in its engine, and does a step when it is told to."""

    def __init__(self, ranks: int, layout: str, shapes: ScalingShapes) -> None:
        self.ranks = ranks
        self.layout = layout
        self._shapes = shapes
        self._folder = tempfile.TemporaryDirectory(prefix="scaling-")
        context = multiprocessing.get_context("forkserver")
        self._connections, self._processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_rank, args=(there, rank, ranks, store, layout, shapes), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def __enter__(self) -> "Processes":
        """Do the first steps, in which memory is allocated: after some, all that a step takes was freed by the last."""
        self._ask(self._shapes.warming, timing=False)
        return self

    def __exit__(self, *failure: object) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()
        self._folder.cleanup()

    def step(self) -> None:
        """One step, over when the slowest process is done."""
        self._ask(1, timing=False)

    def collectives(self, steps: int) -> dict[str, float]:
        """Kind of collective -> share of the time of some further steps that processes spend in it, on average."""
        sums: dict[str, float] = defaultdict(float)
        for shares in self._ask(steps, timing=True):
            for kind, share in shares.items():
                sums[kind] += share / self.ranks
        return dict(sums)

    def _ask(self, steps: int, timing: bool) -> list[dict[str, float]]:
        for connection in self._connections:
            connection.send((steps, timing))
        return [connection.recv() for connection in self._connections]


def start_server(shapes: ScalingShapes) -> None:
    """Start the server that processes are forked from: only on CPUs, and what DeepSpeed says goes to standard error.

    Only the table goes to standard output.
    """
    tensor = ["moe_mamba.parallel.tensor"] if "tensor" in shapes.layouts else []
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED + tensor)
    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"):
            forkserver.ensure_running()
    finally:
        os.dup2(output, sys.stdout.fileno())
        os.close(output)


def _rank(connection: Connection, rank: int, ranks: int, store: str, layout: str, shapes: ScalingShapes) -> None:
    """One process: steps when asked, until the other end closes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    from moe_mamba.parallel.distributed import finish_world, start_world

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    world = World(rank, ranks, rank, ranks)
    start_world(world)
    step = training_step(shapes.config(ranks, layout), world)
    with contextlib.suppress(EOFError):
        while True:
            steps, timing = connection.recv()
            seconds: dict[str, float] = defaultdict(float)
            start = time.perf_counter()
            with Timing(seconds) if timing else contextlib.nullcontext():
                for _ in range(steps):
                    step()
            whole = time.perf_counter() - start
            connection.send({kind: spent / whole for kind, spent in seconds.items()})
    finish_world()


def training_step(config: Config, world: World) -> Callable[[], None]:
    """A step of the engine as the trainer makes it: forward, backward, AdamW under ZeRO."""
    from moe_mamba.parallel import engine as engines
    from moe_mamba.parallel.groups import start_groups
    from moe_mamba.parallel.parallelize import build_model
    from moe_mamba.parallel.run_plan import RunPlan
    from moe_mamba.train.objective import Objective

    topology = Topology.of(config, world)
    plan = RunPlan.of(config, topology)
    groups = start_groups(plan)
    model = build_model(plan, groups)
    assert config.train.micro_batch is not None
    engine = engines.build_engine(model, config, groups, config.train.micro_batch)
    generator = torch.Generator().manual_seed(topology.data_rank)
    shape = (config.train.micro_batch, config.data.sequence_length)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
    targets = tokens.roll(-1, 1)
    counted = config.train.global_batch * config.data.sequence_length

    def step() -> None:
        objective = Objective(config.moe, counted, 1, topology, model.balanced_routers())
        output = engine(tokens, targets=targets)
        engine.backward(objective(output.cross_entropy, output.statistics))
        engines.step(engine, config.train.gradient_clip)

    return step


class Timing(TorchDispatchMode):
    """Adds up the seconds from the call of each collective to its end, by kind.

    It sees every operator of torch.distributed, megatron-core's and DeepSpeed's too, and those of the backward pass:
    on a CPU autograd works in the thread that called ``backward``. A collective that would run beside computation is
    waited for on the spot, so that none of its time is missed: while this lasts nothing is hidden behind computation,
    and the share is an upper bound. Waiting for slower ranks counts. Calls in a group of one process move nothing and
    are left out.
    """

    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__()
        self._seconds = seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call the operator; time it, if it is a collective."""
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if _ranks(func.namespace, args) == 1:
            return result
        if func.namespace == "_c10d_functional":
            torch.ops._c10d_functional.wait_tensor(result)
        else:
            dist.Work.unbox(result[-1] if isinstance(result, tuple) else result).wait()
        name = func.name().replace("_", "")
        kind = next((kind for key, kind in KINDS.items() if key in name), name)
        self._seconds[kind] += time.perf_counter() - start
        return result


def _ranks(namespace: str, args: tuple) -> int:
    """How many processes an operator brings together: 1, unless it is a collective."""
    if namespace == "_c10d_functional" and isinstance(args[-1], str):
        return dist.distributed_c10d._resolve_process_group(dist.GroupName(args[-1])).size()
    if namespace == "c10d":
        objects = (argument for argument in args if isinstance(argument, torch.ScriptObject))
        return next(dist.ProcessGroup.unbox(one).size() for one in objects if "ProcessGroup" in str(one._type()))
    return 1
