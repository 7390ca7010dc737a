"""From where a run goes on whose step is spoilt: for the line that ends it, and for going back by itself.

Rank 0 looks, and all ranks, which call these together, get what it finds.
"""

import logging
from pathlib import Path

import torch.distributed as dist

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.divergence import NextStep
from moe_mamba.config import Config
from moe_mamba.errors import UserError
from moe_mamba.parallel.distributed import from_first

log = logging.getLogger(__name__)


def way_on_line(folder: Path, config: Config, begun: int, step: int, next_step: NextStep | None) -> str:
    """Note that training cannot go on from here, and say from where it can.

    Args:
        folder: the run's folder of checkpoints.
        config: of the run.
        begun: steps that were made when this process started.
        step: steps that are made.
        next_step: the one that cannot be made, where the weights are to blame.
    """
    kept, fault = _newest(folder, config, step, next_step)
    if fault:
        return fault
    is_given = step == 0 and config.train.warm_start  # the rate has changed nothing yet
    advice = "give train.warm_start other weights" if is_given else "lower train.learning_rate"
    advice += ", or look at the data of this step"
    if kept is None:
        return f"There is no valid checkpoint: {advice}; the same command then starts over"
    again = ", as this run did; if that does not help, remove it" if store.step_of(kept) == begun else ""
    return f"{kept} is kept: {advice}; the same command then resumes from it{again}"


def newest_kept(folder: Path, config: Config, step: int, next_step: NextStep | None) -> Path | None:
    """The newest checkpoint to go back to, or None where there is none.

    Args:
        folder: the run's folder of checkpoints.
        config: of the run.
        step: steps that are made.
        next_step: the one that cannot be made, where a second batch gave NaN with the same weights: it is they, and an
            older checkpoint is taken.
    """
    kept, fault = _newest(folder, config, step, next_step)
    if fault:
        log.warning("%s", fault)
    return kept


def _newest(folder: Path, config: Config, step: int, next_step: NextStep | None) -> tuple[Path | None, str]:
    """Note what the next step gave; then the newest valid checkpoint, or why there is none."""
    found: tuple[Path | None, str] = None, ""
    if dist.get_rank() == 0:
        if next_step is not None:
            store.note_next_step(folder, step, next_step, config.checkpoint.keep)
        try:
            found = store.newest(folder), ""
        except UserError as error:
            found = None, str(error)
    return from_first(found)
