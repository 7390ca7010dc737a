"""A SentencePiece model as a tokenizer."""

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

from moe_mamba.data.finality import ByteRuns, Finality
from moe_mamba.data.library_calls import LibraryError, call_library
from moe_mamba.data.plain_tokenizers import END_OF_TEXT, Tokenizer
from moe_mamba.data.tokenizer_folder import CONFIG, Names
from moe_mamba.errors import UserError, brief

SPACE = "▁"  # what SentencePiece writes for a space; it takes a real one in a text for a space too


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback."""

    FILE = "tokenizer.model"

    def __init__(self, model: bytes, name: str = "SentencePiece model", names: Names | None = None) -> None:
        """Load a serialised model.

        Args:
            model: content of its file.
            name: for messages.
            names: what a tokenizer_config.json beside it says; its bos_token and add_bos_token count.

        Raises:
            UserError: it is none, lacks an end-of-text piece, or lacks the piece that is to be added to texts.
        """
        self.name, self.names = name, names or Names()
        self.processor = _processor(model, name)
        self.model = model
        self.vocab_size = self.processor.get_piece_size()
        self.end_of_text = self.processor.eos_id()
        if self.end_of_text < 0:
            raise UserError(f"{name}: it has no end-of-text piece: train it with an eos_id")
        if self.names.add_beginning:
            self.prefix = (self._special(self.names.beginning, self.processor.bos_id(), "bos_token"),)
        if self.names.add_end:
            self.suffix = (self._special(self.names.end, self.end_of_text, "eos_token"),)
        added = json.dumps({"prefix": self.prefix}).encode() if self.prefix else b""
        self.fingerprint = hashlib.sha256(model + added).hexdigest()
        self._space = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._threads = -1  # as many as there are cores
        self._has_bytes = all(self.processor.is_byte(piece) for piece in self._space)

    def _special(self, name: str | None, own: int, key: str) -> int:
        """Id of the piece that stands before or behind every text: as it is named, or the model's own."""
        known = own if name is None else self.processor.piece_to_id(name)
        if known < 0 or (name is not None and self.processor.id_to_piece(known) != name):
            raise UserError(
                f"{self.name}: {CONFIG} adds {key}={brief(name, 40)} to every text, but the model has no such piece: "
                f"set add_{key} to false, or name a piece that it has"
            )
        return known

    @property
    def beginning(self) -> int:
        """See Tokenizer: the model's own BOS counts, or the one that is named, also where none is put before texts."""
        named = self.names.beginning
        own = self.processor.bos_id() if named is None else self.processor.piece_to_id(named)
        is_known = own >= 0 and (named is None or self.processor.id_to_piece(own) == named)
        return self.prefix[0] if self.prefix else own if is_known else self.end_of_text

    @property
    def fingerprint_without_prefix(self) -> str:
        """See Tokenizer."""
        return hashlib.sha256(self.model).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Pieces of each text."""
        encoded = self.processor.encode(list(texts), num_threads=self._threads)
        if self._has_bytes:
            for index, text in enumerate(texts):
                if SPACE in text:
                    encoded[index] = self._with_real_space_marks(text)
        return encoded

    def use_one_thread(self) -> None:
        """See Tokenizer."""
        self._threads = 1

    def _with_real_space_marks(self, text: str) -> list[int]:
        """SentencePiece's own space mark, where the text really holds one, goes in as three bytes."""
        first, *others = self.processor.encode(text.split(SPACE))
        return first + list(chain.from_iterable(self._space + pieces for pieces in others))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the pieces; end-of-text reads as <|endoftext|>, and ids past the last piece have none."""
        parts: list[list[int]] = [[]]
        for i in ids:
            if i == self.end_of_text:
                parts.append([])
            elif i < self.vocab_size:
                parts[-1].append(int(i))
        return END_OF_TEXT.join(self.processor.decode(part) for part in parts)

    def finality(self) -> Finality:
        """Only whole characters are final."""
        return ByteRuns(self._name_of, as_a_whole=False)

    def _name_of(self, token: int) -> str | None:
        if token >= self.vocab_size:
            return None
        return self.processor.id_to_piece(token) if self.processor.is_byte(token) else ""

    def files(self) -> dict[str, bytes]:
        """What the configuration says, if it says anything, then the model."""
        config = self.names.as_config()
        files = {CONFIG: (json.dumps(config) + "\n").encode()} if config else {}
        return files | {self.FILE: self.model}


def _processor(model: bytes, name: str) -> Any:
    """Load the model, without what the library prints of a damaged one."""
    from sentencepiece import SentencePieceProcessor

    try:
        processor = call_library(lambda: SentencePieceProcessor(model_proto=model)) if model else None
    except LibraryError:
        processor = None
    if processor is None or not processor.get_piece_size():
        raise UserError(f"{name}: not a SentencePiece model: give a .model file that SentencePiece wrote")
    return processor
