"""Where documents end: read off the index, for shards of ours and of others; and what is no index."""

import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_mamba.data import shards as module
from moe_mamba.data.batch import UNCOUNTED
from moe_mamba.data.index import HEADER, Index
from moe_mamba.data.loader import Loader, evaluation_batches
from moe_mamba.data.quiet import indexed_dataset
from moe_mamba.data.shards import Shards
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.errors import UserError
from tests.data.conftest import END, write_foreign, write_shards

LENGTH = 16


def documents(seed: int, count: int, end: list[int]) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(256) for _ in range(generator.randrange(1, 40))] + end for _ in range(count)]


def last_tokens(found: list[list[int]]) -> list[bool]:
    return [place == len(document) - 1 for document in found for place in range(len(document))]


@pytest.mark.parametrize("sentence", [None, 3])
@pytest.mark.parametrize("end", [[], [END]])
def test_the_index_tells_where_documents_end(tmp_path: Path, sentence: int | None, end: list[int]) -> None:
    found = documents(0, 200, end)
    write_foreign(tmp_path / "foreign", found, sentence)
    shards, expected = Shards.open(tmp_path / "foreign"), last_tokens(found)
    assert shards.documents == 200
    for start, stop in ((0, shards.tokens), (0, 1), (5, 5), (shards.tokens - 1, shards.tokens), (17, 900)):
        assert shards.document_ends(start, stop).tolist() == expected[start:stop]
    generator = random.Random(1)
    for _ in range(300):
        start, stop = sorted(generator.choices(range(shards.tokens + 1), k=2))
        assert shards.document_ends(start, stop).tolist() == expected[start:stop]


def test_ends_across_parts(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_mamba.data.preprocess.BATCH_DOCUMENTS", 7)
    shards = write_shards(tmp_path, texts, part_bytes=1)
    expected = shards.read(0, shards.tokens) == END
    for start in range(0, shards.tokens, 101):
        assert (shards.document_ends(start, min(start + 700, shards.tokens)) == expected[start : start + 700]).all()


def test_empty_documents_end_nowhere(tmp_path: Path) -> None:
    """Megatron writes none, but others may: an end is the last token of a document that has one."""
    builder = indexed_dataset().IndexedDatasetBuilder(f"{tmp_path}/a.bin", dtype=np.int32)
    for document in ([], [1, 2], [], [], [3], []):
        builder.add_document(np.array(document, np.int32), [len(document)])
    builder.end_document()  # one without a sequence, behind the last
    builder.finalize(f"{tmp_path}/a.idx")
    assert Shards.open(tmp_path / "a").document_ends(0, 3).tolist() == [False, True, True]


def make_loader(shards: Shards, reset: bool = True) -> Loader:
    return Loader({"a": shards}, {"a": 1.0}, LENGTH, 0, reset, END)


@pytest.mark.parametrize("sentence", [None, 3])
def test_states_do_not_leak_where_no_end_of_text_stands(tmp_path: Path, sentence: int | None) -> None:
    found = documents(2, 60, [])
    write_foreign(tmp_path / "foreign", found, sentence)
    shards, is_last = Shards.open(tmp_path / "foreign"), np.array(last_tokens(found))
    loader = make_loader(shards)
    windows = (shards.tokens - 1) // LENGTH
    batch, (_, numbers) = loader.batch(0, windows), loader.places(0, windows)
    assert batch.document_starts is not None
    for row, window in enumerate(numbers.tolist()):
        stretch = slice(window * LENGTH, window * LENGTH + LENGTH)
        assert (batch.targets[row] == UNCOUNTED).tolist() == is_last[stretch].tolist()
        assert batch.document_starts[row].tolist() == [True, *is_last[stretch][:-1]]
    row = np.concatenate([each.targets.flatten() for each in evaluation_batches(shards, LENGTH, 4, END, True)])
    assert (row[: shards.tokens] == UNCOUNTED).tolist() == is_last.tolist()
    plain = make_loader(shards, reset=False).batch(0, windows)
    assert plain.document_starts is None and plain.counted == windows * LENGTH


def test_ours_are_read_as_by_their_end_of_text_tokens(tmp_path: Path, texts: list[str]) -> None:
    """What every version before this one did: bit for bit the same windows."""
    shards = write_shards(tmp_path, texts)
    windows = (shards.tokens - 1) // LENGTH
    batches = [make_loader(shards).batch(0, windows), *evaluation_batches(shards, LENGTH, 7, END, True)]
    for batch in batches:
        ends = batch.tokens == END
        starts = torch.ones_like(ends)
        starts[:, 1:] = ends[:, :-1]
        assert batch.document_starts is not None and torch.equal(batch.document_starts, starts)
        assert (batch.targets[ends] == UNCOUNTED).all() and (batch.targets[~ends] != UNCOUNTED).all()


def test_padding_with_end_of_text_is_no_target(tmp_path: Path) -> None:
    write_foreign(tmp_path / "padded", [[1, 2, END, END, END, END], [3, END, END, END, END, END]])
    (targets,) = [each.targets for each in evaluation_batches(Shards.open(tmp_path / "padded"), 12, 1, END, True)]
    no = UNCOUNTED
    assert targets.tolist() == [[2, END, no, no, no, no, END, no, no, no, no, no]]


@pytest.mark.parametrize(
    ("found", "notes"),
    [
        (documents(0, 400, [END]), []),
        (documents(0, 400, []), [r"400 documents, of which 0 end with the end-of-text token 256: the index tells"]),
        ([[1, END], [2], [3, END]], ["3 documents, of which 2 end with"]),
        ([[1, END, 2, END], [3, END, END]], ["2 end-of-text tokens stand inside its 2 documents: what follows one"]),
        ([[1, END, 2], [3, END]], ["of which 1 end with", "1 end-of-text tokens stand inside"]),
    ],
)
def test_where_index_and_end_of_text_tokens_disagree_it_is_said(
    tmp_path: Path, found: list[list[int]], notes: list[str]
) -> None:
    write_foreign(tmp_path / "foreign", found)
    for sentence in (None, 2):
        write_foreign(tmp_path / "foreign", found, sentence)
        said = Shards.open(tmp_path / "foreign", BytesTokenizer()).notes
        assert len(said) == len(notes)
        for line, expected in zip(said, notes, strict=True):
            assert expected in line and line.startswith(str(tmp_path / "foreign")) and len(line) < 300


def test_a_large_corpus_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 8)
    write_foreign(tmp_path / "foreign", documents(0, 400, []))
    (note,) = Shards.open(tmp_path / "foreign", BytesTokenizer()).notes
    assert "400 documents (" in note and "were looked at), of which 0 end with" in note


