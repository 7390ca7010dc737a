"""Say what the experts of trained models specialise in."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from moe_mamba.atomic_file import write_atomically
from moe_mamba.config_types import OptionalPositive, Positive, Range
from moe_mamba.data.prepare import prepare_corpus
from moe_mamba.data.source import Source
from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.errors import UserError
from moe_mamba.evaluation.choices import Choices, Text, choices_of
from moe_mamba.evaluation.expert_picture import draw
from moe_mamba.evaluation.expert_report import LOOKS_AHEAD, Read, Run, agreement_table, as_json, as_markdown, summary
from moe_mamba.evaluation.specialisation import Agreement, RouterFindings, agreements, bucket_starts, findings
from moe_mamba.model.pattern import kinds
from moe_mamba.parallel.topology import World
from moe_mamba.run.restore import Trained, open_trained, restore_trained


def main(
    *runs: str,
    input: str | None = None,
    output: str = "experts",
    tokens: Positive = 262_144,
    sequence_length: OptionalPositive = None,
    batch: Positive = 8,
    text_key: str | None = None,
    shuffles: Annotated[int, Range(2, 1000)] = 10,
    words: Annotated[int, Range(0, 1000)] = 8,
) -> None:
    """Say which tokens each expert gets beyond chance, what experts know of token and place, and if seeds agree.

    Several runs, such as seeds of one configuration, read the same tokens. Writes experts.md, experts.json and
    experts.png into --output, and prints the tables of routers.

    Args:
        runs: folders of runs (their newest checkpoints are used), or checkpoints/step-... folders of them.
        input: a text, or any other source that `data.train` takes; the first run's first validation set if not given.
        output: folder for what is written.
        tokens: of the text to read, rounded down to whole windows, but for the first.
        sequence_length: tokens per window; the first run's own if not given.
        batch: windows at once.
        text_key: field that holds a document's text; the first run's own if not given.
        shuffles: of the experts over the tokens, for what chance alone gives.
        words: tokens of each expert that are listed, at most.
    """
    if not runs:
        raise UserError("no run is given: name the folder of one, or of several seeds")
    world = World.from_environment()
    if world.size > 1:
        raise UserError("tools/experts.py runs in one process: start it without a launcher")
    if Path(output).exists() and not Path(output).is_dir():
        raise UserError(f"--output={output} is a file: give a folder")
    opened = _open(runs)
    first = next(iter(opened.values()))
    length = sequence_length or first.config.data.sequence_length
    source = input or next(iter(first.config.data.validation_sets.values()))
    corpus = _corpus(source, first, text_key)
    read: list[tuple[Text, dict[str, Choices]]] = []
    for trained in opened.values():
        model, reset = restore_trained(trained, world.device).model, trained.config.data.reset_at_document
        most = max(1, tokens // length)
        read.append(choices_of(model, corpus, length, batch, most, trained.tokenizer.end_of_text, reset))
    choices = {name: one for name, (_, one) in zip(opened, read, strict=True)}
    text = read[0][0]
    found = [
        Run(name, str(trained.path), _findings(text, choices[name], trained.tokenizer, shuffles, words))
        for name, trained in opened.items()
    ]
    vocabulary, buckets = len(set(text.ids.tolist())), bucket_starts(text)
    what = Read(source, corpus.identity, len(text.ids), length, vocabulary, buckets, shuffles)
    pairs = agreements(text.ids, choices, shuffles)
    _write(Path(output), what, found, pairs)
    _say(found, pairs)
    print(f"\n{output}: experts.md, experts.json and experts.png")


def _corpus(source: str, trained: Trained, text_key: str | None) -> Source:
    """The text, as the run would read it; what is to be known of it is said."""
    data = trained.config.data
    key = text_key or data.text_key
    corpus = prepare_corpus(source, trained.tokenizer, data.cache, data.max_documents, text_key=key)
    rejects = f"{corpus.rejects:,} damaged lines are kept in {corpus.rejects_file}"
    for line in [rejects] * bool(corpus.rejects) + corpus.notes:
        print(line, file=sys.stderr)
    return corpus


def _say(runs: Sequence[Run], pairs: Sequence[Agreement]) -> None:
    """Print the tables of routers."""
    print("\n".join(summary(runs)))
    if pairs:
        print("\n".join(["", *agreement_table(pairs)]))
    if any(router.looks_ahead for run in runs for router in run.routers.values()):
        print(f"\n{LOOKS_AHEAD}")


def _findings(
    text: Text, choices: Mapping[str, Choices], tokenizer: Tokenizer, shuffles: int, words: int
) -> dict[str, RouterFindings]:
    """What each router of a run does, by its label."""
    return {
        label: findings(text, one, lambda word: tokenizer.decode([word]), shuffles, words)
        for label, one in choices.items()
    }


def _write(folder: Path, read: Read, runs: Sequence[Run], pairs: Sequence[Agreement]) -> None:
    """The report as text, numbers and picture."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "experts.json", as_json(read, runs, pairs))
    write_atomically(folder / "experts.md", as_markdown(read, runs, pairs))
    draw(read, runs, pairs, folder / "experts.png")


def _open(runs: tuple[str, ...]) -> dict[str, Trained]:
    """The runs by name, which have one tokenizer."""
    folders = [Path(run) for run in runs]
    if len(set(folders)) < len(folders):
        raise UserError("a run is named twice: name each once")
    count = Counter(folder.name for folder in folders)
    opened = {folder.name if count[folder.name] == 1 else str(folder): open_trained(folder) for folder in folders}
    for name, trained in opened.items():
        model = trained.config.model
        if not any(mixer.routes for mixer in kinds(model, trained.config.moe)):
            raise UserError(f"{name}: model.pattern={model.pattern} has no experts: give runs that have")
    (first, one), *others = opened.items()
    for name, other in others:
        if other.tokenizer.fingerprint != one.tokenizer.fingerprint:
            raise UserError(f"{name} has another tokenizer than {first}: compare runs that read the same tokens")
    return opened
