"""A trained model back from a checkpoint: to generate, to evaluate, or to start another run from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import Config
from moe_mamba.config_file import parse_config
from moe_mamba.data.tokenizer import Tokenizer, load_tokenizer
from moe_mamba.errors import UserError
from moe_mamba.installation import command
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.run.folder import RunFolder

ALONE = Topology(World(0, 1, 0, 1))


@dataclass(frozen=True)
class Restored:
    """A model in fp32, in evaluation mode, with what made it; of a sharded one, this rank's part."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: Config
    path: Path
    topology: Topology = ALONE


@dataclass(frozen=True)
class Trained:
    """A checkpoint whose weights are left on the disk, and what is known of it.

    Attributes:
        path: the step's folder.
        config: of the run.
        description: of the checkpoint.
        tokenizer: the run's.
    """

    path: Path
    config: Config
    description: dict[str, Any]
    tokenizer: Tokenizer

    @property
    def run(self) -> RunFolder:
        """The run's folder, which may be incomplete: a step's folder can stand alone."""
        return RunFolder(self.path.resolve().parents[1])


def open_trained(run_or_step: str | Path, tokenizer: str | Path | None = None) -> Trained:
    """Open a run's newest checkpoint, or one step's folder, without reading its weights.

    Args:
        run_or_step: the folder.
        tokenizer: what ``load_tokenizer`` takes, instead of the run's own folder.

    Raises:
        UserError: there is no valid checkpoint, or its tokenizer is missing or another one.
    """
    return read_trained(store.resolve(run_or_step), tokenizer)


def read_trained(path: Path, tokenizer: str | Path | None = None) -> Trained:
    """As ``open_trained``, of a step's folder that is known to be valid."""
    description = store.read_description(path)
    source = tokenizer or RunFolder(path.resolve().parents[1]).tokenizer
    if tokenizer is None and not Path(source).is_dir():
        raise UserError(
            f"{source} is missing: restore it ({command('convert_to_hf')} accepts another copy: --tokenizer=gpt2, "
            "bytes, a folder or a .model file)"
        )
    loaded = load_tokenizer(source)
    if loaded.prefix and loaded.fingerprint_without_prefix == description["tokenizer"]:
        raise UserError(
            f"{path} was trained without the BOS that {source} puts before every text: set post_processor to null in "
            "its tokenizer.json, or import the model again"
        )
    if loaded.fingerprint != description["tokenizer"]:
        raise UserError(f"{source} is not the tokenizer that {path} was trained with: restore that one")
    return Trained(path, parse_config(description["config"]), description, loaded)


def restore(run_or_step: str | Path, device: torch.device) -> Restored:
    """The model of a run's newest checkpoint, or of one step's folder.

    Raises:
        UserError: as ``open_trained``.
    """
    return restore_trained(open_trained(run_or_step), device)


def restore_trained(trained: Trained, device: torch.device) -> Restored:
    """As ``restore``, of a checkpoint that is open."""
    model = LanguageModel.on_meta(trained.config.model, trained.config.moe, trained.config.run.kernels)
    model.to_empty(device=device)
    load_weights(model, trained.path)
    return Restored(model.eval(), trained.tokenizer, trained.config, trained.path)


def find_weights(model: LanguageModel, run_or_step: str | Path) -> Path:
    """The step's folder whose weights fit `model`, found before anything is begun.

    Raises:
        UserError: there is no such checkpoint, or it is of another model.
    """
    path = store.resolve(run_or_step)
    found = store.logical_tensors(path)
    for shard in weight_shards(model):
        shape = found[shard.name][0] if shard.name in found else None
        if shape != shard.shape:
            there = "is missing" if shape is None else f"has the shape {tuple(shape)}"
            raise UserError(
                f"{path} belongs to another model: {shard.name} {there}, but this config needs {shard.shape}: "
                "give the config that it was trained with"
            )
    return path


def load_weights(model: LanguageModel, path: Path) -> None:
    """Fill `model` with the weights in a step's folder.

    Raises:
        UserError: the checkpoint's weights are not this model's.
    """
    store.load(path, weight_shards(model))


def weight_shards(model: LanguageModel) -> list[Shard]:
    """Every weight and persistent buffer of a whole model as one chunk."""
    return [
        Shard(f"weights/{name}", tuple(value.shape), (0,) * value.ndim, value.data)
        for name, value in model.logical_tensors().items()
    ]
