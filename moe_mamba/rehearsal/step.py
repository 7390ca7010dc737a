"""One training step of one rank of a large world, as the trainer makes it: real code, tensors without numbers.

Real are the plan, the groups' members, the sharded model, DeepSpeed's engine, objective, passes, optimizer and all that
is asked of torch. Fake are the device, what groups send, and every number.
"""

import contextlib
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from moe_mamba.config import Config
from moe_mamba.data.batch import Batch
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.faults.signals import Stop
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel import zero3
from moe_mamba.parallel.gradients import held_gradients
from moe_mamba.parallel.groups import start_groups
from moe_mamba.parallel.parallelize import fill_model, shard_copy
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.planning.cluster import Cluster
from moe_mamba.planning.load import Load
from moe_mamba.planning.micro_batch import largest_micro_batch
from moe_mamba.rehearsal import device
from moe_mamba.rehearsal.check import check_cover, check_groups, check_model
from moe_mamba.rehearsal.collectives import Collective
from moe_mamba.rehearsal.load import Matrix, Rows
from moe_mamba.rehearsal.memory import Memory
from moe_mamba.rehearsal.recording import HERE, ROOT, Fault, Note, Stage
from moe_mamba.rehearsal.world import fake_world
from moe_mamba.train.feed import GlobalBatch
from moe_mamba.train.pace import Pace
from moe_mamba.train.setup import check
from moe_mamba.train.steps import Steps

WARM_UP = 3  # steps of ZeRO-3: it records the order of modules in the first, and compares it with other ranks' after it


@dataclass(frozen=True)
class Report:
    """What a rank did in a step.

    Attributes:
        micro_batch: sequences; where the configuration leaves it open, the most that the plan finds room for.
        collectives: of the step, in order.
        places: lines of our code that ordered them.
        start: collectives before the step: groups, weights, engine.
        memory: by kind.
        mixed: operators with operands on the device and in the host's memory.
        waits: where the host waits for the device.
        host: what DeepSpeed's code keeps in the host's memory: line of our code -> bytes.
        matrices: router -> rows that each rank of its expert group sends to each expert; none where no size depends on
            the data.
        graphs: that torch.compile has traced, with train.compile.
        breaks: why it broke a layer into several graphs -> how often.
        seconds: that the rehearsal took.
    """

    micro_batch: int
    collectives: list[Collective]
    places: list[str]
    start: list[Collective]
    memory: Memory
    mixed: list[Note]
    waits: list[Note]
    host: dict[str, int]
    matrices: dict[str, Matrix]
    graphs: int
    breaks: dict[str, int]
    seconds: float


def rehearse(
    config: Config, gpus: int, rank: int, load: Load | None = None, *, gpus_per_machine: int = 8, gpu: str = "h100"
) -> Report:
    """Make one step of a rank.

    Args:
        config: of the run; with the size of the vocabulary.
        gpus: processes of the run.
        rank: of the one.
        load: how tokens spread over experts, where routing is dropless; None: evenly.
        gpus_per_machine: processes of a machine.
        gpu: whose kernels are chosen, one of ``device.GPUS``.

    Raises:
        UserError: what is asked for cannot be, as a run's start would say.
        RunStopped: what would break the real step, and where.
    """
    begin = time.perf_counter()
    if not config.has_vocabulary:
        raise UserError("model.vocab_size=null is only known once a run has its tokenizer: give --model.vocab_size=N")
    if not 0 <= rank < gpus:
        raise UserError(f"--rank={rank}: {gpus:,} GPUs have ranks from 0 to {gpus - 1:,}")
    device.stand_for(gpu)
    local = min(gpus_per_machine, gpus)
    world = device.RehearsedWorld(rank, gpus, rank % local, local)
    plan = RunPlan.of(config, check(config, world))
    micro_batch = config.train.micro_batch or largest_micro_batch(plan, Cluster.of(gpu).memory)
    stage = Stage()
    rows = Rows(load or Load(), stage.note_wait)
    with _quiet(), fake_world(world), _one_line(stage, world):
        return _rehearse(plan, micro_batch, stage, rows, begin)


def _rehearse(plan: RunPlan, micro_batch: int, stage: Stage, rows: Rows, begin: float) -> Report:
    check_cover(plan)
    groups = start_groups(plan)
    check_groups(groups)
    model = shard_copy(plan, groups)
    config = plan.config
    rows.give(model, config.train.compile)
    asking = rows.answering(config.train.compile)
    with device.WithoutNumbers(allow_non_fake_inputs=True), stage, asking, _compiling_for_nobody():
        fill_model(model, plan, groups)
        check_model(model, plan, stage)
        stage.phase = "engine"
        engine = engines.build_engine(model, config, groups, micro_batch)
        try:
            _tag_state(engine, stage)
            since = stage.ledger.moment
            before = _steps(engine, plan, stage, micro_batch)
            memory = stage.ledger.measure(since)
            host: dict[str, int] = {}
            for one in stage.ledger.live():
                if one.is_host and one.is_deepspeed:
                    host[one.place] = host.get(one.place, 0) + one.bytes
        finally:
            with contextlib.suppress(AssertionError):  # it wants a world of its own making
                engine.destroy()
    return Report(
        micro_batch,
        stage.found[before:],
        stage.places[before:],
        stage.found[:before],
        memory,
        stage.mixed,
        stage.waits,
        host,
        rows.matrices,
        *_graphs(config.train.compile),
        time.perf_counter() - begin,
    )


