"""What rank 0 settles before any process group is made, so that the user's mistakes end a run before it began."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moe_mamba.config import Config
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.parallelize import check_compiler
from moe_mamba.parallel.topology import World
from moe_mamba.train import checkpoint
from moe_mamba.train.corpora import Corpora, open_corpora
from moe_mamba.train.micro_batch import choose_micro_batch
from moe_mamba.train.restore import find_weights
from moe_mamba.train.run_folder import RunFolder
from moe_mamba.train.screen import Screen


@dataclass(frozen=True)
class Beginning:
    """Where a run starts from, the same on all ranks.

    Attributes:
        newest: the checkpoint to go on from.
        done: steps that it has made.
        warm: the checkpoint whose weights a fresh run takes.
        micro_batch: sequences that a device works on at once.
    """

    newest: Path | None
    done: int
    warm: Path | None
    micro_batch: int


def check(config: Config, world: World) -> None:
    """Refuse, on every rank alike, what cannot run here.

    Raises:
        UserError: the batch does not divide, a process has no device, or a compiler is missing.
    """
    world.check_devices()
    world.sequences_per_rank(config.train.global_batch, config.train.micro_batch)
    check_compiler(config.train)


def settle(config: Config, folder: RunFolder, screen: Screen, world: World) -> tuple[Beginning, Corpora | None]:
    """Find the checkpoint, prepare the corpora, choose the micro-batch; for rank 0 alone.

    Returns:
        The beginning, and the corpora; None for a run that is finished, which needs none.

    Raises:
        UserError: checkpoints, weights or corpora are missing, damaged, or do not fit.
    """
    newest = checkpoint.newest(folder.checkpoints, screen.say)
    done = checkpoint.step_of(newest) if newest else 0
    warm = find_weights(config, config.train.warm_start) if config.train.warm_start and not newest else None
    if newest is None:
        folder.forget_tokenizer()
    corpora = open_corpora(config, folder, screen.say, verify=config.data.verify) if done < config.steps else None
    if newest and corpora:
        corpora.check_unchanged(checkpoint.read_description(newest), folder)
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in LanguageModel(config.model, config.moe).parameters())
    share = world.sequences_per_rank(config.train.global_batch, config.train.micro_batch)
    return Beginning(newest, done, warm, choose_micro_batch(config, share, parameters, world.device)), corpora
