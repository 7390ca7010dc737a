"""YAML files of settings, read strictly: what is written twice, reads as something else or goes too deep is refused.

Every plain scalar is text, and null where it is empty: the key that it belongs to says how it is read, as on a command
line. So ``010`` is ten, a date or ``1:30`` is itself, and nothing depends on which YAML version knows ``1e-3``.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from moe_mamba.errors import UserError, shown

LARGEST = 1 << 18  # bytes; the largest of ours has 3,000
DEEPEST = 8  # levels; ours have four
NULL = ("", "~", "null", "Null", "NULL")
# YAML takes a bare `*-` for an alias and a bare `-` for a list; a pattern is always text.
BARE_PATTERN = re.compile(r"(?m)((?:^|[{,])[ \t]*pattern:[ \t]+)([*-][^\s\"'#,}]*)")


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: dictionaries with text as keys, lists, text, and None.

    Raises:
        UserError: it cannot be read, is too large, or is no YAML of this kind; names the file and the line.
    """
    text = BARE_PATTERN.sub(r"\1'\2'", _read_text(path))
    try:
        events = yaml.parse(text, Loader=yaml.BaseLoader)
        return _Reader(path, events).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise UserError(f"config file {path}{line}: not YAML ({what}): correct it") from None


def _read_text(path: Path) -> str:
    try:
        # A pipe without a writer would never open.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"config file {path} is no regular file: give the path of a YAML file")
            content = stream.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with NUL, or in letters that the locale has not
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"config file {path} cannot be read ({why}): give the path of a YAML file") from None
    if len(content) > LARGEST:
        raise UserError(f"config file {path} is larger than {LARGEST:,} bytes: give the path of a YAML file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"config file {path} is not UTF-8 text: write it in UTF-8") from None


class _Reader:
    """Builds values from the parser's events, which say where everything stands."""

    def __init__(self, path: Path, events: Iterator[Event]) -> None:
        self.path, self.events = path, events

    def document(self) -> Any:
        """The one document of the file; None where there is none."""
        next(self.events)  # the stream's start
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return None
        value = self._value(next(self.events), 1)
        next(self.events)  # the document's end
        if not isinstance(after := next(self.events), yaml.StreamEndEvent):
            raise self._refusal(after, "a second document begins (---): give one file for each")
        return value

    def _value(self, event: Event, depth: int) -> Any:
        if isinstance(event, AliasEvent):
            raise self._refusal(
                event,
                f"*{event.anchor} is an alias in YAML, which a config has none of: quote a pattern, write out a value",
            )
        if (tag := getattr(event, "tag", None)) not in (None, "!"):
            raise self._refusal(event, f"the tag {shown(tag)} is not read: leave it out")
        if depth > DEEPEST:
            raise self._refusal(event, f"deeper than {DEEPEST} levels: keys are section, key, value")
        if isinstance(event, MappingStartEvent):
            return self._mapping(depth)
        if isinstance(event, SequenceStartEvent):
            return self._sequence(depth)
        assert isinstance(event, ScalarEvent)
        return None if event.implicit[0] and event.value in NULL else event.value

    def _sequence(self, depth: int) -> list[Any]:
        found = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            found.append(self._value(event, depth + 1))
        return found

    def _mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            if not isinstance(event, ScalarEvent):
                raise self._refusal(event, "a key is a word: write it as key: value")
            self._value(event, depth)  # its tag
            if event.value in found:
                raise self._refusal(event, f"{shown(event.value)} stands here twice: give it once")
            found[event.value] = self._value(next(self.events), depth + 1)
        return found

    def _refusal(self, event: Event, what: str) -> UserError:
        assert event.start_mark is not None
        return UserError(f"config file {self.path}, line {event.start_mark.line + 1}: {what}")
