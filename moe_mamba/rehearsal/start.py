"""What one rank does at the start of a run as a function of the number of ranks, by counting, without the machines.

The rank is real: the meeting's code, the comparison of machines, corpora, the hub, the plan, the process groups, the
sharded model, DeepSpeed's engine and the checkpoint's reader. The others are what it hears of them: at the store and in
collectives of objects each says what this rank says, to the hub another process connects in their places, in the
checkpoint each has written as much, and groups send nothing.
"""

import contextlib
import gc
import math
import tempfile
from pathlib import Path

from moe_mamba.config import Config
from moe_mamba.errors import UserError
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.groups import Groups, start_groups
from moe_mamba.parallel.parallelize import fill_model, shard_copy
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology
from moe_mamba.rehearsal import device
from moe_mamba.rehearsal.collectives import Recording
from moe_mamba.rehearsal.recording import Stage
from moe_mamba.rehearsal.start_files import read_checkpoint, read_corpora, with_corpus
from moe_mamba.rehearsal.start_parts import Part, Parts
from moe_mamba.rehearsal.start_store import meet
from moe_mamba.rehearsal.start_world import agree, join_watches
from moe_mamba.rehearsal.world import fake_world
from moe_mamba.train.setup import StartState


def fitted(config: Config, gpus: int) -> Config:
    """The configuration in a world of another size: what does not divide it is reduced, the batch grows with it.

    Raises:
        UserError: the sizes do not fit at all.
    """
    parallel, train = config.parallel, config.train
    tensor = math.gcd(parallel.tensor, gpus)
    expert_tensor = parallel.expert_tensor and tensor > 1
    expert = math.gcd(parallel.expert, gpus // tensor if expert_tensor else gpus)
    changed = parallel.model_copy(update={"tensor": tensor, "expert": expert, "expert_tensor": expert_tensor})
    micro_batch = train.micro_batch or tensor
    batch = train.model_copy(update={"micro_batch": micro_batch, "global_batch": gpus // tensor * micro_batch})
    return config.model_copy(update={"parallel": changed, "train": batch})


def start_costs(
    config: Config, gpus: int, rank: int, *, machine: int = 8, gpu: str = "h100", measured: bool = False
) -> list[Part]:
    """Start one rank of a world, and count.

    Args:
        config: of the run, with the size of the vocabulary; see ``fitted``.
        gpus: processes of the world.
        rank: the one that starts.
        machine: processes of a machine.
        gpu: whose kernels are chosen.
        measured: measure Python's memory, which makes all several times as slow, and leave out model and engine.

    Raises:
        UserError: the sizes do not fit.
    """
    if not config.has_vocabulary:
        raise UserError("model.vocab_size is open until a run chooses it: give --model.vocab_size=N")
    device.stand_for(gpu)
    local = min(machine, gpus)
    first, world = (device.RehearsedWorld(one, gpus, one % local, local) for one in (0, rank))
    parts = Parts(measured)
    gc.collect()
    gc.freeze()  # of what libraries keep, no part's collection of garbage looks through again
    with tempfile.TemporaryDirectory() as name:
        config = with_corpus(fitted(config, gpus), Path(name))
        said = {} if world.is_first else meet(config, first, Parts(False), {})
        meet(config, world, parts, said)
        read_corpora(config, parts)
        with fake_world(world):
            topology = Topology.of(config, world)
            join_watches(config, world, parts)
            agree(StartState(config, None, {}, 0, None, config.train.micro_batch or 1, True), topology, parts)
            with parts.part("plan"):
                plan = RunPlan.of(config, topology)
            with parts.part("groups") as one, Recording() as calls:
                groups = start_groups(plan)
            one.note(calls.found)
            if not measured:
                _build(plan, groups, parts)
            read_checkpoint(Path(name) / "checkpoints", world, parts)
    gc.unfreeze()
    return parts.found


def _build(plan: RunPlan, groups: Groups, parts: Parts) -> None:
    config = plan.config
    model = shard_copy(plan, groups)
    stage = Stage()
    with device.WithoutNumbers(allow_non_fake_inputs=True), stage:
        with parts.part("model") as one:
            fill_model(model, plan, groups)
        one.note(stage.found)
        before = len(stage.found)
        model.to = lambda *_, **__: model  # type: ignore[method-assign, assignment]
        assert config.train.micro_batch is not None
        with parts.part("engine") as one:
            engine = engines.build_engine(model, config, groups, config.train.micro_batch)
        one.note(stage.found[before:])
        one.shards = len(engines.state_shards(engine, plan.shards))
        with contextlib.suppress(AssertionError):  # it wants a world of its own making
            engine.destroy()
