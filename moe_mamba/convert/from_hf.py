"""The way in: a folder of Hugging Face's, or of state-spaces', becomes a run's folder to start from.

Only JSON and tensors are read: Transformers is not needed, and code in the folder is not run.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from moe_mamba.checkpoint.divergence import is_finite
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import Config, ModelConfig, MoEConfig, TrainConfig
from moe_mamba.convert.starting_point import MARK, write_starting_point
from moe_mamba.data.tokenizer import LibraryTokenizer, Tokenizer, load_tokenizer
from moe_mamba.errors import UserError, brief
from moe_mamba.hf.formats import FORMATS, OWN, Entry, Format, detect
from moe_mamba.hf.formats.settings import notes
from moe_mamba.hf.reading import Stored, read_json, stored_tensors
from moe_mamba.hf.tokenizer_files import ORIGINAL
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.mixers.attention import Attention, rotary_frequencies
from moe_mamba.model.pattern import has
from moe_mamba.run.atomic import check_output
from moe_mamba.run.restore import weight_shards

READ_DTYPES = ("F32", "F16", "BF16")  # fp32, as checkpoints have weights, holds them exactly
HEADS = ("lm_head.weight", "model.head.weight")
OLDER_NAMES = {
    "mamba": {"backbone.embeddings.weight": "backbone.embedding.weight"},  # the first conversions
    "moe_mamba": {"lm_head.weight": "model.head.weight"},  # exports from before the head had its own place
}
"""Format -> name of a tensor -> its name in older folders."""
FREQUENCIES = "rotary_emb.inv_freq"  # ends of names: buffers that older files hold and that follow from the config


def import_folder(
    folder: Path,
    output: Path,
    tokenizer: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Format, Config, Path]:
    """Write a run's folder with the weights, the configuration and the tokenizer of `folder`.

    Args:
        folder: config.json and weights of one of `FORMATS`.
        output: the run's folder; it appears when it is whole.
        tokenizer: as `load_tokenizer` takes it; None: the folder's own.
        overwrite: replace a run's folder at `output`.
        say: is told what of config.json is left out on purpose, and of the tokenizer's settings.

    Returns:
        The format that was read, the run's configuration, and the step's folder.

    Raises:
        UserError: `folder` is foreign, truncated, or of a model that ours cannot hold, or a tensor holds NaN or
            Inf; there is no tokenizer; `output` is not empty.
    """
    check_output(output, overwrite, MARK, folder)
    format, config, shards = read_folder(folder, say)
    loaded = _tokenizer(folder, tokenizer)
    for line in _special_tokens(loaded):
        say(line)
    step = write_starting_point(output, config, loaded, shards, overwrite)
    return format, config, step


def read_folder(folder: Path, say: Callable[[str], None]) -> tuple[Format, Config, list[Shard]]:
    """The format of a folder, its model's configuration, and its weights, which are read when they are written.

    What config.json asks for is compared with the files' sizes before anything is allocated.

    Args:
        folder: see `import_folder`.
        say: see `import_folder`.

    Raises:
        UserError: see `import_folder`.
    """
    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} has no config.json, so it is not a model's folder: give config.json and weights of one of "
            f"{', '.join(FORMATS)}"
        )
    configuration = read_json(folder / "config.json")
    format = detect(configuration)
    model, moe = format.read(configuration)
    for note in notes(configuration, format.architecture) if format is not OWN else ():
        say(f"note: {note}")
    stored = stored_tensors(folder)
    whole = _on_meta(folder, model, moe, len(stored))
    entries = match(folder, format, model, moe, stored)
    shards = lazy_shards(folder, whole, entries, stored)
    half = stored[entries[0].theirs].dtype == "BF16"  # the embedding's
    config = Config(model=model, moe=moe, train=TrainConfig(precision="bf16" if half else "fp32"))
    return format, config, shards


def _on_meta(folder: Path, model: ModelConfig, moe: MoEConfig, tensors: int) -> LanguageModel:
    """Ours without memory, of no more layers than the folder has tensors.

    Raises:
        UserError: config.json asks for more.
    """
    fault = f"config.json says {len(model.layers):,} layers, but there are only {tensors:,} tensors"
    if len(model.layers) <= tensors:
        try:
            return LanguageModel.on_meta(model, moe)
        except RuntimeError as error:  # torch has no numbers for such sizes
            fault = f"config.json has impossible sizes ({brief(error, 80)})"
    raise UserError(f"{folder}: {fault}: one of them belongs to another model")


def match(
    folder: Path, format: Format, model: ModelConfig, moe: MoEConfig, stored: dict[str, Stored]
) -> Sequence[Entry]:
    """The format's entries, under the names that the folder has; `stored` loses what is known to say nothing more.

    Raises:
        UserError: a tensor is missing, or there is one that the model lacks.
    """
    for name, older in OLDER_NAMES.get(format.name, {}).items():
        if older in stored and name not in stored:
            stored[name] = stored.pop(older)
    # A config.json may ask for any number of experts: one entry too many shows that a tensor is missing.
    layouts = [list(islice(format.entries(model, moe, stacked), len(stored) + 2)) for stacked in (False, True)]
    entries = min(layouts, key=lambda entries: sum(entry.theirs not in stored for entry in entries))
    embedding = next(entry.theirs for entry in entries if entry.ours == "embedding.weight")
    for head in HEADS if model.tied_head else ():
        if head in stored:
            _drop_tied_head(folder, embedding, head, stored)
    missing = [entry.theirs for entry in entries if entry.theirs not in stored]
    if missing:
        raise UserError(
            f"{folder} has no tensor {missing[0]}, which its config.json ({format.architecture}) requires: "
            "fetch the folder again"
        )
    if has(model, Attention):
        _drop_frequencies(folder, model, stored)
    surplus = stored.keys() - {entry.theirs for entry in entries}
    if surplus:
        raise UserError(
            f"{folder} has the tensor {_first(sorted(surplus))}, which the {format.architecture} of its "
            "config.json lacks: no tensor may be left out, so give the folder of a plain model"
        )
    return entries


def lazy_shards(
    folder: Path, model: LanguageModel, entries: Sequence[Entry], stored: Mapping[str, Stored]
) -> list[Shard]:
    """Every weight of ours, put together of theirs when its turn to be written comes.

    Args:
        folder: for messages.
        model: ours, on the meta device.
        entries: theirs, as `match` found them.
        stored: the folder's tensors.

    Raises:
        UserError: a tensor has another shape than the configuration says, or another kind of numbers.
    """
    parts: dict[str, list[Entry]] = defaultdict(list)
    ours = model.logical_tensors()
    for entry in entries:
        parts[entry.ours].append(entry)
        wanted, found = tuple(entry.view(ours[entry.ours]).shape), stored[entry.theirs]
        if found.shape != wanted:
            raise UserError(
                f"{folder}: {entry.theirs} has shape {brief(list(found.shape))}, but config.json says {list(wanted)}: "
                "one of them belongs to another model"
            )
        if found.dtype not in READ_DTYPES:
            raise UserError(
                f"{folder}: {entry.theirs} is {found.dtype}, but only {', '.join(READ_DTYPES)} are supported: "
                "give weights that are not quantised"
            )
    return [
        Shard(
            shard.name,
            shard.shape,
            shard.offsets,
            shard.tensor,
            partial(_assemble, folder, shard.shape, made_of, stored),
        )
        for shard in weight_shards(model)
        for made_of in (parts[shard.name.removeprefix("weights/")],)
    ]


def _assemble(folder: Path, shape: Sequence[int], entries: Sequence[Entry], stored: Mapping[str, Stored]) -> Tensor:
    """One tensor of ours, fp32.

    Raises:
        UserError: one of theirs holds NaN or Inf.
    """
    tensor = torch.empty(shape)
    for entry in entries:
        theirs = stored[entry.theirs].read()
        if not is_finite([theirs]):
            raise UserError(f"{folder}: {entry.theirs} holds NaN or Inf: fetch the folder again, or give another")
        entry.view(tensor).copy_(theirs)
    return tensor


def _drop_tied_head(folder: Path, embedding: str, head: str, stored: dict[str, Stored]) -> None:
    """Of one matrix under two names, as some writers keep it, one is enough."""
    second = stored.pop(head)
    first = stored.setdefault(embedding, second)
    is_alike = (first.shape, first.dtype) == (second.shape, second.dtype)
    if first is not second and (not is_alike or not torch.equal(first.read(), second.read())):
        raise UserError(
            f"{folder}: config.json ties the head to the embedding, but {head} differs from {embedding}: "
            "set its tie_word_embeddings (state-spaces: tie_embeddings) to false"
        )


def _drop_frequencies(folder: Path, model: ModelConfig, stored: dict[str, Stored]) -> None:
    """Leave out rotary frequencies where they are those of config.json, perhaps rounded to half precision."""
    for name in [name for name in stored if name.endswith(FREQUENCIES)]:
        found = stored.pop(name).read().float()
        is_alike = found.shape == (model.resolved_head_dim // 2,)
        expected = rotary_frequencies(model, torch.float32, torch.device("cpu")) if is_alike else found
        if not is_alike or not torch.allclose(found, expected, rtol=1e-2, atol=1e-6):
            raise UserError(
                f"{folder}: {brief(name)} has other rotary frequencies than config.json: set its rope_theta, "
                "rope_scaling and head_dim to those that the model was trained with"
            )


def _tokenizer(folder: Path, spec: str | None) -> Tokenizer:
    if spec is not None:
        return load_tokenizer(spec)
    if (folder / ORIGINAL).is_dir():  # of our own export, which translated it
        return load_tokenizer(folder / ORIGINAL)
    try:
        return load_tokenizer(folder)
    except UserError as error:
        raise UserError(f"{error}; or name one as --tokenizer") from None


def before_texts(tokenizer: Tokenizer) -> str:
    """What the tokenizer puts before every text, for a line; empty: nothing."""
    return _shown(tokenizer, tokenizer.prefix)


def _shown(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return " ".join(f"{brief(tokenizer.decode([token]) or 'BOS', 40)} (id {token})" for token in ids)


def _special_tokens(tokenizer: Tokenizer) -> Iterator[str]:
    """What of the tokenizer's own settings is not followed, a line each."""
    if tokenizer.suffix:
        yield (
            f"note: Transformers puts {_shown(tokenizer, tokenizer.suffix)} behind every text with this tokenizer; "
            "here documents of training end with end-of-text, and prompts with their own last token"
        )
    if isinstance(tokenizer, LibraryTokenizer):
        asked = {"add_bos_token": tokenizer.names.add_beginning, "add_eos_token": tokenizer.names.add_end}
        does = {"add_bos_token": bool(tokenizer.prefix), "add_eos_token": bool(tokenizer.suffix)}
        for key, value in asked.items():
            if value is not None and value != does[key]:
                wish = f"{key}={str(value).lower()}"
                yield f"note: {wish} is left aside, as in Transformers 5: tokenizer.json says otherwise"


def _first(names: Sequence[str]) -> str:
    return brief(names[0]) if len(names) == 1 else f"{brief(names[0])} (and {len(names) - 1} more)"
