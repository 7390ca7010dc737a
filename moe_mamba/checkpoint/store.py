"""Checkpoints of logical tensors: any layout loads any other's.

A rank offers chunks (`Shard`) of logical tensors, to save or to fill; torch.distributed.checkpoint plans who writes
and who reads what, and nothing is gathered. NaN and Inf are not saved. A step is written aside, checked and renamed,
so that what has its name is complete; the newest valid one is found at start. Where torch.distributed is initialized,
`save` and `load` are called by every rank of the group, and fail on every rank when one fails; the other functions are
of one process. A run saves through saver.py, at once or in the background; what stays is in retention.py.
"""

import errno
import logging
import os
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

from moe_mamba.checkpoint import storage
from moe_mamba.checkpoint.divergence import DivergedError, first_not_finite, has_diverged, read_next_step
from moe_mamba.checkpoint.manifest import MANIFEST, OTHER, DamagedError, read_description, read_index, verify
from moe_mamba.checkpoint.planners import ShardLoadPlanner, ShardSavePlanner
from moe_mamba.checkpoint.retention import (
    STEP_NAME,
    check,
    check_next_step,
    clear,
    name_and_prune,
    name_of,
    note_next_step,
    restore_replaced,
    step_of,
    steps_in,
)
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.errors import UserError, brief

__all__ = [
    "load",
    "logical_tensors",
    "newest",
    "note_next_step",
    "read_description",
    "read_tensor",
    "resolve",
    "save",
    "step_of",
]

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


