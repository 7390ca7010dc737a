"""What a run says about itself: the header at its start, and the summary at its end."""

import shlex
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from moe_mamba.config import Config
from moe_mamba.data.source import Source
from moe_mamba.errors import UserError
from moe_mamba.evaluation.scores import Scores
from moe_mamba.installation import command
from moe_mamba.kernels.backends import choose
from moe_mamba.model.generation import generate
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.model.pattern import describe, has_experts, kernel_operations
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.run.console import Screen
from moe_mamba.run.folder import RunFolder
from moe_mamba.run.plots import plot_expert_load, plot_loss
from moe_mamba.train.corpora import Corpora
from moe_mamba.train.schedule import RateCurve

PROMPT = "The"
ARCHITECTURES = {"*-": "Transformer", "*E": "Transformer-MoE", "M": "Mamba", "M-": "Mamba-MLP", "ME": "MoE-Mamba"}
ARCHITECTURES |= {"(ME)": "parallel MoE-Mamba", "(*E)": "parallel Transformer-MoE"}


def header(plan: RunPlan, corpora: Corpora, micro_batch: int, rates: RateCurve) -> list[str]:
    """The lines that tell, before the first step, what is trained on what, how and where."""
    config, topology = plan.config, plan.topology
    counts, world = plan.model.parameter_counts(), topology.world
    kernels, missing = describe_kernels(config, world)
    name = ARCHITECTURES.get(config.model.pattern, "model")
    batch, length = config.train.global_batch, config.data.sequence_length
    threads = f", {torch.get_num_threads()} threads each" if world.device.type == "cpu" else ""
    lines = [
        f"model     {name}, {describe(config.model, config.moe)}, d_model {config.model.d_model}: "
        f"{_short(counts['total'])} parameters, {_short(counts['active'])} active per token "
        f"(+ {_short(counts['embedding'])} in embedding and head)",
        f"data      {', '.join(corpora.train)}: {_training_size(corpora)} to train on; "
        + ", ".join(f"{name} {_validation_size(source)}" for name, source in corpora.validation.items()),
        f"layout    {world.size} x {world.device.type}{threads}, {describe_layout(config, topology)}"
        f"{config.train.precision}, ZeRO {config.parallel.zero}{', offloaded' * config.parallel.offload_optimizer}; "
        f"{batch} x {length} tokens per step, micro-batch {micro_batch}",
        f"rate      {rates.describe()}",
        f"kernels   {kernels}",
        f"run       {config.run.folder}: {config.steps:,} steps, {_short(config.steps * batch * length)} tokens",
    ]
    return lines + [f"warning   {line}" for line in (*missing, *damaged_lines(corpora), *corpora.notes)]


def describe_layout(config: Config, topology: Topology) -> str:
    """How a model that no device holds whole is sharded; nothing where each does."""
    if not topology.is_sharded:
        return ""
    sharded_experts = " and their tensor-parallel ranks" * topology.expert_tensor
    experts = f", experts over {topology.expert}{sharded_experts}" * has_experts(config.model, config.moe)
    return f"tensor {topology.tensor} x data {topology.data}{experts}, "


def damaged_lines(corpora: Corpora) -> list[str]:
    """What of the text could not be read."""
    return [
        f"{source.rejects:,} damaged lines of {name} were skipped: they are kept in {source.rejects_file}"
        for name, source in corpora.sources.items()
        if source.rejects
    ]


def describe_kernels(config: Config, world: World) -> tuple[str, list[str]]:
    """Which back end serves each operation here, and what a missing one costs.

    Builds or imports them: nothing of that is left for the first step.
    """
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    serves = defaultdict(list)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for operation, size in kernel_operations(config.model, config.moe).items():
            serves[choose(operation, world.device.type, dtype, config.run.kernels, size)[0]].append(operation)
    line = "; ".join(f"{name}: {', '.join(served)}" for name, served in serves.items())
    said = (str(warning.message) for warning in caught if warning.category is UserWarning)  # by choose
    return line, list(dict.fromkeys(said))


def figures(scores: Scores, source: Source) -> dict[str, float | None]:
    """A validation's figures by name."""
    return {
        "loss": scores.loss,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte(source.bytes_per_token),
        "accuracy": scores.accuracy,
    }


def validation_line(name: str, scores: Scores, source: Source) -> str:
    """A validation's figures in one line."""
    bits = figures(scores, source)["bits_per_byte"]
    line = f"{name}: loss {scores.loss:.4f} nats/token, perplexity {scores.perplexity:.2f}"
    if bits is not None:
        line += f", {bits:.4f} bits per byte"
    return f"{line}, accuracy {100 * scores.accuracy:.2f}%"


