"""What rank 0 prepares before any process group is made, so that the user's mistakes end a run before it began."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_mamba.checkpoint import store
from moe_mamba.config import Config, ParallelConfig
from moe_mamba.config_file import parse_config
from moe_mamba.data.tokenizer import load_tokenizer
from moe_mamba.model.pattern import has_experts
from moe_mamba.parallel.parallelize import check_compiler
from moe_mamba.parallel.placement import check_shards
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.fit import check_fit
from moe_mamba.planning.micro_batch import choose_micro_batch
from moe_mamba.run.console import Screen
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.metrics import lacks_validation
from moe_mamba.run.restore import check_resumable, find_weights
from moe_mamba.train.corpora import Corpora, open_corpora
from moe_mamba.train.verification import verify_at_once


@dataclass(frozen=True)
class StartState:
    """Where a run starts from, the same on all ranks.

    Attributes:
        config: as it was asked for, with the size of the vocabulary.
        newest: the checkpoint to go on from.
        description: what it says beside its tensors; empty where there is none.
        done: steps that it has made.
        warm: the checkpoint whose weights a fresh run takes.
        micro_batch: sequences that a device works on at once.
        is_verified: the corpora were read whole, or need not be.
        is_unvalidated: the run was stopped in the validation after its last step, which is still to be made.
    """

    config: Config
    newest: Path | None
    description: dict[str, Any]
    done: int
    warm: Path | None
    micro_batch: int
    is_verified: bool
    is_unvalidated: bool = False


def check(config: Config, world: World) -> Topology:
    """Refuse, on every rank alike, what cannot run here; the layout.

    Raises:
        UserError: the layout does not fit, a process has no device, or a compiler is missing.
    """
    world.check_devices()
    topology = Topology.of(config, world)
    # A vocabulary of any size can be sharded: it is padded.
    check_shards(config if config.has_vocabulary else config.with_vocabulary(1), topology)
    check_compiler(config.train)
    return topology


def prepare_run(
    config: Config, folder: RunFolder, screen: Screen, topology: Topology
) -> tuple[StartState, RunPlan, Corpora | None]:
    """Find the checkpoint, prepare the corpora, choose the micro-batch; only for rank 0.

    Returns:
        The start state, the plan, and the corpora; None for a run that is finished, which needs none.

    Raises:
        UserError: checkpoints, weights or corpora are missing, damaged, or do not fit; or the memory is too small.
    """
    newest = store.newest(folder.checkpoints, screen.say, check_resumable)
    if newest is None and any(folder.checkpoints.glob("step-*")):
        screen.say("restart   there is no usable checkpoint: training starts from step 0")
    done = store.step_of(newest) if newest else 0
    description = store.read_description(newest) if newest else {}
    config = _with_vocabulary(config, description)
    plan = RunPlan.of(config, topology)
    if warning := check_fit(plan):
        screen.say(warning)
    warm = find_weights(plan.model, config.train.warm_start) if config.train.warm_start and not newest else None
    if newest is None:
        folder.forget_tokenizer()
    is_unvalidated = newest is not None and validates_after(config, done) and lacks_validation(folder.path, done)
    corpora = open_corpora(config, folder, screen.say) if done < config.steps or is_unvalidated else None
    if newest and corpora:
        corpora.check_unchanged(description, folder)
    is_verified = not (config.data.verify and corpora) or verify_at_once(corpora, folder, screen.say)
    micro_batch = choose_micro_batch(plan)
    start = StartState(config, newest, description, done, warm, micro_batch, is_verified, is_unvalidated)
    return start, plan, corpora


def validates_after(config: Config, step: int) -> bool:
    """Whether a run scores its validation sets after a step."""
    every = config.train.validate_every
    return step == config.steps or bool(every and step % every == 0)


def _with_vocabulary(config: Config, description: dict[str, Any]) -> Config:
    """Where ``model.vocab_size`` is null: the size that a run goes on with, or the tokenizer's for a new one."""
    if config.has_vocabulary:
        return config
    if description:
        return config.with_vocabulary(parse_config(description["config"]).model.vocab_size)
    return config.with_vocabulary(load_tokenizer(config.data.tokenizer).vocab_size)


def accumulation_changes(config: Config, start: StartState, micro_steps: int) -> list[str]:
    """What a run that goes on with other micro-batches than its checkpoint's should say: a line, or none."""
    before = start.description
    parallel = parse_config(before["config"]).parallel
    was = before["micro_steps"], _routed_together(before["micro_batch"], parallel)
    now = micro_steps, _routed_together(start.micro_batch, config.parallel)
    by_device = config.moe.balance_over == "device"
    changed = []
    if config.moe.balance == "loss" and (was[0] != now[0] or (by_device and was[1] != now[1])):
        changed.append("the balance loss")
    if config.moe.capacity_factor is not None and was[1] != now[1]:
        changed.append("the capacity of experts")
    if not has_experts(config.model, config.moe) or not changed:
        return []
    return [
        f"note      {was[0]} micro-steps of {was[1]:g} sequences per device became {now[0]} of {now[1]:g}: "
        f"{' and '.join(changed)}, computed for each, {'change' if len(changed) > 1 else 'changes'} slightly"
    ]


def _routed_together(micro_batch: int, parallel: ParallelConfig) -> float:
    """Sequences whose tokens a device routes at once: tensor-parallel ranks share those of a micro-batch."""
    return micro_batch if parallel.expert_tensor else micro_batch / parallel.tensor
