"""What a run needs of its data before it starts: a tokenizer, and every source as shards or as a synthetic task."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from moe_mamba.data.corpus import TEXT_KEY, Corpus
from moe_mamba.data.manifest import load_manifest
from moe_mamba.data.preprocess import count_cores, preprocess
from moe_mamba.data.shards import Shards, is_shards, tokenizer_folder
from moe_mamba.data.source import Source
from moe_mamba.data.synthetic import SyntheticTask, is_synthetic
from moe_mamba.data.tokenizer import (
    TRAINING_CHARACTERS,
    SymbolsTokenizer,
    Tokenizer,
    holds_tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from moe_mamba.errors import UserError

# A source past both is tokenized on all cores: below them, workers take longer to start than they save.
LARGE_BYTES = 64 << 20
LARGE_DOCUMENTS = 30_000


def prepare_tokenizer(
    spec: str,
    sources: Sequence[str],
    vocab_size: int,
    folder: str | Path,
    max_documents: int | None = None,
    *,
    text_key: str = TEXT_KEY,
) -> Tokenizer:
    """Load the tokenizer of a run, or train it, and keep it in ``folder``; the second call finds it there.

    Args:
        spec: ``sentencepiece`` to train on ``sources``, ``symbols`` for synthetic tasks, or what ``load_tokenizer``
            takes.
        sources: the run's training sources.
        vocab_size: pieces to train; another tokenizer must not have more tokens.
        folder: where it is kept.
        max_documents: documents to take of each source; None: all.
        text_key: field that holds a document's text, where a source has fields.

    Raises:
        UserError: no such tokenizer, none can be trained on these sources, ``folder`` holds another one, or it knows
            more tokens than ``vocab_size``.
    """
    kept = load_tokenizer(folder) if holds_tokenizer(folder) else None
    if spec != "sentencepiece":
        tokenizer = SymbolsTokenizer(vocab_size) if spec == "symbols" else load_tokenizer(spec)
        if kept and kept.fingerprint != tokenizer.fingerprint:
            raise UserError(f"data.tokenizer={spec} is not the tokenizer in {folder}: give a new run.folder")
        if kept is None:
            tokenizer.save(folder)
    elif kept is None:
        tokenizer = train_sentencepiece(_training_texts(sources, max_documents, text_key), vocab_size, folder)
    else:
        tokenizer = kept
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"data.tokenizer={spec} has {tokenizer.vocab_size} tokens, more than model.vocab_size={vocab_size}: "
            f"set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def prepare_corpus(
    source: str,
    tokenizer: Tokenizer,
    cache_folder: str | Path,
    max_documents: int | None = None,
    *,
    text_key: str = TEXT_KEY,
    verify: bool = False,
    say: Callable[[str], None] | None = None,
) -> Source:
    """Open a source as shards, or as a synthetic task.

    Documents are tokenized into ``cache_folder`` first, unless they were before.

    Args:
        source: in the syntax of ``data.train``.
        tokenizer: the run's; shards of another one are refused.
        cache_folder: holds a folder for each source, tokenizer and limit.
        max_documents: documents to take of a source of documents; None: all.
        text_key: field that holds a document's text, where the source has fields.
        verify: compare every checksum (shards without a manifest: look at every token's id); False: only sizes.
        say: is told in one line what takes long, before it begins, where documents have to be tokenized.

    Raises:
        UserError: no such source, no documents in it, or shards that do not fit or are damaged.
    """
    if is_synthetic(source):
        return _synthetic_task(source, tokenizer)
    folder = Path(source)
    if not is_shards(source):
        corpus = Corpus(source, text_key)
        folder = Path(cache_folder) / _cache_key(corpus, tokenizer, max_documents)
        manifest = load_manifest(folder)
        if say and not (manifest and manifest.complete):
            say(f"sharding {source} into {folder}")
        preprocess(source, tokenizer, folder, _workers(corpus, max_documents), max_documents, text_key)
    return Shards.open(folder, tokenizer, verify="checksums" if verify else False)


def _synthetic_task(source: str, tokenizer: Tokenizer) -> SyntheticTask:
    if not isinstance(tokenizer, SymbolsTokenizer):
        raise UserError(f"{source} is a task of symbols, not of text: set data.tokenizer=symbols")
    return SyntheticTask.parse(source, tokenizer.vocab_size)


def _workers(corpus: Corpus, max_documents: int | None) -> int:
    """Processes that tokenize: one per core for a large source (a streamed one counts as large), or only this one."""
    large = corpus.source.startswith("hf:") or corpus.total_bytes > LARGE_BYTES
    return count_cores() if large and (max_documents or LARGE_DOCUMENTS) >= LARGE_DOCUMENTS else 0


def _cache_key(corpus: Corpus, tokenizer: Tokenizer, max_documents: int | None) -> str:
    """Another name for other content: a local file counts with the time at which it was changed."""
    changed = [Path(file.name).stat().st_mtime_ns for file in corpus.files if file.size]
    key = json.dumps([corpus.describe(), changed, tokenizer.fingerprint, max_documents])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _training_texts(sources: Sequence[str], max_documents: int | None, text_key: str) -> Iterator[str]:
    """Text of the sources to train a tokenizer on, as much of each."""
    for source in sources:
        if is_synthetic(source):
            raise UserError(f"{source} is a task of symbols, not of text: set data.tokenizer=symbols")
        if is_shards(source):
            folder = tokenizer_folder(source) or "the folder of its tokenizer"
            raise UserError(
                f"data.tokenizer=sentencepiece is trained on documents, but {source} is shards: "
                f"set data.tokenizer={folder}"
            )
    share = TRAINING_CHARACTERS // len(sources)
    return chain.from_iterable(_beginning(source, max_documents, text_key, share) for source in sources)


def _beginning(source: str, max_documents: int | None, text_key: str, characters: int) -> Iterator[str]:
    """Documents of a source, up to so many characters; rejects are reported when the source is tokenized."""
    for document in Corpus(source, text_key).documents(max_documents):
        yield document.text[:characters]
        characters -= len(document.text)
        if characters <= 0:
            return
