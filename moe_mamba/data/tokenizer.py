"""Tokenizers: GPT-2's (or any of the ``tokenizers`` library), SentencePiece, bytes, and numbered symbols.

All of them give back the very text they were given, know one end-of-text token, and save themselves into a folder
that ``load_tokenizer`` restores.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from moe_mamba.data.plain_tokenizers import END_OF_TEXT, BytesTokenizer, SymbolsTokenizer, Tokenizer
from moe_mamba.data.quiet import quiet_hub
from moe_mamba.errors import UserError

END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # tried where a tokenizer's folder names none
SPACE = "▁"  # what SentencePiece writes for a space; it takes a real one in a text for a space too
USE_REGEX = ("use_regex", True)  # the default, which older files of the tokenizers library leave out
TRAINING_CHARACTERS = 8_000_000  # SentencePiece is trained on so much of the corpus at most


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback."""

    FILE = "tokenizer.model"

    def __init__(self, model: bytes, name: str = "SentencePiece model") -> None:
        """Load a serialised model; raises UserError where it is none, or lacks an end-of-text piece."""
        from sentencepiece import SentencePieceProcessor

        try:
            self.processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{name}: not a SentencePiece model: give a .model file that SentencePiece wrote"
            ) from error
        self.model = model
        self.vocab_size = self.processor.get_piece_size()
        self.end_of_text = self.processor.eos_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        if self.end_of_text < 0:
            raise UserError(f"{name}: it has no end-of-text piece: train it with an eos_id")
        self._space = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._threads = -1  # as many as there are cores
        self._has_bytes = all(self.processor.is_byte(piece) for piece in self._space)

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
        """The text of the pieces; end-of-text reads as <|endoftext|>."""
        parts: list[list[int]] = [[]]
        for i in ids:
            if i == self.end_of_text:
                parts.append([])
            else:
                parts[-1].append(int(i))
        return END_OF_TEXT.join(self.processor.decode(part) for part in parts)

    def files(self) -> dict[str, bytes]:
        """The model."""
        return {self.FILE: self.model}


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library, from the content of its tokenizer.json."""

    FILE = "tokenizer.json"
    CONFIG = "tokenizer_config.json"

    def __init__(self, content: str, name: str, end_of_text: str | None = None) -> None:
        """Load it; raises UserError where ``content`` is no tokenizer, or no end-of-text token is known."""
        import tokenizers

        try:
            self.library = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"{name}: not a tokenizer.json ({error}): give a file that a tokenizer saved") from error
        self.library.no_padding()
        self.library.no_truncation()
        self.library.encode_special_tokens = True  # a text that holds <|endoftext|> does not end there
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        self.end_name = end_of_text or next((end for end in END_NAMES if end in vocabulary), "")
        if self.end_name not in vocabulary:
            raise UserError(
                f"{name}: it has no end-of-text token: name it as eos_token in {self.CONFIG} beside the vocabulary"
            )
        self.content = content
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_text = vocabulary[self.end_name]

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """See Tokenizer; takes a while, and a process that only encodes needs none."""
        return _library_fingerprint(json.loads(self.content), self.end_name)

    @property
    def has_patterns(self) -> bool:
        """See Tokenizer; GPT-2's own pattern is the library's."""
        content = json.loads(self.content)
        return any(_has_pattern(content.get(step)) for step in ("normalizer", "pre_tokenizer"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def use_one_thread(self) -> None:
        """See Tokenizer; the library reads this variable at each call."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included."""
        return self.library.decode([int(i) for i in ids], skip_special_tokens=False)

    def files(self) -> dict[str, bytes]:
        """The end-of-text token's name as Transformers has it, then tokenizer.json."""
        return {
            self.CONFIG: (json.dumps({"eos_token": self.end_name}) + "\n").encode(),
            self.FILE: self.content.encode(),
        }


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load ``gpt2``, ``bytes``, a SentencePiece ``.model`` file, or a folder.

    A folder is one that a tokenizer was saved into, or holds tokenizer.json, or GPT-2's vocab.json and merges.txt.

    Raises:
        UserError: there is no such tokenizer, or it cannot be read.
    """
    if spec == "gpt2":
        return LibraryTokenizer(_download_gpt2(), "gpt2")
    if spec == "bytes":
        return BytesTokenizer()
    if spec == "sentencepiece":
        raise UserError("the sentencepiece tokenizer is trained on a run's corpus: give that run's tokenizer folder")
    if spec == "symbols":
        raise UserError(
            "the symbols tokenizer has as many ids as a run's model.vocab_size: give that run's tokenizer folder"
        )
    path = Path(spec)
    if path.is_dir():
        return _load_folder(path)
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path.read_bytes(), str(path))
    raise UserError(
        f"{spec}: no such tokenizer: give gpt2, bytes, a SentencePiece .model file, or a tokenizer's folder"
    )


def holds_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer was saved into ``folder``."""
    kinds = (LibraryTokenizer, SentencePieceTokenizer, BytesTokenizer, SymbolsTokenizer)
    return any((Path(folder) / kind.FILE).is_file() for kind in kinds)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, folder: str | Path) -> SentencePieceTokenizer:
    """Train a SentencePiece model of ``vocab_size`` pieces and save it into ``folder``.

    Byte-pair merges over whole documents, so that line ends and indents merge as well: in a trial on the built-in
    corpus, 2,048 pieces, that took the fewest tokens (3.08 bytes per token; unigram pieces 3.04, single line ends
    2.94), in a tenth of the unigram model's time. The same texts give the same model.

    Raises:
        UserError: the texts cannot give so many pieces, or the pieces are too few for their characters.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_first_characters(texts, TRAINING_CHARACTERS),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            character_coverage=0.9999,
            max_sentence_length=1 << 30,
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise UserError(
            f"no SentencePiece model of {vocab_size} pieces from this corpus ({_reason(error)}): change "
            "model.vocab_size (256 of them are bytes), or give more text"
        ) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    tokenizer.save(folder)
    return tokenizer


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def _reason(error: RuntimeError) -> str:
    """The library's own words, without the place in its source."""
    return str(error).strip().splitlines()[-1].rpartition("] ")[2].rstrip(". ") or "no reason given"


