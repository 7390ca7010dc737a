"""A training run, from top to bottom: corpora, world, model, engine, checkpoint, loop, report."""

import errno
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any, NoReturn

import torch

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.divergence import NextStep
from moe_mamba.checkpoint.saver import Saver
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import Config
from moe_mamba.data.loader import Batch, evaluation_batches
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.evaluation.scores import Scores, evaluate
from moe_mamba.faults.signals import REASONS
from moe_mamba.faults.watchdog import Watch
from moe_mamba.kernels.extension import announce_by
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.routing import update_balance_bias
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.distributed import from_all, from_first, limit_collectives, reduce_over_data, start_world
from moe_mamba.parallel.groups import start_groups
from moe_mamba.parallel.parallelize import build_model
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import World
from moe_mamba.preflight.short_form import check_machines
from moe_mamba.run.console import Screen
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.metrics import MetricsWriter
from moe_mamba.train import report
from moe_mamba.train.corpora import Corpora, open_corpora
from moe_mamba.train.diagnosis import first_bad_output, first_bad_parameter
from moe_mamba.train.objective import Objective, StepSums
from moe_mamba.train.profile import profiler
from moe_mamba.train.schedule import learning_rate
from moe_mamba.train.setup import StartState, accumulation_changes, check, prepare_run
from moe_mamba.train.verification import Verification

log = logging.getLogger(__name__)


def train(config: Config, folder: RunFolder, screen: Screen) -> None:
    """Train as `config` says, in `folder`, going on from its newest checkpoint if there is one.

    Raises:
        UserError: the input is wrong; raised before any process group is made.
        RunStopped: the run has diverged, or the disk or a GPU's memory is full.
    """
    world = World.from_environment()
    topology = check(config, world)
    if config.train.deterministic:
        # cuBLAS varies from run to run unless its workspace is fixed before the first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with folder.locked() if world.is_first else nullcontext(), Watch(config, screen, world) as watch:
        exchange = check_machines(config, world, screen.say)
        start, plan, corpora = prepare_run(config, folder, screen, topology) if world.is_first else (None, None, None)
        start_world(world)
        del exchange  # whose port the process group was made over
        with stopping(folder, world):
            watch.join()
            start = from_first(start)
            assert start is not None
            config = start.config
            if start.done >= config.steps:
                watch.is_done = True
                report.finished(config, folder, screen, start.done, world)
                return
            corpora = corpora or open_corpora(config, folder, screen.say)
            plan = plan or RunPlan.of(config, topology)
            Trainer(plan, folder, screen, corpora, start, watch).run()


@contextmanager
def stopping(folder: RunFolder, world: World) -> Iterator[None]:
    """Say in one line what ended a run that had begun."""
    try:
        yield
    except UserError as error:  # too late for the exit code that promises that nothing was begun
        print(f"rank {world.rank}: {error}", flush=True)
        raise RunStopped(str(error)) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunStopped(f"no space left in {folder.path}: free some, then the same command resumes the run") from None
    except torch.OutOfMemoryError:
        raise RunStopped(
            "the GPU's memory is full: lower train.micro_batch or set train.recompute=true; "
            "the same command then resumes the run"
        ) from None


