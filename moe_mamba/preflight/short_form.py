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


@dataclass(frozen=True)
class Comparison:
    """What came out when the ranks compared what they know; `ranks`, `clocks` and `folders` only on rank 0.

    Attributes:
        findings: the same on every rank.
        machines: host name -> its ranks, the same on every rank.
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
    places: list[str] = exchange.from_first(exchange.to_first(facts.machine, str), list[str])
    machines = {place: [rank for rank, one in enumerate(places) if one == place] for place in dict.fromkeys(places)}
    if len(machines) > 1:
        facts = facts.model_copy(update={"unreached": _unreached(exchange, facts, machines)})
    paths = {"run.folder": Path(config.run.folder)}
    if any(source.is_documents for source in facts.data):
        paths["data.cache"] = Path(config.data.cache)
    if thorough and world.rank == machines[facts.machine][0]:
        paths |= cache_folders()
    seen = look(exchange, facts.machine, paths)
    others = [ranks[0] for ranks in machines.values() if ranks[0] != 0]
    offset = exchange.clock_offset(others)
    everyone = exchange.to_first((facts, offset), tuple[RankFacts, tuple[float, float] | None])
    comparison = _conclude(config, machines, everyone, seen, paths) if everyone else None
    findings = exchange.from_first(comparison and comparison.findings, list[Finding])
    exchange.to_first()  # rank 0, which has the store, is the last to leave
    if comparison is not None:
        return comparison
    return Comparison(findings, machines, [], [], [], None)


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


def _describe(folder: Folder) -> Finding:
    kind = "shared by all machines" if len(folder.groups) == 1 else f"{len(folder.groups)} separate ones"
    return Finding(level="ok", subject=folder.name, line=f"{folder.path}: {kind}")


def _unreached(exchange: Exchange, facts: RankFacts, machines: dict[str, list[int]]) -> dict[str, str]:
    """Machines that this rank's one cannot connect to, of rank 0's and the next one; found out by their first ranks."""
    listener = None
    if exchange.world.rank == machines[facts.machine][0] and facts.address is not None:
        listener = network.Listener(facts.address)
    door = (facts.address, listener.port, listener.token) if listener else None
    kind = tuple[str, int, str] | None
    doors = exchange.from_first(exchange.to_first(door, kind), list[kind])
    names = list(machines)
    place = names.index(facts.machine)
    found: dict[str, str] = {}
    for name in {names[0], names[(place + 1) % len(names)]} - {facts.machine} if listener else ():
        door = doors[machines[name][0]]
        # An address that no other machine reaches is told by itself.
        if door is not None and not is_loopback(door[0]) and (why := network.connect(*door)) is not None:
            found[name] = why
    exchange.to_first()
    exchange.from_first()  # all have connected
    if listener is not None:
        listener.close()
    return found


def _checkpoint_bytes(config: Config) -> int | None:
    try:
        if not config.has_vocabulary:
            config = config.with_vocabulary(load_tokenizer(config.data.tokenizer).vocab_size)
        return checkpoint_bytes(LanguageModel.on_meta(config.model, config.moe))
    except UserError:
        return None
