"""What happened to a run besides its steps: `events.jsonl`, one JSON object a line, read by people and by `status`."""

import json
import logging
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_mamba.errors import one_line
from moe_mamba.parallel.messages import Text

Whole = Annotated[int, Field(ge=0, le=10**15)]
Number = Annotated[float, Field(ge=-1e15, le=1e15)]
FILE = "events.jsonl"
LOG_TAIL = 2**18  # bytes of a log in which the line that ended a run is looked for
ENDS = ("stop", "finish")
STARTS = ("start", "restart")
log = logging.getLogger(__name__)


class Line(BaseModel):
    """A line of a run's files, which other processes write while it is read: what is used of it, of these types."""

    model_config = ConfigDict(strict=True, extra="allow")

    step: Whole


class Event(Line):
    """A line of `events.jsonl`."""

    time: str
    event: str
    steps: Whole = 0
    processes: Whole = 0
    machines: dict[Text, Whole] = {}
    log_bytes: Whole = 0
    reason: Text = ""
    batches: list[Whole] = []
    rank: Whole = 0
    host: Text = ""
    device: Text = ""
    versions: dict[Text, Text] = {}
    times: Number = 0.0
    share: Number = 0.0


class Events:
    """Appends to a run's `events.jsonl`; each line is on its way to the disk before `write` returns.

    Args:
        folder: the run's folder.
        enabled: False on all ranks but the first: nothing is written there.
    """

    def __init__(self, folder: Path, enabled: bool) -> None:
        self.path = Path(folder) / FILE
        self.enabled = enabled

    def write(self, event: str, step: int, **details: Any) -> None:
        """Append a line. A disk's fault is a warning: what is told of a run must not end it.

        Args:
            event: what happened, such as ``restart`` or ``nan``.
            step: steps that were made before it.
            details: more of it, as JSON; numbers that are not finite are written as text.
        """
        if not self.enabled:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, "step": step}
        text = json.dumps(line | {key: _plain(value) for key, value in details.items()}, allow_nan=False)
        try:
            with self.path.open("ab+") as stream:
                whole = stream.tell() == 0 or _last_byte(stream) == b"\n"
                stream.write(b"" if whole else b"\n")  # what a kill truncated stays a line of its own
                stream.write(text.encode() + b"\n")
        except OSError as error:
            log.warning("%s: the event %s of step %s could not be written: %s", self.path, event, step, error)


def _last_byte(stream: Any) -> bytes:
    stream.seek(-1, os.SEEK_END)
    return bytes(stream.read(1))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path, kind: type[Line]) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file that are of a kind, and how many are not; nothing where there is no file."""
    lines, damaged = [], 0
    if not path.exists():
        return [], 0
    try:
        content = path.read_bytes() if path.is_file() else b"no file"  # to open a FIFO waits for ever
    except OSError:  # another user's
        return [], 1
    for text in content.split(b"\n"):
        if not text.strip():
            continue
        try:
            lines.append(kind.model_validate_json(text).model_dump(exclude_unset=True))
        except ValidationError:
            damaged += 1
    return lines, damaged


def read_events(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of a run, oldest first, and how many lines are damaged; those without a time are."""
    lines, damaged = read_lines(Path(folder) / FILE, Event)
    events = [line for line in lines if time_of(line) is not None]
    return events, damaged + len(lines) - len(events)


def time_of(line: dict[str, Any]) -> datetime | None:
    """When an event or a heartbeat was written; None where it does not say so."""
    try:
        time = datetime.fromisoformat(line["time"])
    except (KeyError, TypeError, ValueError):
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def why_ended(events: list[dict[str, Any]], log_file: Path) -> str:
    """How the process of the last start in `events` ended, in words.

    What it wrote itself; else the last error in its part of the log, which another rank may have written; else it
    died without a word.
    """
    for event in reversed(events):
        if event["event"] == "finish":
            return "it was finished"
        if event["event"] == "stop":
            return event.get("reason", "stopped")
        if event["event"] in STARTS:
            said = _last_error(log_file, event.get("log_bytes", 0))
            return said or "it ended without a word (killed, or its machine was lost)"
    return "it ended before it began to train"


def _last_error(log_file: Path, start: int) -> str | None:
    """The last line of a log from byte `start` on that says an error."""
    try:
        with log_file.open("rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(start, end - LOG_TAIL, 0))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return next((one_line(line[7:]) for line in reversed(lines) if line.startswith("error: ")), None)
