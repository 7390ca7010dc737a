from pathlib import Path

import numpy as np
import pytest

from moe_mamba.data.preprocess import preprocess
from moe_mamba.data.quiet import indexed_dataset
from moe_mamba.data.shards import Shards
from moe_mamba.data.tokenizer import BytesTokenizer

END = 256  # of the bytes tokenizer


def write_documents(path: Path, texts: list[str]) -> str:
    """A file of JSON lines, one text per line."""
    import json

    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def write_shards(folder: Path, texts: list[str], part_bytes: int = 1 << 20) -> Shards:
    """Shards of the texts' bytes, in ``folder``/shards."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_documents(folder / "documents.jsonl", texts)
    preprocess(source, BytesTokenizer(), folder / "shards", part_bytes=part_bytes)
    return Shards.open(folder / "shards", BytesTokenizer())


def write_foreign(prefix: Path, documents: list[list[int]], sentence: int | None = None) -> None:
    """Shards as Megatron's own tool leaves them: two files and no manifest; sequences of ``sentence`` tokens."""
    builder = indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        starts = range(0, len(document), sentence or len(document))
        lengths = [min(sentence or len(document), len(document) - start) for start in starts]
        builder.add_document(np.array(document), lengths)
    builder.finalize(f"{prefix}.idx")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of many lengths, some longer than a window."""
    return [f"document {number}: " + "abc " * (number * 7 % 40) for number in range(60)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Shards:
    return write_shards(tmp_path_factory.mktemp("shards"), texts)


@pytest.fixture(scope="session")
def other_shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return write_shards(tmp_path_factory.mktemp("other"), [f"other {number} " * 20 for number in range(30)])
