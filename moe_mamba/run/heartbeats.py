"""Signs of life: a small file for each machine of a run, `heartbeats/<host name>`, whose age says whether it works."""

import contextlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moe_mamba.run.events import Line, time_of

FOLDER = "heartbeats"


class Heartbeat(Line):
    """What such a file holds."""

    time: str
    process: int


def write_heartbeat(folder: Path, host: str, step: int) -> None:
    """Say that this machine works at a run: the time, the steps made, and the process.

    Not brought to the disk at once, for it is of no use after a power cut. On a full disk only the file's time changes.

    Args:
        folder: the run's folder.
        host: name of the machine.
        step: steps made.
    """
    path = folder / FOLDER / host
    aside = path.with_name(f".{host}.tmp")
    content = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "process": os.getpid()}
    try:
        path.parent.mkdir(exist_ok=True)
        aside.write_text(json.dumps(content) + "\n")
        os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.utime(path)


def read_heartbeats(folder: Path) -> dict[str, dict[str, Any]]:
    """Host name -> its last sign of life; `time` is a datetime. A damaged file is none."""
    found = {}
    for path in sorted((Path(folder) / FOLDER).glob("[!.]*")):
        if not path.is_file():  # to open a FIFO waits for ever
            continue
        try:
            content = Heartbeat.model_validate_json(path.read_bytes()).model_dump()
        except (OSError, ValidationError):
            continue
        if (time := time_of(content)) is not None:
            found[path.name] = content | {"time": time}
    return found


def forget_machines(folder: Path, hosts: set[str]) -> None:
    """Drop the signs of life of machines that are no longer of the run."""
    for path in (Path(folder) / FOLDER).glob("[!.]*"):
        if path.name not in hosts:
            with contextlib.suppress(OSError):  # another user's, or a folder
                path.unlink()
