"""The fast tokenizers that AutoTokenizer loads give our ids, for real texts and for odd ones."""

import io
import random
from pathlib import Path
from typing import Any

import pytest

from moe_mamba.data.corpus import Corpus
from moe_mamba.data.tokenizer import (
    BytesTokenizer,
    SentencePieceTokenizer,
    SymbolsTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from moe_mamba.errors import UserError
from moe_mamba.hf import tokenizer_files

transformers = pytest.importorskip("transformers")

ODD = [
    *("", " ", "  a  ", "\n\n\n", "\t\t x", "a\r\nb\rc", "<|endoftext|>", "a<|endoftext|>b", "<unk>", "<0x41>", "</s>"),
    *(
        "▁",
        "▁▁a ▁ b▁",
        "e\u0301",
        "ｆｕｌｌ　width",
        "漢字かな交じり文",
        "🙂👩\u200d👩\u200d👧",
        "\0\x01",
        "\u200b\u2028\ufeff",
        "ÿþ \xff\xfe <0xFF> <0xFE>",
    ),
]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return [document.text for document in Corpus("builtin").documents(150)]


@pytest.fixture(scope="module")
def sentencepiece(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_sentencepiece(documents, 1200, tmp_path_factory.mktemp("sentencepiece"))


def _fast(tokenizer: Tokenizer, folder: Path, room: int = 0, **keys: Any) -> "transformers.PreTrainedTokenizerFast":
    """What AutoTokenizer makes of it, for a model with ``room`` ids more than the tokenizer has."""
    pad = tokenizer_files.write(tokenizer, folder, tokenizer.vocab_size + room)
    fast = transformers.AutoTokenizer.from_pretrained(folder, **keys)
    assert fast.is_fast and tokenizer.vocab_size <= len(fast) <= tokenizer.vocab_size + room
    assert fast.eos_token_id == tokenizer.end_of_text and fast.pad_token_id == pad < tokenizer.vocab_size + room
    assert fast.padding_side == "left"
    assert load_tokenizer(folder / tokenizer_files.ORIGINAL).fingerprint == tokenizer.fingerprint
    return fast


def _texts(documents: list[str]) -> list[str]:
    """Real ones, odd ones, runs of one character, and real characters in any order."""
    draw = random.Random(0)
    runs = ["".join(c * draw.randint(1, 40) for c in draw.choices(" \n=-*#aeo_.", k=5)) for _ in range(200)]
    letters = "".join(documents[:20]) + "▁<|endoftext|> é漢🙂"
    return documents + ODD + runs + ["".join(draw.choices(letters, k=60)) for _ in range(200)]


def _check(tokenizer: Tokenizer, folder: Path, texts: list[str]) -> None:
    fast = _fast(tokenizer, folder, split_special_tokens=True)
    for text in texts:
        ids = tokenizer.encode(text)
        assert fast(text)["input_ids"] == ids, repr(text)
        assert fast.decode(ids) == tokenizer.decode(ids), repr(text)
    ended = [*tokenizer.encode(texts[0]), tokenizer.end_of_text]
    assert fast.decode(ended, skip_special_tokens=True) == tokenizer.decode(ended[:-1])
    plain = transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        if not any(name in text for name in plain.all_special_tokens):
            assert plain(text)["input_ids"] == tokenizer.encode(text), repr(text)
    if texts[0]:
        assert plain(f"{texts[0]}{plain.eos_token}")["input_ids"] == ended


def test_sentencepiece(sentencepiece: Tokenizer, documents: list[str], tmp_path: Path) -> None:
    _check(sentencepiece, tmp_path, _texts(documents))


def test_bytes(documents: list[str], tmp_path: Path) -> None:
    _check(BytesTokenizer(), tmp_path, _texts(documents[:20]))


@pytest.mark.slow
def test_gpt2(shared_data: Path, documents: list[str], tmp_path: Path) -> None:
    _check(load_tokenizer(shared_data / "gpt2"), tmp_path, _texts(documents))


def test_symbols(tmp_path: Path) -> None:
    _check(SymbolsTokenizer(20), tmp_path, ["3 1 18 0", "", "7"])


def test_a_batch_is_padded_on_the_left(sentencepiece: Tokenizer, tmp_path: Path) -> None:
    batch = _fast(sentencepiece, tmp_path)(["one", "one two three"], padding=True)
    assert batch["input_ids"][0][0] != sentencepiece.end_of_text
    assert batch["attention_mask"][0][0] == 0 and batch["attention_mask"][0][-1] == 1


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word"])
def test_sentencepiece_models_of_others(kind: str, documents: list[str], tmp_path: Path) -> None:
    """With SentencePiece's own defaults: a dummy prefix, spaces squeezed, NFKC, no bytes. Words are refused."""
    from sentencepiece import SentencePieceTrainer

    model, size = io.BytesIO(), {"bpe": 900, "unigram": 900, "word": 500}[kind]
    SentencePieceTrainer.train(
        sentence_iterator=iter(documents), model_writer=model, vocab_size=size, model_type=kind, minloglevel=3
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    if kind == "word":
        with pytest.raises(UserError, match="words or characters"):
            tokenizer_files.write(tokenizer, tmp_path, tokenizer.vocab_size)
        return
    fast = _fast(tokenizer, tmp_path)
    same = [fast(text)["input_ids"] == tokenizer.encode(text) for text in documents]
    # A unigram model may split a text otherwise where two splits score alike.
    assert sum(same) / len(same) >= {"bpe": 1.0, "unigram": 0.9}[kind]
