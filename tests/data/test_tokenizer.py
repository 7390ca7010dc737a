import json
import shutil
from pathlib import Path

import pytest

from moe_mamba.data.builtin import builtin_documents
from moe_mamba.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer, train_sentencepiece
from moe_mamba.errors import UserError

HARD = [
    "",
    "\n",
    " ",
    "a b  c",
    "  x\n\n  y\n",
    "▁x▁ y▁",
    "<|endoftext|>",
    "<s></s><unk><0x0A>",
    "\0a\0",
    "a\r\n\tb",
    "日本語 é e\u0301 😀",
    "\ufeffx\u2028\ufffd",
    "don 't ,  x .",
    "a" * 5000,
]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_sentencepiece(builtin_documents("validation"), 1024, tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(params=["bytes", "sentencepiece", "gpt2", "gpt2 vocabulary"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    if request.param == "sentencepiece":
        return request.getfixturevalue("sentencepiece")
    folder = request.getfixturevalue("shared_data") / "gpt2"
    if request.param == "gpt2":
        return load_tokenizer(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folder / name, tmp_path / name)
    return load_tokenizer(tmp_path)


def test_round_trip(tokenizer: Tokenizer) -> None:
    texts = HARD + list(builtin_documents("validation")[:10])
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.end_of_text for i in ids)


def test_end_of_text_is_readable(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("one"), tokenizer.end_of_text, *tokenizer.encode(" two")]
    assert tokenizer.decode(ids) == "one<|endoftext|> two"


def test_a_saved_folder_restores_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.fingerprint, again.vocab_size, again.end_of_text) == (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    assert again.encode_batch(HARD) == tokenizer.encode_batch(HARD)


def test_one_thread_gives_the_same(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    before = tokenizer.encode_batch(HARD)
    tokenizer.use_one_thread()
    assert tokenizer.encode_batch(HARD) == before


def test_gpt2_is_gpt2_in_any_format(shared_data: Path, tmp_path: Path) -> None:
    whole = load_tokenizer(shared_data / "gpt2")
    assert whole.encode("Hello world") == [15496, 995]
    assert (whole.vocab_size, whole.end_of_text) == (50257, 50256)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "gpt2" / name, tmp_path / name)
    assert load_tokenizer(tmp_path).fingerprint == whole.fingerprint


@pytest.mark.slow
def test_fingerprints_differ_where_the_ids_may(shared_data: Path, tmp_path: Path, sentencepiece: Tokenizer) -> None:
    content = json.loads((shared_data / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    fingerprints = {load_tokenizer(shared_data / "gpt2").fingerprint}
    content["pre_tokenizer"]["add_prefix_space"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    fingerprints.add(load_tokenizer(tmp_path).fingerprint)
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    fingerprints.add(load_tokenizer(tmp_path).fingerprint)
    fingerprints.update((sentencepiece.fingerprint, BytesTokenizer().fingerprint))
    assert len(fingerprints) == 5


def test_gpt2_by_name_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match="give a folder"):
        load_tokenizer("gpt2")


def test_gpt2_by_name(monkeypatch: pytest.MonkeyPatch, shared_data: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(shared_data / name / file))
    assert load_tokenizer("gpt2").fingerprint == load_tokenizer(shared_data / "gpt2").fingerprint


def test_sentencepiece_is_deterministic_and_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    texts = builtin_documents("validation")
    first = train_sentencepiece(texts, 512, tmp_path / "1")
    assert first.fingerprint == train_sentencepiece(texts, 512, tmp_path / "2").fingerprint
    assert first.vocab_size == 512
    assert load_tokenizer(tmp_path / "1" / "tokenizer.model").fingerprint == first.fingerprint
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("pieces", [64, 1_000_000])
def test_pieces_that_a_corpus_cannot_give(pieces: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.vocab_size") as error:
        train_sentencepiece(["a little text"], pieces, tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "it has no tokenizer"),
        ({"tokenizer.json": "{}"}, "not a tokenizer.json"),
        ({"vocab.json": "no", "merges.txt": ""}, "not JSON"),
        ({"tokenizer.model": "no"}, "not a SentencePiece model"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'}, "no end-of-text token"),
    ],
)
def test_folders_that_hold_no_tokenizer(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spec", ["nothing/here", "missing.model", "sentencepiece"])
def test_specs_that_name_no_tokenizer(spec: str) -> None:
    with pytest.raises(UserError, match="give"):
        load_tokenizer(spec)
