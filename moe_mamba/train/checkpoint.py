"""Checkpoints of logical tensors: any layout loads any other's.

A rank offers boxes (`Piece`) of logical tensors, to save or to fill; torch.distributed.checkpoint plans who writes
and who reads what, and nothing is gathered. A step is written aside, checked and renamed, so that what has its name
is complete; the newest sound one is found at start. Where torch.distributed is initialized, `save` and `load` are
called by every rank of the group, and fail on every rank when one fails; the other functions are of one process.
A run saves through saver.py, at once or in the background.
"""

import errno
import json
import logging
import math
import os
import re
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from moe_mamba.errors import UserError
from moe_mamba.parallel.pieces import Piece
from moe_mamba.train import storage
from moe_mamba.train.manifest import MANIFEST, DamagedError, read_description, read_index, verify
from moe_mamba.train.planners import PieceLoadPlanner, PieceSavePlanner

__all__ = ["load", "logical_tensors", "newest", "read_description", "read_tensor", "resolve", "save", "step_of"]

STEP_NAME = re.compile(r"step-(\d{8,})")
log = logging.getLogger(__name__)
Result = TypeVar("Result")


def _rank_and_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(group), dist.get_world_size(group)
    return 0, 1


def _agree(function: Callable[[], Result], group: dist.ProcessGroup | None) -> list[Result]:
    """Run `function` on every rank and return all results; where one fails, a CheckpointException on all."""
    result: Result | None = None
    failure = None
    try:
        result = function()
    except Exception as error:
        failure = (error, traceback.extract_tb(error.__traceback__))
    _, size = _rank_and_size(group)
    outcomes: list[Any] = [(result, failure)]
    if size > 1:
        outcomes = [None] * size
        dist.all_gather_object(outcomes, (result, failure), group=group)
    failures = {rank: failure for rank, (_, failure) in enumerate(outcomes) if failure is not None}
    if failures:
        raise CheckpointException("checkpoint", failures)
    return [result for result, _ in outcomes]


