"""All ranks of a world agree on what they send to one another, though only a few are rehearsed."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import zip_longest

from moe_mamba.config import Config
from moe_mamba.errors import RunStopped
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.cluster import Cluster
from moe_mamba.planning.load import Load
from moe_mamba.planning.micro_batch import largest_micro_batch
from moe_mamba.rehearsal.agreement import Call, Circle, Disagreement, circle, disagreement, meeting
from moe_mamba.rehearsal.roles import Entry, Layout
from moe_mamba.rehearsal.step import Report, rehearse

MICRO_STEPS = 2  # at most, of a step: one between, and the last, after which weights are updated


def check_all(
    config: Config, gpus: int, load: Load, say: Callable[[str], None], *, machine: int = 8, gpu: str = "h100"
) -> None:
    """Rehearse the first and the last rank of each role, compare what members of groups do, and follow all ranks.

    Args:
        config: of the run; of its micro-steps no more than two are made.
        gpus: processes of the run.
        load: how tokens spread over experts.
        say: is told what was found, line by line.
        machine: processes of a machine.
        gpu: whose kernels are chosen.

    Raises:
        UserError: the run would be refused.
        RunStopped: a rank breaks, a group's members do not do the same, or ranks wait for one another: names the first.
    """
    local = min(machine, gpus)
    plan = RunPlan.of(config, Topology.of(config, World(0, gpus, 0, local)))
    config = _shortened(plan, gpu)
    layout = Layout(plan)
    roles = layout.roles()
    say(f"roles       {len(roles)} of {gpus:,} ranks")
    entries: list[list[Entry]] = []
    for ranks in roles:
        seen = sorted({ranks[0], ranks[-1]})
        reports = [rehearse(config, gpus, rank, load, gpus_per_machine=machine, gpu=gpu) for rank in seen]
        done = [layout.entries(rank, report) for rank, report in zip(seen, reports, strict=True)]
        seconds = sum(report.seconds for report in reports)
        named = " and ".join(f"{rank:,}" for rank in seen)
        say(f"  {len(ranks):>9,} ranks, {len(done[0]):,} collectives each; rehearsed {named} in {seconds:.0f} s")
        if found := difference(layout, seen[0], done[0], seen[-1], done[-1]):
            raise RunStopped(str(found))
        entries.append(merged(seen[0], done[0], seen[-1], done[-1]))
    for line in compare(layout, roles, entries):
        say(line)
    say(follow(layout, roles, entries))


def check_some(
    config: Config,
    gpus: int,
    ranks: Sequence[int],
    load: Load,
    say: Callable[[str], None],
    *,
    machine: int = 8,
    gpu: str = "h100",
) -> None:
    """Rehearse these ranks, and compare in each group what those of its members do that are among them.

    Args and raises: as ``check_all``, and the ranks; all micro-steps are made.
    """
    make = partial(rehearse, config, gpus, load=load, gpus_per_machine=machine, gpu=gpu)
    done: dict[int, list[Call]] = {}
    for rank in dict.fromkeys(ranks):
        report = make(rank)
        done[rank] = calls_of(report)
        say(f"rank {rank:<6,} {len(done[rank]):,} collectives, rehearsed in {report.seconds:.0f} s")
    if found := disagreement(done):
        raise RunStopped(str(found))
    orders = {rank: [meeting(rank, call.collective) for call in calls] for rank, calls in done.items()}
    if waits := circle(orders):
        raise RunStopped(str(Circle(tuple((rank, done[rank][number]) for rank, number in waits))))
    groups = Counter(group for calls in done.values() for group in {call.collective.group for call in calls})
    shared = sum(count > 1 and len(group) > 1 for group, count in groups.items())
    say(f"agree       in {shared:,} groups that have several of these ranks, whose members make the same collectives")


def calls_of(report: Report) -> list[Call]:
    """What a rank was seen to do, start and step."""
    calls = [Call(one, "the start") for one in report.start]
    return calls + [Call(one, place) for one, place in zip(report.collectives, report.places, strict=True)]


def compare(layout: Layout, roles: Sequence[Sequence[int]], entries: Sequence[Sequence[Entry]]) -> list[str]:
    """Compare in each group what its members do; a line for each kind of group.

    Groups of one kind whose members have the same roles, place by place, do the same: of these one is compared.

    Args:
        layout: the ranks.
        roles: the ranks of each role.
        entries: what those do.

    Raises:
        RunStopped: the members of a group do not do the same.
    """
    role_of = {rank: number for number, ranks in enumerate(roles) for rank in ranks}
    by_group: dict[str, dict[int, list[Entry]]] = defaultdict(dict)
    for number, done in enumerate(entries):
        for entry in done:
            by_group[entry.group].setdefault(number, []).append(entry)
    lines = []
    for name, of_role in by_group.items():
        _settle(list(of_role.values()))
        known: set[tuple[int, ...]] = set()
        groups = dict.fromkeys(layout.members(rank, name) for rank in range(layout.size))
        for group in groups:
            kinds = tuple(role_of[rank] for rank in group)
            if kinds in known:
                continue
            known.add(kinds)
            calls = {rank: [layout.call(rank, entry) for entry in of_role.get(role_of[rank], ())] for rank in group}
            if found := disagreement(calls):
                raise RunStopped(str(found))
        most = max(map(len, of_role.values()))
        size = len(next(iter(groups)))
        lines.append(f"agree       {name}: {len(groups):,} groups of {size:,} ranks, {most:,} collectives each")
    return lines


def follow(layout: Layout, roles: Sequence[Sequence[int]], entries: Sequence[Sequence[Entry]]) -> str:
    """Let every rank go through its calls, each of which waits for all of its group; a line about it.

    Args:
        layout: the ranks.
        roles: the ranks of each role.
        entries: what those do; in each group all members do the same.

    Raises:
        RunStopped: ranks wait for one another.
    """
    numbers: dict[Hashable, int] = {}  # of what is waited at: groups of all ranks are long keys
    orders: dict[int, list[int]] = {}
    for ranks, done in zip(roles, entries, strict=True):
        kinds = [(entry.group, entry.channel, entry.kind, entry.root) for entry in done]
        of_kind = dict(zip(kinds, done, strict=True))
        for rank in ranks:
            found = {
                kind: numbers.setdefault(meeting(rank, layout.ends(rank, entry)), len(numbers))
                for kind, entry in of_kind.items()
            }
            orders[rank] = [found[kind] for kind in kinds]
    if waits := circle(orders):
        role_of = {rank: number for number, ranks in enumerate(roles) for rank in ranks}
        calls = ((rank, layout.call(rank, entries[role_of[rank]][number])) for rank, number in waits)
        raise RunStopped(str(Circle(tuple(calls))))
    return f"end         every rank comes to its end through {sum(map(len, orders.values())):,} calls of all ranks"


def _settle(roles: Sequence[list[Entry]]) -> None:
    """Where an exchange of rows may be several things for one role, take what it is for all, in place."""
    for position in range(min(map(len, roles))):
        common = roles[0][position]
        for done in roles:
            common = common.merged(done[position]) or common
        for done in roles:
            done[position] = common.merged(done[position]) or done[position]


def difference(
    layout: Layout, rank: int, entries: Sequence[Entry], other: int, others: Sequence[Entry]
) -> Disagreement | None:
    """The first collective that two ranks of one role do not do alike, each in its own group of a kind."""
    for name in dict.fromkeys(entry.group for entry in (*entries, *others)):
        mine = [entry for entry in entries if entry.group == name]
        theirs = [entry for entry in others if entry.group == name]
        for position, (one, two) in enumerate(zip_longest(mine, theirs), 1):
            if one is None or one.merged(two) is None:
                calls = ((rank, one), (other, two))
                first, second = ((r, None if entry is None else layout.call(r, entry)) for r, entry in calls)
                return Disagreement(layout.members(rank, name), position, first, second)
    return None


def merged(rank: int, entries: Sequence[Entry], other: int, others: Sequence[Entry]) -> list[Entry]:
    """What two ranks of one role do, which is the same in each kind of group.

    Raises:
        RunStopped: they order calls of several groups in another way, so others of their role cannot follow from them.
    """
    found: list[Entry] = []
    for number, (one, two) in enumerate(zip(entries, others, strict=True), 1):
        both = one.merged(two)
        if both is None:
            raise RunStopped(
                f"ranks {rank} and {other} hold the same and order their calls differently, which may hang: "
                f"call {number:,} is of the group {one.group} on one ({one.place}), "
                f"of {two.group} on the other ({two.place})"
            )
        found.append(both)
    return found


def _shortened(plan: RunPlan, gpu: str) -> Config:
    """The configuration with at most `MICRO_STEPS` micro-steps."""
    train = plan.config.train
    micro_batch = train.micro_batch or largest_micro_batch(plan, Cluster.of(gpu).memory)
    batch = min(train.global_batch, MICRO_STEPS * micro_batch * plan.topology.data)
    changed = train.model_copy(update={"micro_batch": micro_batch, "global_batch": batch})
    return plan.config.model_copy(update={"train": changed})
