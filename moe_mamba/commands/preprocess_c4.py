"""Shard C4, or any other documents, into Megatron's .bin/.idx: see ``main``."""

import sys
from pathlib import Path
from typing import Annotated

from moe_mamba.config_types import OptionalPositive, Range
from moe_mamba.data.corpus import TEXT_KEY
from moe_mamba.data.manifest import REJECTS
from moe_mamba.data.preprocess import count_cores, preprocess
from moe_mamba.data.tokenizer import load_tokenizer


def main(
    input: str,
    output: str,
    tokenizer: str = "gpt2",
    workers: Annotated[int | None, Range(1, 4096)] = None,
    limit: OptionalPositive = None,
    text_key: str = TEXT_KEY,
) -> None:
    """Tokenize documents into a folder of shards that data.train and Megatron-LM read.

    Stopped at any instant, the same command goes on where it was; finished, it says so. A damaged line, or a text
    that the tokenizer fails on or never ends with, is kept in the folder's rejects.jsonl with its place and its bytes.

    Args:
        input: 'c4/en/*.json.gz', any file or glob of .txt, .jsonl, .json.gz or .parquet, builtin, or
            hf:allenai/c4:en:train.
        output: the folder to write, such as data/c4.
        tokenizer: gpt2, bytes, a SentencePiece .model file, or a tokenizer's folder.
        workers: processes that tokenize; by default one per core.
        limit: documents to take; by default all.
        text_key: field that holds a document's text, in all but .txt files.
    """
    manifest = preprocess(input, load_tokenizer(tokenizer), output, workers or count_cores(), limit, text_key)
    print(
        f"{output}: finished: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
        f"{manifest.text_bytes:,} bytes of text, {len(manifest.parts)} part(s)"
    )
    if manifest.rejects:
        print(f"{manifest.rejects:,} damaged lines or files are kept in {Path(output) / REJECTS}", file=sys.stderr)
