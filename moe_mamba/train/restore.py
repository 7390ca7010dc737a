"""A trained model back from a checkpoint: to generate, to evaluate, or to start another run from."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moe_mamba.config import Config
from moe_mamba.config_file import parse_config
from moe_mamba.data.tokenizer import Tokenizer, load_tokenizer
from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.pieces import Piece
from moe_mamba.train import checkpoint


@dataclass(frozen=True)
class Restored:
    """A model in fp32, in evaluation mode, with what made it."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: Config
    path: Path


def restore(run_or_step: str | Path, device: torch.device) -> Restored:
    """The model of a run's newest checkpoint, or of one step's folder.

    Raises:
        UserError: there is no such checkpoint, or its tokenizer is missing or another one.
    """
    path = checkpoint.resolve(run_or_step)
    description = checkpoint.read_description(path)
    config = parse_config(description["config"])
    tokenizer = load_tokenizer(str(path.parents[1] / "tokenizer"))
    if tokenizer.fingerprint != description["tokenizer"]:
        raise UserError(
            f"{path.parents[1] / 'tokenizer'} is not the tokenizer that {path} was trained with: restore it"
        )
    with torch.device("meta"):
        model = LanguageModel(config.model, config.moe)
    model.to_empty(device=device)
    load_weights(model, path)
    return Restored(model.eval(), tokenizer, config, path)


def find_weights(config: Config, run_or_step: str | Path) -> Path:
    """The step's folder whose weights fit the model that `config` describes, found before anything is begun.

    Raises:
        UserError: there is no such checkpoint, or it is of another model.
    """
    path = checkpoint.resolve(run_or_step)
    found = checkpoint.logical_tensors(path)
    with torch.device("meta"):
        model = LanguageModel(config.model, config.moe)
    for piece in weight_pieces(model):
        shape = found[piece.name][0] if piece.name in found else None
        if shape != piece.shape:
            there = "is missing" if shape is None else f"has the shape {tuple(shape)}"
            raise UserError(
                f"{path} is of another model: {piece.name} {there}, and this config wants {piece.shape}: "
                "give the config that it was trained with"
            )
    return path


def load_weights(model: LanguageModel, path: Path) -> None:
    """Fill `model` with the weights in a step's folder.

    Raises:
        UserError: the checkpoint's weights are not this model's.
    """
    checkpoint.load(path, weight_pieces(model))


def weight_pieces(model: LanguageModel) -> list[Piece]:
    """Every weight and persistent buffer of a whole model as one box."""
    return [
        Piece(f"weights/{name}", tuple(value.shape), (0,) * value.ndim, value.data)
        for name, value in model.state_dict(keep_vars=True).items()
    ]
