"""From documents to a folder of shards, on several processes, stoppable at any instant.

The work is split into parts by bytes of text. A part is written aside, renamed, and entered into the manifest; what a
stopped run left unentered is written again. Splits depend only on the documents, never on the number of workers or
on interruptions: the folder comes out the same, byte by byte.
"""

import base64
import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from moe_mamba.atomic_file import TEMPORARY, put_in_place, synchronize
from moe_mamba.data.corpus import TEXT_KEY, Corpus, Place
from moe_mamba.data.encoding import Batch, Encoded, encode_documents, encode_in_processes
from moe_mamba.data.manifest import (
    MANIFEST,
    REJECTS,
    TOKENIZER_FOLDER,
    Manifest,
    Part,
    checksum,
    load_manifest,
    part_name,
)
from moe_mamba.data.quiet import indexed_dataset
from moe_mamba.data.records import Reject
from moe_mamba.data.tokenizer import Tokenizer
from moe_mamba.errors import UserError
from moe_mamba.file_lock import lock

PART_BYTES = 1 << 30  # bytes of text a part: what a kill can cost
BATCH_BYTES = 1 << 18  # bytes of text that a worker encodes at once
BATCH_DOCUMENTS = 1024
SMALL_VOCABULARY = 65500  # below it a token fits into two bytes, as Megatron counts
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


def preprocess(
    source: str,
    tokenizer: Tokenizer,
    output: str | Path,
    workers: int = 0,
    limit: int | None = None,
    text_key: str = TEXT_KEY,
    part_bytes: int = PART_BYTES,
    progress: bool = True,
) -> Manifest:
    """Write the documents of ``source`` as shards into the folder ``output``, or go on where that was stopped.

    Args:
        source: in the syntax of ``data.train``.
        tokenizer: encodes each document; an end-of-text follows it.
        output: the folder; a finished one is left as it is.
        workers: processes that encode, one core each; 0: this process, with the tokenizer's own threads (one beside
            it, where the tokenizer has patterns of its own).
        limit: documents to take; None: all.
        text_key: field that holds a document's text, where the source has fields.
        part_bytes: bytes of text in a part.
        progress: show a bar on standard error, where that is a terminal.

    Returns:
        The finished folder's manifest.

    Raises:
        UserError: no documents in the source, or the folder holds something else, or the disk is full.
    """
    folder = Path(output)
    corpus = Corpus(source, text_key)
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


def _write(folder: Path, manifest: Manifest, corpus: Corpus, tokenizer: Tokenizer, workers: int, bar: tqdm) -> Manifest:
    """Write what ``manifest`` does not have yet; the finished manifest."""
    limit = None if manifest.limit is None else manifest.limit - manifest.documents - manifest.failed
    rejects, failed = manifest.rejects, manifest.failed
    part: _PartWriter | None = None
    for taken, encoded in _encode(_batches(corpus, limit, manifest.end), tokenizer, folder, manifest.dtype, workers):
        batch = _without_failed(taken, encoded.failed, corpus)
        if encoded.failed and not failed:
            reject = batch.rejects[-len(encoded.failed)]
            line = f"{reject.file}, line {reject.line}: {reject.reason}: left out, and kept in {folder / REJECTS}"
            tqdm.write(line, file=sys.stderr)
        rejects += _keep_rejects(folder, batch.rejects)
        failed += len(encoded.failed)
        if batch.documents:
            part = part or _PartWriter(folder, len(manifest.parts), manifest.dtype)
            part.add(batch, encoded)
        if part and part.text_bytes >= manifest.part_bytes:
            manifest = _enter(folder, manifest, part, rejects, failed, batch.end)
            part = None
        bar.update(batch.bytes_read - bar.n if corpus.total_bytes else len(taken.documents))
        documents = manifest.documents + (part.documents if part else 0)
        bar.set_postfix_str(f"{documents:,} documents, {rejects:,} rejects", refresh=False)
    if part:
        manifest = _enter(folder, manifest, part, rejects, failed, batch.end)
    if not manifest.parts:
        raise UserError(f"{corpus.source}: the tokenizer fails on all {failed:,} documents: give another tokenizer")
    manifest = replace(manifest, complete=True, rejects=rejects, rejects_bytes=_rejects_bytes(folder), failed=failed)
    manifest.save(folder)
    return manifest


def _without_failed(batch: Batch, failed: dict[int, str], corpus: Corpus) -> Batch:
    """The batch, where documents that could not be encoded are rejects."""
    if not failed:
        return batch
    rejects = [
        Reject(corpus.files[document.place.file].name, document.place.record, failed[index], document.text.encode())
        for index, document in enumerate(batch.documents)
        if index in failed
    ]
    documents = [document for index, document in enumerate(batch.documents) if index not in failed]
    size = sum(document.size for document in documents)
    return replace(batch, documents=documents, size=size, rejects=batch.rejects + rejects)


def _enter(folder: Path, manifest: Manifest, part: "_PartWriter", rejects: int, failed: int, end: Place) -> Manifest:
    """Finish a part and enter it into the folder's manifest."""
    manifest = manifest.with_part(part.finish(), rejects, _rejects_bytes(folder), failed, end)
    manifest.save(folder)
    return manifest


class _PartWriter:
    """One pair of .bin and .idx, written aside."""

    def __init__(self, folder: Path, number: int, dtype: str) -> None:
        self.folder, self.name = folder, part_name(number)
        self.documents = self.tokens = self.text_bytes = 0
        self.largest_id = -1
        self._aside = {suffix: folder / f"{self.name}{suffix}{TEMPORARY}" for suffix in (".bin", ".idx")}
        self._builder = indexed_dataset().IndexedDatasetBuilder(str(self._aside[".bin"]), dtype=np.dtype(dtype).type)

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """Append the documents of a batch that were encoded."""
        start = 0
        for length in filter(None, encoded.lengths.tolist()):
            self._builder.add_document(encoded.ids[start : start + length], [length])
            start += length
        self.documents += len(batch.documents)
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
            batch.documents.append(document)
            batch.size += document.size
            batch.end, batch.bytes_read = document.place, corpus.bytes_read
            if batch.size >= BATCH_BYTES or len(batch.documents) == BATCH_DOCUMENTS:
                batch.rejects, rejects[:] = rejects[:], []
                yield batch
                batch = Batch(end=document.place)
    except UserError:
        if not batch.documents:  # a source that holds nothing but rejects: they are kept all the same
            yield replace(batch, rejects=rejects)
        raise
    everything = Place(len(corpus.files), 0)  # behind the rejects that follow the last document, too
    yield replace(batch, rejects=rejects, end=everything, bytes_read=corpus.bytes_read)


def _encode(
    batches: Iterator[Batch], tokenizer: Tokenizer, folder: Path, dtype: str, workers: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode batches, in order; in processes that read the tokenizer saved in ``folder``, or here."""
    if workers or tokenizer.has_patterns:
        yield from encode_in_processes(batches, folder / TOKENIZER_FOLDER, dtype, workers)
    else:
        for batch in batches:
            yield batch, encode_documents(tokenizer, batch.texts, dtype)


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
        if size := _rejects_bytes(folder):
            os.truncate(folder / REJECTS, min(size, found.rejects_bytes))
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
        return f"{value['source'][-30:]}{size}"
    return str(value)[:12]
