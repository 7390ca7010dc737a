import base64
import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_mamba.data import preprocess as module
from moe_mamba.data.manifest import MANIFEST, Manifest, load_manifest
from moe_mamba.data.preprocess import count_cores, preprocess
from moe_mamba.data.shards import Shards
from moe_mamba.data.tokenizer import BytesTokenizer, train_sentencepiece
from moe_mamba.errors import UserError
from tests import ROOT
from tests.data.conftest import write_documents

PART = 4000  # bytes of text


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 1000)


@pytest.fixture
def source(tmp_path: Path, texts: list[str]) -> str:
    """Two files with damaged lines among their documents, in the middle and at the end."""
    write_documents(tmp_path / "a.jsonl", texts * 2)
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in texts]
    lines.insert(30, b"broken\n")
    lines.append(b"caf\xe9\n")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b"".join(lines))[:-8])
    return str(tmp_path / "*.js*")


def test_the_manifest_says_what_was_done(source: str, tmp_path: Path, texts: list[str]) -> None:
    manifest = preprocess(source, BytesTokenizer(), tmp_path / "out")
    size = 3 * sum(len(text.encode()) for text in texts)
    assert manifest == load_manifest(tmp_path / "out")
    assert manifest.complete
    assert (manifest.documents, manifest.text_bytes, manifest.tokens) == (180, size, size + 180)
    assert (manifest.rejects, manifest.largest_id, manifest.dtype) == (3, 256, "uint16")
    assert [file["name"] for file in manifest.source["files"]] == ["a.jsonl", "b.json.gz"]
    assert set(content(tmp_path / "out")) == {
        MANIFEST,
        "part-00000.bin",
        "part-00000.idx",
        "rejects.jsonl",
        "tokenizer/bytes.json",
    }


def test_rejects_are_kept_with_their_places(source: str, tmp_path: Path) -> None:
    preprocess(source, BytesTokenizer(), tmp_path / "out")
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(Path(reject["file"]).name, reject["line"]) for reject in rejects] == [
        ("b.json.gz", 31),
        ("b.json.gz", 62),
        ("b.json.gz", 63),
    ]
    assert [base64.b64decode(reject["raw"]) for reject in rejects] == [b"broken", b"caf\xe9", b""]
    assert "damaged gzip" in rejects[2]["reason"]


@pytest.mark.usefixtures("small_batches")
def test_the_number_of_workers_does_not_show(source: str, tmp_path: Path) -> None:
    for workers in (0, 2):
        preprocess(source, BytesTokenizer(), tmp_path / str(workers), workers=workers, part_bytes=PART)
    assert content(tmp_path / "0") == content(tmp_path / "2")
    assert len(Shards.open(tmp_path / "2", verify="checksums").manifest.parts) > 3  # type: ignore[union-attr]


class Killed(BaseException):
    """A kill, as far as Python can play it: nothing is cleared up behind it."""


