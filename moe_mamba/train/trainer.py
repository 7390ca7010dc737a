"""The loop over the steps of a run, with what it needs: model, engine, checkpoint, validation, report."""

import logging
import math
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.divergence import NextStep
from moe_mamba.checkpoint.saver import Saver
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.data.loader import Batch, evaluation_batches
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.evaluation.scores import Scores, evaluate
from moe_mamba.faults.signals import REASONS
from moe_mamba.faults.watchdog import Watch
from moe_mamba.kernels.extension import announce_by
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.routing import update_balance_bias
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.distributed import from_all, limit_collectives, number_from_first, reduce_over_data
from moe_mamba.parallel.groups import start_groups
from moe_mamba.parallel.parallelize import build_model
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.run.console import Screen
from moe_mamba.run.events import Events
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.metrics import MetricsWriter
from moe_mamba.train import report
from moe_mamba.train.corpora import Corpora
from moe_mamba.train.diagnosis import first_bad_place
from moe_mamba.train.objective import Objective, StepSums
from moe_mamba.train.pace import Pace
from moe_mamba.train.profile import profiler
from moe_mamba.train.recovery import Recovery
from moe_mamba.train.restarts import note_first_step, note_start
from moe_mamba.train.schedule import RateCurve
from moe_mamba.train.setup import StartState, accumulation_changes
from moe_mamba.train.start_up import StartUp
from moe_mamba.train.throughput import Throughput
from moe_mamba.train.verification import Verification
from moe_mamba.train.ways_on import newest_kept, way_on_line

log = logging.getLogger(__name__)


