"""Whether ranks see the same folder: each writes a file, and looks for those of all others."""

import contextlib
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from moe_mamba.preflight.exchange import Exchange
from moe_mamba.preflight.report import Folder

PREFIX = ".preflight-"
Rank = Annotated[int, Field(ge=0)]
Range = tuple[Rank, Rank]  # first and last
Nonce = Annotated[str, Field(pattern=r"\A[0-9a-f]{16}\z")]  # of a folder that is made, and removed


@dataclass(frozen=True)
class Seen:
    """What one rank saw in one folder.

    Attributes:
        rank: whose eyes.
        machine: its host name.
        ranks: those whose files it saw.
        fault: why it could not write or look.
    """

    rank: int
    machine: str
    ranks: frozenset[int]
    fault: str | None = None


def look(exchange: Exchange, machine: str, folders: dict[str, Path]) -> dict[str, list[Seen]]:
    """Have every rank write a file into each folder, list those that are there, and read rank 0's and its neighbour's.

    The files lie in a folder of this exchange's own name, which no file system's cache has an answer about, and are
    gone after it. A rank may leave out a folder that it does not have.

    Returns:
        On rank 0: name of a folder -> what each rank saw; nothing on the others.
    """
    world = exchange.world
    nonce: str = exchange.from_first(secrets.token_hex(8), Nonce)
    places = {name: path / f"{PREFIX}{nonce}" for name, path in folders.items()}
    faults = {name: _write(place, world.rank, nonce) for name, place in places.items()}
    exchange.to_first()
    exchange.from_first()  # all have written
    neighbour = (world.rank + 1) % world.size
    reports = {name: _list(place, (0, neighbour), nonce) for name, place in places.items() if not faults[name]}
    reports |= {name: ([], fault) for name, fault in faults.items() if fault}
    told = {name: (ranges(ranks), fault) for name, (ranks, fault) in reports.items()}
    everyone = exchange.to_first((machine, told), tuple[str, dict[str, tuple[list[Range], str | None]]])
    exchange.from_first()  # all have looked
    for place in places.values():
        _remove(place, world.rank)
    seen: dict[str, list[Seen]] = {}
    known: dict[tuple[Range, ...], frozenset[int]] = {}  # most see the same: one set for all of them
    for rank, (host, folders_seen) in enumerate(everyone or ()):
        for name, (parts, fault) in folders_seen.items():
            if (key := tuple(parts)) not in known:
                known[key] = frozenset(one for first, last in key for one in range(first, min(last, world.size) + 1))
            seen.setdefault(name, []).append(Seen(rank, host, known[key], fault))
    return seen


def ranges(ranks: Sequence[int]) -> list[Range]:
    """Sorted ranks as their stretches, first and last: whoever sees all says so in two numbers."""
    found: list[Range] = []
    for rank in ranks:
        if found and rank == found[-1][1] + 1:
            found[-1] = (found[-1][0], rank)
        else:
            found.append((rank, rank))
    return found


def not_all(seen: Sequence[Seen]) -> list[Seen]:
    """Those that did not see the files of all ranks."""
    everyone = frozenset(one.rank for one in seen)
    partial = {ranks for ranks in {one.ranks for one in seen} if ranks != everyone}
    return [one for one in seen if one.ranks in partial]


def grouped(name: str, path: Path, seen: list[Seen]) -> Folder:
    """Which machines see the same folder: those whose ranks saw the same files."""
    groups: dict[frozenset[int], list[str]] = {}
    placed: set[str] = set()
    for one in seen:
        if one.machine not in placed:  # its first rank speaks for it
            groups.setdefault(one.ranks, []).append(one.machine)
            placed.add(one.machine)
    return Folder(
        name=name,
        path=str(path),
        groups=list(groups.values()),
        is_seen_by_all=not not_all(seen) and all(one.fault is None for one in seen),
    )


def cache_folders() -> dict[str, Path]:
    """The caches of libraries, and of our kernels, that exist on this machine."""
    home = Path(os.path.expanduser("~"))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    places = {
        "cache of Hugging Face": Path(os.environ.get("HF_HOME") or cache / "huggingface"),
        "cache of Triton": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
        "cache of our kernels": cache / "moe_mamba" / "kernels",
    }
    return {name: path for name, path in places.items() if path.is_dir()}


def _write(folder: Path, rank: int, nonce: str) -> str | None:
    """Write this rank's file; why that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / str(rank)).open("x") as file:
            file.write(nonce)
            file.flush()
            os.fsync(file.fileno())  # another machine is to see it
    except OSError as error:
        return f"it cannot be written ({error.strerror})"
    return None


def _remove(folder: Path, rank: int) -> None:
    """Remove this rank's file; the last one's folder is empty then, and goes as well.

    If each removed all files, a shared file system would be asked as many times as the square of their number.
    """
    with contextlib.suppress(OSError):
        (folder / str(rank)).unlink(missing_ok=True)
        folder.rmdir()


def _list(folder: Path, read: tuple[int, ...], nonce: str) -> tuple[list[int], str | None]:
    """The ranks whose files are there; those of `read` only if they hold the nonce; why it cannot be read."""
    try:
        found = {int(path.name) for path in folder.iterdir()}
        found -= {rank for rank in found.intersection(read) if (folder / str(rank)).read_text() != nonce}
    except OSError as error:
        return [], f"it cannot be read ({error.strerror})"
    return sorted(found), None
