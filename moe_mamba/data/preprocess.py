"""From documents to a folder of shards, on several processes, stoppable at any instant.

The work is split into parts by bytes of text. A part is written aside, renamed, and entered into the manifest; what a
stopped run left unentered is written again. Splits depend only on the documents, never on the number of workers or
on interruptions: the folder comes out the same, byte by byte.
"""

import base64
import errno
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from moe_mamba.atomic_file import TEMPORARY, put_in_place, synchronize
from moe_mamba.data.corpus import START, Corpus, Place, Reject
from moe_mamba.data.manifest import (
    MANIFEST,
    REJECTS,
    TOKENIZER_FOLDER,
    Manifest,
    Part,
    checksum,
    load_manifest,
)
from moe_mamba.data.quiet import indexed_dataset
from moe_mamba.data.tokenizer import Tokenizer, load_tokenizer
from moe_mamba.errors import UserError
from moe_mamba.file_lock import lock

PART_BYTES = 1 << 30  # bytes of text a part: what a kill can cost
BATCH_BYTES = 1 << 18  # bytes of text that a worker encodes at once
BATCH_DOCUMENTS = 1024
SMALL_VOCABULARY = 65500  # below it a token fits into two bytes, as Megatron counts
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


@dataclass
class Batch:
    """Documents that are encoded together, what was rejected among them, and the place behind them."""

    texts: list[str] = field(default_factory=list)
    size: int = 0
    rejects: list[Reject] = field(default_factory=list)
    end: Place = START
    bytes_read: int = 0


_worker: tuple[Tokenizer, str]  # in a worker: its tokenizer, and the dtype of the ids


class Encoded(NamedTuple):
    """Tokens of a batch, end-of-text included: all ids in a row, and the length of each document."""

    ids: np.ndarray
    lengths: np.ndarray


def preprocess(
    source: str,
    tokenizer: Tokenizer,
    output: str | Path,
    workers: int = 0,
    limit: int | None = None,
    part_bytes: int = PART_BYTES,
    progress: bool = True,
) -> Manifest:
    """Write the documents of ``source`` as shards into the folder ``output``, or go on where that was stopped.

    Args:
        source: in the syntax of ``data.train``.
        tokenizer: encodes each document; an end-of-text follows it.
        output: the folder; a finished one is left as it is.
        workers: processes that encode, one core each; 0: this process, with the tokenizer's own threads.
        limit: documents to take; None: all.
        part_bytes: bytes of text in a part.
        progress: show a bar on standard error, where that is a terminal.

    Returns:
        The finished folder's manifest.

    Raises:
        UserError: no documents in the source, or the folder holds something else, or the disk is full.
    """
    folder = Path(output)
    corpus = Corpus(source)
    planned = Manifest(
        source=corpus.describe(),
        limit=limit,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text,
        dtype="uint16" if tokenizer.vocab_size < SMALL_VOCABULARY else "int32",
        part_bytes=part_bytes,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            manifest = _resume(folder, planned)
            if manifest.complete:
                return manifest
            manifest.save(folder)
            tokenizer.save(folder / TOKENIZER_FOLDER)
            with _bar(corpus, progress) as bar:
                return _write(folder, manifest, corpus, tokenizer, workers, bar)
    except OSError as error:
        if error.errno in NO_SPACE:
            fix = "free some space and run the same command again, it goes on where it stopped"
        elif error.errno in NOT_WRITABLE:
            fix = "give another folder for the shards"
        else:
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror}): {fix}") from error


