"""Damaged shards and documents, thousands of them: the same tokens, or one line; never a traceback or a hang."""

import gzip
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_mamba.data.corpus import Corpus
from moe_mamba.data.index import HEADER
from moe_mamba.data.preprocess import preprocess
from moe_mamba.data.shards import Shards
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.errors import UserError
from tests.data.conftest import END, write_documents, write_foreign, write_shards

ODD_NUMBERS = [-1, 0, 1, 2, 7, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
ODD_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 0.5, 1e308, 10**400, 2**63, "", "x", "../x", "/etc/passwd", "a\nb", "\0", "\ud800"),
    *([], {}, [[]], [None], {"a": 1}, "part-00001", "x" * 10_000, "uint8", "float32", "int64"),
]
Content = tuple[list[int], list[bool]]


def content_of(shards: Shards) -> Content:
    """All tokens, and where documents end."""
    assert shards.tokens < 10_000, "tokens that are nowhere"
    return shards.read(0, shards.tokens).tolist(), shards.document_ends(0, shards.tokens).tolist()


def is_same_or_one_line(open_them: Callable[[], Shards], expected: Content) -> bool:
    """Whether the mutant is read as if it were whole; False: it is refused, in one line."""
    try:
        shards = open_them()
        assert content_of(shards) == expected
        shards.window(0, 8, 0)
        list(shards.validation_windows(8, 4))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) <= 300, str(error)
        return False
    return True


def mutate_bytes(content: bytes, generator: random.Random) -> bytes:
    """Bytes flipped, numbers replaced, pieces cut out, doubled or swapped, or an end that is missing or too much."""
    changed = bytearray(content)
    place = generator.randrange(len(changed))
    kind = generator.randrange(6)
    if kind == 0:
        changed[place] ^= 1 << generator.randrange(8)
    elif kind == 1:
        size = generator.choice([1, 4, 8])
        value = generator.choice(ODD_NUMBERS) % 2 ** (8 * size)
        changed[place : place + size] = value.to_bytes(size, "little")
    elif kind == 2:
        del changed[place:]
    elif kind == 3:
        changed += generator.randbytes(generator.randrange(1, 40))
    elif kind == 4:
        other = generator.randrange(len(changed))
        changed[place : place + 8] = changed[other : other + 8]
    else:
        del changed[place : place + generator.randrange(1, 9)]
    return bytes(changed)


def mutate_tree(tree: Any, generator: random.Random) -> Any:
    """A tree of JSON with one of its values replaced, removed or added."""
    if isinstance(tree, dict) and tree and generator.random() < 0.9:
        key = generator.choice(sorted(tree))
        if generator.random() < 0.05:
            return {name: value for name, value in tree.items() if name != key}
        if generator.random() < 0.05:
            return tree | {generator.choice(["a", "name", "x\ny", "\0", "x" * 5000]): generator.choice(ODD_VALUES)}
        return tree | {key: mutate_tree(tree[key], generator)}
    if isinstance(tree, list) and tree and generator.random() < 0.8:
        place = generator.randrange(len(tree))
        return [*tree[:place], mutate_tree(tree[place], generator), *tree[place + generator.choice([0, 1, 1, 1]) :]]
    return generator.choice(ODD_VALUES)


@pytest.fixture
def own(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards of ours in several parts."""
    monkeypatch.setattr("moe_mamba.data.preprocess.BATCH_DOCUMENTS", 5)
    write_shards(tmp_path, texts[:15], part_bytes=1)
    return tmp_path / "shards"


def test_manifests(own: Path, tmp_path: Path) -> None:
    path, tokenizer = own / "manifest.json", BytesTokenizer()
    whole, expected = json.loads(path.read_text()), content_of(Shards.open(own))
    source = str(tmp_path / "documents.jsonl")
    generator, same, tried = random.Random(0), 0, 1500
    for number in range(tried):
        content = json.dumps(mutate_tree(whole, generator)).encode()
        path.write_bytes(mutate_bytes(content, generator) if number % 5 == 0 else content)
        same += is_same_or_one_line(lambda: Shards.open(own, tokenizer), expected)
        if number % 10 == 0:  # who preprocesses reads it, too, but must not take it for a folder to write over
            path.write_bytes(json.dumps(mutate_tree(whole | {"complete": True}, generator)).encode())
            try:
                preprocess(source, tokenizer, own)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) <= 300, str(error)
            for name, part in json.loads(json.dumps(whole))["parts"][0]["checksums"].items():
                assert (own / name).is_file(), part
    print(f"{tried} manifests were tried: {same} said the same, {tried - same} were refused in one line")
    assert same < tried / 3, f"of {tried} manifests {same} were not refused"


def test_manifests_of_unfinished_folders(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on in the folder: to the same shards, or with one line; no file outside it is touched."""
    monkeypatch.setattr("moe_mamba.data.preprocess.BATCH_DOCUMENTS", 5)
    shards = write_shards(tmp_path, [*texts[:15], ""], part_bytes=1)
    expected, source = content_of(shards), str(tmp_path / "documents.jsonl")
    whole = json.loads((tmp_path / "shards" / "manifest.json").read_text()) | {"complete": False}
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "part-00000.bin").write_bytes(b"mine")
    generator, tried, same = random.Random(1), 200, 0
    for number in range(tried):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "shards", folder)
        (folder / "manifest.json").write_text(json.dumps(mutate_tree(whole, generator)))
        try:
            preprocess(source, BytesTokenizer(), folder, part_bytes=1)
            same += content_of(Shards.open(folder)) == expected
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) <= 300, (number, str(error))
    assert (tmp_path / "outside" / "part-00000.bin").read_bytes() == b"mine"
    print(f"{tried} unfinished manifests were tried: {same} went on to the same shards")
    assert 0 < same < tried, f"of {tried} unfinished folders {same} went on"


