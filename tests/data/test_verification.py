"""The content of shards, read once and remembered."""

import os
from pathlib import Path

import pytest

from moe_mamba.data import shards as shards_module
from moe_mamba.data.manifest import checksum
from moe_mamba.data.shards import Shards
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.data.verification import Remembered, compare
from moe_mamba.errors import UserError
from tests.data.conftest import write_foreign, write_shards


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read whole from now on."""
    names: list[str] = []
    monkeypatch.setattr(shards_module, "checksum", lambda path: names.append(path.name) or checksum(path))
    return names


def _verify(shards: Shards, memory: Path) -> int:
    """How many files had to be read."""
    remembered = Remembered(memory)
    pending = remembered.pending(shards.content_checks(BytesTokenizer()))
    remembered.add([compare(check) for check in pending])
    return len(pending)


def test_what_was_read_is_not_read_again_until_it_changes(tmp_path: Path, texts: list[str], read: list[str]) -> None:
    shards, memory = write_shards(tmp_path, texts), tmp_path / "checksums.json"
    assert _verify(shards, memory) == 2
    assert read == ["part-00000.bin", "part-00000.idx"]
    assert _verify(shards, memory) == 0
    path = tmp_path / "shards" / "part-00000.bin"
    os.utime(path, ns=(1, 1))
    assert _verify(shards, memory) == 1
    assert read[2:] == ["part-00000.bin"]
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(UserError, match="its checksum differs"):
        _verify(shards, memory)


@pytest.mark.parametrize("content", ["{", '{"format_version": 1, "files": {"a": 3}}', '{"format_version": 9}', "[]"])
def test_a_damaged_memory_is_as_good_as_none(tmp_path: Path, texts: list[str], content: str) -> None:
    shards, memory = write_shards(tmp_path, texts), tmp_path / "checksums.json"
    memory.write_text(content)
    assert _verify(shards, memory) == 2
    assert _verify(shards, memory) == 0


def test_another_manifest_or_tokenizer_asks_again(tmp_path: Path) -> None:
    write_foreign(tmp_path / "foreign", [[1, 2], [3, 4]])
    foreign = Shards.open(tmp_path / "foreign", BytesTokenizer())
    (check,) = foreign.content_checks(BytesTokenizer())
    remembered = Remembered(tmp_path / "checksums.json")
    remembered.add([compare(check)])
    assert remembered.has(check)
    path, stamp = str(check.path.absolute()), remembered.known[str(check.path.absolute())][1]
    remembered.add([(path, "ids of another", stamp)])
    assert not remembered.has(check)