def count_cores() -> int:
    """Cores that this process may use; outside Linux, cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_documents(tokenizer: Tokenizer, texts: list[str], dtype: str) -> Encoded:
    """Encode documents and put an end-of-text behind each."""
    encoded = tokenizer.encode_batch(texts)
    for ids in encoded:
        ids.append(tokenizer.end_of_text)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return Encoded(np.fromiter(chain.from_iterable(encoded), dtype, int(lengths.sum())), lengths)


def _write(folder: Path, manifest: Manifest, corpus: Corpus, tokenizer: Tokenizer, workers: int, bar: tqdm) -> Manifest:
    """Write what ``manifest`` does not have yet; the finished manifest."""
    limit = None if manifest.limit is None else manifest.limit - manifest.documents
    rejects = manifest.rejects
    part: _PartWriter | None = None
    for batch, encoded in _encode(_batches(corpus, limit, manifest.end), tokenizer, folder, manifest.dtype, workers):
        rejects += _keep_rejects(folder, batch.rejects)
        if batch.texts:
            part = part or _PartWriter(folder, len(manifest.parts), manifest.dtype)
            part.add(batch, encoded)
        if part and part.text_bytes >= manifest.part_bytes:
            manifest = _enter(folder, manifest, part, rejects, batch.end)
            part = None
        bar.update(batch.bytes_read - bar.n if corpus.total_bytes else len(batch.texts))
        documents = manifest.documents + (part.documents if part else 0)
        bar.set_postfix_str(f"{documents:,} documents, {rejects:,} rejects", refresh=False)
    if part:
        manifest = _enter(folder, manifest, part, rejects, batch.end)
    manifest = replace(manifest, complete=True, rejects=rejects, rejects_bytes=_rejects_bytes(folder))
    manifest.save(folder)
    return manifest


def _enter(folder: Path, manifest: Manifest, part: "_PartWriter", rejects: int, end: Place) -> Manifest:
    """Finish a part and enter it into the folder's manifest."""
    manifest = manifest.with_part(part.finish(), rejects, _rejects_bytes(folder), end)
    manifest.save(folder)
    return manifest


class _PartWriter:
    """One pair of .bin and .idx, written aside."""

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self.folder, self.name = folder, f"part-{number:05d}"
        self.documents = self.tokens = self.text_bytes = 0
        self.largest_id = -1
        self._aside = {suffix: folder / f"{self.name}{suffix}{TEMPORARY}" for suffix in (".bin", ".idx")}
        self._builder = indexed_dataset().IndexedDatasetBuilder(str(self._aside[".bin"]), dtype=np.dtype(dtype).type)

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """Append the documents of a batch."""
        start = 0
        for length in encoded.lengths.tolist():
            self._builder.add_document(encoded.ids[start : start + length], [length])
            start += length
        self.documents += len(encoded.lengths)
        self.tokens += start
        self.text_bytes += batch.size
        self.largest_id = max(self.largest_id, int(encoded.ids.max()))

    def finish(self) -> Part:
        """Put both files, whole and on the disk, in their place."""
        self._builder.finalize(str(self._aside[".idx"]))
        checksums = {}
        for suffix, aside in self._aside.items():
            checksums[f"{self.name}{suffix}"] = checksum(aside)
            put_in_place(aside, self.folder / f"{self.name}{suffix}")
        return Part(self.name, self.documents, self.tokens, self.text_bytes, self.largest_id, checksums)


def _batches(corpus: Corpus, limit: int | None, start: Place) -> Iterator[Batch]:
    """Split the documents into batches. A split depends only on what came since the one before."""
    batch = Batch(end=start)
    rejects: list[Reject] = []
    try:
        for document in corpus.documents(limit, rejects.append, start):
            batch.texts.append(document.text)
            batch.size += document.size
            batch.end, batch.bytes_read = document.place, corpus.bytes_read
            if batch.size >= BATCH_BYTES or len(batch.texts) == BATCH_DOCUMENTS:
                batch.rejects, rejects[:] = rejects[:], []
                yield batch
                batch = Batch(end=document.place)
    except UserError:
        if not batch.texts:  # a source that holds nothing but rejects: they are kept all the same
            yield replace(batch, rejects=rejects)
        raise
    everything = Place(len(corpus.files), 0)  # behind the rejects that follow the last document, too
    yield replace(batch, rejects=rejects, end=everything, bytes_read=corpus.bytes_read)


