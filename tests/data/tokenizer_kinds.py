"""One small tokenizer of every kind, made here: nothing is downloaded."""

import io
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from moe_mamba.data.tokenizer import (
    BytesTokenizer,
    LibraryTokenizer,
    SentencePieceTokenizer,
    SymbolsTokenizer,
    Tokenizer,
)

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = [*"abcdehlorstuw.,!", "é", "日"]
PIECES = ["▁", "▁▁", "th", "▁th", "▁the", "he", "lo", "▁a", "▁w"]
MERGES = [("▁", "▁"), ("t", "h"), ("▁", "th"), ("▁th", "e"), ("h", "e"), ("l", "o"), ("▁", "a"), ("▁", "w")]
ENDS = [decoders.ByteFallback(), decoders.Fuse()]
SPACES = decoders.Replace("▁", " ")


def named(library: Library) -> LibraryTokenizer:
    """As ours; the library's added tokens stay as they are."""
    return LibraryTokenizer(library.to_str(), "made for a test")


def special(*names: str) -> list[AddedToken]:
    """Special tokens as published tokenizers have them."""
    return [AddedToken(name, special=True, normalized=False) for name in names]


def llama(steps: list[Any] | None = None, beginning: bool = False, ending: bool = False) -> Library:
    """BPE with byte fallback, and a decoder of these steps, Llama's by default; it may add BOS and EOS."""
    vocabulary = {name: place for place, name in enumerate([*SPECIAL, *BYTES, *LETTERS, *PIECES])}
    library = Library(models.BPE(vocabulary, MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(steps or [SPACES, *ENDS, decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(special(*SPECIAL))
    if beginning or ending:
        single = " ".join(["<s>"] * beginning + ["$A"] + ["</s>"] * ending)
        library.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return library


def gpt2_like() -> Library:
    """Byte-level BPE."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, "he", "Ġa", "æĹ", "ĥ½æ", "<|endoftext|>"]
    vocabulary = {name: place for place, name in enumerate(names)}
    merges = [("h", "e"), ("Ġ", "a"), ("æ", "Ĺ")]
    library = Library(models.BPE(vocabulary, merges))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(special("<|endoftext|>"))
    return library


def wordpiece(cleanup: bool) -> Library:
    """As BERT's."""
    names = ["[UNK]", "</s>", *LETTERS, *(f"##{letter}" for letter in LETTERS), "do", "not", "n't"]
    library = Library(models.WordPiece({name: place for place, name in enumerate(names)}, unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=cleanup)
    library.add_special_tokens(special("</s>"))
    return library


def unigram() -> Library:
    """As T5's: Unigram with Metaspace."""
    pieces = [(name, 0.0) for name in SPECIAL] + [(name, -2.0 - len(name) / 9) for name in [*LETTERS, *PIECES]]
    library = Library(models.Unigram(pieces, unk_id=0))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.add_special_tokens(special(*SPECIAL))
    return library


def words(decoder: Any) -> Library:
    """Words by themselves, with odd ones, and this decoder."""
    names = ["<unk>", "</s>", *LETTERS, *PIECES, " ", "  ", " x ", "b</w>", "|", "<pad>", "", *BYTES]
    library = Library(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        library.decoder = decoder
    library.add_special_tokens(special("</s>"))
    return library


@lru_cache
def sentencepiece_model(dummy_prefix: bool = True, kind: str = "bpe") -> bytes:
    """A small model with byte fallback."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    texts = ["the cat sat on the other mat, and the rats ate hats. " * 3, "he lost the hose, she sat."] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=300, model_type=kind, byte_fallback=True,
        add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False, normalization_rule_name="identity",
        num_threads=1, minloglevel=3, hard_vocab_limit=False,
    )  # fmt: skip
    return model.getvalue()


def _local(name: str, decoder: Callable[[], Any]) -> tuple[str, Callable[[], Tokenizer]]:
    return name, lambda: named(words(decoder()))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": BytesTokenizer,
    "symbols": lambda: SymbolsTokenizer(20),
    "sentencepiece": lambda: SentencePieceTokenizer(sentencepiece_model(False)),
    "sentencepiece, dummy prefix": lambda: SentencePieceTokenizer(sentencepiece_model()),
    "sentencepiece, unigram": lambda: SentencePieceTokenizer(sentencepiece_model(True, "unigram")),
    "byte level": lambda: named(gpt2_like()),
    "Llama": lambda: named(llama()),
    "Gemma": lambda: named(llama([SPACES, *ENDS])),
    "bytes between single tokens": lambda: named(llama([SPACES, decoders.ByteFallback()])),
    "bytes, then Metaspace": lambda: named(llama([decoders.ByteFallback(), decoders.Metaspace()])),
    "spaces at the end stripped": lambda: named(llama([SPACES, *ENDS, decoders.Strip(" ", 0, 2)])),
    "Fuse, then single characters": lambda: named(llama([*ENDS, SPACES, decoders.Strip(" ", 3, 0)])),
    "Fuse, then double spaces": lambda: named(llama([SPACES, *ENDS, decoders.Replace("  ", " ")])),
    "Fuse, then a pattern": lambda: named(llama([SPACES, *ENDS, decoders.Replace(Regex("a+ *$"), "A")])),
    "WordPiece": lambda: named(wordpiece(False)),
    "WordPiece, cleaned up": lambda: named(wordpiece(True)),
    "WordPiece, cleaned up as a whole": lambda: named(
        words(decoders.Sequence([decoders.WordPiece(), decoders.Fuse(), decoders.WordPiece(cleanup=True)]))
    ),
    "Unigram": lambda: named(unigram()),
    "word ends": lambda: named(words(decoders.BPEDecoder("</w>"))),
    "CTC": lambda: named(words(decoders.CTC("<pad>", "|", True))),
    "no decoder": lambda: named(words(None)),
    "byte level behind another step": lambda: named(words(decoders.Sequence([SPACES, decoders.ByteLevel()]))),
    "bytes of bytes": lambda: named(
        words(decoders.Sequence([decoders.Replace("x", "<0x41>"), decoders.ByteFallback()]))
    ),
    "Metaspace, never": lambda: named(words(decoders.Metaspace(prepend_scheme="never"))),
}


def save_library(library: Library, folder: Path, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json in ``folder``, as Transformers has them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
