import json
from pathlib import Path

import pytest

from moe_mamba.data.prepare import prepare_corpus, prepare_tokenizer
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.errors import UserError
from tests.data.conftest import write_documents, write_shards


def test_documents_are_tokenized_once(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_documents(tmp_path / "a.jsonl", texts)
    shards = prepare_corpus(source, BytesTokenizer(), tmp_path / "cache")
    assert shards.documents == len(texts)
    with monkeypatch.context() as patch:
        patch.setattr("moe_mamba.data.preprocess.encode_documents", None)
        again = prepare_corpus(source, BytesTokenizer(), tmp_path / "cache")
    assert (again.name, again.identity) == (shards.name, shards.identity)
    assert prepare_corpus(source, BytesTokenizer(), tmp_path / "cache", 5).documents == 5
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_changed_file_is_tokenized_again(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl", ["one"])
    before = prepare_corpus(source, BytesTokenizer(), tmp_path / "cache")
    write_documents(tmp_path / "a.jsonl", ["two"])
    assert prepare_corpus(source, BytesTokenizer(), tmp_path / "cache").identity != before.identity


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl", ["one"])
    shards = prepare_corpus(source, BytesTokenizer(), tmp_path / "cache")
    (Path(shards.name) / "part-00000.bin").write_bytes(bytes(8))
    with pytest.raises(UserError, match="checksum differs"):
        prepare_corpus(source, BytesTokenizer(), tmp_path / "cache")


def test_shards_open_directly(tmp_path: Path, texts: list[str]) -> None:
    shards = write_shards(tmp_path, texts)
    assert prepare_corpus(shards.name, BytesTokenizer(), tmp_path / "cache").identity == shards.identity
    assert not (tmp_path / "cache").exists()
    with pytest.raises(UserError, match="is a folder, not documents"):
        prepare_corpus(str(tmp_path), BytesTokenizer(), tmp_path / "cache")


def test_a_tokenizer_is_trained_once_and_kept(tmp_path: Path, texts: list[str]) -> None:
    source = write_documents(tmp_path / "a.jsonl", texts)
    first = prepare_tokenizer("sentencepiece", [source], 290, tmp_path / "tokenizer")
    assert first.vocab_size == 290
    Path(source).unlink()
    assert prepare_tokenizer("sentencepiece", [source], 290, tmp_path / "tokenizer").fingerprint == first.fingerprint


def test_a_tokenizer_sees_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_mamba.data.prepare.TRAINING_CHARACTERS", 4000)
    one = write_documents(tmp_path / "a.jsonl", ["abab " * 2000])
    two = write_documents(tmp_path / "b.jsonl", ["zyzy " * 2000])
    tokenizer = prepare_tokenizer("sentencepiece", [one, two], 266, tmp_path / "tokenizer")
    assert len(tokenizer.encode("abab zyzy ")) < 6


def test_tokenizers_that_a_run_cannot_take(tmp_path: Path, texts: list[str]) -> None:
    prepare_tokenizer("bytes", [], 257, tmp_path / "tokenizer")
    shards = write_shards(tmp_path, texts)
    with pytest.raises(UserError, match=r"257 tokens, more than model\.vocab_size=256"):
        prepare_tokenizer("bytes", [], 256, tmp_path / "tokenizer")
    with pytest.raises(UserError, match=f"set data.tokenizer={shards.name}/tokenizer"):
        prepare_tokenizer("sentencepiece", [shards.name], 300, tmp_path / "other")
    (tmp_path / "vocab").mkdir()
    content = {"model": {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "a"}, "added_tokens": []}
    (tmp_path / "vocab" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"give a new run\.folder"):
        prepare_tokenizer(str(tmp_path / "vocab"), [], 257, tmp_path / "tokenizer")


def test_the_builtin_corpus_with_its_own_tokenizer(tmp_path: Path) -> None:
    tokenizer = prepare_tokenizer("sentencepiece", ["builtin"], 2048, tmp_path / "tokenizer")
    train = prepare_corpus("builtin", tokenizer, tmp_path / "cache")
    validation = prepare_corpus("builtin:validation", tokenizer, tmp_path / "cache")
    assert train.text_bytes and train.text_bytes / train.tokens > 3
    assert train.documents > 10 * validation.documents
    assert validation.identity != train.identity