def _encode(
    batches: Iterator[Batch], tokenizer: Tokenizer, folder: Path, dtype: str, workers: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode batches, in order; on ``workers`` processes that read the tokenizer saved in ``folder``, or here."""
    if not workers:
        for batch in batches:
            yield batch, encode_documents(tokenizer, batch.texts, dtype)
        return
    # spawn, not fork: the caller may have threads (of torch, of the tokenizer), whose locks a fork would copy held.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (folder / TOKENIZER_FOLDER, dtype)
    )
    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    problem: UserError | None = None
    try:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_work, batch.texts)))
                if len(waiting) > 3 * workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
        except UserError as error:
            problem = error  # of the source; what was read before it comes first
        for done, future in waiting:
            yield done, future.result()
        if problem:
            raise problem
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(tokenizer_folder: Path, dtype: str) -> None:
    """Set up a worker: one thread, no answer to Ctrl-C (the parent gives it), and no life without the parent."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.use_one_thread()
    _worker = (tokenizer, dtype)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(texts: list[str]) -> Encoded:
    tokenizer, dtype = _worker
    return encode_documents(tokenizer, texts, dtype)


def _resume(folder: Path, planned: Manifest) -> Manifest:
    """The manifest to go on from; clears what a stopped run wrote and did not enter."""
    found = load_manifest(folder)
    strangers = [entry.name for entry in folder.iterdir() if not entry.name.endswith(TEMPORARY)]
    if found is None and strangers:
        raise UserError(f"{folder}: not empty ({strangers[0]} is in it) and has no {MANIFEST}: give a new folder")
    if found is None or not (found.parts or found.complete):
        found = planned
    for name in ("source", "limit", "tokenizer", "part_bytes"):
        ours, theirs = getattr(planned, name), getattr(found, name)
        if ours != theirs:
            raise UserError(
                f"{folder}: holds shards of another {name} ({_brief(theirs)}, now {_brief(ours)}): "
                "give a new folder, or delete this one"
            )
    if not found.complete:
        entered = {file for part in found.parts for file in part.checksums}
        for path in {*folder.rglob(f"*{TEMPORARY}"), *folder.glob("part-*")}:
            if path.name not in entered:
                path.unlink()
        if _rejects_bytes(folder):
            os.truncate(folder / REJECTS, found.rejects_bytes)
    return found


def _keep_rejects(folder: Path, rejects: list[Reject]) -> int:
    """Append to the rejects file, a line of JSON each; how many there were."""
    if rejects:
        with (folder / REJECTS).open("a", encoding="utf-8") as file:
            for reject in rejects:
                values = reject._asdict() | {"raw": base64.b64encode(reject.raw).decode()}
                file.write(json.dumps(values) + "\n")
        synchronize(folder / REJECTS)
    return len(rejects)


def _rejects_bytes(folder: Path) -> int:
    path = folder / REJECTS
    return path.stat().st_size if path.exists() else 0


def _bar(corpus: Corpus, progress: bool) -> tqdm:
    """A bar over the bytes of the source's files, or over documents where a source has no size."""
    files = corpus.total_bytes > 0
    return tqdm(
        total=corpus.total_bytes if files else None,
        unit="B" if files else " documents",
        unit_scale=True,
        desc=corpus.source,
        disable=None if progress else True,
    )


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait until no other process writes the folder (two runs may share a cache), and keep others out."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(descriptor)
        except BlockingIOError:
            tqdm.write(f"{folder}: another process writes it, waiting", file=sys.stderr)
            lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _brief(value: object) -> str:
    """One of the values that decide a folder's content, for a message."""
    if isinstance(value, dict):
        files = value.get("files", ())
        size = f", {len(files)} file(s), {sum(file['bytes'] for file in files):,} bytes" if files else ""
        return f"{value['source']}{size}"
    return str(value)[:12]
