"""The text of a table: where validation comes from, the vocabulary, and what of both a reader can check."""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_mamba.atomic_file import put_in_place, write_atomically
from moe_mamba.config import DataConfig
from moe_mamba.data.builtin import builtin_documents
from moe_mamba.data.corpus import TEXT_KEY, Corpus
from moe_mamba.data.prepare import prepare_corpus, prepare_tokenizer
from moe_mamba.data.shards import is_shards
from moe_mamba.errors import UserError
from moe_mamba.file_lock import lock
from moe_mamba.json_file import Record, Size, Text, read_json

FILE = "text.json"
TOKENIZER = "tokenizer"  # folder of the vocabulary beside it
HELD_OUT = 50  # where no validation is given, one document in so many is held out for it
PIECES = "sentencepiece"


class Facts(Record):
    """What stands in `text.json`.

    Attributes:
        asked: as the flags had it.
        train: sources that runs train on.
        validation: the source that they validate on.
        tokenizer: what runs take.
        vocab_size: of the models.
        sha256: file, as it was given -> its checksum.
        tokens: of training and of validation.
        documents: of training and of validation, where they were counted.
        split: how validation was held out.
        vocabulary: in words.
    """

    asked: dict[Text, Any]
    train: list[Text]
    validation: Text
    tokenizer: Text
    vocab_size: Size
    sha256: dict[Text, Text]
    tokens: list[Size]
    documents: list[Size]
    split: Text
    vocabulary: Text

    def public(self) -> dict[str, Any]:
        """What a reader can check; files by their names alone, which say nothing of the machine."""
        shown = self.model_dump(include={"vocab_size", "tokens", "documents", "split"})
        checksums, seen = dict[str, str](), Counter[str]()
        for source, digest in self.sha256.items():
            name = name_of(source)
            seen[name] += 1
            checksums[name if seen[name] == 1 else f"{name} ({seen[name]})"] = digest
        vocabulary = name_of(self.vocabulary) if self.asked.get("tokenizer") else self.vocabulary
        return shown | {"sha256": checksums, "vocabulary": vocabulary}


