"""The benchmark's row ``preprocess``: documents into shards, against only the tokenizer."""

import gzip
import json
import os
import tempfile
from pathlib import Path

from benchmarks.pairs import Row, compare

VOCABULARY = 2048  # of the SentencePiece model that is trained where no tokenizer is named
COPIES = 20  # of the built-in corpus


def preprocess_row(documents: str, tokenizer_name: str, tiny: bool, repeats: int) -> Row:
    """Documents per second into shards, from the file to the checksums, against only encoding on as many cores."""
    from moe_mamba.data.corpus import Corpus
    from moe_mamba.data.preprocess import preprocess
    from moe_mamba.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        copies = COPIES if documents == "builtin" and not tiny else 1
        source = write_builtin(Path(folder), copies) if documents == "builtin" else documents
        texts = [document.text for document in Corpus(source).documents()]
        if tokenizer_name == "sentencepiece":
            tokenizer: Tokenizer = train_sentencepiece(texts[: len(texts) // copies], VOCABULARY, folder)
        else:
            tokenizer = load_tokenizer(tokenizer_name)
        outputs = iter(range(repeats + 1))

        def ours() -> None:
            preprocess(source, tokenizer, Path(folder) / f"shards-{next(outputs)}", workers, progress=False)

        figures = compare(ours, lambda: tokenizer.encode_batch(texts), repeats)
    name = f"preprocessing, {len(texts):,} documents, {workers} processes"
    return Row(name, "the tokenizer's own batch encoding", "ms", *figures, goal=0.8)


def write_builtin(folder: Path, copies: int) -> str:
    """The built-in corpus several times over, as C4 lies in its files."""
    from moe_mamba.data.corpus import Corpus

    path = folder / "documents.json.gz"
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for _ in range(copies):
            for document in Corpus("builtin").documents():
                file.write(json.dumps({"text": document.text}) + "\n")
    return str(path)
