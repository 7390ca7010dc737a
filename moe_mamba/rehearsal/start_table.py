"""The start of a run as a table: one line a figure, one column a world."""

from collections.abc import Iterator, Sequence
from functools import partial

from moe_mamba.config import Config
from moe_mamba.planning.memory import size
from moe_mamba.rehearsal.start import fitted, start_costs
from moe_mamba.rehearsal.start_parts import Part


def start_table(config: Config, worlds: Sequence[int], *, machine: int = 8, gpu: str = "h100") -> str:
    """What the start takes of rank 0 and of the last rank, one line a figure, one column a world.

    Args:
        config: of the run, with the size of the vocabulary.
        worlds: numbers of processes.
        machine: processes of a machine.
        gpu: whose kernels are chosen.

    Raises:
        UserError: the sizes do not fit.
    """
    start = partial(start_costs, config, machine=machine, gpu=gpu)
    start(worlds[0], 0)  # libraries are loaded, and torch's caches filled
    columns: list[dict[tuple[str, ...], str]] = []
    for gpus in worlds:
        layout = fitted(config, gpus).parallel
        experts = f"EP {layout.expert}{' by tensor' * layout.expert_tensor}"
        columns.append({("layout",): f"TP {layout.tensor}, {experts}, ZeRO {layout.zero}"})
        for rank, name in ((0, "rank 0"), (gpus - 1, "last rank"))[:gpus]:
            parts = start(gpus, rank)
            measured = {part.name: part for part in start(gpus, rank, measured=True)}
            for part in parts:
                if same := measured.get(part.name):
                    part.kept, part.peak = same.kept, same.peak
                columns[-1] |= {(part.name, name, what): text for what, text in figures(part)}
    return "\n".join(lines_of([f"{gpus:,} ranks" for gpus in worlds], columns))


def lines_of(heads: list[str], columns: list[dict[tuple[str, ...], str]]) -> list[str]:
    """A line for each key in any column, in the order of the last one, which has every part; ``-`` where one has none.

    Args:
        heads: of the columns.
        columns: part, rank and name of a figure -> its text.
    """
    keys = list(dict.fromkeys(key for column in reversed(columns) for key in column))
    rows = [("", *heads)]
    rows += [(", ".join(key), *(column.get(key, "-") for column in columns)) for key in keys]
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    return ["  ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def figures(part: Part) -> Iterator[tuple[str, str]]:
    """What a part took, figure by figure: name and text.

    A figure with ``~`` is in proportion to what was counted with fewer ranks.
    """
    yield "seconds", _scaled(part, part.seconds, "{:.2f}")
    if part.peak > 0:
        yield "Python's memory after, at most", f"{size(max(part.kept, 0))}, {size(part.peak)}"
    yield "objects", _scaled(part, max(part.objects, 0), "{:,.0f}")
    if part.groups:
        yield "groups made, their members, ranks listed", f"{part.groups:,}, {part.members:,}, {part.listed:,}"
    if part.store:
        yield "keys at the store", f"{part.store.total():,}, {size(part.store_bytes)}"
    if part.connections > 1:
        for name, count in (("connections", part.connections), ("bytes there", part.sent)):
            yield name, _scaled(part, count, "{:,.0f}")
    if part.descriptors > 0 or part.threads > 0:
        yield "descriptors, threads left", f"{_scaled(part, part.descriptors, '{:,.0f}')}, {part.threads}"
    if part.files:
        done = (part.files[kind] for kind in ("opened", "removed", "folders read", "stats"))
        yield "files opened, removed; folders read; looks", ", ".join(f"{count:,}" for count in done)
        yield "bytes of files read, mapped", f"{size(part.read)}, {size(part.mapped)}"
    if part.shards:
        yield "chunks in a checkpoint", f"{part.shards:,}"
    for kind in dict.fromkeys(kind for kind, _ in part.collectives):
        calls = sum(count for key, count in part.collectives.items() if key[0] == kind)
        ranks = max(ranks for found, ranks in part.collectives if found == kind)
        sent = sum(count for key, count in part.collective_bytes.items() if key[0] == kind)
        yield f"{kind}: calls, bytes, most ranks", f"{calls:,}, {size(sent)}, {ranks:,}"


def _scaled(part: Part, value: float, form: str) -> str:
    return form.format(value) if part.share == 1 else "~" + form.format(value / part.share)
