import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from moe_mamba.data import prepare
from moe_mamba.data.prepare import prepare_corpus, prepare_tokenizer
from moe_mamba.data.tokenizer import BytesTokenizer, LibraryTokenizer, load_tokenizer
from moe_mamba.errors import UserError
from tests.data.conftest import END, write_documents, write_foreign, write_shards


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


def test_another_field_is_another_corpus(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one", "other": "another"}) + "\n")
    both = [prepare_corpus(str(path), BytesTokenizer(), tmp_path / "cache", text_key=key) for key in ("text", "other")]
    assert [shards.tokens for shards in both] == [4, 8]
    assert both[0].name != both[1].name
    tokenizer = prepare_tokenizer("sentencepiece", [str(path)], 265, tmp_path / "tokenizer", text_key="other")
    assert "t" in tokenizer.decode(tokenizer.encode("t"))
    with pytest.raises(UserError, match="there: text, other"):
        prepare_tokenizer("sentencepiece", [str(path)], 265, tmp_path / "none", text_key="no")


def test_a_changed_file_is_tokenized_again(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl", ["one"])
    before = prepare_corpus(source, BytesTokenizer(), tmp_path / "cache")
    write_documents(tmp_path / "a.jsonl", ["two"])
    assert prepare_corpus(source, BytesTokenizer(), tmp_path / "cache").identity != before.identity


@pytest.mark.parametrize("kind", ["documents", "shards"])
def test_a_flipped_byte_is_refused(tmp_path: Path, kind: str) -> None:
    source = write_documents(tmp_path / "a.jsonl", ["one"])
    shards = prepare_corpus(source, BytesTokenizer(), tmp_path / "cache")
    source = source if kind == "documents" else shards.name
    assert prepare_corpus(source, BytesTokenizer(), tmp_path / "cache", verify=True).identity == shards.identity
    path = Path(shards.name) / "part-00000.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    assert prepare_corpus(source, BytesTokenizer(), tmp_path / "cache").tokens == shards.tokens  # only sizes
    with pytest.raises(UserError, match=r"part-00000\.bin: its checksum differs"):
        prepare_corpus(source, BytesTokenizer(), tmp_path / "cache", verify=True)


def test_foreign_ids_past_the_vocabulary_are_refused_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_mamba.data.shards.BLOCK", 8)  # so that a sample leaves most of the row out
    for place in (0, 333, 1998):
        ids = [1] * 1999 + [END]
        write_foreign(tmp_path / "fine", [ids])
        assert prepare_corpus(str(tmp_path / "fine"), BytesTokenizer(), tmp_path, verify=True).tokens == 2000
        ids[place] = 257
        write_foreign(tmp_path / "foreign", [ids])
        with pytest.raises(UserError, match="token id 257 is outside the vocabulary of 257"):
            prepare_corpus(str(tmp_path / "foreign"), BytesTokenizer(), tmp_path, verify=True)


def test_work_is_said_once_and_only_where_there_is_some(tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl", ["one"])
    said: list[str] = []
    for _ in range(2):
        shards = prepare_corpus(source, BytesTokenizer(), tmp_path / "cache", say=said.append)
    prepare_corpus(shards.name, BytesTokenizer(), tmp_path / "cache", say=said.append)
    assert said == [f"sharding {source} into {shards.name}"]
    with pytest.raises(UserError, match="no such file"):
        prepare_corpus("missing.jsonl", BytesTokenizer(), tmp_path / "cache", say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("source", "large_bytes", "limit", "workers"),
    [
        ("file", 1, None, 3),
        ("file", 1, 30_000, 3),
        ("file", 1, 10, 0),
        ("file", 1 << 20, None, 0),
        ("hf:a:b", 1, None, 3),
    ],
)
def test_large_sources_are_tokenized_on_all_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, large_bytes: int, limit: int | None, workers: int
) -> None:
    class Reached(Exception):
        pass

    def preprocess(*arguments: object) -> None:
        assert arguments[3] == workers
        raise Reached

    monkeypatch.setattr(prepare, "LARGE_BYTES", large_bytes)
    monkeypatch.setattr(prepare, "count_cores", lambda: 3)
    monkeypatch.setattr(prepare, "preprocess", preprocess)
    source = write_documents(tmp_path / "a.jsonl", ["one"]) if source == "file" else source
    with pytest.raises(Reached):
        prepare_corpus(source, BytesTokenizer(), tmp_path / "cache", limit)


@pytest.mark.slow
def test_workers_give_the_same_shards(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_documents(tmp_path / "a.jsonl", texts)
    alone = prepare_corpus(source, BytesTokenizer(), tmp_path / "alone")
    monkeypatch.setattr(prepare, "LARGE_BYTES", 1)
    assert prepare_corpus(source, BytesTokenizer(), tmp_path / "many").identity == alone.identity


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


def test_ranks_may_save_the_tokenizer_at_once(tmp_path: Path) -> None:
    spec = tmp_path / "vocab"
    spec.mkdir()
    vocabulary = {"a": 0, "stop": 1} | {f"word{number}": number for number in range(2, 2000)}
    content = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}, "added_tokens": []}
    (spec / LibraryTokenizer.FILE).write_text(json.dumps(content))
    (spec / LibraryTokenizer.CONFIG).write_text('{"eos_token": "stop"}')  # known only from this file
    expected = load_tokenizer(spec).fingerprint
    ranks = 8
    with ThreadPoolExecutor(ranks) as pool:
        for turn in range(20):
            barrier = Barrier(ranks)

            def rank(_: int, folder: Path = tmp_path / f"run{turn}", barrier: Barrier = barrier) -> str:
                barrier.wait()
                return prepare_tokenizer(str(spec), [], 2000, folder).fingerprint

            assert set(pool.map(rank, range(ranks))) == {expected}
            kept = {path.name for path in (tmp_path / f"run{turn}").iterdir()}
            assert kept == {LibraryTokenizer.FILE, LibraryTokenizer.CONFIG}


def test_a_kept_tokenizer_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_tokenizer("bytes", [], 257, tmp_path / "tokenizer")
    monkeypatch.setattr(BytesTokenizer, "save", None)
    assert prepare_tokenizer("bytes", [], 257, tmp_path / "tokenizer").vocab_size == 257


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