@dataclass(frozen=True)
class Asked:
    """What flags say of the text; empty where they say nothing."""

    train: str = ""
    validation: str = ""
    tokenizer: str = ""
    text_key: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether no flag was given."""
        return not any(asdict(self).values())

    @property
    def names_tokenizer(self) -> bool:
        """Whether a vocabulary is given, and not to be trained."""
        return self.tokenizer not in ("", PIECES)

    def sources(self) -> tuple[list[str], str]:
        """Of training, and of validation, read as the configuration reads these keys: a,b and JSON."""
        data = DataConfig.model_validate(
            {"train": self.train or "builtin", "validation": self.validation or "builtin:validation"}
        )
        return list(data.train_weights), next(iter(data.validation_sets.values()))


def name_of(source: str) -> str:
    """A source without the folders that it lies in on this machine; a data set of a hub is its name already."""
    return source if source.startswith(("hf:", "builtin")) else Path(source).name


def prepare_text(folder: Path, asked: Asked, vocab_size: int, say: Callable[[str], None]) -> Facts:
    """Hold out the validation, train the vocabulary and tokenize, once; a second call finds it done.

    Args:
        folder: of the text, in the output.
        asked: by flags; nothing asks for what is there already, else for the built-in corpus.
        vocab_size: pieces to train, where no tokenizer is given.
        say: is told what takes long.

    Raises:
        UserError: other text is there already, or this one cannot be read; or it was unpacked from an archive, which
            has no text.
    """
    if (folder / FILE).is_file() and not (folder / TOKENIZER).is_dir():
        raise UserError(
            f"{folder.parent} is of an archive, which has no text to train on: give --gather, or another --output"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        return text_of(folder, asked) or _prepare(folder, asked, vocab_size, say)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for another call that prepares text in a folder; the lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _prepare(folder: Path, asked: Asked, vocab_size: int, say: Callable[[str], None]) -> Facts:
    key = asked.text_key or TEXT_KEY
    train, validation = asked.sources()
    is_given = bool(asked.validation) or train == ["builtin"]
    checksums = _checksums([*train, *[validation] * is_given], key)
    split, documents = "as it was given", []
    if is_given and not asked.validation:
        split = "the built-in corpus's own: one document in 16, by the hash of its name"
        documents = [len(builtin_documents(part)) for part in ("train", "validation")]
    elif not is_given:
        say(f"split     one document in {HELD_OUT} of {', '.join(train)} is held out for validation")
        documents = _hold_out(train, key, folder)
        train, validation, key = [str(folder / "train.jsonl")], str(folder / "validation.jsonl"), TEXT_KEY
        split = f"documents {HELD_OUT}, {2 * HELD_OUT}, ... are held out"
    tokenizer = prepare_tokenizer(
        asked.tokenizer or PIECES, train, _most(asked, vocab_size), folder / TOKENIZER, text_key=key
    )
    sources = [
        prepare_corpus(source, tokenizer, folder / "cache", text_key=key, say=say) for source in [*train, validation]
    ]
    sizes = [source.extent[0] for source in sources]
    facts = Facts(
        asked=asdict(asked),
        train=train,
        validation=validation,
        tokenizer=str(folder / TOKENIZER),
        vocab_size=tokenizer.vocab_size if asked.names_tokenizer else vocab_size,
        sha256=checksums,
        tokens=[sum(sizes[:-1]), sizes[-1]],
        documents=documents,
        split=split,
        vocabulary=_vocabulary(asked, vocab_size),
    )
    write_atomically(folder / FILE, json.dumps(facts.model_dump(), indent=1) + "\n")
    return facts


def expected_text(asked: Asked, vocab_size: int) -> Facts:
    """What flags will give, without reading the text: sources and size of the vocabulary, and no token counted.

    Raises:
        UserError: there is no such file or tokenizer.
    """
    train, validation = asked.sources()
    for source in [*train, validation]:
        if not is_shards(source):
            Corpus(source, asked.text_key or TEXT_KEY)
    if asked.names_tokenizer:
        with tempfile.TemporaryDirectory() as folder:
            vocab_size = prepare_tokenizer(asked.tokenizer, train, _most(asked, vocab_size), folder).vocab_size
    return Facts(
        asked=asdict(asked),
        train=train,
        validation=validation,
        tokenizer=asked.tokenizer or PIECES,
        vocab_size=vocab_size,
        sha256={},
        tokens=[],
        documents=[],
        split="not made yet",
        vocabulary=_vocabulary(asked, vocab_size),
    )


def text_of(folder: Path, asked: Asked) -> Facts | None:
    """The text that was prepared in a folder; None: none was.

    Raises:
        UserError: flags ask for other text.
    """
    return _found(folder, asked) if (folder / FILE).is_file() else None


def _found(folder: Path, asked: Asked) -> Facts:
    facts = Facts.model_validate(read_json(folder / FILE, "remove the folder, or give another --output"))
    if not asked.is_empty and facts.asked != asdict(asked):
        if not (folder / TOKENIZER).is_dir():
            raise UserError(f"{folder.parent} is of an archive, which has one text: leave --data out")
        was = ", ".join(f"--data.{key}={value}" for key, value in facts.asked.items() if value) or "the built-in corpus"
        raise UserError(f"{folder} holds other text, of {was}: give that, or another --output")
    return facts


def _most(asked: Asked, vocab_size: int) -> int:
    """Tokens that a tokenizer may have: of one that is given, any number."""
    return 2**24 if asked.names_tokenizer else vocab_size


def _vocabulary(asked: Asked, vocab_size: int) -> str:
    """In words."""
    if asked.names_tokenizer:
        return asked.tokenizer
    return f"SentencePiece (BPE) of {vocab_size:,}, trained on the training text"


def _checksums(sources: Sequence[str], key: str) -> dict[str, str]:
    found = {}
    for source in sources:
        if is_shards(source) or source.startswith("hf:"):
            continue  # shards have checksums of their own; a hub's files are its matter
        if source.startswith("builtin"):
            split = source.partition(":")[2] or "train"
            found[source] = hashlib.sha256("\0".join(builtin_documents(split)).encode()).hexdigest()
            continue
        for file in Corpus(source, key).files:
            with open(file.name, "rb") as stream:
                found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _hold_out(sources: Sequence[str], key: str, folder: Path) -> list[int]:
    """Write documents of training and of validation as JSON lines; how many there are of each."""
    if shards := [source for source in sources if is_shards(source)]:
        raise UserError(
            f"--data.train={shards[0]} is shards, of which nothing is held out: give --data.validation, too"
        )
    names = ("train", "validation")
    paths = [folder / f"{name}.jsonl.tmp" for name in names]
    counts = [0, 0]
    with paths[0].open("w", encoding="utf-8") as train, paths[1].open("w", encoding="utf-8") as validation:
        for source in sources:
            for document in Corpus(source, key).documents():
                is_held_out = (sum(counts) + 1) % HELD_OUT == 0
                counts[is_held_out] += 1
                (train, validation)[is_held_out].write(json.dumps({"text": document.text}) + "\n")
    if not counts[1]:
        raise UserError(
            f"--data.train has {counts[0]} documents, and one in {HELD_OUT} is held out: give --data.validation, too"
        )
    for path, name in zip(paths, names, strict=True):
        put_in_place(path, folder / f"{name}.jsonl")
    return counts
