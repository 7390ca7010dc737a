import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_mamba.data import records
from moe_mamba.data.corpus import Corpus, Place
from moe_mamba.data.records import Reject
from moe_mamba.errors import UserError


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def read(source: Path | str, **arguments: object) -> tuple[list[str], list[Reject]]:
    rejects: list[Reject] = []
    return [document.text for document in Corpus(str(source)).documents(on_reject=rejects.append, **arguments)], rejects


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({column: pyarrow.array(texts)}), path, row_group_size=2)


TEXTS = ["one\r\n\n two", "drei äöü 日本", "\ufeff four ▁ "]


@pytest.fixture(params=["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    if path.suffix == ".parquet":
        write_parquet(path, TEXTS)
    else:
        path.write_bytes(gzip.compress(lines(*TEXTS)) if path.suffix == ".gz" else lines(*TEXTS))
    return path


def test_each_format_gives_its_texts(source: Path) -> None:
    assert read(source) == (TEXTS, [])


def test_reading_goes_on_at_a_place(source: Path) -> None:
    found = list(Corpus(str(source)).documents())
    assert [document.size for document in found] == [len(text.encode()) for text in TEXTS]
    for number, document in enumerate(found, 1):
        assert read(source, start=document.place)[0] == TEXTS[number:]


def test_limit(source: Path) -> None:
    assert read(source, limit=2)[0] == TEXTS[:2]


def test_a_text_file_is_one_document_and_a_glob_is_sorted(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_bytes(f"{name}\r\n".encode())
    assert read(tmp_path / "*.txt") == (["a.txt\r\n", "b.txt\r\n"], [])
    assert read(tmp_path / "*.txt", start=Place(1, 0))[0] == ["b.txt\r\n"]


def test_the_whole_source_counts_as_read_at_its_end(source: Path) -> None:
    corpus = Corpus(str(source))
    assert corpus.bytes_read == 0 < corpus.total_bytes
    list(corpus.documents())
    assert corpus.bytes_read == corpus.total_bytes


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{not json}", "not JSON"),
        (b'{"url": "x"}', "no field text"),
        (b'{"text": 3}', "no field text that holds a string (text holds a number); there: text"),
        (b"[1]", "no field text"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not UTF-8"),
        (b'{"text": ""}', "empty"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_damaged_line_is_rejected_with_its_place_and_bytes(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines("one") + line + b"\n" + lines("two"))
    texts, (reject,) = read(path)
    assert texts == ["one", "two"]
    assert (reject.file, reject.line) == (str(path), 2)
    assert reason in reject.reason
    if reject.line and b"\\u" not in line and b'""' not in line:
        assert reject.raw == line


def test_a_text_file_that_is_not_utf8_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"fine")
    texts, (reject,) = read(tmp_path / "*.txt")
    assert texts == ["fine"]
    assert (reject.file, reject.raw) == (str(tmp_path / "a.txt"), b"caf\xe9")


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "not gzip", "trailing"])
def test_damaged_gzip_keeps_the_lines_before_and_reports_the_rest(tmp_path: Path, damage: str) -> None:
    texts = [f"{number} " + str(hash((number, "x"))) * 20 for number in range(2000)]
    packed = bytearray(gzip.compress(lines(*texts)))
    if damage == "truncated":
        packed = packed[: len(packed) // 2]
    elif damage == "corrupted":
        packed[len(packed) // 2 : len(packed) // 2 + 64] = bytes(64)
    elif damage == "not gzip":
        packed = bytearray(b"plain text")
    else:
        packed += b"rubbish"
    (tmp_path / "a.json.gz").write_bytes(packed)
    (tmp_path / "b.jsonl").write_bytes(lines("after"))
    found, rejects = read(tmp_path / "*.json*")
    assert found[-1] == "after"
    assert rejects[-1].reason.startswith("damaged gzip")
    if damage in ("truncated", "trailing"):
        assert found[:-1] == texts[: len(found) - 1]
        assert rejects[-1].line == len(found)
        assert len(found) > (500 if damage == "truncated" else 2000)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view"])
def test_every_kind_of_text_in_parquet_is_read(tmp_path: Path, kind: str) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = pyarrow.array(["one", "two"]).cast(getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (["one", "two"], [])


def test_two_columns_of_one_name_are_a_reject(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = [pyarrow.array(["one"]), pyarrow.array(["other"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="2 columns are named text: rename all but one"):
        read(tmp_path / "a.parquet")


def test_damaged_parquet_and_rows_without_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["one", None, "three"])
    write_parquet(tmp_path / "b.parquet", ["x"], column="other")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    texts, rejects = read(tmp_path / "*.parquet")
    assert texts == ["one", "three"]
    assert [(Path(reject.file).name, reject.line) for reject in rejects] == [
        ("a.parquet", 2),
        ("b.parquet", 0),
        ("c.parquet", 0),
    ]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b""), ("a.jsonl", b"no\n"), ("a.txt", b""), ("a.json.gz", gzip.compress(b""))]
)
def test_an_empty_corpus_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="it has no documents") as error:
        list(Corpus(str(tmp_path / name)).documents())
    assert "\n" not in str(error.value)
    if content == b"no\n":
        assert "line 1: not JSON" in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.jsonl", "no such file"),
        ("*.nothing", "no such file"),
        (".", "is a folder"),
        ("a.csv", "unknown file type"),
        ("a.txt.gz", "unknown file type"),
        ("builtin:test", "train and validation"),
        ("hf:c4", "hf:NAME:SPLIT"),
        ("hf:c4::train", "hf:NAME:SPLIT"),
    ],
)
def test_sources_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.csv", "a.txt.gz"):
        Path(name).touch()
    with pytest.raises(UserError, match=message):
        list(Corpus(source).documents())


class Rows:
    """What load_dataset gives: rows, streamed."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = rows

    def skip(self, count: int) -> "Rows":
        return Rows(self.rows[count:])

    def __iter__(self) -> Iterator[dict]:
        return iter(self.rows)


def test_hub_datasets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*arguments: object, **options: object) -> Rows:
        calls.append((arguments, options))
        return Rows([{"text": "one"}, {"url": "x"}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts, (reject,) = read("hf:allenai/c4:en:train")
    assert texts == ["one", "two"]
    assert reject.line == 2
    assert reject.raw == b'{"url": "x"}'
    assert calls == [(("allenai/c4", "en"), {"split": "train", "streaming": True})]
    assert read("hf:c4:train", start=Place(0, 1))[0] == ["two"]
    assert calls[-1][0] == ("c4", None)


def test_an_unreachable_hub_dataset_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: object, **__: object) -> Rows:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match="check the name and the network") as error:
        list(Corpus("hf:nobody/nothing:train").documents())
    assert "\n" not in str(error.value)


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf in a text" if name == "a.txt" else lines(*TEXTS) + BOM + lines("joined by cat")
    content = BOM + content
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    expected = ["\ufeff in a text"] if name == "a.txt" else [*TEXTS, "joined by cat"]
    assert read(tmp_path / name) == (expected, [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_another_field_holds_the_text(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, TEXTS, column="content")
    else:
        path.write_bytes(lines(*TEXTS).replace(b'"text"', b'"content"'))
    corpus = Corpus(str(path), "content")
    assert [document.text for document in corpus.documents()] == TEXTS
    assert corpus.describe() == Corpus(str(path)).describe() | {"text_key": "content"}
    with pytest.raises(UserError, match=r"there: content\): name the field of the text with --text_key, "):
        list(Corpus(str(path)).documents())


def test_where_no_source_has_fields_their_name_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    for source in ("builtin", str(tmp_path / "a.txt")):
        assert Corpus(source, "content").describe() == Corpus(source).describe()
    assert next(Corpus(source, "content").documents()).text == "one"


def test_a_thousand_records_without_the_field_are_refused_at_once(tmp_path: Path) -> None:
    line = b'{"url": "x", "it\\nhas": 3, "content": "some text"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 5000)
    rejects: list[Reject] = []
    with pytest.raises(UserError, match=r"first 1,000 records \(a.jsonl, line 1: no field text .*url, it") as error:
        list(Corpus(str(tmp_path / "a.jsonl")).documents(on_reject=rejects.append))
    assert len(rejects) == 1000
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    (tmp_path / "a.jsonl").write_bytes(line * 999 + lines("", "one") + line * 2000)
    texts, found = read(tmp_path / "a.jsonl")
    assert (texts, len(found)) == (["one"], 3000)


def test_a_thousand_rows_of_a_hub_dataset_without_the_field_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows([{"content": "x"}] * 1100))
    with pytest.raises(UserError, match=r"first 1,000 records .*there: content\): name the field of the text"):
        list(Corpus("hf:a:b").documents())
    assert next(Corpus("hf:a:b", "content").documents()).text == "x"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz"])
def test_a_line_past_the_limit_is_a_reject_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(records, "LONGEST_RECORD", 3 << 20)
    longest = lines("x" * ((3 << 20) - len(lines("")) + 1))
    assert len(longest) == (3 << 20) + 1  # with its line end, which does not count
    content = lines("one") + longest + lines("y" * (4 << 20)) + lines("two") + b"z" * (5 << 20)
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    texts, rejects = read(tmp_path / name)
    assert [len(text) for text in texts] == [3, (3 << 20) - len(lines("")) + 1, 3]
    assert [reject.line for reject in rejects] == [3, 5]
    assert rejects[1].reason == "too long (5,242,880 bytes, at most 3,145,728 are read): split it into documents"
    assert [reject.raw for reject in rejects] == [lines("y" * (4 << 20))[: records.KEPT], b"z" * records.KEPT]


def test_a_text_or_cell_past_the_limit_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_RECORD", 10)
    monkeypatch.setattr(records, "LONGEST_TEXT", 20)
    write_parquet(tmp_path / "a.parquet", ["x" * 10, "y" * 11, "z"])
    (tmp_path / "b.txt").write_bytes(b"x" * 20)
    (tmp_path / "c.txt").write_bytes(b"x" * 21)
    texts, rejects = read(tmp_path / "*.*")
    assert texts == ["x" * 10, "z", "x" * 20]
    assert [(Path(reject.file).name, reject.line) for reject in rejects] == [("a.parquet", 2), ("c.txt", 0)]


def test_a_bomb_is_read_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In time, too: a reader that copies the line for each chunk would take half an hour."""
    monkeypatch.setattr(records, "LONGEST_RECORD", 8 << 20)
    with gzip.open(tmp_path / "a.json.gz", "wb") as file:
        for _ in range(8):
            file.write(bytes(16 << 20))
        file.write(b"\n" + lines("after"))
    tracemalloc.start()
    texts, (reject,) = read(tmp_path / "a.json.gz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["after"]
    assert (reject.line, len(reject.raw)) == (1, records.KEPT)
    assert peak < 3 * records.LONGEST_RECORD
