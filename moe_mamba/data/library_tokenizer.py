"""A tokenizer of the ``tokenizers`` library: GPT-2's, Llama's, or any other that a tokenizer.json holds."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from moe_mamba.data.finality import Finality, of_decoder, parse_state
from moe_mamba.data.library_calls import DecodingError, EncodingError, LibraryError, call_library, call_within
from moe_mamba.data.plain_tokenizers import END_OF_TEXT, Tokenizer
from moe_mamba.data.tokenizer_folder import CONFIG, LARGEST_VOCABULARY, Names, template
from moe_mamba.errors import UserError, brief

END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # tried where a tokenizer's folder names none
USE_REGEX = ("use_regex", True)  # the default, which older files of the tokenizers library leave out
PATIENCE = 60.0  # seconds for a batch of prompts, and
PATIENT_CHARACTERS = 10_000  # one more for each so many characters: slow tokenizers encode ten times as many
HOLES = 1 << 16  # ids without a token that a vocabulary may have, beside four for each token


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library, from the content of its tokenizer.json."""

    FILE = "tokenizer.json"
    CONFIG = CONFIG

    def __init__(self, content: str, name: str, names: Names | None = None) -> None:
        """Load it.

        Args:
            content: of tokenizer.json.
            name: for messages.
            names: what the tokenizer_config.json beside it says.

        Raises:
            UserError: ``content`` is no tokenizer, or no end-of-text token is known, or its ids or its post-processor
                are of no use.
        """
        import tokenizers

        self.name, self.names, self.content = name, names or Names(), content
        try:
            self.library = call_library(lambda: tokenizers.Tokenizer.from_str(content))
        except LibraryError as error:
            raise UserError(f"{name}: not a tokenizer.json ({error}): give a file that a tokenizer saved") from error
        self.library.no_padding()
        self.library.no_truncation()
        self.library.encode_special_tokens = True  # a text that holds <|endoftext|> does not end there
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        self.end_name = self.names.end or next((end for end in END_NAMES if end in vocabulary), "")
        if self.end_name not in vocabulary:
            raise UserError(
                f"{name}: it has no end-of-text token: name it as eos_token in {CONFIG} beside the vocabulary"
            )
        self.vocab_size = max(vocabulary.values()) + 1
        if self.vocab_size > min(4 * len(vocabulary) + HOLES, LARGEST_VOCABULARY):
            raise UserError(
                f"{name}: {len(vocabulary):,} tokens have ids up to {self.vocab_size - 1:,}: the vocabulary is "
                "damaged, give the file as its authors publish it"
            )
        self.end_of_text = vocabulary[self.end_name]
        self.prefix, self.suffix = self._around()

    def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids that the post-processor puts before and behind every text."""
        try:
            before, behind = _around(parse_state(self.library.post_processor))
        except _NotAroundError as error:
            raise UserError(
                f"{self.name}: its post_processor {error}: give a tokenizer that only puts tokens around a text"
            ) from None
        for token in before + behind:
            if self.library.id_to_token(token) is None:
                raise UserError(
                    f"{self.name}: its post_processor adds the id {token}, which its vocabulary lacks: give the file "
                    "as its authors publish it"
                )
        return before, behind

    @property
    def beginning(self) -> int:
        """See Tokenizer: a bos_token that is named counts, also where none is put before texts."""
        named = None if self.names.beginning is None else self.library.token_to_id(self.names.beginning)
        return self.end_of_text if named is None and not self.prefix else self.prefix[0] if named is None else named

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """See Tokenizer; takes a while, and a process that only encodes needs none."""
        return _library_fingerprint(json.loads(self.content), self.end_name, self.prefix)

    @property
    def fingerprint_without_prefix(self) -> str:
        """See Tokenizer."""
        return _library_fingerprint(json.loads(self.content), self.end_name, ())

    @cached_property
    def has_patterns(self) -> bool:  # type: ignore[override]
        """See Tokenizer; GPT-2's own pattern is the library's."""
        return any(_has_pattern(parse_state(part)) for part in (self.library.normalizer, self.library.pre_tokenizer))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return self._encode(texts, lambda call: call())

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer; where there are patterns, Ctrl-C ends it, and a text that takes unreasonably long is an error.

        Raises:
            EncodingError: see ``encode_batch``.
            UserError: it takes too long, as a pattern can that looks for words in many ways.
        """
        if not self.has_patterns:
            return super().encode_prompts(texts)
        seconds = PATIENCE + sum(map(len, texts)) / PATIENT_CHARACTERS
        try:
            encoded = self._encode(texts, lambda call: call_within(call, seconds))
        except TimeoutError:
            raise UserError(
                f"{self.name}: after {seconds:.0f} s it has not encoded the text that begins "
                f"{brief(repr(texts[0][:40]), 60)}: its pattern may never end there; give another tokenizer or text"
            ) from None
        return [[*self.prefix, *ids] for ids in encoded]

    def _encode(self, texts: Sequence[str], run: Any) -> list[list[int]]:
        def encode(some: Sequence[str]) -> Any:
            batch = list(some)
            return call_library(lambda: run(lambda: self.library.encode_batch_fast(batch, add_special_tokens=False)))

        try:
            encodings = encode(texts)
        except LibraryError as error:
            raise self._wrong_text(texts, encode, error) from error
        return [encoding.ids for encoding in encodings]

    def _wrong_text(self, texts: Sequence[str], encode: Any, error: LibraryError) -> EncodingError:
        """What to say: the first text that fails by itself."""
        index = 0
        for place, text in enumerate(texts if len(texts) > 1 else ()):
            try:
                encode([text])
            except LibraryError as found:
                index, error = place, found
                break
        return EncodingError(
            f"{self.name}: it cannot encode the text that begins {brief(repr(texts[index][:40]), 60)} "
            f"({brief(error, 80)}): leave that text out, or give another tokenizer",
            index,
            brief(error, 100),
        )

    def use_one_thread(self) -> None:
        """See Tokenizer; the library reads this variable at each call."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included; ids without a token have none.

        Raises:
            DecodingError: the library cannot decode them.
        """
        tokens = [int(i) for i in ids]
        if not tokens:  # at which some decoders panic
            return ""
        try:
            return call_library(lambda: self.library.decode(tokens, skip_special_tokens=False))
        except LibraryError as error:
            raise DecodingError(
                f"{self.name}: it cannot decode its tokens ({brief(error, 80)}): give another tokenizer"
            ) from error

    def finality(self) -> Finality:
        """See ``finality.of_decoder``."""
        return of_decoder(parse_state(self.library.decoder), self.library.id_to_token)

    def files(self) -> dict[str, bytes]:
        """The special tokens' names as Transformers has them, then tokenizer.json."""
        config = {"eos_token": self.end_name} | self.names.as_config()
        return {CONFIG: (json.dumps(config) + "\n").encode(), self.FILE: self.content.encode()}

    def exported_content(self) -> dict[str, Any]:
        """tokenizer.json as it is, but that nothing is put behind a text, and none is cut or padded."""
        content = json.loads(self.content) | {"truncation": None, "padding": None}
        content["added_tokens"] = content.get("added_tokens") or []
        if self.suffix:
            before = {str(self.library.id_to_token(token)): [token] for token in self.prefix}
            content["post_processor"] = template(before, {})
        return content