def _load_folder(folder: Path) -> Tokenizer:
    if (folder / LibraryTokenizer.FILE).is_file():
        content = _read(folder / LibraryTokenizer.FILE)
        return LibraryTokenizer(content, str(folder), _named_end(folder / LibraryTokenizer.CONFIG))
    if (folder / SentencePieceTokenizer.FILE).is_file():
        return SentencePieceTokenizer((folder / SentencePieceTokenizer.FILE).read_bytes(), str(folder))
    if (folder / BytesTokenizer.FILE).is_file():
        return BytesTokenizer()
    if (folder / SymbolsTokenizer.FILE).is_file():
        return SymbolsTokenizer(_parse(folder / SymbolsTokenizer.FILE)["vocab_size"])
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return LibraryTokenizer(_gpt2_content(folder), str(folder))
    raise UserError(
        f"{folder}: it has no tokenizer: it needs tokenizer.json, vocab.json and merges.txt, or tokenizer.model"
    )


def _named_end(config: Path) -> str | None:
    """The end-of-text token that a tokenizer_config.json names, as a string or as an added token."""
    if not config.is_file():
        return None
    name = _parse(config).get("eos_token")
    return name.get("content") if isinstance(name, dict) else name


def _gpt2_content(folder: Path) -> str:
    """GPT-2's vocab.json and merges.txt as the tokenizer.json that they stand for."""
    vocabulary = _parse(folder / "vocab.json")
    lines = _read(folder / "merges.txt").splitlines()
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    end = {"id": vocabulary.get(END_OF_TEXT), "content": END_OF_TEXT, "special": True, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [end | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [line for line in lines if line and not line.startswith("#version")],
        },
    }
    return json.dumps(content, ensure_ascii=False)


def _download_gpt2() -> str:
    """GPT-2's tokenizer.json from the Hugging Face hub, or from its cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache("gpt2", LibraryTokenizer.FILE)
        with quiet_hub():
            path = cached if isinstance(cached, str) else hf_hub_download("gpt2", LibraryTokenizer.FILE)
        return Path(path).read_text(encoding="utf-8")
    except Exception as error:  # no network, no cache, a refusal: the client has a type for each
        raise UserError(
            f"gpt2 cannot be downloaded from the Hugging Face hub ({type(error).__name__}): "
            "give a folder that holds its tokenizer.json, or vocab.json and merges.txt"
        ) from error


def _library_fingerprint(content: dict[str, Any], end_of_text: str) -> str:
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


def _has_pattern(node: Any) -> bool:
    """Whether a step of a tokenizer.json has a regular expression anywhere."""
    if isinstance(node, dict):
        return "Regex" in node or any(map(_has_pattern, node.values()))
    return isinstance(node, list) and any(map(_has_pattern, node))


def _parse(path: Path) -> dict[str, Any]:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}): give the file as its authors publish it") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: give the file as it was published") from error
