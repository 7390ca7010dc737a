"""What every tokenizer does, and the two that need no vocabulary: bytes, and numbered symbols."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from moe_mamba.atomic_file import write_atomically
from moe_mamba.data.finality import EVERYWHERE, Finality, Utf8
from moe_mamba.errors import UserError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of token ids; every id is below it.
        end_of_text: id of the token that ends a document; no text encodes to it.
        fingerprint: sha256 of what decides the encoding; shards carry it.
        prefix: ids that stand before every text, as Transformers puts them there: of BOS, or none.
        suffix: ids that Transformers puts behind every text, and we do not: a prompt is to be continued.
    """

    vocab_size: int
    end_of_text: int
    fingerprint: str
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @property
    def has_patterns(self) -> bool:
        """Whether it searches a text with regular expressions of its own, which may take for ever."""
        return False

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without end-of-text and without ``prefix``.

        Raises:
            EncodingError: the tokenizer's library cannot encode one of them.
        """

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
        """Ids of one text, without end-of-text and without ``prefix``."""
        return self.encode_batch([text])[0]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts to continue or to score: ``prefix``, and the text's."""
        return [[*self.prefix, *ids] for ids in self.encode_batch(texts)]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of documents to train on: ``prefix``, the text's, end-of-text.

        A prefix that is end-of-text itself (OPT's) is left out: the document before has ended with one.
        """
        prefix = () if self.prefix == (self.end_of_text,) else self.prefix
        return [[*prefix, *ids, self.end_of_text] for ids in self.encode_batch(texts)]

    @property
    def beginning(self) -> int:
        """Id that the harness puts before a text without a context: BOS where there is one, else end-of-text."""
        return self.prefix[0] if self.prefix else self.end_of_text

    def without_prefix(self, ids: Sequence[int]) -> list[int]:
        """Ids of a text without the ``prefix`` that they may begin with: it is read, and not shown."""
        length = len(self.prefix)
        return list(ids[length:] if tuple(ids[:length]) == self.prefix else ids)

    @property
    def fingerprint_without_prefix(self) -> str:
        """What ``fingerprint`` would be without ``prefix``: such a prefix was left out once."""
        return self.fingerprint

    def finality(self) -> Finality:
        """Which tokens' text is final, for a text that grows; here every token's."""
        return EVERYWHERE


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
        return b"".join(map(self._bytes, ids)).decode("utf-8", "replace")

    def _bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else END_OF_TEXT.encode()

    def finality(self) -> Finality:
        """Only whole characters are final."""
        return Utf8(self._bytes)

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
