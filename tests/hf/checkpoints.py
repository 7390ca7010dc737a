"""Run folders with the weights of a model that was never trained, for the tests to convert."""

from pathlib import Path
from typing import Any

import torch

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import Config
from moe_mamba.config_file import save_config
from moe_mamba.data.tokenizer import BytesTokenizer, Tokenizer
from moe_mamba.model.initialize import initialize
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.restore import weight_shards

SIZES = {"repeat": 1, "d_model": 16, "vocab_size": 260, "d_state": 4, "heads": 4, "d_ff": 24}


def make_run(
    path: Path,
    model: dict[str, Any],
    moe: dict[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    **train: Any,
) -> LanguageModel:
    """A run's folder at ``path``, and the model that is in it, in evaluation mode."""
    routing = {"experts": 4, "capacity_factor": None, **(moe or {})}
    config = Config(model={**SIZES, **model}, moe=routing, train=train)
    built = LanguageModel(config.model, config.moe)
    initialize(built, 0)
    torch.manual_seed(0)
    with torch.no_grad():  # norms, D and biases too, so that nothing can be mixed up
        for tensor in (*built.parameters(), *built.buffers()):
            tensor += 0.1 * torch.randn_like(tensor)
    shards = [part for shard in weight_shards(built) for part in _halves(shard)]
    save_run(path, config, shards, tokenizer or BytesTokenizer())
    return built.eval()


def _halves(shard: Shard) -> list[Shard]:
    """A tensor as two chunks along its last dimension, as a layout might shard it."""
    half = shard.shape[-1] // 2
    inner = (0,) * (len(shard.shape) - 1)
    return [
        Shard(shard.name, shard.shape, (*inner, start), shard.tensor[..., start:stop])
        for start, stop in ((0, half), (half, shard.shape[-1]))
    ]


def save_run(path: Path, config: Config, shards: list, tokenizer: Tokenizer) -> None:
    """A run's folder with a checkpoint of step 10."""
    run = RunFolder(path)
    description = {"config": config.model_dump(), "tokenizer": tokenizer.fingerprint, "tokens": 5120, "corpora": {}}
    store.save(run.checkpoints, 10, shards, description)
    tokenizer.save(run.tokenizer)
    save_config(config, run.config)
