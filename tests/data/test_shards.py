import json
import math
from pathlib import Path

import numpy as np
import pytest

from moe_mamba.data.corpus import Corpus
from moe_mamba.data.preprocess import preprocess
from moe_mamba.data.quiet import indexed_dataset
from moe_mamba.data.shards import BLOCK, Shards, is_shards
from moe_mamba.data.tokenizer import BytesTokenizer, load_tokenizer
from moe_mamba.errors import UserError
from tests.data.conftest import END, write_documents, write_foreign, write_shards


def row_of(texts: list[str]) -> np.ndarray:
    return np.array([i for text in texts for i in (*text.encode(), END)])


@pytest.fixture
def own(tmp_path: Path, texts: list[str]) -> Path:
    """A folder of shards that a test may damage."""
    write_shards(tmp_path, texts[:10])
    return tmp_path / "shards"


def one_line(error: pytest.ExceptionInfo[UserError]) -> bool:
    return "\n" not in str(error.value)


def test_reads_any_part_of_what_was_written(tmp_path: Path, texts: list[str]) -> None:
    shards = write_shards(tmp_path, texts, part_bytes=1)  # every batch is a part
    expected = row_of(texts)
    assert (shards.tokens, shards.documents) == (len(expected), len(texts))
    for start, stop in ((0, len(expected)), (5, 5), (17, 900), (len(expected) - 1, len(expected))):
        assert (shards.read(start, stop) == expected[start:stop]).all()
        assert shards.read(start, stop).dtype == np.int64


