"""A trained model back from a checkpoint: to generate, to evaluate, or to start another run from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.manifest import DESCRIPTION, OTHER, DamagedError
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import Config
from moe_mamba.config_file import parse_config
from moe_mamba.data.tokenizer import Tokenizer, load_tokenizer
from moe_mamba.errors import UserError, brief
from moe_mamba.installation import command
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.run.folder import RunFolder

ALONE = Topology(World(0, 1, 0, 1))
READ = ("config", "tokenizer", "step", "tokens")  # what everybody reads of a description
RESUMED = (*READ, "corpora", "micro_batch", "micro_steps")  # and a run that goes on


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
    _check_keys(path, description, READ)
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
    config = read_config(path, description)
    check_weights(path, config)
    return Trained(path, config, description, loaded)


def check_resumable(path: Path) -> None:
    """Check that a valid step's folder says all that a run needs to go on from it, and holds the weights of its model.

    Raises:
        DamagedError: it does not.
    """
    description = store.read_description(path)
    _check_keys(path, description, RESUMED)
    check_weights(path, read_config(path, description))


def _check_keys(path: Path, description: dict[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if description.get(key) is None]
    if missing:
        raise DamagedError(f"{path / DESCRIPTION} does not say {missing[0]}: {OTHER}")


def read_config(path: Path, description: dict[str, Any]) -> Config:
    """The configuration in the description of a step's folder, of no more layers than the folder has tensors.

    Raises:
        DamagedError: it describes no run, or not this one.
    """
    model = description["config"].get("model", {})
    pattern, repeat, tensors = model.get("pattern", ""), model.get("repeat", 0), len(store.logical_tensors(path))
    if not isinstance(pattern, str) or type(repeat) is not int or len(pattern) * repeat > 2 * tensors:
        raise DamagedError(
            f"{path / DESCRIPTION} says {brief(repeat, 20)} x {brief(pattern, 20)} layers, but there are only "
            f"{tensors:,} tensors: {OTHER}"
        )
    try:
        config = parse_config(description["config"])
        if not config.has_vocabulary:
            raise UserError("model.vocab_size is null")
        return config
    except UserError as error:
        raise DamagedError(f"{path / DESCRIPTION} has a wrong config ({brief(error, 100)}): {OTHER}") from None


def check_weights(path: Path, config: Config) -> None:
    """Check that a step's folder holds the weights of the model in its description; only its index is read.

    So whoever builds that model allocates no more than the folder holds.

    Raises:
        DamagedError: it lacks a weight, or has it in another shape.
    """
    try:
        fault = _fault_of_weights(LanguageModel.on_meta(config.model, config.moe), path)
    except (RuntimeError, TypeError, ArithmeticError) as error:  # torch has no numbers for such sizes
        fault = f"its sizes are impossible ({brief(error, 100)})"
    if fault:
        raise DamagedError(f"{path / DESCRIPTION} is of another model: {fault}: {OTHER}")


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
    if fault := _fault_of_weights(model, path):
        raise UserError(f"{path} belongs to another model: {fault}: give the config that it was trained with")
    return path


def _fault_of_weights(model: LanguageModel, path: Path) -> str | None:
    """Which weight of `model` a step's folder lacks, or has in another shape; None where it holds all."""
    found = store.logical_tensors(path)
    for shard in weight_shards(model):
        shape = found[shard.name][0] if shard.name in found else None
        if shape != shard.shape:
            there = "is missing" if shape is None else f"has the shape {brief(tuple(shape), 40)}"
            return f"{shard.name} {there}, but this config needs {shard.shape}"
    return None


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