class Trainer:
    """The state of a run, and the loop over its steps.

    Args:
        plan: what to train, and how the processes share the work; a process group is joined.
        folder: where the run lies.
        screen: what the user sees.
        corpora: what is read.
        start: what rank 0 prepared.
        watch: knows when to stop.
    """

    def __init__(
        self,
        plan: RunPlan,
        folder: RunFolder,
        screen: Screen,
        corpora: Corpora,
        start: StartState,
        watch: Watch,
    ) -> None:
        self.plan = plan
        self.config, self.topology = config, topology = plan.config, plan.topology
        self.folder = folder
        self.screen = screen
        self.world = world = topology.world
        self.corpora = corpora
        self.watch = watch
        self.begun = self.step = self.saved = watch.step = start.done
        self.tokens_per_step = config.train.global_batch * config.data.sequence_length
        self.micro_batch = start.micro_batch
        share = topology.sequences_per_data_rank(config.train.global_batch, config.train.micro_batch)
        self.micro_steps = share // self.micro_batch
        announce_by(screen.shout)  # the rank that builds is not always the first
        for line in report.header(plan, corpora, self.micro_batch):
            screen.say(line)
        groups = start_groups(plan)
        self.engine = engines.build_engine(build_model(plan, groups), config, groups, self.micro_batch)
        if start.warm:
            store.load(start.warm, [shard for shard in self._state() if shard.name.startswith("weights/")])
            engines.finish_loading(self.engine, 0)
        if start.newest:
            store.load(start.newest, self._state())
            engines.finish_loading(self.engine, self.step)
            screen.say(f"resumed   {start.newest}, step {self.step:,}")
            for line in accumulation_changes(config, start, self.micro_steps):
                screen.say(line)
        if world.is_first:
            folder.save_config(config)
        self.saver = Saver(folder.checkpoints, config.checkpoint.keep, config.checkpoint.asynchronous)
        self.verification = None if start.is_verified else Verification(corpora, folder, world)
        self.metrics = MetricsWriter(folder.path, self.step, config.logging, config.model_dump(), world.is_first)

    @property
    def model(self) -> LanguageModel:
        """The model inside the engine."""
        return self.engine.module

    def run(self) -> None:
        """Do the steps that are left, then report."""
        train, steps = self.config.train, self.config.steps
        limit_collectives(self.config.parallel.timeout + 60)  # the watch is quicker, and says the place
        self.screen.start_bar(self.step, steps)
        scores: dict[str, Scores] = {}
        profile = profiler(train.profile, self.folder.profile, self.world)
        with ThreadPoolExecutor(1) as reader, profile as trace, self.saver:
            upcoming = reader.submit(self._read, self.step)
            while self.step < steps:
                begin = time.perf_counter()
                batches, upcoming = upcoming.result(), reader.submit(self._read, self.step + 1)
                targets, reason = self._agree(sum(batch.counted for batch in batches))
                if reason is not None:
                    if self.saved < self.step:
                        self._save({})
                    break
                self._train_step(batches, targets, begin)
                trace.step()
                is_last = self.step == steps
                if is_last or (train.validate_every and self.step % train.validate_every == 0):
                    scores = self._validate()
                every = self.config.checkpoint.every
                if is_last or (every and self.step % every == 0):
                    if self.verification:
                        self.verification.finish()
                    self._save(scores)
                scores = scores if is_last else {}
        self.screen.stop_bar()
        self.watch.is_done = True
        self.metrics.close()
        if self.step < steps:
            self.screen.say(f"stopped by {reason} at step {self.step:,}: saved; the same command resumes the run")
        elif self.world.is_first:
            report.finish(self.config, self.folder, self.screen, self.model, self.corpora, scores, self.topology)

    def _read(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the step after `step` steps.

        Each micro-step takes the next sequences of the global batch, whatever the layout that shares them.
        """
        first = step * self.config.train.global_batch + self.topology.data_rank * self.micro_batch
        together = self.micro_batch * self.topology.data
        return [
            self.corpora.loader.batch(first + number * together, self.micro_batch) for number in range(self.micro_steps)
        ]

    def _agree(self, counted: int) -> tuple[int, str | None]:
        """The sum over data ranks, and why to stop before this step, if any rank is asked to; the same on all ranks."""
        values = torch.tensor([counted, *self.watch.stop.asked], dtype=torch.float64, device=self.world.device)
        total, *asked = reduce_over_data(values, self.topology).tolist()
        reason = next((reason for reason, share in zip(REASONS, asked, strict=True) if share), None)
        return round(total), reason

    def _train_step(self, batches: list[Batch], targets: int, begin: float) -> None:
        """One optimizer step; `begin` is when it began, in seconds of the performance counter."""
        batches = [batch.to(self.world.device) for batch in batches]
        rate = learning_rate(self.step + 1, self.config.steps, self.config.train)
        engines.set_learning_rate(self.engine, rate)
        objective = Objective(self.config.moe, self.model.cross_entropy, targets, self.micro_steps, self.topology)
        for number, batch in enumerate(batches, 1):
            output = self.engine(batch.tokens, batch.document_starts)
            self.engine.backward(objective(output.logits, batch.targets, output.statistics))
            if number < len(batches):
                self.engine.step()
        sums = objective.sums
        assert sums is not None
        loss = float(reduce_over_data(sums.cross_entropy.double(), self.topology)) / targets
        if not math.isfinite(loss):
            self._stop(f"the loss is {loss} at step {self.step + 1}", NextStep(loss, None), batches)
        norm = engines.step(self.engine, self.config.train.gradient_clip)
        next_step = NextStep(loss, norm)
        if not math.isfinite(norm):
            self._stop(f"the loss is {loss:.4f} but its gradient's norm is {norm} at step {self.step + 1}", next_step)
        if self.saved == self.step and self.world.is_first:
            self.saver.note_next_step(self.step, next_step)
        self._update_balance_biases(sums)
        self.step += 1
        self.watch.step = self.step
        self._log(loss, rate, norm, sums, time.perf_counter() - begin)

    def _update_balance_biases(self, sums: StepSums) -> None:
        if self.config.moe.balance == "bias":
            for name, router in self.model.routers().items():
                # Experts sharded by tensor count in shares, whose sum may be a rounding away from the whole number.
                update_balance_bias(router, sums.statistics[name].assigned.round(), self.config.moe.bias_rate)

    def _state(self) -> list[Shard]:
        """What this rank owns of the run's state."""
        return engines.state_shards(self.engine, self.plan.shards)

    def _stop(self, fault: str, next_step: NextStep | None = None, batches: Sequence[Batch] = ()) -> NoReturn:
        """End a run that has diverged, before anything of it is saved.

        Args:
            fault: what is not finite, and where.
            next_step: that was to be made from the weights as they are, and is noted beside a checkpoint of them.
            batches: of that step, for a look at where the first bad value is.
        """
        places = from_all(first_bad_parameter(self.model) if batches else None)
        if any(places):  # spoilt in memory, for what is saved is finite
            next_step = None
        else:
            for batch in batches:
                places += from_all(first_bad_output(self.model, batch.tokens, batch.document_starts))
        place = next((f"; the first bad value is in {place}" for place in places if place), "")
        try:
            self.saver.wait()
        except UserError as error:
            log.warning("%s", error)
        raise RunStopped(f"{fault}{place}. {from_first(self._way_on(next_step) if self.world.is_first else None)}")

    def _way_on(self, next_step: NextStep | None) -> str:
        """Note that training cannot go on from here, and say from where it can."""
        folder = self.folder.checkpoints
        if next_step is not None:
            store.note_next_step(folder, self.step, next_step, self.config.checkpoint.keep)
        try:
            kept = store.newest(folder)
        except UserError as error:
            return str(error)
        is_given = self.step == 0 and self.config.train.warm_start  # the rate has changed nothing yet
        advice = "give train.warm_start other weights" if is_given else "lower train.learning_rate"
        advice += ", or look at the data of this step"
        if kept is None:
            return f"There is no valid checkpoint: {advice}; the same command then starts over"
        again = ", as this run did; if that does not help, remove it" if store.step_of(kept) == self.begun else ""
        return f"{kept} is kept: {advice}; the same command then resumes from it{again}"

    def _log(self, loss: float, rate: float, norm: float, sums: StepSums, seconds: float) -> None:
        speed = self.tokens_per_step / seconds
        self.screen.advance(loss, speed)
        if self.step % self.config.logging.every and self.step != self.config.steps:
            return
        line: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": round(speed, 1),
        }
        if sums.statistics:
            line |= report.routing_metrics(self.config, sums, self.micro_steps)
        self.metrics.write(line)

    def _validate(self) -> dict[str, Scores]:
        """Scores of every validation set, on the screen and in the metrics; none where the run is asked to stop.

        Raises:
            RunStopped: a loss is not finite, and so no model to save.
        """
        scores = {}
        data, limit = self.config.data, self.config.train.validation_batches
        end_of_text = self.corpora.tokenizer.end_of_text
        for name, corpus in self.corpora.validation.items():
            batches = evaluation_batches(
                corpus, data.sequence_length, self.micro_batch, end_of_text, data.reset_at_document
            )
            if limit:
                batches = islice(batches, limit * self.config.train.global_batch // self.micro_batch)
            score = evaluate(self.model, batches, self.topology, lambda: self._agree(0)[1] is not None)
            if score is None:
                return {}
            if not math.isfinite(score.loss):
                self._stop(f"the loss on {name} is {score.loss} after step {self.step}")
            scores[name] = score
            self.screen.say(f"step {self.step:>6,}  {report.validation_line(name, score, corpus)}")
        self.metrics.write(report.validation_metrics(self.step, self.step * self.tokens_per_step, self.corpora, scores))
        return scores

    def _save(self, scores: dict[str, Scores]) -> None:
        description = {
            "config": self.config.model_dump(),
            "tokenizer": self.corpora.tokenizer.fingerprint,
            "corpora": self.corpora.identities,
            "tokens": self.step * self.tokens_per_step,
            "processes": self.world.size,
            "micro_batch": self.micro_batch,
            "micro_steps": self.micro_steps,
            "validation_loss": next((score.loss for score in scores.values()), None),
        }
        self.saver.save(self.step, self._state(), description)
        self.saved = self.step