def save(
    folder: Path,
    step: int,
    shards: Sequence[Shard],
    description: dict[str, Any],
    keep: int = 2,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Save a step, if all its numbers are finite: write aside, check, rename, and drop old ones.

    Args:
        folder: the run's folder of checkpoints, seen by every rank.
        step: number of the step; an existing checkpoint of it is replaced.
        shards: this rank's chunks; over all ranks they must hold every tensor whole. Chunks that several ranks offer
            are written once.
        description: what is not a tensor, as JSON; the coordinator's (rank 0) is taken. `validation_loss` in it
            decides which checkpoint is the best.
        keep: newest checkpoints that stay; the best stays besides, and `best.json` names it; so does the one before
            this until `note_next_step` says that a step was made from this.
        group: the ranks that save, all if None.

    Returns:
        The step's folder, `step-00000100`.

    Raises:
        UserError: on every rank, when a rank cannot write, or has NaN or Inf; what was there before is kept.
    """
    folder = Path(folder)
    final, partial = folder / name_of(step), folder / f".{name_of(step)}.partial"
    rank, _ = _rank_and_size(group)

    def start() -> None:
        if (name := first_not_finite(shards)) is not None:
            raise _NotFiniteError(name)
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            clear(folder)
            partial.mkdir()

    def finish() -> None:
        if rank == 0:
            name_and_prune(partial, final, keep)

    try:
        _agree(start, group)
        writer = storage.Writer(partial, {"step": step} | description)
        with nullcontext() if dist.is_initialized() else _quiet():
            dcp.save({}, storage_writer=writer, planner=ShardSavePlanner(shards), process_group=group)
        _agree(finish, group)
    except CheckpointException as error:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise _save_error(error, folder, step) from (None if _first_error(error, OSError) else error)
    return final


class _NotFiniteError(Exception):
    """Names a tensor of what was to be saved."""


def _save_error(error: CheckpointException, folder: Path, step: int) -> Exception:
    """The line for the user when numbers are not finite, what is read late is refused, or a disk fails.

    A plain error otherwise (CheckpointException is no Exception).
    """
    before = [path for path in steps_in(folder) if not has_diverged(path)]
    kept = f"the last complete checkpoint, {before[-1].name}, is kept" if before else "there is no earlier checkpoint"
    if (name := _first_error(error, _NotFiniteError)) is not None:
        return UserError(f"step {step} is not saved because {name} holds NaN or Inf: lower train.learning_rate; {kept}")
    if (refusal := _first_error(error, UserError)) is not None:
        return UserError(str(refusal))
    cause = _first_error(error, OSError)
    if cause is None:
        return RuntimeError(f"step {step} could not be saved: {error}")
    if cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space left for the checkpoint of step {step} in {folder}: free some, or lower checkpoint.keep; {kept}"
        )
    return UserError(f"the checkpoint of step {step} could not be written to {folder} ({cause}): fix this; {kept}")


def load(path: Path, shards: Sequence[Shard], group: dist.ProcessGroup | None = None) -> None:
    """Fill shards in place from a step's folder, whatever layout saved it; other dtypes are converted.

    Each rank reads of each stored chunk the rows (of its first dimension) that its shards want, and no more; of rows
    that it wants in part it reads the whole, slab by slab. Shards may be views of any stride.

    Sizes are checked, checksums are not: `newest` and `resolve` check those.

    Raises:
        UserError: on every rank, when a tensor is missing, has another shape, or a file is damaged.
    """
    _load(Path(path), shards, group, single=_rank_and_size(group)[1] == 1)


def _load(path: Path, shards: Sequence[Shard], group: dist.ProcessGroup | None, single: bool) -> None:
    try:
        reader = storage.Reader(path) if single else _agree_on_reader(path, group)
        with _quiet():
            planner = ShardLoadPlanner(path, reader.index, shards)
            dcp.load({}, storage_reader=reader, planner=planner, process_group=group, no_dist=single)
    except CheckpointException as error:
        raise _load_error(error, path) from (None if _first_error(error, UserError) else error)


def _agree_on_reader(path: Path, group: dist.ProcessGroup | None) -> storage.Reader:
    readers: list[storage.Reader] = []
    is_first = _rank_and_size(group)[0] == 0
    _agree(lambda: readers.append(storage.Reader(path, is_checked=not is_first)), group)
    return readers[0]


def _load_error(error: CheckpointException, path: Path) -> Exception:
    for kind in (DamagedError, UserError):
        if (cause := _first_error(error, kind)) is not None:
            return kind(str(cause))
    if (cause := _first_error(error, OSError)) is not None:
        return UserError(f"{path} could not be read ({cause}): fix this, or use another checkpoint")
    return RuntimeError(f"{path} could not be loaded: {error}")


def logical_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of every tensor in a step's folder."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in read_index(Path(path)).items()}


def read_tensor(path: Path, name: str) -> Tensor:
    """A whole tensor of a step's folder, on the CPU, read by only this process."""
    tensors = logical_tensors(path)
    if name not in tensors:
        raise UserError(f"{path} has no tensor {brief(name)}: it is another model's checkpoint")
    shape, dtype = tensors[name]
    tensor = torch.empty(shape, dtype=dtype)
    _load(Path(path), [Shard(name, shape, (0,) * len(shape), tensor)], None, single=True)
    return tensor


def newest(
    folder: Path, warn: Callable[[str], None] = log.warning, check_more: Callable[[Path], object] = Path
) -> Path | None:
    """The newest complete checkpoint that is valid: sizes and checksums hold, all is finite, it has not diverged.

    Asked by one process, not by all at once.

    Args:
        folder: the run's folder of checkpoints; it need not exist.
        warn: told of each that is not valid, and which one is used in its place.
        check_more: raises a DamagedError where its caller cannot use a step's folder either.

    Returns:
        The step's folder, or None where no checkpoint was ever completed, or all have diverged.

    Raises:
        UserError: there are checkpoints, none is valid and not all have diverged; or one is of another format version.
    """
    folder = Path(folder)
    if folder.is_dir():
        restore_replaced(folder)
    faults: list[DamagedError] = []
    found = None
    for path in reversed(steps_in(folder)):
        try:
            check_next_step(path)
            check(path)
            check_more(path)
        except DamagedError as error:
            faults.append(error)
        else:
            found = path
            break
    texts = [str(error).removesuffix(f": {OTHER}") for error in faults]
    if found is None and not all(isinstance(error, DivergedError) for error in faults):
        said = [brief(text.removeprefix(f"{folder}{os.sep}"), 80) for text in texts[:2]]
        said += [f"and {len(texts) - 2} more"] * (len(texts) > 2)
        raise UserError(f"no checkpoint in {folder} is valid ({'; '.join(said)}): remove them to start over")
    for text in texts:
        warn(f"{text}: {f'{found.name} is used instead' if found else 'there is no older one'}")
    return found


def resolve(run_or_step: str | os.PathLike[str], finite: bool = True) -> Path:
    """The step's folder that a user means by a run's folder (its newest valid checkpoint) or by a step's own.

    Args:
        run_or_step: the folder.
        finite: refuse a step whose tensors hold NaN or Inf; False: to look at it.

    Raises:
        UserError: neither, or the step is damaged or not finite.
    """
    path = Path(run_or_step)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: give a run's folder or one of its checkpoints/step-...")
    if (path / MANIFEST).exists() or STEP_NAME.fullmatch(path.name):
        (check if finite else verify)(path)
        if has_diverged(path):
            log.warning("%s has diverged (its next step: %s)", path, read_next_step(path))
        return path
    found = newest(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        raise UserError(f"{path} has no usable checkpoint: train first, or give another run's folder")
    return found
