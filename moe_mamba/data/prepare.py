"""What a run needs of its data before it starts: a tokenizer, and every source as shards."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from moe_mamba.data.corpus import Corpus
from moe_mamba.data.preprocess import preprocess
from moe_mamba.data.shards import Shards, is_shards, tokenizer_folder
from moe_mamba.data.tokenizer import (
    TRAINING_CHARACTERS,
    Tokenizer,
    holds_tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from moe_mamba.errors import UserError


def prepare_tokenizer(
    spec: str, sources: Sequence[str], vocab_size: int, folder: str | Path, max_documents: int | None = None
) -> Tokenizer:
    """Load the tokenizer of a run, or train it, and keep it in ``folder``; the second call finds it there.

    Args:
        spec: ``sentencepiece`` to train on ``sources``, or what ``load_tokenizer`` takes.
        sources: the run's training sources.
        vocab_size: pieces to train; another tokenizer must not have more tokens.
        folder: where it is kept.
        max_documents: documents to take of each source; None: all.

    Raises:
        UserError: no such tokenizer, none can be trained on these sources, ``folder`` holds another one, or it knows
            more tokens than ``vocab_size``.
    """
    kept = load_tokenizer(folder) if holds_tokenizer(folder) else None
    if spec != "sentencepiece":
        tokenizer = load_tokenizer(spec)
        if kept and kept.fingerprint != tokenizer.fingerprint:
            raise UserError(f"data.tokenizer={spec} is not the tokenizer in {folder}: give a new run.folder")
        tokenizer.save(folder)
    elif kept is None:
        tokenizer = train_sentencepiece(_training_texts(sources, max_documents), vocab_size, folder)
    else:
        tokenizer = kept
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer={spec} has {tokenizer.vocab_size} tokens, more than model.vocab_size={vocab_size}: "
            f"set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def prepare_corpus(
    source: str, tokenizer: Tokenizer, cache_folder: str | Path, max_documents: int | None = None
) -> Shards:
    """Open a source as shards; documents are tokenized into ``cache_folder`` first, unless they were before.

    Args:
        source: in the syntax of ``data.train``.
        tokenizer: the run's; shards of another one are refused.
        cache_folder: holds a folder for each source, tokenizer and limit.
        max_documents: documents to take of a source of documents; None: all.

    Raises:
        UserError: no such source, no documents in it, or shards that do not fit or are damaged.
    """
    if is_shards(source):
        return Shards.open(source, tokenizer)
    folder = Path(cache_folder) / _cache_key(source, tokenizer, max_documents)
    preprocess(source, tokenizer, folder, limit=max_documents)
    return Shards.open(folder, tokenizer, verify="checksums")


def _cache_key(source: str, tokenizer: Tokenizer, max_documents: int | None) -> str:
    """Another name for other content: a local file counts with the time at which it was changed."""
    corpus = Corpus(source)
    changed = [Path(file.name).stat().st_mtime_ns for file in corpus.files if file.size]
    key = json.dumps([corpus.describe(), changed, tokenizer.fingerprint, max_documents])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _training_texts(sources: Sequence[str], max_documents: int | None) -> Iterator[str]:
    """Text of the sources to train a tokenizer on, as much of each."""
    for source in sources:
        if is_shards(source):
            folder = tokenizer_folder(source) or "the folder of its tokenizer"
            raise UserError(
                f"data.tokenizer=sentencepiece is trained on documents, and {source} is shards: "
                f"set data.tokenizer={folder}"
            )
    share = TRAINING_CHARACTERS // len(sources)
    return chain.from_iterable(_beginning(source, max_documents, share) for source in sources)


def _beginning(source: str, max_documents: int | None, characters: int) -> Iterator[str]:
    """Documents of a source, up to so many characters; rejects are reported when the source is tokenized."""
    for document in Corpus(source).documents(max_documents, lambda reject: None):
        yield document.text[:characters]
        characters -= len(document.text)
        if characters <= 0:
            return
