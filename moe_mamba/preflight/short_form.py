"""What every start on several machines looks at, in seconds, before there is a process group.

Before it, because a host name that leads nowhere would end there in a traceback of gloo, and because a run that has
begun nothing is refused with exit code 2 and one line, on all ranks alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from moe_mamba.config import Config
from moe_mamba.data.tokenizer import load_tokenizer
from moe_mamba.errors import UserError
from moe_mamba.model.language_model import LanguageModel
from moe_mamba.parallel.network import is_loopback
from moe_mamba.parallel.topology import World
from moe_mamba.planning.memory import checkpoint_bytes
from moe_mamba.preflight import checks, network
from moe_mamba.preflight.exchange import Exchange
from moe_mamba.preflight.facts import rank_facts
from moe_mamba.preflight.folders import Seen, cache_folders, grouped, look
from moe_mamba.preflight.report import Clock, Finding, Folder, RankFacts

TOLD = 8  # refusals, and as many other findings, that ranks other than the first hear


@dataclass(frozen=True)
class Comparison:
    """What came out when the ranks compared what they know; all but the findings only on rank 0.

    Attributes:
        findings: on rank 0 all; on the others the first refusals and warnings, without the names of machines.
        machines: host name -> its ranks.
        ranks: facts of each.
        clocks: of machines other than rank 0's.
        folders: who sees the same.
        checkpoint_bytes: of one checkpoint; None: not known.
    """

    findings: list[Finding]
    machines: dict[str, list[int]]
    ranks: list[RankFacts]
    clocks: list[Clock]
    folders: list[Folder]
    checkpoint_bytes: int | None

    @property
    def refusals(self) -> list[Finding]:
        """What a run would fail of."""
        return [finding for finding in self.findings if finding.level == "refused"]


def check_machines(config: Config, world: World, store: dist.Store, say: Callable[[str], None]) -> None:
    """Refuse a world of several machines that cannot train; nothing for a single machine.

    Args:
        config: of the run.
        world: its processes.
        store: that all ranks reach.
        say: is told what is wrong but not refused.

    Raises:
        UserError: ranks do not come, or something would fail; the same line on all ranks.
    """
    if world.local_size >= world.size:
        return
    comparison = compare(Exchange(world, store, config.parallel.timeout), config, thorough=False)
    for finding in comparison.findings:
        if finding.level == "warning":
            say(f"warning   {finding.line}")
    if refusals := comparison.refusals:
        more = f" (and {len(refusals) - 1} more: launch/preflight.py tells all)" if len(refusals) > 1 else ""
        raise UserError(f"{refusals[0].line}{more}")


def compare(exchange: Exchange, config: Config, *, thorough: bool) -> Comparison:
    """Collect what every rank knows, and find what is wrong; every rank calls it.

    Args:
        exchange: of all ranks.
        config: of the run.
        thorough: look at the kernels and the caches of libraries as well.

    Raises:
        UserError: a rank did not come.
    """
    world = exchange.world
    facts = rank_facts(config, world, thorough=thorough)
    places = exchange.to_first(facts.machine, str)
    machines: dict[str, list[int]] = {}
    for rank, place in enumerate(places or ()):
        machines.setdefault(place, []).append(rank)
    speaks, count = exchange.each_from_first(places and _speakers(machines, world.size), tuple[bool, int])
    if count > 1:
        facts = facts.model_copy(update={"unreached": _unreached(exchange, facts, machines, speaks)})
    paths = {"run.folder": Path(config.run.folder)}
    if any(source.is_documents for source in facts.data):
        paths["data.cache"] = Path(config.data.cache)
    if thorough and speaks:
        paths |= cache_folders()
    seen = look(exchange, facts.machine, paths)
    others = [ranks[0] for ranks in machines.values() if ranks[0] != 0]
    offset = exchange.clock_offset(others, speaks and not world.is_first)
    everyone = exchange.to_first((facts, offset), tuple[RankFacts, tuple[float, float] | None])
    comparison = _conclude(config, machines, everyone, seen, paths) if everyone else None
    findings = exchange.from_first(comparison and _told(comparison.findings), list[Finding])
    exchange.to_first()  # rank 0, which has the store, is the last to leave
    if comparison is not None:
        return comparison
    return Comparison(findings, {}, [], [], [], None)


def _conclude(
    config: Config,
    machines: dict[str, list[int]],
    everyone: list[tuple[RankFacts, tuple[float, float] | None]],
    seen: dict[str, list[Seen]],
    paths: dict[str, Path],
) -> Comparison:
    """On rank 0: what the facts of all ranks come to."""
    ranks = [facts for facts, _ in everyone]
    clocks = [
        Clock(machine=fact.machine, offset_seconds=offset[0], delay_seconds=offset[1])
        for fact, (_, offset) in zip(ranks, everyone, strict=True)
        if offset is not None
    ]
    size = _checkpoint_bytes(config)
    folders = [grouped(name, paths.get(name, Path(name)), who) for name, who in seen.items()]
    findings = [
        *checks.check_facts(ranks),
        *checks.check_clocks(clocks),
        *checks.check_folder(seen["run.folder"]),
        *checks.check_cache(ranks, seen.get("data.cache", [])),
        *checks.check_disk(ranks, size),
        *(_describe(folder) for folder in folders if folder.name.startswith("cache of ") and len(machines) > 1),
    ]
    return Comparison(findings, machines, ranks, clocks, folders, size)


def _told(findings: list[Finding]) -> list[Finding]:
    """What all ranks hear: a finding for each machine, told to each rank, would be as many as the square of them."""
    refused = [finding for finding in findings if finding.level == "refused"]
    others = [finding for finding in findings if finding.level != "refused"]
    return [finding.model_copy(update={"machines": []}) for finding in (*refused[:TOLD], *others[:TOLD])]


def _describe(folder: Folder) -> Finding:
    kind = "shared by all machines" if len(folder.groups) == 1 else f"{len(folder.groups)} separate ones"
    return Finding(level="ok", subject=folder.name, line=f"{folder.path}: {kind}")


def _speakers(machines: dict[str, list[int]], size: int) -> list[tuple[bool, int]]:
    """Of each rank, whether it is its machine's first, and how many machines there are."""
    first = {ranks[0] for ranks in machines.values()}
    return [(rank in first, len(machines)) for rank in range(size)]