def _tag_state(engine: Any, stage: Stage) -> None:
    """Say which memory is the optimizer's and the weights'.

    Raises:
        Fault: the optimizer steps, or keeps, what is not fp32.
    """
    optimizer, zero = engines.base_optimizer(engine), engine.zero_optimization_stage()
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if zero == 3:
        stepped = zero3.masters(engine)
    state = [value for one in optimizer.state.values() for value in one.values()]
    for tensor in (*stepped, *state):
        if tensor.dtype != torch.float32:
            raise Fault(f"the optimizer steps {tensor.dtype} numbers, and is promised fp32")
    stage.ledger.tag([*stepped, *state], "optimizer")
    _tag_weights(engine, stage)
    if zero == 3:
        stage.ledger.tag([engine.optimizer.grad_partitions_flat_buffer], "gradients")


def _tag_weights(engine: Any, stage: Stage) -> None:
    """Say which memory is the weights': of ZeRO-3 this rank's parts, and what is gathered now."""
    model = engine.module
    stage.ledger.tag((*model.parameters(), *model.buffers()), "weights")
    parts = (getattr(parameter, "ds_tensor", None) for parameter in model.parameters())
    stage.ledger.tag((part for part in parts if part is not None), "weights")


def _tag_gradients(engine: Any, stage: Stage) -> None:
    """Say which memory holds gradients from pass to pass."""
    for parameter in engine.module.parameters():
        kept = (parameter.grad, getattr(parameter, "grad_accum", None))
        stage.ledger.tag((gradient for gradient in kept if gradient is not None), "gradients")


def _steps(engine: Any, plan: RunPlan, stage: Stage, micro_batch: int) -> int:
    """Make steps, of which the last is like all that would follow; the number of collectives before it."""
    config, topology = plan.config, plan.topology
    backward = engine.backward

    def begin_forward(*_: Any) -> None:
        stage.phase = "forward"
        _tag_gradients(engine, stage)
        stage.ledger.begin_pass()

    def run_backward(loss: torch.Tensor) -> None:
        stage.phase = "backward"
        backward(loss)
        stage.phase = "update"
        if engine.is_gradient_accumulation_boundary():
            stage.ledger.tag((gradient for _, gradient in held_gradients(engine)), "gradients")

    engine.module.register_forward_pre_hook(begin_forward)
    engine.backward = run_backward
    share = topology.sequences_per_data_rank(config.train.global_batch, micro_batch)
    shape = (micro_batch, config.data.sequence_length)
    starts = torch.zeros(shape, dtype=torch.bool) if config.data.reset_at_document else None
    parts = [Batch(torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64), starts)]
    batch = GlobalBatch(1, parts * (share // micro_batch), share * shape[1])
    # No step is measured, and nothing is said on a screen.
    pace = Pace(topology, 2**62, [""] * topology.world.size, cast(Any, None), cast(Any, None))
    steps = Steps(engine, plan, len(batch.parts), Stop(), pace)
    steps._targets = torch.ones((), dtype=torch.float64, device=topology.world.device)  # as `begin` leaves it
    for number in range(1, WARM_UP if config.parallel.zero == 3 else 1):
        steps.make(number, batch, batch, config.train.learning_rate)
    before, stage.is_warm, stage.phase = len(stage.found), True, "step"
    steps.make(WARM_UP, batch, batch, config.train.learning_rate)
    _tag_weights(engine, stage)  # with what ZeRO-3 leaves gathered
    return before


def _graphs(is_compiled: bool) -> tuple[int, dict[str, int]]:
    """Graphs that torch.compile has traced, and why it broke layers into several."""
    if not is_compiled:
        return 0, {}
    from torch._dynamo.utils import counters

    breaks = {" ".join(reason.split()): count for reason, count in counters["graph_break"].items()}
    return counters["stats"]["unique_graphs"], breaks


@contextlib.contextmanager
def _compiling_for_nobody() -> Iterator[None]:
    """Let ``train.compile`` trace layers as it does, and run their graphs as they are: no code is generated."""
    compile_module, began = torch.nn.Module.compile, False

    def trace(module: torch.nn.Module) -> None:
        nonlocal began
        if not began:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            began = True
        compile_module(module, backend="aot_eager")

    with device.replaced(torch.nn.Module, "compile", trace):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what libraries warn of where tensors are fake, or torch is newer than they."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Accessing the data pointer of FakeTensor", UserWarning)
        warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
        yield


@contextlib.contextmanager
def _one_line(stage: Stage, world: device.RehearsedWorld) -> Iterator[None]:
    """Turn whatever breaks into a line that says what, in which phase, and where in our code."""
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        text = lines[0] if lines else type(error).__name__
        raise RunStopped(
            f"rank {world.rank} of {world.size:,} would end in its {stage.phase}: {text} ({_place(error)})"
        ) from error


def _place(error: Exception) -> str:
    """The innermost line of our code that an error has passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(ROOT)]
    ours = [frame for frame in frames if not frame.filename.startswith(HERE)] or frames
    if not ours:
        return "outside our code"
    last = ours[-1]
    return f"moe_mamba/{Path(last.filename).relative_to(ROOT)}:{last.lineno} {last.name}"
