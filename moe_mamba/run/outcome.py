"""How a run ended, for what started it: launchers turn every exit code into 0 or 1, and a site must tell more apart.

Two environment variables, which `launch/slurm.sbatch` and `launch/kubernetes/pod.sh` set:

- `MOE_MAMBA_OUTCOME`: a file in which rank 0 leaves one line: `running`, `finished`, `stopped` (by a signal, all
  saved), `mistake: ...` (the user's) or `failed: ...`. A process that is killed leaves `running`.
- `MOE_MAMBA_STOPPED_CODE`: the exit code of a run that was stopped and has saved all; 0 where it is not set. With
  another one, a launcher that starts failed processes again goes on where the run was stopped.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_mamba.errors import LocalError, UserError, one_line, shown
from moe_mamba.run.folder import InUse

FILE, STOPPED_CODE = "MOE_MAMBA_OUTCOME", "MOE_MAMBA_STOPPED_CODE"


@dataclass
class Outcome:
    """How a run ended; `is_finished` is for its caller to set: all steps are made."""

    is_finished: bool = False


@contextmanager
def outcome_left() -> Iterator[Outcome]:
    """Leave the outcome of what runs inside; where that was stopped, end with the code that the environment names.

    Raises:
        UserError: the environment's code is no number, or its file cannot be written.
        SystemExit: stopped, and another code than 0 was asked for.
    """
    code = _stopped_code()
    _write("running")
    outcome = Outcome()
    try:
        yield outcome
    except BaseException as error:
        # To wait may help where a folder is in use, or a machine is not there yet.
        is_mistake = isinstance(error, UserError) and not isinstance(error, InUse | LocalError)
        _write(f"{'mistake' if is_mistake else 'failed'}: {error}")
        raise
    _write("finished" if outcome.is_finished else "stopped")
    if code and not outcome.is_finished:
        sys.exit(code)


def _stopped_code() -> int:
    text = os.environ.get(STOPPED_CODE, "0")
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or int(text) > 255:
        raise UserError(f"{STOPPED_CODE}={shown(text)[1:-1]} is no exit code: give a number from 0 to 255")
    return int(text)


def _write(line: str) -> None:
    """Overwrite the file in place: other machines, which have it open or cached, see the new line at once."""
    path = os.environ.get(FILE)
    if not path or os.environ.get("RANK", "0") != "0":
        return
    try:
        Path(path).write_text(one_line(line) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{FILE}={path} cannot be written: {error.strerror}") from None
