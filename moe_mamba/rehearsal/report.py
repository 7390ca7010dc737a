"""What a rehearsal found, for people and as JSON."""

from collections import Counter
from typing import Any

from moe_mamba.planning.memory import size
from moe_mamba.rehearsal.load import Matrix
from moe_mamba.rehearsal.memory import KINDS
from moe_mamba.rehearsal.recording import Note
from moe_mamba.rehearsal.step import Report

PLACES = 8  # lines of our code whose memory is shown
BREAK = 160  # letters of why a layer was broken into several graphs
COLUMNS = 8  # experts of a send matrix that are shown


def to_json(report: Report) -> dict[str, Any]:
    """Everything, in bytes and seconds; collectives in their order."""
    memory = report.memory
    return {
        "seconds": report.seconds,
        "memory": {
            "total": memory.total,
            "peak": memory.peak,
            "largest": memory.largest,
            "kept": memory.kept,
            "host": memory.host,
            "places": [
                {"kind": kind, "place": place, "bytes": count} for (kind, place), count in memory.places.items()
            ],
        },
        "collectives": [
            one._asdict() | {"place": place} for one, place in zip(report.collectives, report.places, strict=True)
        ],
        "start": [one._asdict() for one in report.start],
        "mixed": [vars(note) for note in report.mixed],
        "waits": [vars(note) for note in report.waits],
        "host": report.host,
        "sends": report.matrices,
        "micro_batch": report.micro_batch,
        "graphs": report.graphs,
        "breaks": report.breaks,
    }


def table(report: Report) -> str:
    """The memory by kind, what travels, what waits and what is mixed."""
    memory = report.memory
    rows = [("micro-batch", f"{report.micro_batch:,} sequences"), ("memory at its peak", size(memory.total))]
    rows += [(f"  {kind}", size(memory.peak[kind])) for kind in KINDS if memory.peak[kind]]
    places = list(memory.places.items())[:PLACES]
    rows += [("  most of it", f"{size(count)} of {kind}, {place}") for (kind, place), count in places]
    rows.append(("  host", size(memory.host)))
    rows += [("    DeepSpeed's", f"{size(count)}, {place}") for place, count in report.host.items()]
    rows += _collective_rows(report)
    rows += _note_rows("waits for the device", report.waits) + _note_rows("mixed devices", report.mixed)
    if report.graphs:
        breaks = [(f"  {count} breaks", reason[:BREAK]) for reason, count in report.breaks.items()]
        rows += [("compiled", f"{report.graphs:,} graphs"), *breaks]
    rows += _load_rows(report.matrices)
    rows.append(("rehearsed", f"in {report.seconds:.0f} s"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _collective_rows(report: Report) -> list[tuple[str, str]]:
    counts: Counter[tuple[str, int, str]] = Counter()
    total: Counter[tuple[str, int, str]] = Counter()
    for one, place in zip(report.collectives, report.places, strict=True):
        key = one.kind, len(one.group), place
        counts[key] += 1
        total[key] += one.bytes
    rows = [("collectives", f"{len(report.collectives):,} a step, {size(sum(total.values()))}")]
    for kind, ranks, place in sorted(total, key=total.__getitem__, reverse=True):
        key = kind, ranks, place
        rows.append((f"  {kind}", f"{size(total[key])} in {counts[key]:,} among {ranks:,} ranks, {place}"))
    return rows


def _note_rows(title: str, notes: list[Note]) -> list[tuple[str, str]]:
    rows = [(title, f"{sum(note.count for note in notes):,}" if notes else "none")]
    return rows + [(f"  {note.phase}", f"{note.count:,} x {note.what}, {note.place}") for note in notes]


def _load_rows(matrices: dict[str, Matrix]) -> list[tuple[str, str]]:
    """Send matrices of the expert groups, each once with the routers that have it."""
    routers: dict[str, list[str]] = {}
    for name, matrix in matrices.items():
        routers.setdefault(str(matrix), []).append(name)
    rows = []
    for names in routers.values():
        matrix, first = matrices[names[0]], names[0]
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rows.append(("rows to each expert", f"{first}{others}: each rank of {len(matrix)} sends"))
        for line in dict.fromkeys(map(tuple, matrix)):
            alike = sum(tuple(row) == line for row in matrix)
            shown = " ".join(f"{count:,}" for count in line[:COLUMNS]) + " ..." * (len(line) > COLUMNS)
            rows.append((f"  {alike} ranks" if alike > 1 else "  1 rank", shown))
    return rows
