"""Where the text of a growing row of tokens is final: whatever tokens follow, it stays as it is.

Half a character becomes a whole one, and the ``tokenizers`` library decodes a run of byte tokens
(``<0xE6><0x97><0xA5>``) as a whole: one wrong byte at its end, and all of the run reads as U+FFFD. Which tokens are
final follows from a tokenizer's decoder, step by step; what is not known to be local is final only at the end.
"""

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import Any

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")  # what the library's ByteFallback takes for a byte
OF_BYTES = frozenset("<0xX123456789ABCDEFabcdef+>")  # characters of such names
BY_TOKEN = {"WordPiece", "Metaspace", "BPEDecoder", "CTC", "Replace", "Strip"}  # steps that change each token by itself


class Place(Enum):
    """What the place behind a token is.

    Attributes:
        FINAL: the text so far stays.
        SO_FAR: it stays unless the bytes that follow are no characters; if the text ends here, this is it.
        INSIDE: in the middle of a character, or of bytes that are none.
        NOTHING: the token is unknown to the decoder, which leaves it out.
    """

    FINAL = auto()
    SO_FAR = auto()
    INSIDE = auto()
    NOTHING = auto()


class Finality(ABC):
    """Reads the tokens of one text in their order.

    Attributes:
        is_local: text behind a place depends only on a few tokens before it; else on all of them.
    """

    is_local = True

    @abstractmethod
    def push(self, token: int) -> Place:
        """What the place behind the next token is."""


class _Everywhere(Finality):
    def push(self, token: int) -> Place:
        return Place.FINAL


class Nowhere(Finality):
    """A decoder whose end may change its beginning."""

    is_local = False

    def push(self, token: int) -> Place:
        """See Finality."""
        return Place.SO_FAR


EVERYWHERE = _Everywhere()


class Utf8(Finality):
    """Bytes that become characters one after the other, a wrong byte U+FFFD.

    Args:
        bytes_of: of a token; None: the decoder leaves it out.
    """

    def __init__(self, bytes_of: Callable[[int], bytes | None]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> Place:
        """See Finality."""
        content = self._bytes_of(token)
        if content is None:
            return Place.NOTHING
        self._decoder.decode(content)
        return Place.INSIDE if self._decoder.getstate()[0] else Place.FINAL


class ByteRuns(Finality):
    """Tokens of text, and runs of byte tokens between them.

    Args:
        name_of: a token's name in the vocabulary; None: the decoder leaves it out.
        as_a_whole: a wrong byte makes U+FFFD of all bytes of its run, as in the ``tokenizers`` library; else only of
            itself, as in SentencePiece.
    """

    def __init__(self, name_of: Callable[[int], str | None], as_a_whole: bool) -> None:
        self._name_of, self._as_a_whole = name_of, as_a_whole
        self._start_run()

    def _start_run(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict" if self._as_a_whole else "replace")
        self._is_wrong = False

    def push(self, token: int) -> Place:
        """See Finality."""
        name = self._name_of(token)
        if name is None:
            return Place.NOTHING
        byte = BYTE.fullmatch(name)
        if byte is None:
            self._start_run()
            return Place.FINAL
        try:
            self._decoder.decode(bytes([int(byte[1], 16)]))
        except UnicodeDecodeError:
            self._is_wrong = True
        if self._is_wrong or self._decoder.getstate()[0]:
            return Place.INSIDE
        return Place.SO_FAR if self._as_a_whole else Place.FINAL


def of_decoder(decoder: dict[str, Any] | None, name_of: Callable[[int], str | None]) -> Finality:
    """Of a decoder of the ``tokenizers`` library, as tokenizer.json has it.

    Args:
        decoder: its entry; None: the library puts spaces between the tokens.
        name_of: a token's name in the vocabulary; None: there is no such token.
    """
    kind = _kind(list(_steps(decoder)))
    if kind == "nowhere":
        return Nowhere()
    if kind == "byte level":
        return Utf8(lambda token: None if (name := name_of(token)) is None else _byte_level(name))
    # Without byte tokens no name looks like one to the decoder, and every token is final.
    return ByteRuns(name_of if kind == "byte runs" else _without_bytes(name_of), as_a_whole=True)


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _kind(steps: list[dict[str, Any]]) -> str:
    """How far a later token can reach back: ``tokens``, ``byte runs``, ``byte level``, or ``nowhere`` is text final."""
    kind, is_one_text = "tokens", False
    for number, step in enumerate(steps):
        name = step["type"]
        if is_one_text:
            if not _is_local_in_text(step):
                return "nowhere"
        elif name == "Fuse":
            is_one_text = True
        elif name == "ByteLevel" and number == 0:
            kind, is_one_text = "byte level", True
        elif name == "ByteFallback" and all(map(_keeps_bytes, steps[:number])):
            kind = "byte runs"
        elif name not in BY_TOKEN:
            return "nowhere"
    return kind


def _keeps_bytes(step: dict[str, Any]) -> bool:
    """Whether the names of byte tokens pass it, and nothing else becomes one."""
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return bool(pattern) and OF_BYTES.isdisjoint(pattern + step["content"])
    return step["type"] == "Strip" and OF_BYTES.isdisjoint(step["content"])


def _is_local_in_text(step: dict[str, Any]) -> bool:
    """Whether it changes a text whose tokens are one string already, only at its beginning or by single characters."""
    if step["type"] == "Replace":
        return len(step["pattern"].get("String") or "") == 1
    # At the end the library strips only texts that are long enough for it, and panics at others.
    return step["type"] == "Fuse" or (step["type"] == "Strip" and not step["stop"])


def _without_bytes(name_of: Callable[[int], str | None]) -> Callable[[int], str | None]:
    return lambda token: None if name_of(token) is None else ""


def _characters_of_bytes() -> dict[str, int]:
    """GPT-2's character for each byte: itself where it can be seen, else one behind U+0100."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(others)}


CHARACTERS = _characters_of_bytes()


def _byte_level(name: str) -> bytes:
    """The bytes of a token; of a name with any other character, that character and all others as they are."""
    try:
        return bytes(CHARACTERS[character] for character in name)
    except KeyError:
        return name.encode("utf-8", "surrogatepass")


def parse_state(part: Any) -> dict[str, Any] | None:
    """A part of a library's tokenizer (a decoder, a post-processor) as tokenizer.json has it."""
    return None if part is None else json.loads(part.__getstate__())
