"""Where a test steps into a run: public calls that the trainer makes of others, each at one place of the loop."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Act = Callable[[Any], None]


def _nothing(trainer: Any) -> None:
    """Do nothing before, or after, a call."""


@contextlib.contextmanager
def stepping_in(place: str, before: Act = _nothing, after: Act = _nothing) -> Iterator[None]:
    """In a worker: call `before(trainer)` and `after(trainer)` around one place of the loop, each time it is passed.

    Args:
        place: ``step``, where one begins, when ``trainer.made`` are begun; ``made``, where one was read, but not
            saved, when ``trainer.step`` are read; ``validation``; ``save``.
        before: gets the trainer when the place is reached; what it raises ends the run as a fault of that place would.
        after: gets the trainer when the place is left.
    """
    from moe_mamba.checkpoint.saver import Saver
    from moe_mamba.parallel import engine
    from moe_mamba.run.console import Screen
    from moe_mamba.train import trainer as loop

    owner, name = {
        "step": (engine, "set_learning_rate"),
        "made": (Screen, "advance"),
        "validation": (loop, "evaluate"),
        "save": (Saver, "save"),
    }[place]
    run, call = loop.Trainer.run, getattr(owner, name)
    running: list[loop.Trainer] = []

    def run_and_tell(trainer: loop.Trainer) -> None:
        running.append(trainer)
        run(trainer)

    def call_between(*rest: Any, **options: Any) -> Any:
        before(running[-1])
        result = call(*rest, **options)
        after(running[-1])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "run", run_and_tell)
        patch.setattr(owner, name, call_between)
        yield