def test_reads_across_parts(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_mamba.data.preprocess.BATCH_DOCUMENTS", 7)
    shards = write_shards(tmp_path, texts, part_bytes=1)
    expected = row_of(texts)
    assert shards.manifest is not None and len(shards.manifest.parts) == 9
    assert (shards.read(0, len(expected)) == expected).all()
    for start in range(0, len(expected), 101):
        assert (shards.read(start, min(start + 700, len(expected))) == expected[start : start + 700]).all()


def test_blocks_cover_the_row(monkeypatch: pytest.MonkeyPatch, shards: Shards, texts: list[str]) -> None:
    assert BLOCK > 1000
    monkeypatch.setattr("moe_mamba.data.shards.BLOCK", 100)
    assert (np.concatenate(list(shards.blocks())) == row_of(texts)).all()
    assert 5 <= len(list(shards.blocks(sampled=5))) <= 6


def test_unigram_entropy_and_bytes_per_token(shards: Shards, texts: list[str]) -> None:
    share = np.bincount(row_of(texts)) / shards.tokens
    assert math.isclose(shards.unigram_entropy(), -(share[share > 0] * np.log(share[share > 0])).sum())
    size = sum(len(text.encode()) for text in texts)
    assert shards.bytes_per_token == size / (size + len(texts))


def test_another_tokenizers_shards_are_refused(own: Path) -> None:
    class Other(BytesTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.fingerprint = "0" * 64

    with pytest.raises(UserError, match="tokenizer hash") as error:
        Shards.open(own, Other())
    assert one_line(error)


def test_ids_past_the_vocabulary_are_refused(own: Path, tmp_path: Path) -> None:
    class Small(BytesTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.vocab_size = 100

    with pytest.raises(UserError, match="outside the vocabulary of 100") as error:
        Shards.open(own, Small())
    assert one_line(error)
    write_foreign(tmp_path / "foreign", [[1, 2], [300, 4]])
    with pytest.raises(UserError, match="token id 300 is outside the vocabulary of 257"):
        Shards.open(tmp_path / "foreign", BytesTokenizer())
    with pytest.raises(UserError, match="token id 300"):
        Shards.open(tmp_path / "foreign", BytesTokenizer(), verify="checksums")
    write_foreign(tmp_path / "negative", [[1, -2]])
    with pytest.raises(UserError, match="token id -2 is below 0"):
        Shards.open(tmp_path / "negative", BytesTokenizer())


@pytest.mark.parametrize("name", ["part-00000.bin", "part-00000.idx"])
def test_a_checksum_that_differs_is_refused(own: Path, name: str) -> None:
    content = bytearray((own / name).read_bytes())
    content[-1] ^= 1
    (own / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: its checksum differs") as error:
        Shards.open(own, verify="checksums")
    assert one_line(error)


@pytest.mark.parametrize("name", ["part-00000.bin", "part-00000.idx"])
@pytest.mark.parametrize("size", [0, 20, -2])
def test_a_truncated_file_is_refused_without_reading_it(own: Path, name: str, size: int) -> None:
    (own / name).write_bytes((own / name).read_bytes()[:size])
    with pytest.raises(UserError, match=name) as error:
        Shards.open(own)
    assert one_line(error)


def test_a_missing_file_is_refused(own: Path, tmp_path: Path) -> None:
    (own / "part-00000.bin").unlink()
    with pytest.raises(UserError, match=r"part-00000\.bin: a file of these shards is missing"):
        Shards.open(own)
    with pytest.raises(UserError, match="no shards found"):
        Shards.open(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format_version": 99}, "format version 99"), ({"complete": False}, "unfinished"), ({"parts": 3}, "damaged")],
)
def test_manifests_that_are_refused(own: Path, change: dict, message: str) -> None:
    values = json.loads((own / "manifest.json").read_text())
    (own / "manifest.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message) as error:
        Shards.open(own)
    assert one_line(error)
    (own / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        Shards.open(own)


def test_foreign_shards(tmp_path: Path) -> None:
    write_foreign(tmp_path / "foreign", [[1, 2, END], [3, END]])
    for path in (tmp_path / "foreign", tmp_path / "foreign.bin", tmp_path / "foreign.idx"):
        assert is_shards(path)
        shards = Shards.open(path, BytesTokenizer(), verify="checksums")
        assert shards.read(0, shards.tokens).tolist() == [1, 2, END, 3, END]
        assert (shards.documents, shards.text_bytes, shards.bytes_per_token) == (2, None, None)
    write_foreign(tmp_path / "another", [[1, END]])
    assert Shards.open(tmp_path / "another").identity != shards.identity


def test_shards_say_what_was_left_out(tmp_path: Path, shards: Shards) -> None:
    preprocess(write_documents(tmp_path / "a.jsonl", ["one", "", ""]), BytesTokenizer(), tmp_path / "out")
    damaged = Shards.open(tmp_path / "out")
    assert (damaged.rejects, damaged.rejects_file) == (2, tmp_path / "out" / "rejects.jsonl")
    write_foreign(tmp_path / "foreign", [[1, END]])
    for whole in (shards, Shards.open(tmp_path / "foreign")):
        assert (whole.rejects, whole.rejects_file) == (0, None)


def test_identity_is_of_the_content(tmp_path: Path, shards: Shards, other_shards: Shards, texts: list[str]) -> None:
    assert write_shards(tmp_path, texts).identity == shards.identity != other_shards.identity


def test_megatron_reads_them(own: Path, texts: list[str]) -> None:
    dataset = indexed_dataset().IndexedDataset(str(own / "part-00000"))
    assert [document.tolist() for document in dataset] == [[*text.encode(), END] for text in texts[:10]]
    assert dataset.document_indices.tolist() == list(range(11))


def test_gpt_dataset_reads_them(shards: Shards) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Megatron:
        unique_identifiers: dict[str, str] = {"class": "bytes"}  # noqa: RUF012
        vocab_size = END + 1
        eod = END
        pad = -1

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend=None,
        split="1,0,0",
        tokenizer=Megatron(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    low = GPTDataset.build_low_level_dataset(f"{shards.name}/part-00000", config)
    documents = np.arange(GPTDataset.numel_low_level_dataset(low))
    dataset = GPTDataset(low, f"{shards.name}/part-00000", documents, 10, Split.train, config)
    row = shards.read(0, shards.tokens)
    sample = dataset[0]
    assert sample["tokens"].shape == (64,)
    assert (sample["tokens"][1:] == sample["labels"][:-1]).all()
    assert set(sample["tokens"].tolist()) <= set(row.tolist())


def test_real_c4_through_gpt2(shared_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "gpt2")
    source = str(shared_data / "c4/en/c4-validation*.json.gz")
    preprocess(source, tokenizer, tmp_path / "c4")
    shards = Shards.open(tmp_path / "c4", tokenizer, verify="checksums")
    assert shards.documents == 170
    assert shards.tokens == 64_897 + 170  # end-of-text
    assert shards.manifest is not None and shards.manifest.dtype == "uint16"
    row = shards.read(0, shards.tokens)
    assert (row == tokenizer.end_of_text).sum() == 170
    assert tokenizer.decode(row[:50].tolist()).startswith(next(Corpus(source).documents()).text[:40])
