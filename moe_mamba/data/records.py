"""Records of a file: its lines, rows or whole text, in memory that does not depend on what the file holds.

Each damaged or oversized record is a ``Reject`` with its place and its bytes, and reading goes on behind it. A byte
order mark at the start of a file, or of a line of JSON (files are joined by ``cat``), is no text.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

CHUNK = 1 << 20  # bytes read at once
LONGEST_RECORD = 64 << 20  # bytes of a line or a cell; a line of 1 GB compresses to 1 MB
LONGEST_TEXT = 256 << 20  # bytes of a .txt, which is one document
KEPT = 1 << 16  # bytes of a longer one that its reject keeps
ROWS = 32  # of a Parquet file decoded at once
NAMED = 80  # characters of fields' names in a message


class Reject(NamedTuple):
    """What could not be read: the file, the line or row from 1 (0: the whole file), why, and the bytes, if any."""

    file: str
    line: int
    reason: str
    raw: bytes


class NoText(Reject):
    """A record, or a file, whose fields are not what was expected."""


Records = Iterator[str | bytes | Reject]  # bytes are checked to be UTF-8 by whoever asks for documents


def too_long(file: str, line: int, size: int, longest: int, beginning: bytes) -> Reject:
    """The reject of what is longer than ``longest`` bytes; it keeps the beginning."""
    reason = f"too long ({size:,} bytes, at most {longest:,} are read): split it into documents"
    return Reject(file, line, reason, beginning[:KEPT])


def whole_text(path: Path) -> bytes | Reject:
    """The content of a file."""
    with path.open("rb") as file:
        content = file.read(LONGEST_TEXT + 1)
    if len(content) > LONGEST_TEXT:
        return too_long(str(path), 0, max(path.stat().st_size, len(content)), LONGEST_TEXT, content)
    return content.removeprefix(codecs.BOM_UTF8)


class _Line:
    """A line that comes in pieces; of one that is too long only the beginning is kept."""

    def __init__(self, number: int) -> None:
        self.number, self.size = number, 0
        self.pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        was_short = self.size <= LONGEST_RECORD
        self.size += len(piece)
        if self.size <= LONGEST_RECORD:
            self.pieces.append(piece)
        elif was_short:
            self.pieces = [b"".join((*self.pieces, piece))[:KEPT]]

    def whole(self, file: str) -> bytes | Reject:
        content = b"".join(self.pieces)
        if self.size > LONGEST_RECORD:
            return too_long(file, self.number, self.size, LONGEST_RECORD, content)
        return content


def lines(stream: IO[bytes] | gzip.GzipFile, file: str) -> Iterator[bytes | Reject]:
    """Yield the lines of a stream; where it is damaged, those before the damage, and then a reject."""
    line = _Line(1)
    try:
        while chunk := stream.read1(CHUNK):  # type: ignore[union-attr]
            first, *others = chunk.split(b"\n")
            line.add(first)
            for piece in others:
                yield line.whole(file)
                line = _Line(line.number + 1)
                line.add(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        beginning = b"".join(line.pieces)[:KEPT]
        yield Reject(file, line.number, f"damaged gzip, the rest of the file is lost ({error})", beginning)
    else:
        if line.size:
            yield line.whole(file)


def text_of_line(line: bytes, file: str, number: int, key: str) -> str | Reject:
    """The field ``key`` of a line of JSON."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Reject(file, number, f"not UTF-8 ({error.reason} at {error.start})", line)
    except (ValueError, RecursionError) as error:
        return Reject(file, number, f"not JSON ({error})", line)
    return text_of_row(row, file, number, key, line)


def text_of_row(row: Any, file: str, number: int, key: str, raw: bytes) -> str | Reject:
    """The field ``key`` of what a record holds."""
    text = row.get(key) if isinstance(row, dict) else None
    if isinstance(text, str):
        return text
    found = _names(row) if isinstance(row, dict) else f"no fields, but a {_kind(row)}"
    held = f" ({key} holds a {_kind(row[key])})" if isinstance(row, dict) and key in row else ""
    return NoText(file, number, f"no field {key} that holds a string{held}; there: {found}", raw)


def _kind(value: Any) -> str:
    """What JSON calls it."""
    kinds = {dict: "object", list: "list", str: "string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "number")


def parquet_rows(path: Path, skip: int, key: str) -> Records:
    """Values of the column ``key``, behind the first ``skip``."""
    import pyarrow
    import pyarrow.parquet

    file = str(path)
    try:
        table = pyarrow.parquet.ParquetFile(path)
        schema = table.schema_arrow
        places = schema.get_all_field_indices(key)
        if len(places) > 1:
            yield Reject(file, 0, f"{len(places)} columns are named {key}: rename all but one", b"")
            return
        if not places or not _holds_text(schema.field(places[0]).type):
            yield NoText(file, 0, f"no column {key} that holds strings; there: {_names(schema.names)}", b"")
            return
        row = 0
        for batch in table.iter_batches(batch_size=ROWS, columns=[key]):
            column = batch.column(0).cast(pyarrow.large_binary())  # as bytes, so that bad UTF-8 is ours to report
            for value in column.to_pylist():
                row += 1
                if row > skip:
                    yield _cell(value, file, row)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        yield Reject(file, 0, f"damaged Parquet, the rest of the file is lost ({first_line(error)})", b"")


def _cell(value: bytes | None, file: str, row: int) -> bytes | Reject:
    if value is None:
        return Reject(file, row, "no text in this row", b"")
    return value if len(value) <= LONGEST_RECORD else too_long(file, row, len(value), LONGEST_RECORD, value)


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    texts = types.is_string, types.is_large_string, types.is_string_view
    others = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_null
    return any(is_kind(kind) for is_kind in texts + others)


def _names(fields: Iterable[str]) -> str:
    """Names of fields in a message, whatever they hold."""
    names = ", ".join(repr(name)[1:-1] for name in fields)
    return (names if len(names) <= NAMED else f"{names[:NAMED]}...") or "no fields"


def first_line(error: Exception) -> str:
    """Of a library's message."""
    return (str(error).strip() or "no reason given").splitlines()[0][:200]