class Trainer:
    """The state of a run, and the loop over its steps.

    Args:
        plan: what to train, and how the processes share the work; a process group is joined.
        folder: where the run lies.
        screen: what the user sees.
        corpora: what is read.
        start: what rank 0 prepared.
        watch: knows when to stop.
        start_up: knows where the time until now went.
    """

    def __init__(
        self,
        plan: RunPlan,
        folder: RunFolder,
        screen: Screen,
        corpora: Corpora,
        start: StartState,
        watch: Watch,
        start_up: StartUp,
    ) -> None:
        self.plan = plan
        self.config, self.topology = config, topology = plan.config, plan.topology
        self.folder = folder
        self.screen = screen
        self.world = world = topology.world
        self.corpora = corpora
        self.watch, self.start_up = watch, start_up
        self.begun = self.step = self.saved = watch.step = start.done
        self.events = Events(folder.path, world.is_first)
        self.pace = Pace(topology, config.logging.every, from_all(socket.gethostname()), screen, self.events)
        self.recovery = Recovery(config.train, start.done, start.description)
        self.rates = RateCurve.resumed(config, start.done, start.description)
        self.tokens_per_step = config.train.global_batch * config.data.sequence_length
        self.micro_batch = start.micro_batch
        share = topology.sequences_per_data_rank(config.train.global_batch, config.train.micro_batch)
        self.micro_steps = share // self.micro_batch
        announce_by(screen.shout)  # the rank that builds is not always the first
        for line in report.header(plan, corpora, self.micro_batch, self.rates):
            screen.say(line)
        start_up.reached("kernels")
        groups = start_groups(plan)
        start_up.reached("groups")
        self.engine = engines.build_engine(build_model(plan, groups), config, groups, self.micro_batch)
        start_up.reached("engine")
        if start.warm:
            store.load(start.warm, [shard for shard in self._state() if shard.name.startswith("weights/")])
            engines.finish_loading(self.engine, 0)
        if start.newest:
            store.load(start.newest, self._state())
            engines.finish_loading(self.engine, self.step)
            screen.say(f"resumed   {start.newest}, step {self.step:,}")
            for line in accumulation_changes(config, start, self.micro_steps):
                screen.say(line)
            if self.rates.note:
                screen.say(f"note      {self.rates.note}")
        if world.is_first:
            folder.save_config(config)
        self.saver = Saver(folder.checkpoints, config.checkpoint.keep, config.checkpoint.asynchronous)
        self.verification = None if start.is_verified else Verification(corpora, folder, world)
        self.throughput = Throughput.of(plan)
        self.metrics = self._open_metrics()
        start_up.reached("checkpoint")

    def _open_metrics(self) -> MetricsWriter:
        config = self.config
        return MetricsWriter(
            self.folder.path, self.step, config.logging, config.model_dump(), self.world.is_first, self.screen.say
        )

    @property
    def model(self) -> LanguageModel:
        """The model inside the engine."""
        return self.engine.module

    def run(self) -> None:
        """Do the steps that are left, then report."""
        train, steps = self.config.train, self.config.steps
        limit_collectives(self.config.parallel.timeout + 60)  # the watch is quicker, and says the place
        note_start(self.events, self.folder, self.screen, self.step, steps, self.pace.hosts)
        if late := self.recovery.too_late:
            self.screen.say(f"note      train.skip_batches: {late} were trained on before, and stay")
        self.screen.start_bar(self.step, steps)
        scores: dict[str, Scores] = {}
        profile = profiler(train.profile, self.folder.profile, self.world)
        with ThreadPoolExecutor(1) as reader, profile as trace, self.saver:
            number = self.recovery.after(self.recovery.position)
            upcoming = reader.submit(self._read, number)
            while self.step < steps:
                begin = time.perf_counter()
                following = self.recovery.after(number)
                batches, upcoming = upcoming.result(), reader.submit(self._read, following)
                self.pace.waited_for_data(time.perf_counter() - begin)
                targets, reason = self._agree(sum(batch.counted for batch in batches), self.pace.row())
                if reason is not None:
                    if self.saved < self.step:
                        self._save({})
                    break
                is_made = self._train_step(number, batches, targets, begin) if targets else self._pass_step(number)
                note_first_step(self.start_up, self.events, self.screen, self.step)
                number = following
                trace.step()
                if not is_made:
                    continue
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
            self.events.write("stop", self.step, reason=f"stopped by {reason}")
            self.screen.say(f"stopped by {reason} at step {self.step:,}: saved; the same command resumes the run")
            return
        self.events.write("finish", self.step)
        if without := self.recovery.without_targets:
            self.screen.say(f"note      {without:,} of {steps:,} steps had no target to count, and changed nothing")
        if self.world.is_first:
            report.finish(self.config, self.folder, self.screen, self.model, self.corpora, scores, self.topology)

    def _read(self, number: int) -> list[Batch]:
        """This rank's micro-batches of global batch `number`, counted from 1.

        Each micro-step takes its next sequences, whatever the layout that shares them; pinned, where there is a GPU.
        """
        first = (number - 1) * self.config.train.global_batch + self.topology.data_rank * self.micro_batch
        together = self.micro_batch * self.topology.data
        starts = range(first, first + self.micro_steps * together, together)
        return [self.corpora.loader.batch(at, self.micro_batch).pinned_for(self.world.device) for at in starts]

    def _agree(self, counted: int, figures: Sequence[float] = ()) -> tuple[int, str | None]:
        """The sum over data ranks, and why to stop before this step, if any rank is asked to; the same on all ranks.

        Figures of the ranks' pace, if there are any, are shared on the way.
        """
        values = torch.tensor([counted, *self.watch.stop.asked, *figures], dtype=torch.float64)
        total, *rest = reduce_over_data(values.to(self.world.device), self.topology).tolist()
        reason = next((reason for reason, share in zip(REASONS, rest, strict=False) if share), None)
        self.pace.judge(self.step, rest[len(REASONS) :])
        return round(total), reason

    def _train_step(self, number: int, batches: list[Batch], targets: int, begin: float) -> bool:
        """One optimizer step with batch `number`, unless it is spoilt; whether it was made.

        `begin` is when it began, in seconds of the performance counter.
        """
        batches = [batch.to(self.world.device) for batch in batches]
        rate = self.rates.rate(self.step + 1)
        engines.set_learning_rate(self.engine, rate)
        with self.pace.measured(self.step + 1):
            sums, loss = self._gradient(batches, targets)
            norm = engines.step(
                self.engine, self.config.train.gradient_clip, lambda norm: self.recovery.judge(loss, self._alike(norm))
            )
        next_step = NextStep(loss, norm if math.isfinite(loss) else None)
        if self.recovery.is_refused:
            self._recover(number, batches, next_step)
            return False
        if self.saved == self.step and self.world.is_first:
            self.saver.note_next_step(self.step, next_step)
        self._note_batches(number)
        self._update_balance_biases(sums)
        self.step += 1
        self.watch.step = self.step
        self._log(loss, rate, norm, sums, time.perf_counter() - begin)
        return True

    def _pass_step(self, number: int) -> bool:
        """A step whose batch has no target to count, on no rank: it is one of the run's, and changes nothing."""
        if not self.recovery.without_targets:
            self.events.write("no_targets", self.step, batch=number)
            self.screen.say(
                f"note      step {self.step + 1:,} has no target to count (each token is the last of its document): a "
                "step without loss; all such steps are in metrics.jsonl"
            )
        self._note_told(self.recovery.passed(number))
        self.step += 1
        self.watch.step = self.step
        self.screen.advance(None, 0)
        self.metrics.write({"step": self.step, "tokens": self.step * self.tokens_per_step, "targets": 0})
        return True

    def _gradient(self, batches: list[Batch], targets: int) -> tuple[StepSums, float]:
        """Forward and backward of all micro-steps; their sums, and the loss over all ranks in nats/token."""
        balanced = self.model.balanced_routers()
        objective = Objective(self.config.moe, targets, self.micro_steps, self.topology, balanced)
        for number, batch in enumerate(batches, 1):
            output = self.engine(batch.tokens, batch.document_starts, targets=batch.targets)
            self.engine.backward(objective(output.cross_entropy, output.statistics))
            if number < len(batches):
                self.engine.step()
        sums = objective.sums
        assert sums is not None
        return sums, float(reduce_over_data(sums.cross_entropy.double(), self.topology)) / targets

    def _alike(self, norm: float) -> float:
        """Rank 0's norm where a step may be refused for it: sums of several groups may differ in their last bits."""
        return norm if self.config.train.on_spike == "log" else number_from_first(norm, self.world.device)

    def _note_batches(self, number: int) -> None:
        """Note that the step of batch `number` was made, a spike that begins, and what was left out as told."""
        spike, told = self.recovery.made(number)
        self._note_told(told)
        if spike is not None:
            self.events.write("spike", self.step, batch=number, text=spike.text, action="log")
            self.screen.say(f"spike     step {self.step + 1:,}: {spike.text}")

    def _note_told(self, batches: list[int]) -> None:
        if batches:
            self.events.write("skip", self.step, batches=batches, reason="train.skip_batches")

    def _recover(self, number: int, batches: Sequence[Batch], next_step: NextStep) -> None:
        """Go on from a step that was not made, as the configuration says: leave its batch out, or rewind, or end."""
        fault, action = self.recovery.fault, self.recovery.action(self.step)
        assert fault is not None
        figures = {"loss": next_step.loss, "gradient_norm": next_step.gradient_norm}
        self.events.write(fault.kind, self.step, batch=number, text=fault.text, action=action, **figures)
        text = f"{fault.text} at step {self.step + 1}"
        if action == "stop":
            if self.recovery.is_exhausted:
                text += f", and train.skip_limit={self.config.train.skip_limit} bad batches were left out"
            is_nan = fault.kind == "nan"
            self._stop(text, next_step if is_nan else None, batches if not math.isfinite(next_step.loss) else ())
        kept = None
        if action == "rewind":
            self.saver.wait()
            certain = next_step if fault.kind == "nan" and self.recovery.is_again else None
            kept = newest_kept(self.folder.checkpoints, self.config, self.step, certain)
        if kept is None:
            left_out = self.recovery.leave_out(number)
            self.events.write("skip", self.step, batches=left_out, reason=fault.text)
            none = ", for there is no checkpoint to go back to" if action == "rewind" else ""
            self.screen.say(f"skip      {text}: batch {number:,} is left out{none}")
        else:
            self._rewind(number, kept, text)

    def _rewind(self, number: int, kept: Path, text: str) -> None:
        """Go back to a checkpoint, and leave out every batch since it."""
        before, self.step = self.step, store.step_of(kept)
        self.saved = self.watch.step = self.step
        store.load(kept, self._state())
        engines.finish_loading(self.engine, self.step)
        left_out = self.recovery.rewind(number, self.step, store.read_description(kept))
        self.metrics.close()
        self.metrics = self._open_metrics()
        self.screen.stop_bar()
        self.screen.say(f"rewind    {text}: back to {kept.name}; batches {left_out[0]:,} to {number:,} are left out")
        self.screen.start_bar(self.step, self.config.steps)
        self.events.write("rewind", before, to=self.step, batches=left_out, reason=text)

    def _update_balance_biases(self, sums: StepSums) -> None:
        for name, router in self.model.routers().items():
            if router.config.balance == "bias":
                # Ranks that count the same tokens answer for shares, whose sum may be a rounding away from a number.
                update_balance_bias(router, sums.statistics[name].assigned.round(), router.config.bias_rate)

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
        place, is_spoilt_in_memory = first_bad_place(self.model, batches)
        if is_spoilt_in_memory:  # for what is saved is finite
            next_step = None
        try:
            self.saver.wait()
        except UserError as error:
            log.warning("%s", error)
        way_on = way_on_line(self.folder.checkpoints, self.config, self.begun, self.step, next_step)
        raise RunStopped(f"{fault}{place}. {way_on}")

    def _log(self, loss: float, rate: float, norm: float, sums: StepSums, seconds: float) -> None:
        rates = self.throughput.figures(self.tokens_per_step / seconds)
        self.screen.advance(loss, **rates)
        if self.step % self.config.logging.every and self.step != self.config.steps:
            return
        line: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
        } | rates
        if sums.statistics:
            line |= report.routing_metrics(self.model.routers(), sums, self.micro_steps)
        if self.pace.slowest is not None:
            line["pace"] = self.pace.slowest  # of the step before
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
            "recovery": self.recovery.describe(),
            "rates": self.rates.to_json(),
        }
        self.saver.save(self.step, self._state(), description)
        self.saved = self.step
        self.events.write("checkpoint", self.step)