Door = tuple[str, int, str] | None
"""Where a machine's first rank listens: address, port, token; None: it finds no address."""


def _unreached(exchange: Exchange, facts: RankFacts, machines: dict[str, list[int]], speaks: bool) -> dict[str, str]:
    """Machines that this rank's one cannot connect to, of rank 0's and the next one; found out by their first ranks.

    Args:
        exchange: of all ranks.
        facts: of this rank.
        machines: host name -> its ranks; on rank 0.
        speaks: whether this is the machine's first rank.
    """
    listener = network.Listener(facts.address) if speaks and facts.address is not None else None
    door = (facts.address, listener.port, listener.token) if listener else None
    doors = exchange.to_first(door, Door)
    asked = exchange.each_from_first(doors and _to_ask(machines, doors), list[tuple[str, Door]])
    found: dict[str, str] = {}
    for name, other in asked if listener else ():
        # An address that no other machine reaches is told by itself.
        if other is not None and not is_loopback(other[0]) and (why := network.connect(*other)) is not None:
            found[name] = why
    exchange.to_first()
    exchange.from_first()  # all have connected
    if listener is not None:
        listener.close()
    return found


def _to_ask(machines: dict[str, list[int]], doors: list[Door]) -> list[list[tuple[str, Door]]]:
    """The doors at which each rank knocks: a machine's first rank at rank 0's machine and at the next one."""
    names = list(machines)
    asked: list[list[tuple[str, Door]]] = [[] for _ in doors]
    for place, name in enumerate(names):
        others = dict.fromkeys((names[0], names[(place + 1) % len(names)]))
        asked[machines[name][0]] = [(other, doors[machines[other][0]]) for other in others if other != name]
    return asked


def _checkpoint_bytes(config: Config) -> int | None:
    try:
        if not config.has_vocabulary:
            config = config.with_vocabulary(load_tokenizer(config.data.tokenizer).vocab_size)
        return checkpoint_bytes(LanguageModel.on_meta(config.model, config.moe))
    except UserError:
        return None