@pytest.mark.usefixtures("small_batches")
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess(source, BytesTokenizer(), tmp_path / "whole", part_bytes=PART)
    calls = 0

    def counted(function):
        def wrapper(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Killed
            return function(*arguments, **options)

        return wrapper

    for owner, name in ((os, "fsync"), (os, "replace"), (module, "encode_documents")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    stop, stops, finished = 0, 0, False
    while not finished:
        stop, calls = stop + 3, 0
        try:
            for _ in range(2):
                preprocess(source, BytesTokenizer(), tmp_path / f"cut{stop}", part_bytes=PART)
            finished = True
        except Killed:
            stops += 1
            stopped_at, stop = stop, -1
            preprocess(source, BytesTokenizer(), tmp_path / f"cut{stopped_at}", part_bytes=PART)
            stop = stopped_at
        assert content(tmp_path / f"cut{stop}") == content(tmp_path / "whole")
    assert stops > 10


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import os, sys, time\n"
        "from moe_mamba.data import preprocess as module\n"
        "from moe_mamba.data.tokenizer import BytesTokenizer\n"
        "if __name__ == '__main__':\n"
        "    module.BATCH_BYTES = 4096\n"
        "    replace = os.replace\n"
        "    os.replace = lambda *paths: (time.sleep(0.1), replace(*paths))[1]\n"
        "    module.preprocess(sys.argv[1], BytesTokenizer(), sys.argv[2], workers=2, part_bytes=20_000)\n"
    )
    (tmp_path / "program.py").write_text(program)
    source = write_documents(tmp_path / "a.jsonl", [f"{number} " * 300 for number in range(300)])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), source, str(tmp_path / "cut")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "cut").glob("part-*.idx"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait(30)
    manifest = load_manifest(tmp_path / "cut")
    assert manifest is not None and not manifest.complete and manifest.parts
    with pytest.raises(UserError, match="unfinished"):
        Shards.open(tmp_path / "cut")
    monkeypatch.setattr(module, "BATCH_BYTES", 4096)
    for folder in ("cut", "whole"):
        preprocess(source, BytesTokenizer(), tmp_path / folder, part_bytes=20_000)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    while _group_lives(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _group_lives(process.pid)  # workers end with their parent


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_finished_folder_is_left_as_it_is(source: str, tmp_path: Path) -> None:
    first = preprocess(source, BytesTokenizer(), tmp_path / "out")
    before = [(path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()]
    assert preprocess(source, BytesTokenizer(), tmp_path / "out") == first
    assert [(path.name, path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()] == before


def test_a_folder_of_something_else_is_refused(source: str, tmp_path: Path, texts: list[str]) -> None:
    preprocess(source, BytesTokenizer(), tmp_path / "out")
    tokenizer = train_sentencepiece(texts, 300, tmp_path / "tokenizer")
    other = write_documents(tmp_path / "tokenizer" / "other.jsonl", texts)
    for arguments, what in (
        ((other, BytesTokenizer(), tmp_path / "out"), "another source"),
        ((source, tokenizer, tmp_path / "out"), "another tokenizer"),
        ((source, BytesTokenizer(), tmp_path / "tokenizer"), "not empty"),
        ((source, BytesTokenizer(), tmp_path / "a.jsonl"), "cannot be written"),
    ):
        with pytest.raises(UserError, match=what) as error:
            preprocess(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="another limit"):
        preprocess(source, BytesTokenizer(), tmp_path / "out", limit=3)


def test_limit(source: str, tmp_path: Path) -> None:
    assert preprocess(source, BytesTokenizer(), tmp_path / "out", limit=7).documents == 7


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_only_rejects_keeps_them_and_can_be_fixed(tmp_path: Path, workers: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"no\nnor this\n")
    with pytest.raises(UserError, match="it has no documents"):
        preprocess(str(tmp_path / "a.jsonl"), BytesTokenizer(), tmp_path / "out", workers)
    assert len((tmp_path / "out" / "rejects.jsonl").read_text().splitlines()) == 2
    source = write_documents(tmp_path / "a.jsonl", ["a"])
    manifest: Manifest = preprocess(source, BytesTokenizer(), tmp_path / "out")
    assert (manifest.documents, manifest.rejects) == (1, 0)
    assert Shards.open(tmp_path / "out").tokens == 2


def test_cores_are_counted_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= count_cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for found, expected in ((5, 5), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda found=found: found)
        assert count_cores() == expected


def test_a_full_disk_is_one_line(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"No space left on device\): free some"):
        patch.setattr(os, "fsync", full)
        preprocess(source, BytesTokenizer(), tmp_path / "out")
    assert preprocess(source, BytesTokenizer(), tmp_path / "out").complete


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    class Large(BytesTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.vocab_size = 100_000

    source = write_documents(tmp_path / "a.jsonl", ["abc"])
    assert preprocess(source, Large(), tmp_path / "out").dtype == "int32"
    assert (tmp_path / "out" / "part-00000.bin").stat().st_size == 16
    assert Shards.open(tmp_path / "out").read(0, 4).tolist() == [*b"abc", 256]