def _has_pattern(node: Any) -> bool:
    """Whether a step of a tokenizer.json has a regular expression anywhere."""
    if isinstance(node, dict):
        return "Regex" in node or any(map(_has_pattern, node.values()))
    return isinstance(node, list) and any(map(_has_pattern, node))


class _NotAroundError(Exception):
    """A post-processor does something else than putting tokens around a text."""


def _around(processor: dict[str, Any] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a post-processor, as tokenizer.json has it, puts before and behind a text."""
    kind = processor["type"] if processor else "ByteLevel"
    if processor is None or kind == "ByteLevel":  # which changes offsets only
        return (), ()
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (processor["cls"][1],), (processor["sep"][1],)
    if kind == "Sequence":
        before: tuple[int, ...] = ()
        behind: tuple[int, ...] = ()
        for step in processor["processors"]:
            outer = _around(step)
            before, behind = outer[0] + before, behind + outer[1]
        return before, behind
    if kind != "TemplateProcessing":
        raise _NotAroundError(f"is a {brief(kind, 40)}")
    parts: tuple[list[int], list[int]] = ([], [])
    texts = 0
    for piece in processor["single"]:
        if "Sequence" in piece:
            texts += 1
        else:
            parts[min(texts, 1)].extend(processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    if texts != 1:
        raise _NotAroundError(f"takes the text {texts} times")
    return tuple(parts[0]), tuple(parts[1])


def _library_fingerprint(content: dict[str, Any], end_of_text: str, prefix: tuple[int, ...]) -> str:
    """One hash for a tokenizer, whichever of its file formats it came in and whichever version wrote them."""
    model = dict(content["model"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.pop("merges", [])]
    vocabulary = model.pop("vocab")
    decisive = {
        "vocabulary": sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary,
        "merges": merges,
        "model": _set_values(model),
        "normalizer": _set_values(content.get("normalizer")),
        "pre_tokenizer": _set_values(content.get("pre_tokenizer")),
        "added": sorted((token["id"], token["content"]) for token in content.get("added_tokens") or []),
        "end_of_text": end_of_text,
    }
    if prefix:
        decisive["prefix"] = prefix
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode("utf-8")).hexdigest()


def _set_values(node: Any) -> Any:
    """Settings that differ from their defaults and touch the ids: older files leave out what newer ones spell out."""
    if isinstance(node, list):
        return [_set_values(value) for value in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _set_values(value)
        for key, value in node.items()
        if not (value is None or value is False or value == "" or key == "trim_offsets" or (key, value) == USE_REGEX)
    }
