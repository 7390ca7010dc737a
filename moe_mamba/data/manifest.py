"""What a folder of shards says of itself, as JSON that is replaced whole whenever a part is finished."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe_mamba.atomic_file import write_atomically
from moe_mamba.data.corpus import START, Place
from moe_mamba.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Part:
    """One finished pair of ``name``.bin and ``name``.idx."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    largest_id: int
    checksums: dict[str, str]  # file name -> sha256


@dataclass(frozen=True)
class Manifest:
    """A folder of shards: what it was made from, and what stands in it.

    ``source`` to ``part_bytes`` decide every byte of the folder; the rest counts what was done so far, and
    ``end`` and ``rejects_bytes`` are where a run that was stopped goes on.
    """

    source: dict[str, Any]
    limit: int | None
    tokenizer: str  # its fingerprint
    vocab_size: int
    end_of_text: int
    dtype: str
    part_bytes: int
    complete: bool = False
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    largest_id: int = -1
    rejects: int = 0
    rejects_bytes: int = 0
    end: Place = START
    parts: tuple[Part, ...] = ()
    format_version: int = FORMAT_VERSION

    def with_part(self, part: Part, rejects: int, rejects_bytes: int, end: Place) -> "Manifest":
        """This manifest after one more part; the source was read up to ``end``."""
        return replace(
            self,
            documents=self.documents + part.documents,
            tokens=self.tokens + part.tokens,
            text_bytes=self.text_bytes + part.text_bytes,
            largest_id=max(self.largest_id, part.largest_id),
            rejects=rejects,
            rejects_bytes=rejects_bytes,
            end=end,
            parts=(*self.parts, part),
        )

    def save(self, folder: Path) -> None:
        """Replace the folder's manifest at once, on the disk itself."""
        write_atomically(folder / MANIFEST, json.dumps(asdict(self), indent=1) + "\n")


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest of ``folder``, or None where it has none; raises UserError where it cannot be read."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    fix = "restore it, or delete the folder and preprocess again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format version {version}, but this program reads {FORMAT_VERSION}: {fix}")
        parts = tuple(Part(**part) for part in values["parts"])
        return Manifest(**values | {"parts": parts, "end": Place(*values["end"])})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}): {fix}") from error


def checksum(path: Path) -> str:
    """Sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