@pytest.mark.parametrize("verify", [False, "checksums"])
def test_files_of_ours(own: Path, verify: Any) -> None:
    """Of a .bin only checksums know; every damaged index is refused without them."""
    expected = content_of(Shards.open(own))
    generator, same, tried = random.Random(2), 0, 600
    files = [*own.glob("part-*.idx"), *(own.glob("part-*.bin") if verify else ())]
    for _ in range(tried):
        file = generator.choice(files)
        whole = file.read_bytes()
        mutant = mutate_bytes(whole, generator)
        file.write_bytes(mutant)
        is_same = is_same_or_one_line(lambda: Shards.open(own, BytesTokenizer(), verify), expected)
        assert is_same == (mutant == whole), (file, verify)
        same += is_same
        file.write_bytes(whole)
    print(f"{tried} files of shards were tried, {same} of them whole")


def reversed_numbers(content: bytes, generator: random.Random) -> bytes:
    """Whole numbers of an index replaced in their places."""
    _, _, _, sequences, boundaries = HEADER.unpack(content[: HEADER.size])
    places = [
        *((HEADER.size + 4 * number, 4) for number in range(sequences)),
        *((HEADER.size + 4 * sequences + 8 * number, 8) for number in range(sequences + boundaries)),
        *((18, 8), (26, 8), (9, 8)),
    ]
    changed = bytearray(content)
    for place, size in generator.sample(places, generator.randrange(1, 3)):
        old = int.from_bytes(changed[place : place + size], "little")
        value = generator.choice([*ODD_NUMBERS, old + 1, old - 1, old ^ 2, -old])
        changed[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(changed)


@pytest.mark.parametrize("sentence", [None, 4])
def test_indices_of_others(tmp_path: Path, sentence: int | None) -> None:
    """No checksum knows them: only what contradicts itself or its .bin can be refused, and all of it is."""
    generator = random.Random(3)
    documents = [[generator.randrange(256) for _ in range(generator.randrange(1, 12))] for _ in range(12)]
    write_foreign(tmp_path / "a", documents, sentence)
    index, expected = tmp_path / "a.idx", content_of(Shards.open(tmp_path / "a"))
    whole, same, other, tried = index.read_bytes(), 0, 0, 0
    every_byte = [
        whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :] for at in range(len(whole)) for flip in (1, 128)
    ]
    random_ones = [(mutate_bytes, reversed_numbers)[n % 2](whole, generator) for n in range(800)]
    for mutant in [*every_byte, *random_ones]:
        tried += 1
        index.write_bytes(mutant)
        try:
            same += is_same_or_one_line(lambda: Shards.open(tmp_path / "a", BytesTokenizer()), expected)
        except AssertionError:  # another split into documents, which contradicts nothing
            other += 1
            tokens, _ = content_of(Shards.open(tmp_path / "a"))
            assert tokens == expected[0], "the tokens are those of the .bin"
            offset = len(whole) - 8 * struct.unpack("<Q", whole[26:34])[0]
            assert mutant[:offset] == whole[:offset], "lengths and pointers know one another"
    print(f"{tried} indices were tried: {same} said the same, {other} name other boundaries of documents")
    assert same + other < tried / 4, f"of {tried} indices {same + other} were not refused"


def test_ids_of_others(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a", [[1, 2, 3, END], [4, 5, END], [*range(50), END]])
    file, generator, tried, opened = tmp_path / "a.bin", random.Random(4), 600, 0
    whole = file.read_bytes()
    for _ in range(tried):
        file.write_bytes(mutant := mutate_bytes(whole, generator))
        try:
            shards = Shards.open(tmp_path / "a", BytesTokenizer())
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) <= 300, str(error)
            continue
        opened += 1
        ids = np.frombuffer(mutant, np.int32)
        assert shards.read(0, shards.tokens).tolist() == ids.tolist()
        assert ids.min() >= 0 and ids.max() < 257
    print(f"{tried} files of ids were tried, {opened} hold ids of the vocabulary")
    assert opened < tried, f"none of {tried} was refused"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.txt", "a.parquet"])
def test_documents(tmp_path: Path, name: str) -> None:
    """Whatever is damaged is a reject, or nothing is left and that is one line."""
    texts = [f"text {number} äöü 日本 " * 3 for number in range(40)]
    path = tmp_path / name
    write_documents(tmp_path / "whole.jsonl", texts)
    content = (tmp_path / "whole.jsonl").read_bytes()
    if name == "a.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": texts, "url": texts}), path, row_group_size=10)
        content = path.read_bytes()
    elif name == "a.json.gz":
        content = gzip.compress(content, mtime=0)
    generator, tried, damaged = random.Random(5), 400, 0
    for _ in range(tried):
        mutant = content
        for _ in range(generator.randrange(1, 4)):
            mutant = mutate_bytes(mutant, generator) or b"\0"
        path.write_bytes(mutant)
        rejects: list[Any] = []
        try:
            list(Corpus(str(path)).documents(on_reject=rejects.append))
            damaged += bool(rejects)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) <= 300, str(error)
            damaged += 1
        for reject in rejects:
            assert "\n" not in reject.reason and len(reject.reason) <= 300
    print(f"{tried} damaged {name} were tried: {damaged} had rejects or nothing left")
    assert damaged > 0, f"none of {tried} was seen as damaged"
