"""JSON from outside: what is read, and the one line for what is not."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, TypeAdapter

from moe_mamba.errors import UserError, brief
from moe_mamba.json_file import DEPTH, Record, Size, Text, check, read_json

FIX = "write it again"


class Kind(Record):
    name: Text
    sizes: Annotated[list[Size], Field(max_length=2)] = Field([])


KIND = TypeAdapter(Kind)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_what_json_is_is_read(tmp_path: Path, mark: bytes) -> None:
    content = {"größe": [1, -2.5, True, None, {"a": "b"}], "n": 2**70}
    (tmp_path / "file").write_bytes(mark + json.dumps(content, ensure_ascii=False).encode())
    assert read_json(tmp_path / "file", FIX) == content


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\xff\xfe{\0}\0", "codec can't decode"),
        (b"[NaN]", "it has NaN, which is no number of JSON"),
        (b"[-Infinity]", "it has -Infinity"),
        (b"[1e999]", "it has 1e999"),
        (b"9" * 5000, "limit"),
        (b"[" * 100_000, "it is too deep"),
        (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), "it is too deep"),
        (b'{"a": 1, "b": {"c\\n": 1, "c\\n": 2}}', r"the key c\n is there twice"),
    ],
)
def test_what_it_is_not_is_one_line(tmp_path: Path, data: bytes, says: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "file", FIX)
    line = str(error.value)
    assert says in line and line.startswith(str(tmp_path / "file")) and line.endswith(FIX)
    assert line.isprintable() and len(line) < 300


def test_the_deepest_and_nan_where_it_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"[" * DEPTH + b"Infinity" + b"]" * DEPTH)
    read_json(tmp_path / "file", FIX, allow_nan=True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "is missing"),
        (os.mkfifo, "is not a regular file"),
        (os.mkdir, "is not a regular file"),
        (lambda path: os.symlink("/dev/zero", path), "is not a regular file"),
        (lambda path: os.symlink(path, path), "cannot be read as JSON"),
        (lambda path: path.write_bytes(b"[" + b" " * 100 + b"]"), "has 102 bytes, more than the 100 that are read"),
    ],
)
def test_what_is_no_file_of_this_size(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path / "file")
    with pytest.raises(UserError, match=says):
        read_json(tmp_path / "file", FIX, limit=100)


def test_names_that_no_file_has(tmp_path: Path) -> None:
    for name in ("a\0b", "x" * 300, "\ud800"):
        with pytest.raises(UserError, match="cannot be read as JSON"):
            read_json(tmp_path / name, FIX)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], r"file: it is \[\]: "),
        ({}, "file: name: field required: "),
        ({"name": 1}, "file: name is 1: "),
        ({"name": "a", "sizes": [True]}, "sizes.0 is True: "),
        ({"name": "a", "sizes": ["1"]}, "sizes.0 is 1: "),
        ({"name": "a", "sizes": [1.0]}, r"sizes.0 is 1\.0: "),
        ({"name": "a", "sizes": [-1]}, "sizes.0 is -1: "),
        ({"name": "a", "sizes": [10**4000]}, r"sizes.0 is 10+\.\.\.0+: "),
        ({"name": "a", "sizes": [1, 2, 3]}, r"sizes is \[1, 2, 3\]: "),
        ({"name": ["x\n" * 10**6]}, r"name is \['x\\nx"),
    ],
)
def test_types_are_exact(value: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        check(value, KIND, "file", FIX)
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_what_fits_comes_back() -> None:
    assert check({"name": "a", "sizes": [0, 2**60], "more": 1}, KIND, "file", FIX) == Kind(name="a", sizes=[0, 2**60])


@pytest.mark.parametrize(
    "value", ["x" * 1000, "\ud800\n\0\x1b[31m\u202e" * 100, list(range(10**5)), 10**4000, ValueError("a\nb")]
)
def test_what_is_shown_is_short_and_of_one_line(value: object) -> None:
    for most in (20, 60):
        text = brief(value, most)
        assert 0 < len(text) <= most and text.isprintable()
    assert brief("größe 中") == "größe 中"
