"""From where a run goes on whose step is spoilt: for the line that ends it, and for going back by itself."""

import logging
from pathlib import Path

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.divergence import NextStep
from moe_mamba.config import Config
from moe_mamba.errors import UserError

log = logging.getLogger(__name__)


def way_on_line(folder: Path, config: Config, begun: int, step: int, next_step: NextStep | None) -> str:
    """Note that training cannot go on from here, and say from where it can; of one process.

    Args:
        folder: the run's folder of checkpoints.
        config: of the run.
        begun: steps that were made when this process started.
        step: steps that are made.
        next_step: the one that cannot be made, where the weights are to blame.
    """
    if next_step is not None:
        store.note_next_step(folder, step, next_step, config.checkpoint.keep)
    try:
        kept = store.newest(folder)
    except UserError as error:
        return str(error)
    is_given = step == 0 and config.train.warm_start  # the rate has changed nothing yet
    advice = "give train.warm_start other weights" if is_given else "lower train.learning_rate"
    advice += ", or look at the data of this step"
    if kept is None:
        return f"There is no valid checkpoint: {advice}; the same command then starts over"
    again = ", as this run did; if that does not help, remove it" if store.step_of(kept) == begun else ""
    return f"{kept} is kept: {advice}; the same command then resumes from it{again}"


def newest_kept(folder: Path, config: Config, step: int, next_step: NextStep | None) -> Path | None:
    """The newest checkpoint to go back to, or None where there is none; of one process.

    Args:
        folder: the run's folder of checkpoints.
        config: of the run.
        step: steps that are made.
        next_step: the one that cannot be made, where a second batch gave NaN with the same weights: it is they, and an
            older checkpoint is taken.
    """
    if next_step is not None:
        store.note_next_step(folder, step, next_step, config.checkpoint.keep)
    try:
        return store.newest(folder)
    except UserError as error:
        log.warning("%s", error)
        return None
