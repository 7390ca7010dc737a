"""Documents from a source: the built-in corpus, files and globs of files, or a Hugging Face dataset, streamed.

Each damaged line or file is a ``Reject`` with its place and its bytes (records.py), for whoever keeps the documents to
keep as well, and reading goes on behind it.
"""

import glob
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from moe_mamba.data.builtin import SPLITS, builtin_documents
from moe_mamba.data.quiet import quiet_hub
from moe_mamba.data.records import (
    NoText,
    Records,
    Reject,
    first_line,
    lines,
    parquet_rows,
    text_of_line,
    text_of_row,
    whole_text,
)
from moe_mamba.errors import UserError

KINDS = ".txt, .jsonl, .json, .jsonl.gz, .json.gz, .parquet"
TEXT_KEY = "text"  # the field that holds a document, where no other is named
TRIED = 1000  # records of a source that are rejected before it is refused, where no document came
EMPTY = "the text is empty"


class Place(NamedTuple):
    """How far a source was read: files that are done, and records (lines, rows) of the file after them."""

    file: int = 0
    record: int = 0


START = Place()


class Document(NamedTuple):
    """One document: its text, the bytes of the text in UTF-8, and the place right behind it."""

    text: str
    size: int
    place: Place


OnReject = Callable[[Reject], None]


@dataclass(frozen=True)
class _File:
    """One file of a source, or what counts as one: ``read(skip)`` yields its records behind the first ``skip``."""

    name: str
    read: Callable[[int], Records]
    size: int = 0
    has_fields: bool = True


class Corpus:
    """A source, resolved into files. ``bytes_read`` of ``total_bytes`` says how far reading has come.

    The source's syntax is that of ``data.train``: ``builtin``, ``builtin:validation``, a file or glob of
    .txt (one document a file), .jsonl, .json.gz or .parquet, or ``hf:NAME[:CONFIG]:SPLIT``. ``text_key`` is the field
    that holds a document's text, where a source has fields.
    """

    def __init__(self, source: str, text_key: str = TEXT_KEY) -> None:
        """Resolve ``source``; raises UserError where there is nothing of that name."""
        self.source = source
        self.text_key = text_key
        self.bytes_read = 0
        if source == "builtin" or source.startswith("builtin:"):
            self.files = [_builtin_file(source)]
        elif source.startswith("hf:"):
            self.files = [_hub_file(source, text_key)]
        else:
            self.files = [self._local_file(path) for path in _matching_files(source)]
        self.total_bytes = sum(file.size for file in self.files)

    def describe(self) -> dict:
        """What the documents depend on, as JSON: a run that goes on compares it."""
        description: dict = {"source": self.source}
        if self.source.startswith("builtin"):
            description["python"] = ".".join(map(str, sys.version_info[:3]))
        elif not self.source.startswith("hf:"):
            description["files"] = [{"name": Path(file.name).name, "bytes": file.size} for file in self.files]
        if self.text_key != TEXT_KEY and any(file.has_fields for file in self.files):
            description["text_key"] = self.text_key
        return description

    def documents(
        self, limit: int | None = None, on_reject: OnReject = lambda reject: None, start: Place = START
    ) -> Iterator[Document]:
        """Yield the documents behind ``start``, at most ``limit`` of them; ``on_reject`` gets what cannot be read.

        Raises:
            UserError: the source cannot be reached, or holds no document.
        """
        kept = damaged = 0
        first: Reject | None = None
        self.bytes_read = sum(file.size for file in self.files[: start.file])
        for index, file in enumerate(self.files[start.file :], start.file):
            skip = start.record if index == start.file else 0
            for record, item in enumerate(_readable(file, skip) if kept != limit else (), skip):
                document = _check(item, file.name, Place(index, record + 1))
                if isinstance(document, Reject):
                    first = _telling(first, document)
                    damaged += document.reason != EMPTY
                    on_reject(document)
                    if not kept and damaged == TRIED and start == START:
                        raise UserError(_refusal(f"{file.name}: no document in the first {TRIED:,} records", first))
                    continue
                kept += 1
                yield document
                if kept == limit:
                    return
            self.bytes_read = sum(file.size for file in self.files[: index + 1])
        if not kept and start == START:
            raise UserError(_refusal(f"{self.source}: it has no documents", first))

    def _local_file(self, path: Path) -> _File:
        name = path.name.lower()
        readers = {
            ".txt": self._text,
            ".jsonl": self._json_lines,
            ".json": self._json_lines,
            ".parquet": self._parquet,
        }
        reader = readers.get(Path(name.removesuffix(".gz")).suffix)
        if reader is None or (name.endswith(".gz") and reader != self._json_lines):
            raise UserError(f"{path}: unknown file type: give {KINDS}")
        try:
            size = path.stat().st_size
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): give another file, or fix it") from error
        return _File(str(path), lambda skip: reader(path, skip), size, reader != self._text)

    def _text(self, path: Path, skip: int) -> Records:
        if not skip:
            yield whole_text(path)

    def _parquet(self, path: Path, skip: int) -> Records:
        return parquet_rows(path, skip, self.text_key)

    def _json_lines(self, path: Path, skip: int) -> Records:
        before = self.bytes_read
        with path.open("rb") as file:
            stream = gzip.GzipFile(fileobj=file) if path.name.lower().endswith(".gz") else file
            for number, line in enumerate(lines(stream, str(path)), 1):
                if number > skip:
                    yield line if isinstance(line, Reject) else text_of_line(line, str(path), number, self.text_key)
                if number % 256 == 0:
                    self.bytes_read = before + file.tell()


