"""A training run, from top to bottom: corpora, world, model, engine, checkpoint, loop, report."""

import errno
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
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
from moe_mamba.parallel.parallelize import parallelize
from moe_mamba.parallel.topology import World, finish_world, from_first, start_world
from moe_mamba.train import checkpoint, report
from moe_mamba.train.beginning import Beginning, check, settle
from moe_mamba.train.corpora import Corpora, open_corpora
from moe_mamba.train.diagnose import first_bad_value
from moe_mamba.train.evaluate import Scores, evaluate
from moe_mamba.train.metrics import MetricsWriter
from moe_mamba.train.objective import Objective, StepSums
from moe_mamba.train.profile import profiler
from moe_mamba.train.restore import load_weights
from moe_mamba.train.run_folder import RunFolder
from moe_mamba.train.schedule import learning_rate
from moe_mamba.train.screen import Screen


def train(config: Config, folder: RunFolder, screen: Screen) -> None:
    """Train as `config` says, in `folder`, going on from its newest checkpoint if there is one.

    Raises:
        UserError: the input is wrong; raised before any process group is made.
        RunStopped: the loss is no number any more, or the disk or a GPU's memory is full.
    """
    world = World.from_environment()
    check(config, world)
    if config.train.deterministic:
        # cuBLAS varies from run to run unless its workspace is fixed before the first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with folder.alone() if world.is_first else nullcontext():
        beginning, corpora = settle(config, folder, screen, world) if world.is_first else (None, None)
        start_world(world)
        with stopping(folder, world):
            beginning = from_first(beginning)
            assert beginning is not None
            if beginning.done >= config.steps:
                report.finished(config, folder, screen, beginning.done, world)
                return
            corpora = corpora or open_corpora(config, folder, screen.say)
            Trainer(config, folder, screen, world, corpora, beginning).run()


@contextmanager
def stopping(folder: RunFolder, world: World) -> Iterator[None]:
    """Leave the world at the end, and say in one line what ended a run that had begun."""
    try:
        yield
    except UserError as error:  # too late for the exit code that promises that nothing was begun
        print(f"rank {world.rank}: {error}", flush=True)
        raise RunStopped(str(error)) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunStopped(f"no space left in {folder.path}: free some, then the same line again goes on") from None
    except torch.OutOfMemoryError:
        raise RunStopped(
            "the GPU's memory is full: lower train.micro_batch or set train.recompute=true; "
            "the same line again then goes on"
        ) from None
    finally:
        finish_world()


class Trainer:
    """The state of a run, and the loop over its steps.

    Args:
        config: what to train.
        folder: where the run lies.
        screen: what the user sees.
        world: the processes; a process group is joined.
        corpora: what is read.
        beginning: what rank 0 settled.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        screen: Screen,
        world: World,
        corpora: Corpora,
        beginning: Beginning,
    ) -> None:
        self.config = config
        self.folder = folder
        self.screen = screen
        self.world = world
        self.corpora = corpora
        self.step = beginning.done
        self.tokens_per_step = config.train.global_batch * config.data.sequence_length
        self.micro_batch = beginning.micro_batch
        share = world.sequences_per_rank(config.train.global_batch, config.train.micro_batch)
        self.micro_steps = share // self.micro_batch
        with torch.device("meta"):
            model = LanguageModel(config.model, config.moe)
        model.to_empty(device=world.device)
        initialize(model, config.run.seed)
        if beginning.warm:
            load_weights(model, beginning.warm)
        for line in report.header(config, model, corpora, world, self.micro_batch):
            screen.say(line)
        parallelize(model, config.train)
        self.engine = build_engine(model, config, self.micro_batch, world.size)
        if beginning.newest:
            checkpoint.load(beginning.newest, state_pieces(self.engine))
            finish_loading(self.engine, self.step)
            screen.say(f"resumed   {beginning.newest}, step {self.step:,}")
        if world.is_first:
            folder.save_config(config)
        self.metrics = MetricsWriter(folder.path, self.step, config.logging, config.model_dump(), world.is_first)

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
                begin = time.perf_counter()
                batches, upcoming = upcoming.result(), reader.submit(self._read, self.step + 1)
                self._train_step(batches, begin)
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

    def _train_step(self, batches: list[Batch], begin: float) -> None:
        """One optimizer step; `begin` is when it began, in seconds of the performance counter."""
        device = self.world.device
        targets = int(self._sum(torch.tensor(sum(batch.counted for batch in batches), device=device)))
        batches = [batch.to(device) for batch in batches]
        rate = learning_rate(self.step + 1, self.config.steps, self.config.train)
        set_learning_rate(self.engine, rate)
        objective = Objective(self.config.moe, targets, self.micro_steps * self.world.size, self.world.size)
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
            self._stop(f"the loss is {loss:.4f} but its gradient's norm is {norm}", [])
        self._update_balance_biases(sums)
        self.step += 1
        self._log(loss, rate, norm, sums, time.perf_counter() - begin)

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
        """End the run at a step that went wrong, before anything of it is saved; names the first bad value."""
        mine = [place for batch in batches if (place := first_bad_value(self.model, batch.tokens, batch.starts))]
        found: list[list[str]] = [[] for _ in range(self.world.size)]
        torch.distributed.all_gather_object(found, mine)
        place = next((f"; the first bad value is in {place}" for rank in found for place in rank), "")
        kept = from_first(checkpoint.newest(self.folder.checkpoints) if self.world.is_first else None)
        raise RunStopped(
            f"{fault} at step {self.step + 1}{place}. "
            + (f"{kept} is kept" if kept else "No checkpoint was saved yet")
            + ": lower train.learning_rate, or look at the data of this step"
        )

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
        """Scores of every validation set, on the screen and in the metrics."""
        scores = {}
        data, limit = self.config.data, self.config.train.validation_batches
        end_of_text = self.corpora.tokenizer.end_of_text
        for name, shards in self.corpora.validation.items():
            batches = evaluation_batches(
                shards, data.sequence_length, self.micro_batch, end_of_text, data.reset_at_document
            )
            if limit:
                batches = islice(batches, limit * self.config.train.global_batch // self.micro_batch)
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
