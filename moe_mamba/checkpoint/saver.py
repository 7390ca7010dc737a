"""Saving while training goes on: a copy of what is saved, and a thread that writes it."""

import copy
import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.divergence import NextStep
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.errors import UserError

LAZY = "TORCH_GLOO_LAZY_INIT"  # torch reads it when it makes a group
ALIGNMENT = 64  # bytes between the starts of copies: a multiple of every dtype's size, and what memcpy likes
log = logging.getLogger(__name__)


class Saver:
    """Saves the steps of a run one after another, at once or in the background, with the same guarantees.

    Every rank makes one, and calls it with the same steps. A save in the background is `store.save` of a copy,
    with collectives in a group of its own, so that they never mix with those of training. What goes wrong there is
    raised by the next `save`, by `wait`, or at the end of the `with` block. (`async_save` of
    torch.distributed.checkpoint would do the writing by itself in its thread, but not the naming and pruning, and its
    stagers know state dicts, not chunks.)

    Args:
        folder: the run's folder of checkpoints, seen by every rank.
        keep: newest checkpoints that stay; see `store.save`.
        asynchronous: return from `save` as soon as this rank's shards are copied to the CPU's memory.
    """

    def __init__(self, folder: Path, keep: int, asynchronous: bool = False) -> None:
        self.folder = folder
        self.keep = keep
        self.asynchronous = asynchronous
        self.group = _group() if dist.is_initialized() else None
        self._copies = Copies()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, step: int, shards: Sequence[Shard], description: dict[str, Any]) -> None:
        """Save a step, when the one before is done; the shards may change as soon as this returns.

        Args:
            step: number of the step.
            shards: this rank's chunks, see `store.save`.
            description: what is not a tensor, as JSON.

        Raises:
            UserError: on every rank, when a rank has NaN or Inf, or could not write this step or, in the background,
                the one before.
        """
        self.wait()
        if self.asynchronous:
            copies, description = self._copies.make(shards), copy.deepcopy(description)
            self._pending = self._thread.submit(self._write, step, copies, description)
        else:
            self._write(step, shards, description)

    def wait(self) -> None:
        """Wait until the last step is saved.

        Raises:
            UserError: on every rank, when a rank could not write it.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def note_next_step(self, step: int, next_step: NextStep) -> None:
        """Note what the step after a saved one gave, as soon as that one is written; only rank 0 calls it."""
        if self.asynchronous:
            self._thread.submit(store.note_next_step, self.folder, step, next_step, self.keep)
        else:
            store.note_next_step(self.folder, step, next_step, self.keep)

    def _write(self, step: int, shards: Sequence[Shard], description: dict[str, Any]) -> Path:
        return store.save(self.folder, step, shards, description, self.keep, self.group)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Let a save under way complete; its error is raised, or said where another ended the block."""
        try:
            self.wait()
        except Exception as error:
            if kind is None:
                raise
            log.warning("%s", error)
        finally:
            self._thread.shutdown()
            self._copies.free()


def _group() -> dist.ProcessGroup:
    """All ranks, over gloo, each of which connects to those that it talks to, when it does.

    By default each would connect to all others at once, and read of each how all others reach it: 8 bytes for each pair
    of ranks, 2 GB on every one of 16,384.
    """
    before = os.environ.get(LAZY)
    os.environ[LAZY] = "1"
    try:
        return dist.new_group(backend="gloo")
    finally:
        if before is None:
            del os.environ[LAZY]
        else:
            os.environ[LAZY] = before


class Copies:
    """Copies of shards in the CPU's memory, pinned if shards come from a GPU; the memory is kept between saves."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.is_pinned = False

    def make(self, shards: Sequence[Shard]) -> list[Shard]:
        """Contiguous copies of `shards`, complete on return; those of the call before are overwritten."""
        starts, end = [], 0
        for shard in shards:
            starts.append(end)
            end += -(-shard.tensor.nbytes // ALIGNMENT) * ALIGNMENT
        from_gpu = any(shard.tensor.is_cuda for shard in shards)
        if end > self.memory.numel():
            self.free()
            self._allocate(end, from_gpu)
        copies = []
        for start, shard in zip(starts, shards, strict=True):
            source = shard.tensor.detach()
            target = self.memory[start : start + source.nbytes].view(source.dtype).view(source.shape)
            target.copy_(source, non_blocking=True)
            copies.append(Shard(shard.name, shard.shape, shard.offsets, target))
        if from_gpu:
            torch.cuda.synchronize()
        return copies

    def free(self) -> None:
        """Give the memory back."""
        if self.is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
        self.memory, self.is_pinned = torch.empty(0, dtype=torch.uint8), False

    def _allocate(self, size: int, pinned: bool) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8)
        if pinned:  # by hand, since torch's own pinned memory comes in powers of two: up to twice what is needed
            code = int(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), size, 1))
            if code != 0:
                raise UserError(
                    f"the copy for checkpoint.asynchronous=true needs {size / 2**30:.1f} GiB of pinned memory, which "
                    f"this machine could not allocate (CUDA error {code}): set checkpoint.asynchronous=false"
                )
            self.is_pinned = True
