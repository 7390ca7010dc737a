"""Shards: tokenized documents in Megatron's .bin/.idx files, read through a memory map.

A folder of shards has a manifest (manifest.py) and one or more parts; a bare prefix of foreign shards has neither,
and gets the checks that are possible. The parts are read as one row of tokens.
"""

import hashlib
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from moe_mamba.data.batch import UNCOUNTED
from moe_mamba.data.manifest import MANIFEST, REJECTS, TOKENIZER_FOLDER, Manifest, checksum, load_manifest
from moe_mamba.data.quiet import indexed_dataset
from moe_mamba.data.source import Windows
from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.data.verification import ContentCheck
from moe_mamba.errors import UserError

BLOCK = 1 << 22  # tokens looked at together when all are counted
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, document boundaries
SAMPLED_BLOCKS = 16  # blocks of a foreign shard in which the largest id is looked for


class Shards:
    """A row of tokens: the documents of one corpus, each with its end-of-text, one behind the other.

    Attributes:
        name: the folder or prefix.
        tokens: length of the row; documents: how many it holds.
        text_bytes: bytes of the documents' text in UTF-8; None for foreign shards.
        identity: hash of the tokens, the same wherever the shards lie.
    """

    def __init__(self, name: str, prefixes: list[Path], manifest: Manifest | None) -> None:
        """Map the parts; use ``Shards.open``, which checks them."""
        reader = indexed_dataset()
        self.name = name
        self.manifest = manifest
        self._parts = [reader.IndexedDataset(str(prefix)) for prefix in prefixes]
        sizes = [int(part.index.sequence_lengths.sum(dtype=np.int64)) for part in self._parts]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.tokens = int(self._ends[-1])
        self.documents = sum(len(part.index.document_indices) - 1 for part in self._parts)
        self.text_bytes = manifest.text_bytes if manifest else None
        self.identity = _identity(prefixes, manifest)

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
        for part in manifest.parts:
            _check_pair(folder / part.name)
        return cls(str(path), [folder / part.name for part in manifest.parts], manifest)

    @classmethod
    def _open_foreign(cls, path: str | Path, tokenizer: Tokenizer | None, thorough: bool) -> "Shards":
        prefix = _prefix(path)
        for name in (f"{prefix}.bin", f"{prefix}.idx"):
            if not Path(name).is_file():
                raise UserError(f"{path}: no shards found ({MANIFEST} or {name} is missing): check the path")
        _check_pair(prefix)
        shards = cls(str(path), [prefix], None)
        if tokenizer:
            shards._check_all_ids(tokenizer, None if thorough else SAMPLED_BLOCKS)
        return shards

    def content_checks(self, tokenizer: Tokenizer | None = None) -> list[ContentCheck]:
        """What is found out by reading every file whole: its checksum, or without a manifest every token's id."""
        if self.manifest is None:
            if tokenizer is None:
                return []
            path = Path(f"{_prefix(self.name)}.bin")
            return [ContentCheck(path, f"ids of {tokenizer.fingerprint}", lambda: self._check_all_ids(tokenizer))]
        return _checksums(Path(self.name), self.manifest)

    def _check_all_ids(self, tokenizer: Tokenizer, sampled: int | None = None) -> None:
        for block in self.blocks(sampled):
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
        return Windows(row[:-1], row[1:])

    def check_validation(self, sequence_length: int) -> None:
        """Raise a UserError where there are no two tokens."""
        if self.tokens < 2:
            raise UserError(f"{self.name}: {self.tokens} tokens leave nothing to predict: give more text")

    def validation_windows(self, sequence_length: int, batch: int) -> Iterator[Windows]:
        """See Source; each token but the first is a target once."""
        starts = range(0, self.tokens - 1, sequence_length)
        for first in range(0, len(starts), batch):
            rows = np.full((batch, sequence_length + 1), UNCOUNTED, dtype=np.int64)
            for row, start in zip(rows, starts[first : first + batch], strict=False):
                tokens = self.read(start, min(start + sequence_length + 1, self.tokens))
                row[: len(tokens)] = tokens
            yield Windows(rows[:, :-1].copy(), rows[:, 1:].copy())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the row, across parts: (stop - start,) int64."""
        chunks = []
        part = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            first = int(self._ends[part - 1]) if part else 0
            end = min(stop, int(self._ends[part]))
            dataset = self._parts[part]
            dtype = np.dtype(dataset.index.dtype)
            chunk = dataset.bin_reader.read(dtype.type, count=end - start, offset=(start - first) * dtype.itemsize)
            chunks.append(chunk.astype(np.int64))
            start, part = end, part + 1
        return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, np.int64), *chunks])

    def blocks(self, sampled: int | None = None) -> Iterator[np.ndarray]:
        """All tokens in blocks, or ``sampled`` blocks spread over the row."""
        starts = range(0, self.tokens, BLOCK)
        if sampled and len(starts) > sampled:
            starts = range(0, self.tokens, self.tokens // sampled)
        for start in starts:
            yield self.read(start, min(start + BLOCK, self.tokens))


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


def _check_pair(prefix: Path) -> None:
    """Refuse an index that is truncated or none, and a .bin whose size is not what the index says."""
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    with index.open("rb") as file:
        header = file.read(INDEX_HEADER.size)
        if len(header) < INDEX_HEADER.size or header[:9] != INDEX_MAGIC:
            raise UserError(f"{index}: not a Megatron index: give shards in its .bin/.idx format")
        _, _, code, sequences, documents = INDEX_HEADER.unpack(header)
        if index.stat().st_size < INDEX_HEADER.size + 12 * sequences + 8 * documents:
            raise UserError(f"{index} is truncated: restore it, or preprocess again")
        lengths = np.fromfile(file, np.int32, sequences)
    expected = int(lengths.sum(dtype=np.int64)) * indexed_dataset().DType.size(code)
    actual = tokens.stat().st_size
    if actual != expected:
        raise UserError(f"{tokens}: {actual} bytes, but its index says {expected}: restore it, or preprocess again")
    if not actual:
        raise UserError(f"{tokens}: it has no tokens: give another corpus")


def _identity(prefixes: list[Path], manifest: Manifest | None) -> str:
    """From the manifest's checksums; for foreign shards from the index, which tells the documents' lengths."""
    digest = hashlib.sha256()
    if manifest:
        for part in manifest.parts:
            digest.update(part.checksums[f"{part.name}.bin"].encode())
    else:
        digest.update(checksum(Path(f"{prefixes[0]}.idx")).encode())
    return digest.hexdigest()
