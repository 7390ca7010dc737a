"""One line for what ends a run that had begun."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            line = f"no space left in {folder.path}: free some"
        elif error.filename is not None and Path(error.filename).is_relative_to(folder.path):
            line = f"{error.filename} cannot be read or written any more ({error.strerror}): correct this"
        else:
            raise
        raise RunStopped(f"{line}, then the same command resumes the run") from None
    except torch.OutOfMemoryError:
        raise RunStopped(
            "the GPU's memory is full: lower train.micro_batch or set train.recompute=true; "
            "the same command then resumes the run"
        ) from None