def _first_error(error: CheckpointException, kind: type[Exception]) -> Any:
    return next((failure for failure, _ in error.failures.values() if isinstance(failure, kind)), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notice that a save or load without a process group is of one process: that is meant so.

    Filters of warnings are of the whole process, so that a save in the background leaves them alone where it can.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _steps(folder: Path) -> list[Path]:
    """Folders of complete steps, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := STEP_NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_of(path: Path) -> int:
    """Number of the step that a step's folder holds."""
    return int(path.name.removeprefix("step-"))


def _restore(folder: Path) -> None:
    """Give a step back its name, if a kill came between moving it aside and naming the one that replaces it."""
    for aside in folder.glob(".step-*.replaced"):
        name = folder / aside.name[1:].removesuffix(".replaced")
        if not name.exists():
            aside.rename(name)


def _clear(folder: Path) -> None:
    """Remove what killed saves left behind."""
    _restore(folder)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


def _remove(path: Path) -> None:
    """Remove a step; hidden first, so that no half of it is ever taken for a checkpoint."""
    aside = path.with_name(f".{path.name}.old")
    path.rename(aside)
    shutil.rmtree(aside)


def _name_and_prune(partial: Path, final: Path, keep: int) -> None:
    """Give a finished step its name; then keep the newest `keep` and the best."""
    aside = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    storage.synchronize_folder(final.parent)
    if aside.exists():
        shutil.rmtree(aside)
    steps = []
    for path in _steps(final.parent):
        if step_of(path) <= step_of(final):
            steps.append(path)
        elif _is_damaged(path):  # a later step that this run could not resume from
            _remove(path)
    best = _best(steps)
    if best is not None:
        _write_best(final.parent, *best)
    for path in steps[:-keep]:
        if best is None or path != best[0]:
            _remove(path)


def _is_damaged(path: Path) -> bool:
    try:
        verify(path)
    except DamagedError:
        return True
    except UserError:  # another format version: not ours to judge
        return False
    return False


def _best(steps: Sequence[Path]) -> tuple[Path, float] | None:
    """The step with the lowest validation loss, the earliest of equals; None where no step has one."""
    losses = []
    for path in steps:
        try:
            loss = read_description(path).get("validation_loss")
        except UserError:
            continue
        if loss is not None and math.isfinite(loss):
            losses.append((loss, path))
    if not losses:
        return None
    loss, path = min(losses, key=lambda pair: pair[0])
    return path, loss


def _write_best(folder: Path, path: Path, loss: float) -> None:
    new = folder / ".best.json"
    new.write_text(json.dumps({"step": step_of(path), "checkpoint": path.name, "validation_loss": loss}) + "\n")
    new.replace(folder / "best.json")


def save(
    folder: Path,
    step: int,
    pieces: Sequence[Piece],
    description: dict[str, Any],
    keep: int = 2,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save a step: write aside, check, rename, and drop old ones.

    Args:
        folder: the run's folder of checkpoints, seen by every rank.
        step: number of the step; an existing checkpoint of it is replaced.
        pieces: this rank's boxes; over all ranks they must hold every tensor whole. Boxes that several ranks offer
            are written once.
        description: what is not a tensor, as JSON; the coordinator's (rank 0) is taken. `validation_loss` in it
            decides which checkpoint is the best.
        keep: newest checkpoints that stay; the best stays besides, and `best.json` names it.
        group: the ranks that save, all if None.

    Returns:
        The step's folder, `step-00000100`.

    Raises:
        UserError: on every rank, when a rank cannot write; what was there before is kept.
    """
    folder = Path(folder)
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"
    rank, _ = _rank_and_size(group)

    def start() -> None:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _clear(folder)
            partial.mkdir()

    def finish() -> None:
        if rank == 0:
            _name_and_prune(partial, final, keep)

    try:
        _agree(start, group)
        writer = storage.Writer(partial, {"step": step} | description)
        with nullcontext() if dist.is_initialized() else _quiet():
            dcp.save({}, storage_writer=writer, planner=PieceSavePlanner(pieces), process_group=group)
        _agree(finish, group)
    except CheckpointException as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise _save_error(error, folder, step) from (None if _first_error(error, OSError) else error)
    return final


def _save_error(error: CheckpointException, folder: Path, step: int) -> Exception:
    """The line for the user when a disk fails; a plain error otherwise (CheckpointException is no Exception)."""
    cause = _first_error(error, OSError)
    if cause is None:
        return RuntimeError(f"step {step} could not be saved: {error}")
    before = _steps(folder)
    kept = f"the last complete checkpoint, {before[-1].name}, is kept" if before else "there is no earlier checkpoint"
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space left for the checkpoint of step {step} in {folder}: free some, or lower checkpoint.keep; {kept}"
        )
    return UserError(f"the checkpoint of step {step} could not be written in {folder} ({cause}): mend that; {kept}")


def load(path: Path, pieces: Sequence[Piece], group: dist.ProcessGroup | None = None) -> None:
    """Fill pieces in place from a step's folder, whatever layout saved it; other dtypes are converted.

    Each rank reads of each stored box the rows (of its first dimension) that its pieces want, and no more; of rows
    that it wants in part it reads the whole, slab by slab. Pieces may be views of any stride.

    Sizes of files are checked, checksums are not: `newest` and `resolve` check those.

    Raises:
        UserError: on every rank, when a tensor is missing, has another shape, or a file is damaged.
    """
    _load(Path(path), pieces, group, alone=_rank_and_size(group)[1] == 1)


def _load(path: Path, pieces: Sequence[Piece], group: dist.ProcessGroup | None, alone: bool) -> None:
    try:
        reader = storage.Reader(path) if alone else _agree_on_reader(path, group)
        with _quiet():
            planner = PieceLoadPlanner(path, reader.index, pieces)
            dcp.load({}, storage_reader=reader, planner=planner, process_group=group, no_dist=alone)
    except CheckpointException as error:
        raise _load_error(error, path) from (None if _first_error(error, UserError) else error)


def _agree_on_reader(path: Path, group: dist.ProcessGroup | None) -> storage.Reader:
    readers: list[storage.Reader] = []
    _agree(lambda: readers.append(storage.Reader(path)), group)
    return readers[0]


def _load_error(error: CheckpointException, path: Path) -> Exception:
    for kind in (DamagedError, UserError):
        if (cause := _first_error(error, kind)) is not None:
            return kind(str(cause))
    if (cause := _first_error(error, OSError)) is not None:
        return UserError(f"{path} could not be read ({cause}): mend that, or use another checkpoint")
    return RuntimeError(f"{path} could not be loaded: {error}")


def logical_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of every tensor in a step's folder."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in read_index(Path(path)).items()}


def read_tensor(path: Path, name: str) -> Tensor:
    """A whole tensor of a step's folder, on the CPU, by this process alone."""
    tensors = logical_tensors(path)
    if name not in tensors:
        raise UserError(f"{path} has no tensor {name}: it is a checkpoint of another model")
    shape, dtype = tensors[name]
    tensor = torch.empty(shape, dtype=dtype)
    _load(Path(path), [Piece(name, shape, (0,) * len(shape), tensor)], None, alone=True)
    return tensor


def newest(folder: Path, warn: Callable[[str], None] = log.warning) -> Path | None:
    """The newest complete checkpoint whose sizes and checksums hold; asked by one process, not by all at once.

    Args:
        folder: the run's folder of checkpoints; it need not exist.
        warn: told of each damaged checkpoint, and which one is used in its place.

    Returns:
        The step's folder, or None where no checkpoint was ever completed.

    Raises:
        UserError: there are checkpoints and all are damaged, or one is of another format version.
    """
    folder = Path(folder)
    if folder.is_dir():
        _restore(folder)
    damages: list[str] = []
    for path in reversed(_steps(folder)):
        try:
            verify(path)
        except DamagedError as error:
            damages.append(str(error).removesuffix(": use another checkpoint"))
            continue
        for damage in damages:
            warn(f"{damage}: {path.name} is used instead")
        return path
    if damages:
        raise UserError(f"no checkpoint in {folder} is sound ({'; '.join(damages)}): remove them to start anew")
    return None


def resolve(run_or_step: str | os.PathLike[str]) -> Path:
    """The step's folder that a user means by a run's folder (its newest sound checkpoint) or by a step's own.

    Raises:
        UserError: neither, or the step is damaged.
    """
    path = Path(run_or_step)
    if not path.is_dir():
        raise UserError(f"{path} is no folder: give a run's folder or one of its checkpoints/step-...")
    if (path / MANIFEST).exists() or STEP_NAME.fullmatch(path.name):
        verify(path)
        return path
    found = newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        raise UserError(f"{path} holds no complete checkpoint: train first, or give another run's folder")
    return found
