"""Shards: tokenized documents in Megatron's .bin/.idx files, read through a memory map.

A folder of shards has a manifest (manifest.py) and one or more parts; a bare prefix of foreign shards has neither,
and gets the checks that are possible. The parts are read as one row of tokens; where documents end in it, their
indices tell (index.py).
"""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from moe_mamba.data.batch import UNCOUNTED
from moe_mamba.data.index import Index
from moe_mamba.data.manifest import MANIFEST, REJECTS, TOKENIZER_FOLDER, Manifest, checksum, load_manifest
from moe_mamba.data.source import Windows
from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.data.verification import ContentCheck
from moe_mamba.errors import UserError

BLOCK = 1 << 22  # tokens looked at together when all are counted
SAMPLED_BLOCKS = 16  # blocks of a foreign shard in which ids and the ends of documents are looked at
SEARCHED = 1 << 16  # tokens in which a target is looked for at once


class Shards:
    """A row of tokens: the documents of one corpus, each with its end-of-text, one behind the other.

    Attributes:
        name: the folder or prefix.
        tokens: length of the row; documents: how many it holds.
        text_bytes: bytes of the documents' text in UTF-8; None for foreign shards.
        identity: hash of the tokens, the same wherever the shards lie.
        notes: see Source.
    """

    def __init__(self, name: str, prefixes: list[Path], manifest: Manifest | None) -> None:
        """Map the parts; use ``Shards.open``, which checks them."""
        self.name = name
        self.manifest = manifest
        self._indices = [Index(prefix) for prefix in prefixes]
        self._ids = [
            np.asarray(np.memmap(f"{prefix}.bin", index.dtype, "r"))
            for prefix, index in zip(prefixes, self._indices, strict=True)
        ]
        self._ends = np.cumsum([index.tokens for index in self._indices], dtype=np.int64)
        self.tokens = int(self._ends[-1])
        self.documents = sum(index.documents for index in self._indices)
        self.text_bytes = manifest.text_bytes if manifest else None
        self.identity = _identity(prefixes, manifest)
        self.notes: list[str] = []

    @classmethod
    def open(
        cls, path: str | Path, tokenizer: Tokenizer | None = None, verify: Literal[False, "checksums"] = False
    ) -> "Shards":
        """Open a folder of shards, or a bare prefix of Megatron's .bin/.idx.

        Args:
            path: the folder, or the prefix.
            tokenizer: whose tokens they must be; None: not checked.
            verify: ``checksums`` reads every file and compares it with the manifest (foreign shards: looks at every
                token's id, instead of a sample).

        Raises:
            UserError: missing, unfinished or damaged shards, another tokenizer's, or ids past its vocabulary.
        """
        folder = Path(path)
        manifest = load_manifest(folder)
        if manifest is None:
            return cls._open_foreign(path, tokenizer, thorough=verify == "checksums")
        if not manifest.complete:
            raise UserError(f"{path}: unfinished shards: run the command that writes them again to resume")
        if tokenizer:
            _check_tokenizer(manifest, tokenizer, path)
        for part in manifest.parts:
            for name in part.checksums:
                _check_present(folder / name)
        for check in _checksums(folder, manifest) if verify == "checksums" else ():
            check.run()
        shards = cls(str(path), [folder / part.name for part in manifest.parts], manifest)
        shards._check_manifest(manifest)
        return shards

    @classmethod
    def _open_foreign(cls, path: str | Path, tokenizer: Tokenizer | None, thorough: bool) -> "Shards":
        prefix = _prefix(path)
        for name in (f"{prefix}.bin", f"{prefix}.idx"):
            if not Path(name).is_file():
                raise UserError(f"{path}: no shards found ({MANIFEST} or {name} is missing): check the path")
        shards = cls(str(path), [prefix], None)
        if tokenizer:
            shards._check_all_ids(tokenizer, None if thorough else SAMPLED_BLOCKS)
            shards._compare_ends(tokenizer.end_of_text)
        return shards

    def _check_manifest(self, manifest: Manifest) -> None:
        """Refuse a manifest that says other things of its parts than they do."""
        for part, index in zip(manifest.parts, self._indices, strict=True):
            said = part.documents, part.tokens, manifest.dtype
            found = index.documents, index.tokens, index.dtype.name
            if said != found or not index.is_plain:
                raise UserError(
                    f"{self.name}: {MANIFEST} says documents, tokens, dtype {said} of {part.name}, but its index does "
                    "not: restore them, or delete the folder and preprocess again"
                )

    def _compare_ends(self, end_of_text: int) -> None:
        """Note where the index and end-of-text tokens disagree on the ends of documents, from a sample of the row."""
        looked_at = ended = inside = 0
        for start, block in self._sampled(SAMPLED_BLOCKS):
            ends, is_end_of_text = self.document_ends(start, start + len(block)), block == end_of_text
            looked_at += int(ends.sum())
            ended += int((ends & is_end_of_text).sum())
            inside += int((is_end_of_text & ~ends).sum())
        sampled = "" if looked_at == self.documents else f" ({looked_at:,} were looked at)"
        if ended < looked_at:
            self.notes.append(
                f"{self.name}: {self.documents:,} documents{sampled}, of which {ended:,} end with the end-of-text "
                f"token {end_of_text}: the index tells them apart, but no model learns from it where a text ends"
            )
        if inside:
            self.notes.append(
                f"{self.name}: {inside:,} end-of-text tokens stand inside its {self.documents:,} documents{sampled}: "
                "what follows one counts as another document"
            )

    def content_checks(self, tokenizer: Tokenizer | None = None) -> list[ContentCheck]:
        """What is found out by reading every file whole: its checksum, or without a manifest every token's id."""
        if self.manifest is None:
            if tokenizer is None:
                return []
            path = Path(f"{_prefix(self.name)}.bin")
            return [ContentCheck(path, f"ids of {tokenizer.fingerprint}", lambda: self._check_all_ids(tokenizer))]
        return _checksums(Path(self.name), self.manifest)

    def _check_all_ids(self, tokenizer: Tokenizer, sampled: int | None = None) -> None:
        for _, block in self._sampled(sampled):
            _check_ids(int(block.min()), int(block.max()), tokenizer, self.name)

    @property
    def rejects(self) -> int:
        """Damaged lines or files that were left out; 0 for foreign shards."""
        return self.manifest.rejects if self.manifest else 0

    @property
    def rejects_file(self) -> Path | None:
        """Where they are kept, with their places and bytes; None where there are none."""
        return Path(self.name) / REJECTS if self.rejects else None

    @property
    def is_text(self) -> bool:
        """See Source."""
        return True

    @property
    def extent(self) -> tuple[int, str]:
        """See Source."""
        return self.tokens, "tokens"

    @property
    def bytes_per_token(self) -> float | None:
        """See Source; None for foreign shards."""
        return None if self.text_bytes is None else self.text_bytes / self.tokens

    def unigram_entropy(self) -> float:
        """See Source; end-of-text is a token like others."""
        counts = np.zeros(0, dtype=np.int64)
        for block in self.blocks():
            more = np.bincount(block, minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log(share)).sum())

    def windows(self, sequence_length: int) -> int:
        """Windows of so many tokens, each with a target behind its last one; see Source."""
        return (self.tokens - 1) // sequence_length

    def window(self, number: int, sequence_length: int, seed: int) -> Windows:
        """Tokens [i L, i L + L) of the row for window i, and those one further as targets.

        No two windows share a token, and the last target of one is the first token of the next.
        """
        start = number * sequence_length
        row = self.read(start, start + sequence_length + 1)
        return Windows(row[:-1], row[1:], self.document_ends(start, start + sequence_length))

    def check_validation(self, sequence_length: int) -> None:
        """Raise a UserError where there are no two tokens."""
        if self.tokens < 2:
            raise UserError(f"{self.name}: {self.tokens} tokens leave nothing to predict: give more text")

    def check_targets(self, end_of_text: int, tokens: int | None = None) -> None:
        """See Source; reads until it has found one."""
        last = min(self.tokens - 1, tokens or self.tokens)  # the row's last token has none
        for start in range(0, last, SEARCHED):
            stop = min(start + SEARCHED, last)
            if not (self.document_ends(start, stop) | (self.read(start, stop) == end_of_text)).all():
                return
        raise UserError(
            f"{self.name}: no token in its first {last:,} is followed by one of the same document, so there is nothing "
            "to predict: give longer documents, or set data.reset_at_document=false"
        )

    def validation_windows(self, sequence_length: int, batch: int) -> Iterator[Windows]:
        """See Source; each token but the first is a target once."""
        starts = range(0, self.tokens - 1, sequence_length)
        for first in range(0, len(starts), batch):
            rows = np.full((batch, sequence_length + 1), UNCOUNTED, dtype=np.int64)
            ends = np.zeros((batch, sequence_length), dtype=bool)
            for row, end, start in zip(rows, ends, starts[first : first + batch], strict=False):
                stop = min(start + sequence_length + 1, self.tokens)
                row[: stop - start] = self.read(start, stop)
                stop = min(start + sequence_length, self.tokens)
                end[: stop - start] = self.document_ends(start, stop)
            yield Windows(rows[:, :-1].copy(), rows[:, 1:].copy(), ends)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the row, across parts: (stop - start,) int64."""
        chunks = [self._ids[part][first:last].astype(np.int64) for part, first, last in self._pieces(start, stop)]
        return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, np.int64), *chunks])

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Whether each of the tokens ``start`` to ``stop`` is the last one of a document: (stop - start,) bool."""
        ends = np.zeros(stop - start, dtype=bool)
        for part, first, last in self._pieces(start + 1, min(stop + 1, self.tokens)):
            offset = int(self._ends[part]) - self._indices[part].tokens - start - 1
            ends[self._indices[part].document_starts(first, last) + offset] = True
        if stop == self.tokens:
            ends[-1:] = True
        return ends

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The parts that a stretch of the row lies in: number, and from where to where in its own tokens."""
        part = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = min(stop, int(self._ends[part]))
            first = int(self._ends[part]) - self._indices[part].tokens
            yield part, start - first, end - first
            start, part = end, part + 1

    def blocks(self, sampled: int | None = None) -> Iterator[np.ndarray]:
        """All tokens in blocks, or ``sampled`` blocks spread over the row."""
        return (block for _, block in self._sampled(sampled))

    def _sampled(self, sampled: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks with their starts."""
        starts = range(0, self.tokens, BLOCK)
        if sampled and len(starts) > sampled:
            starts = range(0, self.tokens, self.tokens // sampled)
        for start in starts:
            yield start, self.read(start, min(start + BLOCK, self.tokens))


def is_shards(path: str | Path) -> bool:
    """Whether ``path`` is a folder of shards, or a prefix of .bin and .idx."""
    return (Path(path) / MANIFEST).is_file() or Path(f"{_prefix(path)}.idx").is_file()


def tokenizer_folder(path: str | Path) -> Path | None:
    """Where the tokenizer of a folder of shards is saved; None for foreign shards."""
    folder = Path(path) / TOKENIZER_FOLDER
    return folder if folder.is_dir() else None


def _prefix(path: str | Path) -> Path:
    """A prefix, also where one of its two files is named."""
    return Path(str(path).removesuffix(".bin").removesuffix(".idx"))


def _check_tokenizer(manifest: Manifest, tokenizer: Tokenizer, path: str | Path) -> None:
    if manifest.tokenizer != tokenizer.fingerprint:
        saved = Path(path) / TOKENIZER_FOLDER
        raise UserError(
            f"{path}: tokenizer hash {manifest.tokenizer[:12]} differs from the given tokenizer's "
            f"{tokenizer.fingerprint[:12]}: give the one that made the shards ({saved}), or preprocess again"
        )
    _check_ids(0, manifest.largest_id, tokenizer, path)


def _check_ids(smallest: int, largest: int, tokenizer: Tokenizer, path: str | Path) -> None:
    if smallest < 0:
        raise UserError(f"{path}: token id {smallest} is below 0: the shards are damaged, restore them")
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{path}: token id {largest} is outside the vocabulary of {tokenizer.vocab_size}: "
            "give the tokenizer that made the shards"
        )


def _check_present(path: Path) -> None:
    if not path.is_file():
        raise UserError(
            f"{path}: a file of these shards is missing: restore it, or delete the folder and preprocess again"
        )


def _checksums(folder: Path, manifest: Manifest) -> list[ContentCheck]:
    named = {folder / name: digest for part in manifest.parts for name, digest in part.checksums.items()}
    return [ContentCheck(path, digest, partial(_check_sum, path, digest)) for path, digest in named.items()]


def _check_sum(path: Path, expected: str) -> None:
    if checksum(path) != expected:
        raise UserError(f"{path}: its checksum differs from the manifest's: delete the folder and preprocess again")


def _identity(prefixes: list[Path], manifest: Manifest | None) -> str:
    """From the manifest's checksums; for foreign shards from the index, which tells the documents' lengths."""
    digest = hashlib.sha256()
    if manifest:
        for part in manifest.parts:
            digest.update(part.checksums[f"{part.name}.bin"].encode())
    else:
        digest.update(checksum(Path(f"{prefixes[0]}.idx")).encode())
    return digest.hexdigest()
