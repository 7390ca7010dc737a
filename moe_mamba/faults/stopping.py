"""One line for what ends a run that had begun."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_mamba.errors import RunStopped, UserError
from moe_mamba.parallel.topology import World
from moe_mamba.run.folder import RunFolder


@contextmanager
def stopping(folder: RunFolder, world: World) -> Iterator[None]:
    """Say in one line what ended a run that had begun."""
    try:
        yield
    except UserError as error:  # too late for the exit code that promises that nothing was begun
        print(f"rank {world.rank}: {error}", flush=True)
        raise RunStopped(str(error)) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunStopped(f"no space left in {folder.path}: free some, then the same command resumes the run") from None
    except torch.OutOfMemoryError:
        raise RunStopped(
            "the GPU's memory is full: lower train.micro_batch or set train.recompute=true; "
            "the same command then resumes the run"
        ) from None
