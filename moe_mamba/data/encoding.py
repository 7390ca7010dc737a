"""Documents to token ids: in this process, or in processes that can be ended.

A tokenizer's patterns may search some text for days, and a fault in its library may end the process that it runs in.
Neither can be stopped from inside. So what has patterns of its own is encoded in processes: where one does not answer
in time, it is ended, and its batch is encoded document by document, so that only what is at fault is left out.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from moe_mamba.data.corpus import START, Document, Place
from moe_mamba.data.library_calls import EncodingError
from moe_mamba.data.records import Reject
from moe_mamba.data.tokenizer import Tokenizer, load_tokenizer
from moe_mamba.errors import UserError

SECONDS = 30.0  # that a batch, and then each document of it, may take
BYTES_PER_SECOND = 50_000  # of text, for which it may take longer; GPT-2's tokenizer does a million
AHEAD = 3  # batches a process that are read before they are needed


@dataclass
class Batch:
    """Documents that are encoded together, what was rejected among them, and the place behind them."""

    documents: list[Document] = field(default_factory=list)
    size: int = 0
    rejects: list[Reject] = field(default_factory=list)
    end: Place = START
    bytes_read: int = 0

    @property
    def texts(self) -> list[str]:
        """Of the documents."""
        return [document.text for document in self.documents]


class Encoded(NamedTuple):
    """Tokens of a batch, end-of-text included: all ids in a row, the length of each document, and what failed.

    A document that could not be encoded has no ids and a length of 0; ``failed`` has its index, and why.
    """

    ids: np.ndarray
    lengths: np.ndarray
    failed: dict[int, str]


def encode_documents(tokenizer: Tokenizer, texts: list[str], dtype: str) -> Encoded:
    """Encode documents, each with what belongs around it: BOS, if the tokenizer has one, and end-of-text."""
    failed: dict[int, str] = {}
    try:
        encoded = tokenizer.encode_documents(texts)
    except EncodingError:
        encoded = [_encode_one(tokenizer, text, index, failed) for index, text in enumerate(texts)]
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    return Encoded(np.fromiter(chain.from_iterable(encoded), dtype, int(lengths.sum())), lengths, failed)


def _encode_one(tokenizer: Tokenizer, text: str, index: int, failed: dict[int, str]) -> list[int]:
    try:
        return tokenizer.encode_documents([text])[0]
    except EncodingError as error:
        failed[index] = f"the tokenizer fails on it ({error.reason})"
        return []


def encode_in_processes(
    batches: Iterable[Batch], tokenizer_folder: Path, dtype: str, workers: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Encode batches, in order, on ``workers`` processes of one thread each; 0: one with the tokenizer's own threads.

    Raises:
        UserError: no such process can be started, or one of the source, behind what was read before it.
    """
    seconds, threads = SECONDS, max(1, workers)
    pool = [_Process(tokenizer_folder, dtype, seconds, is_single=bool(workers)) for _ in range(threads)]
    idle: SimpleQueue[_Process] = SimpleQueue()
    for process in pool:
        idle.put(process)

    def encode(batch: Batch) -> Encoded:
        process = idle.get()
        try:
            return process.encode_batch(batch.texts)
        finally:
            idle.put(process)

    waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
    problem: UserError | None = None
    callers = ThreadPoolExecutor(threads)
    try:
        try:
            for batch in batches:
                waiting.append((batch, callers.submit(encode, batch)))
                if len(waiting) > AHEAD * threads:
                    done, future = waiting.popleft()
                    yield done, future.result()
        except UserError as error:
            problem = error  # of the source; what was read before it comes first
        for done, future in waiting:
            yield done, future.result()
        if problem:
            raise problem
    finally:
        callers.shutdown(wait=False, cancel_futures=True)
        for process in pool:
            process.close()
        callers.shutdown()


class _Ended(Exception):
    """A process did not answer in time, or is gone."""


class _Process:
    """One process that encodes; it is started when it is needed first, and again after it was ended.

    Args:
        folder: a tokenizer's.
        dtype: of the ids.
        seconds: see SECONDS.
        is_single: encode on one thread.
    """

    def __init__(self, folder: Path, dtype: str, seconds: float, is_single: bool) -> None:
        self._arguments = folder, dtype, is_single
        self._dtype, self._seconds = dtype, seconds
        self._started: tuple[BaseProcess, Connection] | None = None
        self._is_closed = False

    def encode_batch(self, texts: list[str]) -> Encoded:
        """Encode documents together, or where that brings the process down, each by itself."""
        try:
            return self._ask(texts)
        except _Ended:
            if self._is_closed:
                raise
        parts = [self._ask_for_one(text) for text in texts]
        lengths = np.concatenate([part.lengths for part in parts])
        failed = {index: part.failed[0] for index, part in enumerate(parts) if part.failed}
        return Encoded(np.concatenate([part.ids for part in parts]), lengths, failed)

    def _ask_for_one(self, text: str) -> Encoded:
        try:
            return self._ask([text])
        except _Ended as error:
            if self._is_closed:
                raise
            return Encoded(np.zeros(0, self._dtype), np.zeros(1, np.int64), {0: str(error)})

    def _ask(self, texts: list[str]) -> Encoded:
        process, pipe = self._started or self._start()
        limit = self._seconds + sum(map(len, texts)) / BYTES_PER_SECOND
        try:
            pipe.send(texts)
            if pipe.poll(limit):
                answer = pipe.recv()
                if isinstance(answer, Exception):
                    raise answer
                return answer
            why = f"the tokenizer did not end within {limit:.0f} s on it"
        except (EOFError, ConnectionError):
            why = "the tokenizer's process ended on it"
        self._end(process, pipe)
        raise _Ended(why)

    def _start(self) -> tuple[BaseProcess, Connection]:
        # spawn, not fork: the caller may have threads (of torch, of the tokenizer), whose locks a fork would copy held.
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        process.start()
        theirs.close()
        self._started = process, pipe
        try:
            problem = pipe.recv()
        except (EOFError, ConnectionError):
            problem = None if self._is_closed else UserError("a process that tokenizes ended at its start: try again")
        if problem is not None:
            self._end(process, pipe)
            raise problem
        return self._started

    def _end(self, process: BaseProcess, pipe: Connection) -> None:
        self._started = None
        process.kill()
        process.join()
        pipe.close()

    def close(self) -> None:
        """End the process, whatever it does; what waits for it gets an error."""
        self._is_closed = True
        if self._started:
            self._started[0].kill()
            self._started[0].join()


def _serve(pipe: Connection, tokenizer_folder: Path, dtype: str, is_single: bool) -> None:
    """Encode what comes through the pipe: no answer to Ctrl-C (the parent gives it), and no life without the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a panic is told in lines of its own, before it is an error
    os.environ["RUST_BACKTRACE"] = "0"  # takes a second, for nobody
    try:
        tokenizer = load_tokenizer(tokenizer_folder)
        if is_single:
            tokenizer.use_one_thread()
    except Exception as error:
        pipe.send(error)
        return
    pipe.send(None)
    with suppress(EOFError):
        while True:
            texts = pipe.recv()
            try:
                answer: Encoded | Exception = encode_documents(tokenizer, texts, dtype)
            except Exception as error:
                answer = error
            pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
