"""Encoding that fails, ends its process or never ends: only the document that is at fault is left out."""

import base64
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moe_mamba.data import encoding
from moe_mamba.data.corpus import Document, Place
from moe_mamba.data.encoding import Batch, encode_documents, encode_in_processes
from moe_mamba.data.library_calls import EncodingError
from moe_mamba.data.manifest import load_manifest
from moe_mamba.data.preprocess import preprocess
from moe_mamba.data.shards import Shards
from moe_mamba.data.tokenizer import BytesTokenizer, load_tokenizer
from moe_mamba.errors import UserError
from tests.data.conftest import write_documents

PANICS = "a" * 30 + "b"  # more than the ten million steps that the library tries at one place
NEVER_ENDS = ("a" * 20 + "b") * 20_000  # a tenth of a second at each of twenty thousand places


@pytest.fixture(scope="session")
def catastrophic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes whose pattern takes exponential time."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"(a+)+$|."), "isolated")
    level = tokenizers.pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("catastrophic")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def batch_of(*texts: str) -> Batch:
    documents = [Document(text, len(text), Place(0, number)) for number, text in enumerate(texts, 1)]
    return Batch(documents, sum(map(len, texts)))


def rejects_in(folder: Path) -> list[dict]:
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    return [reject | {"raw": base64.b64decode(reject["raw"]).decode()} for reject in rejects]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_panic_is_a_reject_with_its_place(
    catastrophic: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    source = write_documents(tmp_path / "a.jsonl", ["one", PANICS, "two", PANICS])
    tokenizer = load_tokenizer(catastrophic)
    manifest = preprocess(source, tokenizer, tmp_path / "out", workers)
    assert manifest == load_manifest(tmp_path / "out")
    assert (manifest.documents, manifest.failed, manifest.rejects, manifest.text_bytes) == (2, 2, 2, 6)
    shards = Shards.open(tmp_path / "out", tokenizer, verify="checksums")
    assert tokenizer.decode(shards.read(0, shards.tokens)) == "one<|endoftext|>two<|endoftext|>"
    rejects = rejects_in(tmp_path / "out")
    assert [(reject["file"], reject["line"], reject["raw"]) for reject in rejects] == [
        (source, 2, PANICS),
        (source, 4, PANICS),
    ]
    assert all("retry-limit-in-match" in reject["reason"] for reject in rejects)
    (line,) = capfd.readouterr().err.splitlines()  # and nothing of what the library prints of a panic
    assert line.startswith(f"{source}, line 2: the tokenizer fails on it")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_what_never_ends_is_a_reject_with_its_place(
    catastrophic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(encoding, "SECONDS", 2.0)
    monkeypatch.setattr(encoding, "BYTES_PER_SECOND", 1e9)
    source = write_documents(tmp_path / "a.jsonl", ["one", NEVER_ENDS, "two"])
    manifest = preprocess(source, load_tokenizer(catastrophic), tmp_path / "out", workers)
    assert (manifest.documents, manifest.failed, manifest.text_bytes) == (2, 1, 6)
    (reject,) = rejects_in(tmp_path / "out")
    assert (reject["line"], reject["raw"]) == (2, NEVER_ENDS)
    assert reject["reason"] == "the tokenizer did not end within 2 s on it"


@pytest.mark.slow
def test_a_limit_counts_what_could_not_be_encoded(catastrophic: Path, tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl", ["one", PANICS, "two", "three"])
    manifest = preprocess(source, load_tokenizer(catastrophic), tmp_path / "out", limit=3)
    assert (manifest.documents, manifest.failed) == (2, 1)


@pytest.mark.slow
def test_a_source_that_the_tokenizer_fails_on_whole_is_refused(catastrophic: Path, tmp_path: Path) -> None:
    source = write_documents(tmp_path / "a.jsonl", [PANICS] * 3)
    with pytest.raises(UserError, match="the tokenizer fails on all 3 documents: give another tokenizer"):
        preprocess(source, load_tokenizer(catastrophic), tmp_path / "out")


def test_only_tokenizers_with_patterns_of_their_own_are_run_in_processes(catastrophic: Path, shared_data: Path) -> None:
    assert load_tokenizer(catastrophic).has_patterns
    assert not load_tokenizer(shared_data / "gpt2").has_patterns
    assert not BytesTokenizer().has_patterns


class Fails(BytesTokenizer):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if "bad" in texts:
            raise self.error
        return super().encode_batch(texts)


def test_a_librarys_error_is_of_one_document_and_others_are_raised() -> None:
    encoded = encode_documents(Fails(EncodingError("a line", 1, "no unk")), ["a", "bad", "b"], "uint16")
    assert (encoded.ids.tolist(), encoded.lengths.tolist()) == ([97, 256, 98, 256], [2, 0, 2])
    assert encoded.failed == {1: "the tokenizer fails on it (no unk)"}
    for error in (UserError("not a symbol"), KeyboardInterrupt(), AttributeError()):
        with pytest.raises(type(error)):
            encode_documents(Fails(error), ["a", "bad"], "uint16")


def children() -> set[int]:
    """Processes that this one has started, whichever of its threads did."""
    threads = Path(f"/proc/{os.getpid()}/task").iterdir()
    return {int(pid) for thread in threads for pid in (thread / "children").read_text().split()}


@pytest.mark.slow
def test_a_process_that_is_killed_costs_nothing(tmp_path: Path) -> None:
    BytesTokenizer().save(tmp_path)
    before, killed = children(), []

    def batches() -> Iterator[Batch]:
        for number in range(40):
            if number == 20:
                deadline = time.monotonic() + 60
                while not (started := children() - before) and time.monotonic() < deadline:
                    time.sleep(0.01)
                for pid in started:
                    if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
            yield batch_of(f"text {number}", "x")

    found = list(encode_in_processes(batches(), tmp_path, "uint16", 1))
    assert killed
    assert [bytes(encoded.ids[:6].astype(np.uint8)) for _, encoded in found[:3]] == [b"text 0", b"text 1", b"text 2"]
    assert len(found) == 40
    assert all(not encoded.failed and len(encoded.lengths) == 2 for _, encoded in found)
    assert not children() & set(killed)


@pytest.mark.slow
def test_what_is_given_up_leaves_no_process(catastrophic: Path) -> None:
    before = children()
    encoding_ = encode_in_processes((batch_of(text) for text in ["a", *[NEVER_ENDS] * 20]), catastrophic, "uint16", 2)
    assert next(encoding_)[1].lengths.tolist() == [2]
    encoding_.close()
    assert len(children() - before) <= 1  # multiprocessing's resource tracker


@pytest.mark.slow
def test_a_process_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has no tokenizer"):
        list(encode_in_processes(iter([batch_of("a")]), tmp_path, "uint16", 1))