def against_unigram(scores: Scores, entropy: float) -> str:
    """How much of the text's structure was learnt, beyond how often each token comes."""
    side = "below" if scores.loss < entropy else "above"
    return f"{abs(entropy - scores.loss):.2f} nats/token {side} the unigram entropy of its tokens ({entropy:.4f})"


def validation_metrics(step: int, tokens: int, corpora: Corpora, scores: dict[str, Scores]) -> dict[str, Any]:
    """A line of metrics of a validation; `validation_loss` is the first set's, `validation` holds every set's."""
    sets = {name: figures(score, corpora.validation[name]) for name, score in scores.items()}
    return {"step": step, "tokens": tokens, "validation_loss": next(iter(scores.values())).loss, "validation": sets}


def finish(
    config: Config,
    folder: RunFolder,
    screen: Screen,
    model: LanguageModel,
    corpora: Corpora,
    scores: dict[str, Scores],
    topology: Topology,
) -> None:
    """The end of a run: what was reached, the pictures, a sample of text."""
    for name, score in scores.items():
        source = corpora.validation[name]
        screen.say(f"result    {validation_line(name, score, source)}")
        if (entropy := source.unigram_entropy()) is not None:
            screen.say(f"          {against_unigram(score, entropy)}")
    if config.logging.plots:
        screen.say(f"pictures  {draw_pictures(config, folder)}")
    if config.train.sample_tokens and not topology.is_sharded and config.parallel.zero < 3:  # else no single device can
        screen.say(f"sample    {sample_text(config, model, corpora)}")
    source = next(iter(corpora.validation.values()))
    if not source.is_text:
        place, name = _quoted(folder.path), _quoted(source.name)
        screen.say(f"next      {command('evaluate')} --checkpoint {place} --input {name}")
        return
    line = f"{command('generate')} --checkpoint {_quoted(folder.path)} --prompt {PROMPT!r} --max_new_tokens 100"
    screen.say(f"next      {line}")


def _quoted(word: object) -> str:
    """A word of a command as a shell takes it: a folder's name may have spaces."""
    return shlex.quote(str(word))


def finished(config: Config, folder: RunFolder, screen: Screen, steps: int, world: World) -> None:
    """What a run that is done already says; draws the pictures, if a kill came before they were drawn."""
    screen.say(
        f"{folder.path} is finished: {steps:,} steps are done. Raise train.steps to continue; "
        "train.on_longer_budget says with which learning rate."
    )
    if world.is_first and config.logging.plots and not all(picture.exists() for picture in _pictures(config, folder)):
        screen.say(f"pictures  {draw_pictures(config, folder)}")


def draw_pictures(config: Config, folder: RunFolder) -> str:
    """Draw the run's curves and, where it has experts, their load; the files drawn, or why there are none.

    A run has not failed where its steps had no loss, or its metrics were damaged.
    """
    loss, *load = _pictures(config, folder)
    try:
        plot_loss({folder.path.name: folder.path}, loss)
        for picture in load:
            plot_expert_load(folder.path, picture)
    except UserError as error:
        return f"none: {error}"
    return ", ".join(map(str, [loss, *load]))


def _pictures(config: Config, folder: RunFolder) -> list[Path]:
    return [folder.plots / "loss.png"] + [folder.plots / "expert_load.png"] * has_experts(config.model, config.moe)


def sample_text(config: Config, model: LanguageModel, corpora: Corpora) -> str:
    """A few words of what the model writes, or why it writes none."""
    tokenizer = corpora.tokenizer
    try:
        (prompt,) = tokenizer.encode_prompts([PROMPT])
        tokens = generate(
            model,
            prompt,
            config.train.sample_tokens,
            temperature=0.7,
            seed=config.run.seed,
            end_of_text=tokenizer.end_of_text,
        )
    except UserError as error:
        return f"none: {error}"
    return tokenizer.decode([*tokenizer.without_prefix(prompt), *tokens])


def _training_size(corpora: Corpora) -> str:
    sizes, units = zip(*(source.extent for source in corpora.train.values()), strict=True)
    return f"{_short(sum(sizes))} {units[0]}" if corpora.loader.is_finite else "endless sequences"


def _validation_size(source: Source) -> str:
    size, unit = source.extent
    return f"{_short(size)} {unit}"


def _short(number: float) -> str:
    """1234567 -> 1.23 M."""
    for scale, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= scale:
            return f"{number / scale:.2f}{unit}"
    return f"{number:.0f}"
