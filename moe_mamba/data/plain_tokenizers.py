"""What every tokenizer does, and the two that need no vocabulary: bytes, and numbered symbols."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from moe_mamba.atomic_file import write_atomically
from moe_mamba.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of token ids; every id is below it.
        end_of_text: id of the token that ends a document; no text encodes to it.
        fingerprint: sha256 of what decides the encoding; shards carry it.
    """

    vocab_size: int
    end_of_text: int
    fingerprint: str

    @property
    def has_patterns(self) -> bool:
        """Whether it searches a text with regular expressions of its own, which may take for ever."""
        return False

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without end-of-text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Name -> content of what ``load_tokenizer`` needs of a folder; the last one marks the folder as whole."""

    def save(self, folder: str | Path) -> None:
        """Write into ``folder``, also where several processes do so at once, what ``load_tokenizer(folder)`` needs."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            write_atomically(Path(folder) / name, content)

    def use_one_thread(self) -> None:  # noqa: B027 (bytes have no threads)
        """Encode on one thread from now on, for a process beside others."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without end-of-text."""
        return self.encode_batch([text])[0]


class BytesTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, and end-of-text."""

    FILE = "bytes.json"

    def __init__(self) -> None:
        self.vocab_size, self.end_of_text = 257, 256
        self.fingerprint = hashlib.sha256(b"256 bytes, then end-of-text").hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The bytes of each text."""
        return [list(text.encode("utf-8")) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes; end-of-text reads as <|endoftext|>."""
        end = END_OF_TEXT.encode()
        return b"".join(bytes([i]) if i < 256 else end for i in ids).decode("utf-8", "replace")

    def files(self) -> dict[str, bytes]:
        """A file that names the kind."""
        return {self.FILE: b'{"tokenizer": "bytes"}\n'}


class SymbolsTokenizer(Tokenizer):
    """Symbols of synthetic tasks: ids written as numbers with spaces between them; the last id is end-of-text."""

    FILE = "symbols.json"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.end_of_text = vocab_size, vocab_size - 1
        self.fingerprint = hashlib.sha256(f"{vocab_size - 1} symbols, then end-of-text".encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The numbers of each text; raises UserError where there is anything else."""
        return [[self._symbol(word) for word in text.split()] for text in texts]

    def _symbol(self, word: str) -> int:
        if not word.isdecimal() or int(word) >= self.end_of_text:
            raise UserError(
                f"{word[:20]!r} is not a symbol: give numbers from 0 to {self.end_of_text - 1}, as in '3 1 2'"
            )
        return int(word)

    def decode(self, ids: Sequence[int]) -> str:
        """The ids as numbers; end-of-text reads as <|endoftext|>."""
        return " ".join(END_OF_TEXT if i == self.end_of_text else str(int(i)) for i in ids)

    def files(self) -> dict[str, bytes]:
        """A file that says how many ids there are."""
        return {self.FILE: f'{{"tokenizer": "symbols", "vocab_size": {self.vocab_size}}}\n'.encode()}
