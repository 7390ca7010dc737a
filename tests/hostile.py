"""What an attacker or a broken tool would give: odd values, changed JSON and bytes; and limits to try them within."""

import copy
import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_mamba.errors import UserError

LONGEST = 300  # characters of an error's line
RAW = {"@digits": "9" * 5000, "@deep": "[" * 100_000 + "]" * 100_000, "@huge": "1e999", "@twice": '{"a": 1, "a": 2}'}
"""Text -> what is written in its place, which no Python value gives."""
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**60, 2**62, 2**63, 2**64, -(2**63), 10**4000),
    *(0.5, 1.0, -1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"), *RAW),
    *("", "16", "x", "a\nb", "a\0b", "\ud800", "\u202e", "../x", "/etc/passwd", "F64", "x" * 100_000, "x" * 300),
    *([], {}, [[]], [1], [-1, 2], [2**60, 2**60], [10**9] * 30, {"a": 1}, {"": None}, [[[[{}]]]]),
)


def text_of(tree: Any) -> bytes:
    """`tree` as JSON, with what no Python value gives."""
    text = json.dumps(tree)
    for placeholder, raw in RAW.items():
        text = text.replace(f'"{placeholder}"', raw)
    return text.encode()


def mutated(tree: Any, chance: random.Random) -> Any:
    """A copy of a tree of JSON with one to three changes anywhere in it."""
    tree = copy.deepcopy(tree)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(tree))
        if not places:
            break
        _change(*chance.choice(places), chance)
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in it."""
    for key, value in list(
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield tree, key
        yield from _places(value)


def _change(holder: Any, key: Any, chance: random.Random) -> None:
    value, how = holder[key], chance.randrange(8)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(value, int):
        holder[key] = value + chance.choice((-1, 1, value, 2**32))
    elif how == 2 and isinstance(holder, dict):
        holder[chance.choice(("x", "", "../x", "a\nb", "\ud800", "rank-00001.safetensors"))] = holder.pop(key)
    elif how == 3 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(value))
    elif how == 4:
        other = chance.choice(list(holder if isinstance(holder, dict) else range(len(holder))))
        holder[key], holder[other] = holder[other], value
    else:
        holder[key] = copy.deepcopy(chance.choice(ODD))


def mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    """Some bytes of `data` flipped, cut out, repeated or put in."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = chance.randrange(len(found) + 1)
        how = chance.randrange(5)
        if how == 0 and place < len(found):
            found[place] ^= 1 << chance.randrange(8)
        elif how == 1:
            del found[place : place + chance.choice((1, 2, 9))]
        elif how == 2:
            found[place:place] = found[place : place + chance.choice((1, 8, 30))]
        elif how == 3:
            found[place : place + 1] = chance.choice(
                (b"9", b"-", b"[", b"}", b'"', b"\xff", b"\0", b"e9", b"\xef\xbb\xbf")
            )
        else:
            found[:8] = chance.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(found))).to_bytes(8, "little")
    return bytes(found)


@contextmanager
def limits(memory: int = 2**29, seconds: float = 5.0) -> Iterator[None]:
    """Let what runs inside take no more address space than `memory` bytes beside what is taken, and no more time.

    Args:
        memory: bytes.
        seconds: of this process; of waiting, as for a FIFO, ten times as many.
    """

    def too_long(*_: object) -> None:
        raise AssertionError(f"it takes longer than {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, 10 * seconds))
    handlers = [signal.signal(number, too_long) for _, number, _ in timers]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, before[1]))
    for timer, _, length in timers:
        signal.setitimer(timer, length)
    try:
        yield
    finally:
        for (timer, number, _), handler in zip(timers, handlers, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def refusal_of(function: Callable[[], object]) -> str | None:
    """The one line that a call ends with; None where it ends well. Any other error is the test's."""
    try:
        with limits():
            function()
    except UserError as error:
        line = str(error)
        assert len(line.splitlines()) == 1 and line.isprintable(), f"not one line: {line!r}"
        assert len(line) <= LONGEST, f"{len(line)} characters: {line}"
        return line
    return None