def test_ours_have_nothing_to_note(shards: Shards) -> None:
    assert Shards.open(shards.name, BytesTokenizer()).notes == []


HUGE = 2**63


def patched(content: bytes, offset: int, kind: str, value: int) -> bytes:
    return content[:offset] + struct.pack(kind, value) + content[offset + struct.calcsize(kind) :]


@pytest.mark.parametrize(
    ("offset", "kind", "value", "message"),
    [
        (0, "<B", 0, "not a Megatron index"),
        (9, "<Q", 2, "an index of version 2"),
        (17, "<B", 99, "code 99 is no type of token ids"),
        (17, "<B", 6, "code 6 is no type of token ids"),  # floats
        (17, "<B", 8, "pointers and lengths disagree"),  # two bytes each
        (18, "<Q", HUGE, "is truncated"),
        (18, "<Q", 0, "it has no documents"),
        (18, "<Q", 3, "is damaged: 122 bytes"),
        (26, "<Q", HUGE, "is truncated"),
        (26, "<Q", 0, "0 document boundaries"),
        (26, "<Q", 4, "is damaged"),
        (34, "<i", -5, "a sequence of -5 tokens"),
        (34, "<i", 6, "pointers and lengths disagree"),
        (46, "<i", 2**31 - 1, r"a\.bin: 48 bytes, but its index says"),
        (50, "<q", 4, "pointers and lengths disagree"),
        (58, "<q", HUGE - 1, "pointers and lengths disagree"),
        (82, "<q", 1, "documents do not follow one another"),
        (90, "<q", 5, "documents do not follow one another"),
        (90, "<q", -1, "documents do not follow one another"),
        (114, "<q", 3, "documents do not follow one another"),
    ],
)
def test_a_damaged_index_is_one_line(tmp_path: Path, offset: int, kind: str, value: int, message: str) -> None:
    write_foreign(tmp_path / "a", [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]])
    content = (tmp_path / "a.idx").read_bytes()
    assert len(content) == HEADER.size + 12 * 4 + 8 * 5
    (tmp_path / "a.idx").write_bytes(patched(content, offset, kind, value))
    with pytest.raises(UserError, match=message) as error:
        Shards.open(tmp_path / "a")
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_an_index_with_modes_is_read(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a", [[1, 2], [3]])
    with (tmp_path / "a.idx").open("ab") as file:
        file.write(bytes(2))
    assert Index(tmp_path / "a").documents == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    write_foreign(tmp_path / "a", [[1, 2], [3]])
    for name in ("a.idx", "a.bin"):
        (tmp_path / name).chmod(0)
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            Shards.open(tmp_path / "a")
        (tmp_path / name).chmod(0o600)