def _check(item: str | bytes | Reject, file: str, place: Place) -> Document | Reject:
    """A document, or a reject where the text is not UTF-8 or empty."""
    if isinstance(item, Reject):
        return item
    try:
        if isinstance(item, bytes):
            raw, text = item, item.decode("utf-8")
        else:
            raw, text = item.encode("utf-8"), item
    except UnicodeError as error:
        raw = item if isinstance(item, bytes) else item.encode("utf-8", "surrogatepass")
        return Reject(file, place.record, f"not UTF-8 ({error.reason} at {error.start})", raw)  # type: ignore[attr-defined]
    if not text:
        return Reject(file, place.record, EMPTY, b"")
    return Document(text, len(raw), place)


def _readable(file: _File, skip: int) -> Records:
    """The records of a file; raises UserError where its disk, or whoever owns it, does not give it."""
    try:
        yield from file.read(skip)
    except OSError as error:
        raise UserError(f"{file.name}: cannot be read ({error.strerror}): give another file, or fix it") from error


def _telling(first: Reject | None, reject: Reject) -> Reject:
    """Of two rejects the one that tells more of why a source has no documents."""
    if first is None or (isinstance(reject, NoText) and not isinstance(first, NoText)):
        return reject
    return first


def _refusal(what: str, first: Reject | None) -> str:
    """The line for a source without documents."""
    if first is None:
        return f"{what}: give another source"
    fix = "give another source"
    if isinstance(first, NoText):
        fix = "name the field of the text with --text_key, in a configuration data.text_key"
    return f"{what} ({Path(first.file).name}, line {first.line}: {first.reason[:160]}): {fix}"


def _builtin_file(source: str) -> _File:
    split = source.partition(":")[2] or "train"
    if split not in SPLITS:
        raise UserError(
            f"{source}: the built-in corpus only has {' and '.join(SPLITS)}: give builtin:validation, for example"
        )
    return _File(source, lambda skip: iter(builtin_documents(split)[skip:]), has_fields=False)


def _hub_file(source: str, text_key: str) -> _File:
    parts = source.removeprefix("hf:").split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"{source}: give hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, such as hf:allenai/c4:en:train")
    name, config, split = parts[0], parts[1] if len(parts) == 3 else None, parts[-1]
    return _File(source, lambda skip: _hub_rows(source, name, config, split, skip, text_key))


def _hub_rows(source: str, name: str, config: str | None, split: str, skip: int, text_key: str) -> Records:
    try:
        from datasets import load_dataset  # seconds to import

        with quiet_hub():
            rows: Iterable[dict] = load_dataset(name, config, split=split, streaming=True).skip(skip)
        for number, row in enumerate(rows, skip + 1):
            yield text_of_row(row, source, number, text_key, json.dumps(row, default=str).encode())
    except Exception as error:  # the hub's client raises anything, from many libraries
        raise UserError(
            f"{source}: cannot be read from the Hugging Face hub ({type(error).__name__}: {first_line(error)}): "
            "check the name and the network, or give local files"
        ) from error


def _matching_files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{source} is a folder, not documents: give its files, such as '{source.rstrip('/')}/*.jsonl'")
    if path.exists():
        return [path]
    found = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
    if not found:
        raise UserError(f"{source}: no such file, and no file matches it: check data.train, data.validation or --input")
    return found
