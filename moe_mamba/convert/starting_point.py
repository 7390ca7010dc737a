"""A run's folder that holds only weights, at step 0: what is imported or upcycled, for runs to start from.

Training does not go on in it (there are no moments, and its data and schedule are nobody's choice yet): a run takes its
weights with `train.warm_start`. Everything that reads a trained run reads it too.
"""

import shlex
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import Config
from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.errors import UserError
from moe_mamba.installation import command
from moe_mamba.run.atomic import whole_folder
from moe_mamba.run.folder import RunFolder

MARK = "config.yaml"  # what every run's folder holds, and --overwrite asks for


def write_starting_point(
    output: Path, config: Config, tokenizer: Tokenizer, shards: Sequence[Shard], overwrite: bool = False
) -> Path:
    """Write a run's folder: `config.yaml`, `tokenizer/`, and the weights as the checkpoint of step 0.

    Args:
        output: the folder; it appears when it is whole.
        config: what a run from these weights starts with; its folder and its tokenizer become `output`'s.
        tokenizer: whose ids the weights know.
        shards: ``weights/...``, every tensor of the model whole; those with `read` are read one after the other.
        overwrite: replace a run's folder that is there.

    Returns:
        The step's folder.

    Raises:
        UserError: there is something at `output`, the tokenizer has more tokens than the model, a tensor holds NaN or
            Inf, or the disk is full.
    """
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model has {config.model.vocab_size}: "
            "give the tokenizer that it was trained with"
        )
    tree = config.model_dump()
    tree["run"]["folder"], tree["data"]["tokenizer"] = str(output), str(output / "tokenizer")
    config = Config.model_validate(tree)
    description = {"config": tree, "tokenizer": tokenizer.fingerprint, "corpora": {}, "tokens": 0}
    with _unused(output), whole_folder(output, overwrite, MARK) as aside:
        folder = RunFolder(aside)
        step = store.save(folder.checkpoints, 0, shards, description)
        tokenizer.save(folder.tokenizer)
        folder.save_config(config)
    return output / "checkpoints" / step.name


def _unused(output: Path) -> AbstractContextManager[None]:
    """Refuse to replace a run that is at work."""
    return RunFolder(output).locked() if (output / MARK).is_file() else nullcontext()


def how_to_train(output: Path) -> str:
    """The line that says how to start a run from these weights."""
    folder = RunFolder(output)
    config, free, start = (shlex.quote(str(path)) for path in (folder.config, folder.next_free, output))
    return f"train on with: {command('train')} --config {config} --run.folder={free} --train.warm_start={start}"
