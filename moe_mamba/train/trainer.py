"""A training run, from top to bottom: corpora, world, model, engine, checkpoint, loop, report."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_mamba.config import Config
from moe_mamba.data.loader import Batch, evaluation_batches
from moe_mamba.errors import RunStopped, UserError
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.routing import update_balance_bias
from moe_mamba.parallel.engine import build_engine, finish_loading, gradient_norm, set_learning_rate, state_pieces
from moe_mamba.parallel.parallelize import check_compiler, parallelize
from moe_mamba.parallel.topology import World, finish_world, from_first, start_world
from moe_mamba.train import checkpoint, report
from moe_mamba.train.corpora import Corpora, open_corpora
from moe_mamba.train.diagnose import first_bad_value
from moe_mamba.train.evaluate import Scores, evaluate
from moe_mamba.train.metrics import MetricsWriter
from moe_mamba.train.micro_batch import choose_micro_batch
from moe_mamba.train.objective import Objective, StepSums
from moe_mamba.train.profile import profiler
from moe_mamba.train.restore import check_weights, load_weights
from moe_mamba.train.run_folder import RunFolder
from moe_mamba.train.schedule import learning_rate
from moe_mamba.train.screen import Screen


def train(config: Config, folder: RunFolder, screen: Screen) -> None:
    """Train as `config` says, in `folder`, going on from its newest checkpoint if there is one.

    Raises:
        UserError: the input is wrong; raised before any process group is made.
        RunStopped: the loss is no number any more, or a checkpoint cannot be written.
    """
    world = World.from_environment()
    world.sequences_per_rank(config.train.global_batch, config.train.micro_batch)
    check_compiler(config.train)
    if config.train.deterministic:
        # cuBLAS varies from run to run unless its workspace is fixed before the first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    corpora, newest = None, None
    if world.is_first:
        newest = checkpoint.newest(folder.checkpoints, screen.say)
        if config.train.warm_start and not newest:
            check_weights(config, config.train.warm_start)
        corpora = open_corpora(config, folder)
        if newest:
            corpora.check_unchanged(checkpoint.read_description(newest), folder)
    start_world(world)
    try:
        newest = from_first(newest)
        done = checkpoint.step_of(newest) if newest else 0
        if done >= config.steps:
            screen.say(f"{folder.path} is finished: {done:,} steps are done. More train.steps make it go on.")
            return
        trainer = Trainer(config, folder, screen, world, corpora or open_corpora(config, folder))
        trainer.start(newest)
        trainer.run()
    except UserError as error:  # too late for the exit code that promises that nothing was begun
        raise RunStopped(str(error)) from None
    finally:
        finish_world()


class Trainer:
    """The state of a run, and the loop over its steps."""

    def __init__(self, config: Config, folder: RunFolder, screen: Screen, world: World, corpora: Corpora) -> None:
        self.config = config
        self.folder = folder
        self.screen = screen
        self.world = world
        self.corpora = corpora
        self.step = 0
        self.seconds = 0.0
        self.tokens_per_step = config.train.global_batch * config.data.sequence_length
        share = world.sequences_per_rank(config.train.global_batch, config.train.micro_batch)
        self.micro_batch = choose_micro_batch(config, share, world.device)
        self.micro_steps = share // self.micro_batch

    def start(self, newest: Path | None) -> None:
        """Build the model and the engine; take weights, moments and step from `newest` if given."""
        config = self.config
        with torch.device("meta"):
            model = LanguageModel(config.model, config.moe)
        model.to_empty(device=self.world.device)
        initialize(model, config.run.seed)
        if config.train.warm_start and not newest:
            load_weights(model, config.train.warm_start)
        for line in report.header(config, model, self.corpora, self.world, self.micro_batch):
            self.screen.say(line)
        parallelize(model, config.train)
        self.engine = build_engine(model, config, self.micro_batch, self.world.size)
        if newest:
            description = checkpoint.read_description(newest)
            checkpoint.load(newest, state_pieces(self.engine))
            self.step = description["step"]
            finish_loading(self.engine, self.step)
            self.screen.say(f"resumed   {newest}, step {self.step:,}")
        if self.world.is_first:
            self.folder.save_config(config)
        self.metrics = MetricsWriter(
            self.folder.path, self.step, config.logging, config.model_dump(), enabled=self.world.is_first
        )

    @property
    def model(self) -> LanguageModel:
        """The model inside the engine."""
        return self.engine.module

    def run(self) -> None:
        """Do the steps that are left, then report."""
        train, steps = self.config.train, self.config.steps
        self.screen.start_bar(self.step, steps)
        scores: dict[str, Scores] = {}
        with ThreadPoolExecutor(1) as reader, profiler(train.profile, self.folder.profile, self.world) as trace:
            upcoming = reader.submit(self._read, self.step)
            while self.step < steps:
                batches, upcoming = upcoming.result(), reader.submit(self._read, self.step + 1)
                self._train_step(batches)
                trace.step()
                is_last = self.step == steps
                if is_last or (train.validate_every and self.step % train.validate_every == 0):
                    scores = self._validate()
                every = self.config.checkpoint.every
                if is_last or (every and self.step % every == 0):
                    self._save(scores)
                scores = scores if is_last else {}
        self.screen.stop_bar()
        self.metrics.close()
        if self.world.is_first:
            report.finish(self.config, self.folder, self.screen, self.model, self.corpora, scores)

    def _read(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the step after `step` steps."""
        share = self.micro_batch * self.micro_steps
        first = step * self.config.train.global_batch + self.world.rank * share
        return [
            self.corpora.loader.batch(first + number * self.micro_batch, self.micro_batch)
            for number in range(self.micro_steps)
        ]

    def _train_step(self, batches: list[Batch]) -> None:
        """One optimizer step."""
        begin = time.perf_counter()
        batches = [batch.to(self.world.device) for batch in batches]
        targets = int(self._sum(torch.stack([(batch.targets >= 0).sum() for batch in batches]).sum()))
        objective = Objective(self.config.moe, targets, self.micro_steps * self.world.size, self.world.size)
        rate = learning_rate(self.step + 1, self.config.steps, self.config.train)
        set_learning_rate(self.engine, rate)
        for number, batch in enumerate(batches, 1):
            output = self.engine(batch.tokens, batch.starts)
            self.engine.backward(objective(output.logits, batch.targets, output.statistics))
            if number < len(batches):
                self.engine.step()
        sums = objective.sums
        assert sums is not None
        loss = float(self._sum(sums.cross_entropy)) / targets
        if not math.isfinite(loss):
            self._stop(f"the loss is {loss}", batches)
        norm = self._update()
        if not math.isfinite(norm):
            self._stop(f"the gradient's norm is {norm}", batches)
        self._update_balance_biases(sums)
        self.step += 1
        self.seconds = time.perf_counter() - begin
        self._log(loss, rate, norm, sums)

    def _update(self) -> float:
        """Let the engine do its optimizer step; the gradient's norm before clipping."""
        before = None if self.engine.zero_optimization() else gradient_norm(self.engine)
        self.engine.step()
        return gradient_norm(self.engine) if before is None else before

    def _update_balance_biases(self, sums: StepSums) -> None:
        if self.config.moe.balance == "bias":
            for router, layer in zip(self.model.routers(), sums.statistics, strict=True):
                update_balance_bias(router, layer.assigned, self.config.moe.bias_rate)

    def _sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks, of a copy."""
        value = value.clone()
        if self.world.size > 1:
            torch.distributed.all_reduce(value)
        return value

    def _stop(self, fault: str, batches: list[Batch]) -> None:
        """End the run at a step that went wrong, before anything of it is saved."""
        places = [first_bad_value(self.model, batch.tokens, batch.starts) for batch in batches]
        found: list[list[str]] = [[] for _ in range(self.world.size)]
        torch.distributed.all_gather_object(found, [place for place in places if place])
        place = next((place for rank in found for place in rank), "the loss or its gradient alone")
        kept = from_first(checkpoint.newest(self.folder.checkpoints) if self.world.is_first else None)
        raise RunStopped(
            f"{fault} at step {self.step + 1}; the first bad value is in {place}. "
            + (f"{kept} is kept" if kept else "No checkpoint was saved yet")
            + ": lower train.learning_rate, or look at the data of this step"
        )

    def _log(self, loss: float, rate: float, norm: float, sums: StepSums) -> None:
        speed = self.tokens_per_step / self.seconds
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
            line |= report.routing_metrics(self.model, sums, self.micro_steps)
        self.metrics.write(line)

    def _validate(self) -> dict[str, Scores]:
        """Scores of every validation set, on the screen and in the metrics."""
        scores = {}
        data, limit = self.config.data, self.config.train.validation_batches
        end_of_text = self.corpora.tokenizer.end_of_text
        for name, shards in self.corpora.validation.items():
            batches = evaluation_batches(
                shards, data.sequence_length, self.micro_batch, end_of_text, data.reset_at_document
            )
            if limit:
                most = limit * self.config.train.global_batch // self.micro_batch
                batches = (batch for batch, _ in zip(batches, range(most), strict=False))
            scores[name] = evaluate(self.model, batches, self.world)
            self.screen.say(f"step {self.step:>6,}  {report.validation_line(name, scores[name], shards)}")
        self.metrics.write(report.validation_metrics(self.step, self.step * self.tokens_per_step, self.corpora, scores))
        return scores

    def _save(self, scores: dict[str, Scores]) -> None:
        description = {
            "config": self.config.model_dump(),
            "tokenizer": self.corpora.tokenizer.fingerprint,
            "corpora": self.corpora.identities,
            "tokens": self.step * self.tokens_per_step,
            "validation_loss": next((score.loss for score in scores.values()), None),
        }
        checkpoint.save(
            self.folder.checkpoints, self.step, state_pieces(self.engine), description, self.config.checkpoint.keep
        )
