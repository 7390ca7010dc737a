"""Documents from a source: the built-in corpus, files and globs of files, or a Hugging Face dataset, streamed.

Each damaged line or file is a ``Reject`` with its place and its bytes, for whoever keeps the documents to keep as
well, and reading goes on behind it.
"""

import glob
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from moe_mamba.data.builtin import SPLITS, builtin_documents
from moe_mamba.data.quiet import quiet_hub
from moe_mamba.errors import UserError

CHUNK = 1 << 20  # bytes read at once
KINDS = ".txt, .jsonl, .json, .jsonl.gz, .json.gz, .parquet"


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


class Reject(NamedTuple):
    """What could not be read: the file, the line or row from 1 (0: the whole file), why, and the bytes, if any."""

    file: str
    line: int
    reason: str
    raw: bytes


OnReject = Callable[[Reject], None]
Records = Iterator[str | bytes | Reject]  # bytes are checked to be UTF-8 by whoever asks for documents


@dataclass(frozen=True)
class _File:
    """One file of a source, or what counts as one: ``read(skip)`` yields its records behind the first ``skip``."""

    name: str
    read: Callable[[int], Records]
    size: int = 0


class Corpus:
    """A source, resolved into files. ``bytes_read`` of ``total_bytes`` says how far reading has come.

    The source's syntax is that of ``data.train``: ``builtin``, ``builtin:validation``, a file or glob of
    .txt (one document a file), .jsonl, .json.gz or .parquet (field ``text``), or ``hf:NAME[:CONFIG]:SPLIT``.
    """

    def __init__(self, source: str) -> None:
        """Resolve ``source``; raises UserError where there is nothing of that name."""
        self.source = source
        self.bytes_read = 0
        if source == "builtin" or source.startswith("builtin:"):
            self.files = [_builtin_file(source)]
        elif source.startswith("hf:"):
            self.files = [_hub_file(source)]
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
        return description

    def documents(
        self, limit: int | None = None, on_reject: OnReject = lambda reject: None, start: Place = START
    ) -> Iterator[Document]:
        """Yield the documents behind ``start``, at most ``limit`` of them; ``on_reject`` gets what cannot be read.

        Raises:
            UserError: the source cannot be reached, or holds no document.
        """
        kept = 0
        why = ""
        self.bytes_read = sum(file.size for file in self.files[: start.file])
        for index, file in enumerate(self.files[start.file :], start.file):
            skip = start.record if index == start.file else 0
            for record, item in enumerate(file.read(skip) if kept != limit else (), skip):
                document = _check(item, file.name, Place(index, record + 1))
                if isinstance(document, Reject):
                    why = why or f" (first reject: {document.file}, line {document.line}: {document.reason})"
                    on_reject(document)
                    continue
                kept += 1
                yield document
                if kept == limit:
                    return
            self.bytes_read = sum(file.size for file in self.files[: index + 1])
        if not kept and start == START:
            raise UserError(f"{self.source}: it has no documents{why}: give another source")

    def _local_file(self, path: Path) -> _File:
        name = path.name.lower()
        readers = {".txt": self._text, ".jsonl": self._json_lines, ".json": self._json_lines, ".parquet": _parquet}
        reader = readers.get(Path(name.removesuffix(".gz")).suffix)
        if reader is None or (name.endswith(".gz") and reader != self._json_lines):
            raise UserError(f"{path}: unknown file type: give {KINDS}")
        try:
            size = path.stat().st_size
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): give another file, or fix it") from error
        return _File(str(path), lambda skip: reader(path, skip), size)

    def _text(self, path: Path, skip: int) -> Records:
        if not skip:
            yield path.read_bytes()

    def _json_lines(self, path: Path, skip: int) -> Records:
        before = self.bytes_read
        with path.open("rb") as file:
            stream = gzip.GzipFile(fileobj=file) if path.name.lower().endswith(".gz") else file
            for number, line in enumerate(_lines(stream, str(path)), 1):
                if number > skip:
                    yield line if isinstance(line, Reject) else _text_of(line, str(path), number)
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
        return Reject(file, place.record, "the text is empty", b"")
    return Document(text, len(raw), place)


def _lines(stream: IO[bytes] | gzip.GzipFile, name: str) -> Iterator[bytes | Reject]:
    """Yield the lines of a stream; where it is damaged, those before the damage, and then a reject."""
    tail, number = b"", 0
    try:
        while chunk := stream.read1(CHUNK):  # type: ignore[union-attr]
            lines = (tail + chunk).split(b"\n")
            tail = lines.pop()
            number += len(lines)
            yield from lines
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Reject(name, number + 1, f"damaged gzip, the rest of the file is lost ({error})", tail)
    else:
        if tail:
            yield tail


def _text_of(line: bytes, file: str, number: int) -> str | Reject:
    """The field ``text`` of a line of JSON."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Reject(file, number, f"not UTF-8 ({error.reason} at {error.start})", line)
    except (ValueError, RecursionError) as error:
        return Reject(file, number, f"not JSON ({error})", line)
    text = row.get("text") if isinstance(row, dict) else None
    return text if isinstance(text, str) else Reject(file, number, "no field text that holds a string", line)


def _parquet(path: Path, skip: int) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        if "text" not in table.schema_arrow.names:
            yield Reject(str(path), 0, "no column text", b"")
            return
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=["text"]):
            column = batch.column(0).cast(pyarrow.large_binary())  # as bytes, so that bad UTF-8 is ours to report
            for value in column.to_pylist():
                row += 1
                if row > skip:
                    yield Reject(str(path), row, "no text in this row", b"") if value is None else value
    except pyarrow.ArrowException as error:
        yield Reject(str(path), 0, f"damaged Parquet, the rest of the file is lost ({_first_line(error)})", b"")


def _builtin_file(source: str) -> _File:
    split = source.partition(":")[2] or "train"
    if split not in SPLITS:
        raise UserError(
            f"{source}: the built-in corpus only has {' and '.join(SPLITS)}: give builtin:validation, for example"
        )
    return _File(source, lambda skip: iter(builtin_documents(split)[skip:]))


def _hub_file(source: str) -> _File:
    parts = source.removeprefix("hf:").split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"{source}: give hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT, such as hf:allenai/c4:en:train")
    name, config, split = parts[0], parts[1] if len(parts) == 3 else None, parts[-1]
    return _File(source, lambda skip: _hub_rows(source, name, config, split, skip))


def _hub_rows(source: str, name: str, config: str | None, split: str, skip: int) -> Records:
    try:
        from datasets import load_dataset  # seconds to import

        with quiet_hub():
            rows: Iterable[dict] = load_dataset(name, config, split=split, streaming=True).skip(skip)
        for number, row in enumerate(rows, skip + 1):
            text = row.get("text")
            raw = json.dumps(row, default=str).encode()
            yield text if isinstance(text, str) else Reject(source, number, "no field text that holds a string", raw)
    except Exception as error:  # the hub's client raises anything, from many libraries
        raise UserError(
            f"{source}: cannot be read from the Hugging Face hub ({type(error).__name__}: {_first_line(error)}): "
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


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]
