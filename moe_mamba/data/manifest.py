"""What a folder of shards says of itself, as JSON that is replaced whole whenever a part is finished."""

import codecs
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from moe_mamba.atomic_file import write_atomically
from moe_mamba.data.corpus import START, Place
from moe_mamba.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
TOKENIZER_FOLDER = "tokenizer"
SUFFIXES = (".bin", ".idx")

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def part_name(number: int) -> str:
    """Of the files of a part: no other name is believed, and so none leads out of the folder."""
    return f"part-{number:05d}"


@dataclass(frozen=True)
class Part:
    """One finished pair of ``name``.bin and ``name``.idx."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    documents: Count
    tokens: Count
    text_bytes: Count
    largest_id: Annotated[int, Field(ge=-1, lt=1 << 63)]
    checksums: dict[str, Hash]  # file name -> sha256


@dataclass(frozen=True)
class Manifest:
    """A folder of shards: what it was made from, and what stands in it.

    ``source`` to ``part_bytes`` decide every byte of the folder; the rest counts what was done so far, and
    ``end``, ``rejects_bytes`` and ``failed`` (documents that the tokenizer could not encode, which are rejects) are
    where a run that was stopped goes on.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    source: dict[str, Any]
    limit: Count | None
    tokenizer: Hash  # its fingerprint
    vocab_size: Count
    end_of_text: Count
    dtype: Literal["uint16", "int32"]
    part_bytes: Count
    complete: bool = False
    documents: Count = 0
    tokens: Count = 0
    text_bytes: Count = 0
    largest_id: Annotated[int, Field(ge=-1, lt=1 << 63)] = -1
    rejects: Count = 0
    rejects_bytes: Count = 0
    end: Place = START
    parts: tuple[Part, ...] = ()
    format_version: int = FORMAT_VERSION
    failed: Count = 0

    def with_part(self, part: Part, rejects: int, rejects_bytes: int, failed: int, end: Place) -> "Manifest":
        """This manifest after one more part; the source was read up to ``end``."""
        return replace(
            self,
            documents=self.documents + part.documents,
            tokens=self.tokens + part.tokens,
            text_bytes=self.text_bytes + part.text_bytes,
            largest_id=max(self.largest_id, part.largest_id),
            rejects=rejects,
            rejects_bytes=rejects_bytes,
            failed=failed,
            end=end,
            parts=(*self.parts, part),
        )

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest at once, on the disk itself."""
        write_atomically(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")


_CHECKED = TypeAdapter(Manifest)


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of ``folder``, or None where it has none; raises UserError where it cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    fix = "restore it, or delete the folder and preprocess again"
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        version = _version(content)
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format version {version}, but this program reads {FORMAT_VERSION}: {fix}")
        manifest = _CHECKED.validate_json(content, strict=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {fix}") from error
    except ValidationError as error:
        raise UserError(f"{path}: damaged ({_first(error)}): {fix}") from None
    if fault := _contradiction(manifest):
        raise UserError(f"{path}: damaged ({fault}): {fix}")
    return manifest


def _version(content: bytes) -> object:
    """What the content says of its version, if it says a number, whatever else stands in it."""
    try:
        values = from_json(content)
    except ValueError:
        return FORMAT_VERSION  # what is no JSON is told by who reads it
    version = values.get("format_version") if isinstance(values, dict) else None
    return version if isinstance(version, int) and abs(version) < 1 << 63 else FORMAT_VERSION


def _contradiction(manifest: Manifest) -> str | None:
    """What a manifest says of itself that cannot be; or None."""
    source, files = manifest.source.get("source"), manifest.source.get("files", [])
    if not isinstance(source, str) or not isinstance(files, list) or not all(map(_is_file, files)):
        return "source is not described"
    if min(manifest.end) < 0:
        return "end is below 0"
    for number, part in enumerate(manifest.parts):
        if part.name != part_name(number):
            return f"part {number} is not called {part_name(number)}"
        if set(part.checksums) != {f"{part.name}{suffix}" for suffix in SUFFIXES}:
            return f"the checksums of {part.name} are not of its two files"
    for name in ("documents", "tokens", "text_bytes"):
        if getattr(manifest, name) != sum(getattr(part, name) for part in manifest.parts):
            return f"{name} is not the sum of the parts'"
    if manifest.largest_id != max((part.largest_id for part in manifest.parts), default=-1):
        return "largest_id is not that of the parts"
    return "it is complete without a part" if manifest.complete and not manifest.parts else None


def _is_file(described: Any) -> bool:
    return (
        isinstance(described, dict)
        and isinstance(described.get("name"), str)
        and isinstance(described.get("bytes"), int)
    )


def _first(error: ValidationError) -> str:
    """The first thing that is wrong with a manifest's content, without the content."""
    first = error.errors(include_input=False, include_url=False)[0]
    place = repr(".".join(map(str, first["loc"])))[1:-1][:60]
    return f"{place}: {first['msg'].lower()[:100]}" if place else first["msg"][:100]


def checksum(path: Path) -> str:
    """Sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
