"""The loop over the steps of a run, with what it needs: model, engine, checkpoint, validation, report."""

import logging
import math
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.divergence import NextStep
from moe_mamba.checkpoint.saver import Saver
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.data.batch import Batch
from moe_mamba.data.loader import evaluation_batches
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.evaluation.scores import Scores, evaluate
from moe_mamba.faults.watchdog import Watch
from moe_mamba.kernels.extension import announce_by
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel import engine as engines
from moe_mamba.parallel.distributed import from_all, limit_collectives
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
from moe_mamba.train.feed import Feed, GlobalBatch
from moe_mamba.train.pace import Pace
from moe_mamba.train.profile import Trace, profiler
from moe_mamba.train.recovery import Recovery
from moe_mamba.train.restarts import note_first_step, note_start
from moe_mamba.train.schedule import RateCurve
from moe_mamba.train.setup import StartState, accumulation_changes, validates_after
from moe_mamba.train.start_up import StartUp
from moe_mamba.train.steps import Outcome, Step, Steps
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
        self.begun = self.step = self.made = self.saved = watch.step = start.done
        self.reason: str | None = None
        self.scores: dict[str, Scores] = {}
        self.events = Events(folder.path, world.is_first)
        self.pace = Pace(topology, config.logging.every, from_all(socket.gethostname()), screen, self.events)
        self.recovery = Recovery(config.train, start.done, start.description)
        self.rates = RateCurve.resumed(config, start.done, start.description)
        self.tokens_per_step = config.train.global_batch * config.data.sequence_length
        self.micro_batch, self.is_unvalidated = start.micro_batch, start.is_unvalidated
        share = topology.sequences_per_data_rank(config.train.global_batch, config.train.micro_batch)
        self.micro_steps = share // self.micro_batch
        announce_by(screen.shout)  # the rank that builds is not always the first
        for line in report.header(plan, corpora, self.micro_batch, self.rates):
            screen.say(line)
        start_up.reached("kernels")
        groups = start_groups(plan)
        start_up.reached("groups")
        self.engine = engines.build_engine(build_model(plan, groups), config, groups, self.micro_batch)
        self.steps = Steps(self.engine, plan, self.micro_steps, watch.stop, self.pace)
        start_up.reached("engine")
        if start.warm:
            store.load(start.warm, [shard for shard in self._state() if shard.name.startswith("weights/")])
            engines.finish_loading(self.engine, 0)
        if start.newest:
            self._load(start.newest)
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

    def run(self) -> bool:
        """Do the steps that are left, then report; False: it was stopped before, and is saved."""
        train, steps = self.config.train, self.config.steps
        limit_collectives(self.config.parallel.timeout + 60)  # the watch is quicker, and says the place
        note_start(self.events, self.folder, self.screen, self.step, steps, self.pace.hosts, self.world.device)
        if late := self.recovery.too_late:
            self.screen.say(f"note      train.skip_batches: {late} were trained on before, and stay")
        self.screen.start_bar(self.step, steps)
        feed = Feed(self.corpora.loader, self.topology, self.micro_batch, self.micro_steps)
        profile = profiler(train.profile, self.folder.profile, self.world)
        with profile as trace, self.saver:
            if self.is_unvalidated:
                self.scores = self._validate()
            while self.step < steps and self.reason is None:
                with closing(feed.ahead(self.recovery.numbers())) as batches:
                    self._train_on(batches, trace)
            if self.saved < self.step:
                self._save({})
        self.screen.stop_bar()
        self.watch.is_done = True
        self.metrics.close()
        if self.step < steps or not self.scores:  # stopped in the last validation, which the next start makes
            self.events.write("stop", self.step, reason=f"stopped by {self.reason}")
            self.screen.say(f"stopped by {self.reason} at step {self.step:,}: saved; the same command resumes the run")
            return False
        self.events.write("finish", self.step)
        if without := self.recovery.without_targets:
            self.screen.say(f"note      {without:,} of {steps:,} steps had no target to count, and changed nothing")
        if self.world.is_first:
            report.finish(self.config, self.folder, self.screen, self.model, self.corpora, self.scores, self.topology)
        return True

    def _train_on(self, batches: Iterator[GlobalBatch], trace: Trace) -> None:
        """Make steps until one is refused, or the run is to end: the device works on one while the last is read."""
        unread: Step | None = None
        following = next(batches)
        self.made, self.reason = self.step, self.steps.begin(following)
        while self.made < self.config.steps and self.reason is None:
            batch, following = following, self._wait_for(batches)
            step = self._make(batch, following)
            trace.step()
            if unread is not None and not self._take(unread):
                return  # and `step` has changed nothing
            unread = step
            is_pause = self._is_pause(step.number)
            if is_pause or self.reason is not None or self._is_read_at_once or self.step == self.begun:
                if not self._take(step):
                    return
                unread = None
            note_first_step(self.start_up, self.events, self.screen, self.step)
            if is_pause:
                self._pause()

    def _wait_for(self, batches: Iterator[GlobalBatch]) -> GlobalBatch:
        begin = time.perf_counter()
        batch = next(batches)
        self.pace.waited_for_data(time.perf_counter() - begin)
        return batch

    def _make(self, batch: GlobalBatch, following: GlobalBatch) -> Step:
        """Give the device the next step."""
        number = self.made + 1
        judge = self.recovery.judge if self._is_read_at_once else None
        step = self.steps.make(number, batch, following, self.rates.rate(number), judge)
        self.made = number
        return step

    @property
    def _is_read_at_once(self) -> bool:
        """Whether a step may be refused for what only the host knows."""
        return self.config.train.on_spike != "log"

    def _is_pause(self, step: int) -> bool:
        """Whether something is to be done after a step, with the model as it leaves it."""
        spacings = (self.config.train.validate_every, self.config.checkpoint.every)
        return step == self.config.steps or any(every and step % every == 0 for every in spacings)

    def _pause(self) -> None:
        """Validate, and save, where it is time to."""
        is_last, every = self.step == self.config.steps, self.config.checkpoint.every
        scores = {}
        if validates_after(self.config, self.step):
            scores = self.scores = self._validate()
        if is_last or (every and self.step % every == 0):
            if self.verification:
                self.verification.finish()
            self._save(scores)
        self._is_asked_to_stop()  # meanwhile
        self.steps.pause()

    def _take(self, step: Step) -> bool:
        """Read a step that the device was given; whether it is one of the run's, and not refused."""
        outcome = step.read()
        self.pace.judge(self.step, outcome.pace)
        self.reason = self.reason or outcome.reason
        if not outcome.targets:
            self._pass_step(step.batch.number)
            return True
        next_step = NextStep(outcome.loss, outcome.norm if math.isfinite(outcome.loss) else None)
        if not self._is_read_at_once:
            self.recovery.judge(outcome.loss, outcome.norm)
        if self.recovery.is_refused:
            self._recover(step.batch, next_step)
            self.steps.forget()
            return False
        if self.saved == self.step and self.world.is_first:
            self.saver.note_next_step(self.step, next_step)
        self._note_batches(step.batch.number)
        self._advance()
        self._log(step, outcome)
        return True

    def _advance(self) -> None:
        self.step += 1
        self.watch.step = self.step

    def _pass_step(self, number: int) -> None:
        """A step whose batch has no target to count, on no rank: it is one of the run's, and changed nothing."""
        if not self.recovery.without_targets:
            self.events.write("no_targets", self.step, batch=number)
            self.screen.say(
                f"note      step {self.step + 1:,} has no target to count (each token is the last of its document): a "
                "step without loss; all such steps are in metrics.jsonl"
            )
        self._note_told(self.recovery.passed(number))
        self._advance()
        self.screen.advance(None, 0)
        self.metrics.write({"step": self.step, "tokens": self.step * self.tokens_per_step, "targets": 0})

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

    def _recover(self, batch: GlobalBatch, next_step: NextStep) -> None:
        """Go on from a step that was refused, as the configuration says: leave its batch out, or rewind, or end."""
        number = batch.number
        fault, action = self.recovery.fault, self.recovery.action(self.step)
        assert fault is not None
        figures = {"loss": next_step.loss, "gradient_norm": next_step.gradient_norm}
        self.events.write(fault.kind, self.step, batch=number, text=fault.text, action=action, **figures)
        text = f"{fault.text} at step {self.step + 1}"
        if action == "stop":
            if self.recovery.is_exhausted:
                text += f", and train.skip_limit={self.config.train.skip_limit} bad batches were left out"
            is_nan = fault.kind == "nan"
            self._stop(text, next_step if is_nan else None, batch.parts if not math.isfinite(next_step.loss) else ())
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
        left_out = self.recovery.rewind(number, self.step, store.read_description(kept))
        self._load(kept)
        self.metrics.close()
        self.metrics = self._open_metrics()
        self.screen.stop_bar()
        self.screen.say(f"rewind    {text}: back to {kept.name}; batches {left_out[0]:,} to {number:,} are left out")
        self.screen.start_bar(self.step, self.config.steps)
        self.events.write("rewind", before, to=self.step, batches=left_out, reason=text)

    def _load(self, checkpoint: Path) -> None:
        """Take the state of a checkpoint, of `step` steps; those without targets were none of the optimizer's."""
        store.load(checkpoint, self._state())
        engines.finish_loading(self.engine, self.step - self.recovery.without_targets)

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

    def _log(self, step: Step, outcome: Outcome) -> None:
        rates = self.throughput.figures(self.tokens_per_step / outcome.seconds)
        self.screen.advance(outcome.loss, **rates)
        if self.step % self.config.logging.every and self.step != self.config.steps:
            return
        line: dict[str, Any] = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "loss": outcome.loss,
            "learning_rate": step.rate,
            "gradient_norm": outcome.norm,
        } | rates
        line |= self.steps.routing.describe(outcome.routing)
        if self.pace.slowest is not None:
            line["pace"] = self.pace.slowest  # of two steps before
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
            score = evaluate(self.model, batches, self.topology, self._is_asked_to_stop)
            if score is None:
                return {}
            if not math.isfinite(score.loss):
                self._stop(f"the loss on {name} is {score.loss} after step {self.step}")
            scores[name] = score
            self.screen.say(f"step {self.step:>6,}  {report.validation_line(name, score, corpus)}")
        self.metrics.write(report.validation_metrics(self.step, self.step * self.tokens_per_step, self.corpora, scores))
        return scores

    def _is_asked_to_stop(self) -> bool:
        self.reason = self.reason or self.steps.asked()
        return self.reason is not None

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
