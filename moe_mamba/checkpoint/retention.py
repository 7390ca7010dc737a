"""The folders of a run's saved steps: their names, which of them serve, and which of them stay."""

import json
import logging
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from moe_mamba.atomic_file import remove_leftovers, rename, write_atomically
from moe_mamba.checkpoint.divergence import (
    DivergedError,
    NextStep,
    check_finite,
    has_diverged,
    read_next_step,
    write_next_step,
)
from moe_mamba.checkpoint.manifest import DamagedError, read_description, verify
from moe_mamba.errors import UserError

STEP_NAME = re.compile(r"step-(\d{8,})")
log = logging.getLogger(__name__)


def steps_in(folder: Path) -> list[Path]:
    """Folders of complete steps, oldest first."""
    if not folder.is_dir():
        return []
    matches = ((STEP_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    found = [(int(match[1]), path) for match, path in matches if match and path.is_dir()]
    return [path for _, path in sorted(found)]


def name_of(step: int) -> str:
    """Name of a step's folder."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Number of the step that a step's folder holds."""
    return int(path.name.removeprefix("step-"))


def restore_replaced(folder: Path) -> None:
    """Give a step back its name, if a kill came between moving it aside and naming the one that replaces it."""
    for aside in folder.glob(".step-*.replaced"):
        name = folder / aside.name[1:].removesuffix(".replaced")
        if not name.exists():
            rename(aside, name)


def clear(folder: Path) -> None:
    """Remove what killed saves left behind."""
    restore_replaced(folder)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    remove_leftovers(folder)


def _remove(path: Path) -> None:
    """Remove a step; hidden first, so that no half of it is ever taken for a checkpoint."""
    aside = path.with_name(f".{path.name}.old")
    rename(path, aside)
    shutil.rmtree(aside)


def name_and_prune(partial: Path, final: Path, keep: int) -> None:
    """Give a finished step its name; then drop what is not kept.

    Args:
        partial: the folder that the step was written to.
        final: its folder from now on; an earlier one of this name is replaced.
        keep: see `store.save`.
    """
    aside = final.with_name(f".{final.name}.replaced")
    if final.exists():
        rename(final, aside)
    rename(partial, final)
    if aside.exists():
        shutil.rmtree(aside)
    for path in steps_in(final.parent):
        if step_of(path) > step_of(final) and _is_unusable(path):  # a later step that this run could not resume from
            _remove(path)
    _prune(final, keep)


def _prune(latest: Path, keep: int) -> None:
    """Of the steps up to `latest`, keep the newest `keep` and the best.

    Until a step was made from `latest`, the one before it stays too: weights may be finite and their next loss NaN.
    """
    steps = [path for path in steps_in(latest.parent) if step_of(path) <= step_of(latest)]
    serving = [path for path in steps if not has_diverged(path)]
    kept = serving[-(keep if read_next_step(latest) else max(keep, 2)) :]
    best = _best(steps)
    if best is not None:
        _write_best(latest.parent, *best)
        kept.append(best[0])
    for path in steps:
        if path not in kept:
            _remove(path)


def note_next_step(folder: Path, step: int, next_step: NextStep, keep: int) -> None:
    """Note what the step after a saved one gave, if it was saved, and drop what stayed until this was known.

    Of one process. That a step has diverged is not believed where training went on from it before: then something else
    has changed, and it is kept. A disk's fault is a warning: without the note the step is not known, and is used.

    Args:
        folder: the run's folder of checkpoints.
        step: the saved step.
        next_step: made from it.
        keep: see `store.save`.
    """
    path = folder / name_of(step)
    try:
        if not path.is_dir():
            return
        if next_step.is_finite:
            write_next_step(path, next_step)
            _prune(path, keep)
        elif path == steps_in(folder)[-1]:
            write_next_step(path, next_step)
    except OSError as error:
        log.warning("%s: its next step (%s) could not be noted: %s", path, next_step, error)


def check(path: Path) -> None:
    """Check that a step's files are what was written, and all numbers finite.

    Raises:
        DamagedError: they are not.
        UserError: the checkpoint is of another format version.
    """
    verify(path)
    check_finite(path)


def check_next_step(path: Path) -> None:
    """Raise a DivergedError for a step from which no training can go on."""
    if has_diverged(path):
        raise DivergedError(
            f"{path} has diverged (step {step_of(path) + 1:,}: {read_next_step(path)}): use another checkpoint"
        )


def _is_unusable(path: Path) -> bool:
    try:
        check_next_step(path)
        check(path)
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
    best = {"step": step_of(path), "checkpoint": path.name, "validation_loss": loss}
    write_atomically(folder / "best.json", json.dumps(best) + "\n")
