"""Megatron's .idx file, read through a memory map: where the documents of its .bin begin.

What it says is compared with the sizes of both files, and with itself, before anything is made of it.
"""

import bisect
import struct
from pathlib import Path

import numpy as np

from moe_mamba.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the dtype, sequences, document boundaries
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # of ids; 6 and 7 are floats
BLOCK = 1 << 20  # sequences that are compared together


class Index:
    """The index of one pair of files.

    A document is one sequence or several; all lie one behind the other. ``_pointers`` (bytes, of each sequence),
    ``_lengths`` (ids, of each sequence) and ``_boundaries`` (the first sequence of each document, and the end) are
    maps.

    Attributes:
        dtype: of the ids.
        tokens: ids in all.
        documents: how many there are.
        is_plain: each document is one sequence.
    """

    def __init__(self, prefix: Path) -> None:
        """Map the index of ``prefix``.bin.

        Raises:
            UserError: it is no index, is damaged, or speaks of another .bin; one of the files cannot be read.
        """
        self._file, tokens_file = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        try:
            with self._file.open("rb") as file:
                header = file.read(HEADER.size)
            size, stored = self._file.stat().st_size, tokens_file.stat().st_size
            tokens_file.open("rb").close()
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}): restore it") from None
        sequences, boundaries = self._read_header(header, size)
        self._lengths = self._map(np.int32, HEADER.size, sequences)
        self._pointers = self._map(np.int64, HEADER.size + 4 * sequences, sequences)
        self._boundaries = self._map(np.int64, HEADER.size + 12 * sequences, boundaries)
        self.documents = boundaries - 1
        expected = self._check_sequences()
        if stored != expected:
            raise UserError(
                f"{tokens_file}: {stored} bytes, but its index says {expected}: restore it, or preprocess again"
            )
        self._check_boundaries()
        self.tokens = expected // self.dtype.itemsize

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Places in [start, stop) at which documents begin, in ids from the .bin's first: (documents,) int64.

        Takes time in the logarithm of the documents, and in those that are found; an empty document has its place, too.
        """
        documents, near = range(self.documents), 8
        first = bisect.bisect_left(documents, start, key=self._start)
        while first + near < self.documents and self._start(first + near) < stop:
            near *= 2
        last = bisect.bisect_left(documents, stop, first, min(first + near, self.documents), key=self._start)
        return self._starts(np.array(self._boundaries[first:last]))

    def _start(self, document: int) -> int:
        sequence = int(self._boundaries[document])
        return int(self._pointers[sequence]) // self.dtype.itemsize if sequence < len(self._pointers) else self.tokens

    def _starts(self, sequences: np.ndarray) -> np.ndarray:
        """Where sequences begin; one behind the last begins at the end, as an empty document there does."""
        inside = sequences < len(self._pointers)
        starts = np.full(len(sequences), self.tokens, np.int64)
        starts[inside] = self._pointers[sequences[inside]] // self.dtype.itemsize
        return starts

    def _map(self, dtype: type, offset: int, count: int) -> np.ndarray:
        return np.asarray(np.memmap(self._file, dtype, "r", offset, count))

    def _read_header(self, header: bytes, size: int) -> tuple[int, int]:
        """Sequences and boundaries, where the file is as long as they say."""
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise UserError(f"{self._file}: not a Megatron index: give shards in its .bin/.idx format")
        _, version, code, sequences, boundaries = HEADER.unpack(header)
        if version != VERSION:
            raise UserError(f"{self._file}: an index of version {version}, but only {VERSION} is known: convert it")
        if code not in DTYPES:
            raise self._damaged(f"code {code} is no type of token ids")
        if not sequences:
            raise UserError(f"{self._file}: it has no documents: give another corpus")
        if boundaries < 2:
            raise self._damaged(f"{boundaries} document boundaries")
        expected = HEADER.size + 12 * sequences + 8 * boundaries
        if size not in (expected, expected + sequences):  # with a mode for each sequence, of images among text
            what = "truncated" if size < expected else "damaged"
            raise UserError(
                f"{self._file} is {what}: {size} bytes, but its header says {expected}: restore it, or preprocess again"
            )
        self.dtype = np.dtype(DTYPES[code])
        return sequences, boundaries

    def _check_sequences(self) -> int:
        """Compare pointers with lengths; the bytes that all sequences take."""
        end = 0
        for first in range(0, len(self._lengths), BLOCK):
            lengths = self._lengths[first : first + BLOCK].astype(np.int64)
            if lengths.min() < 0:
                raise self._damaged(f"a sequence of {lengths.min()} tokens")
            ends = end + np.cumsum(lengths * self.dtype.itemsize)
            pointers = self._pointers[first : first + BLOCK]
            if pointers[0] != end or (pointers[1:] != ends[:-1]).any():
                raise self._damaged("pointers and lengths disagree")
            end = int(ends[-1])
        if not end:
            raise UserError(f"{self._file.with_suffix('.bin')}: it has no tokens: give another corpus")
        return end

    def _check_boundaries(self) -> None:
        """Refuse documents that do not cover the sequences in order."""
        ends = self._boundaries
        self.is_plain, is_in_order = True, ends[0] == 0 and ends[-1] == len(self._lengths)
        for first in range(0, len(ends), BLOCK):
            sequences = np.diff(ends[first : first + BLOCK + 1])
            self.is_plain &= bool((sequences == 1).all())
            is_in_order &= bool((sequences >= 0).all())
        if not is_in_order:
            raise self._damaged("documents do not follow one another")

    def _damaged(self, fault: str) -> UserError:
        return UserError(f"{self._file}: damaged ({fault}): restore it, or preprocess again")
