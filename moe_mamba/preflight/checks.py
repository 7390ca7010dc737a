"""From what ranks know to what is wrong: pure functions of facts, so that any world can be made up and looked at."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from moe_mamba.parallel.network import is_loopback
from moe_mamba.preflight.folders import Seen, not_all
from moe_mamba.preflight.report import Clock, Finding, Level, RankFacts

Facts = Sequence[RankFacts]
SECONDS_OF_OFFSET = 1.0  # past it, times in logs and files of two machines cannot be compared
# What a process opens beside its data: libraries and logs; sockets to each other rank, of up to four groups.
OPEN_FILES, GROUPS = 128, 4
GPU_SHARED_MEMORY = 1 << 30  # bytes of /dev/shm that NCCL's ranks of a machine do with
KEEPALIVE = 'export PDSH_SSH_ARGS_APPEND="-o ServerAliveInterval=10 -o ServerAliveCountMax=3"'
SAID = 4  # places that a line names


def check_facts(facts: Facts) -> list[Finding]:
    """All that can be said of the ranks' own facts."""
    checks: tuple[Callable[[Facts], Iterable[Finding]], ...] = (
        check_versions,
        check_revision,
        check_kernels,
        check_network,
        check_data,
        check_shared_memory,
        check_open_files,
        check_keepalive,
    )
    return [finding for check in checks for finding in check(facts)]


def check_versions(facts: Facts) -> Iterator[Finding]:
    """The same Python and libraries everywhere."""
    names = dict.fromkeys(name for fact in facts for name in fact.versions)
    different = [name for name in names if len(_groups(facts, lambda fact, n=name: fact.versions.get(n))) > 1]  # type: ignore[misc]
    for name in different:
        groups = _groups(facts, lambda fact, n=name: fact.versions.get(n, "none"))  # type: ignore[misc]
        yield _finding("refused", "versions", groups, f"{name} is {_listed(groups)}: install the same on all machines")
    if not different:
        said = ", ".join(f"{name} {version}" for name, version in facts[0].versions.items() if version != "none")
        yield Finding(level="ok", subject="versions", line=f"the same on all ranks: {said}")


def check_revision(facts: Facts) -> Iterator[Finding]:
    """The same code of ours everywhere, whatever commit it is called."""
    groups = _groups(facts, lambda fact: fact.sources)
    if len(groups) > 1:
        named = _groups(facts, lambda fact: f"{fact.revision}, sources {fact.sources}")
        line = f"moe_mamba is {_listed(named)}: bring the same commit to all machines, or share the checkout"
        yield _finding("refused", "revision", groups, line)
    else:
        yield Finding(level="ok", subject="revision", line=f"the same sources on all ranks: {facts[0].revision}")


def check_kernels(facts: Facts) -> Iterator[Finding]:
    """The same back ends and builds everywhere; nothing in the short form, which does not ask."""
    if facts[0].kernels is None:
        return
    groups = _groups(facts, lambda fact: tuple(sorted((fact.kernels or {}).items())))
    if len(groups) > 1:
        for operation in facts[0].kernels:
            of_one = _groups(facts, lambda fact, o=operation: (fact.kernels or {}).get(o))  # type: ignore[misc]
            if len(of_one) > 1:
                line = (
                    f"{operation} is served by {_listed(of_one)}: the slowest sets the pace; see why with a run there"
                )
                yield _finding("warning", "kernels", of_one, line)
        return
    builds = _groups(facts, lambda fact: fact.kernels_build)
    if len(builds) > 1:
        line = (
            f"the C++ kernels are different builds, {_listed(builds)}: other processors or compilers, so sums may round"
        )
        yield _finding("warning", "kernels", builds, f"{line} differently")
        return
    served: dict[str, list[str]] = {}
    for operation, backend in facts[0].kernels.items():
        served.setdefault(backend, []).append(operation)
    build = f"; build {facts[0].kernels_build}" if facts[0].kernels_build else ""
    line = "; ".join(f"{backend}: {', '.join(operations)}" for backend, operations in served.items())
    yield Finding(level="ok", subject="kernels", line=f"the same on all ranks: {line}{build}")


def check_network(facts: Facts) -> Iterator[Finding]:
    """Every machine has an address that others reach; nothing to say of a single machine."""
    firsts = first_of_machines(facts)
    if len(firsts) == 1:
        return
    wrong = [finding for fact in firsts if (finding := _check_address(fact)) is not None]
    yield from wrong
    for fact in firsts:
        for other, why in fact.unreached.items():
            target = next(one for one in firsts if one.machine == other)
            line = f"{fact.machine} cannot connect to {other} at {target.address} ({why}): "
            line += f"open the network between them, or on {other} {_set_interface(target)}"
            yield Finding(level="refused", subject="network", machines=[fact.machine, other], line=line)
            wrong.append(Finding(level="refused", subject="network", line=line))
    if not wrong:
        addresses = ", ".join(f"{fact.machine} {fact.address}" for fact in firsts[:SAID])
        more = f" and {len(firsts) - SAID} more" * (len(firsts) > SAID)
        yield Finding(level="ok", subject="network", line=f"machines reach one another: {addresses}{more}")


def _check_address(fact: RankFacts) -> Finding | None:
    """What is wrong with the address at which a machine will listen."""
    known = {interface.name for interface in fact.interfaces}
    for variable, value in fact.asked_interfaces.items():
        names = value.lstrip("^=").split(",")
        # NCCL's is a list of beginnings of names.
        if not value.startswith("^") and not any(one.startswith(name) for one in known for name in names):
            line = f"{variable}={value} names no interface of {fact.machine}, which has {', '.join(sorted(known))}: "
            return _refused_network(fact, line + _set_interface(fact))
    if fact.address is None:
        to = ", ".join(fact.host_addresses) or "nothing"
        line = f"the host name {fact.machine} resolves to {to}, which is no address of that machine: "
    elif is_loopback(fact.address):
        line = f"the host name {fact.machine} resolves to {fact.address} there, where no other machine reaches it: "
    else:
        return None
    return _refused_network(fact, line + _set_interface(fact))


def _refused_network(fact: RankFacts, line: str) -> Finding:
    return Finding(level="refused", subject="network", machines=[fact.machine], line=line)


def _set_interface(fact: RankFacts) -> str:
    name = fact.route_interface or "NAME"
    return f"set GLOO_SOCKET_IFNAME={name} NCCL_SOCKET_IFNAME={name}, or correct /etc/hosts"


def check_data(facts: Facts) -> Iterator[Finding]:
    """Every rank sees the same files of every source; of text that is sharded first, with the same times as well."""
    wrong = False
    for number, source in enumerate(facts[0].data):
        faults = _groups(facts, lambda fact, n=number: fact.data[n].fault)  # type: ignore[misc]
        bad = {fault: places for fault, places in faults.items() if fault is not None}
        contents = _groups(facts, lambda fact, n=number: _seen_content(fact, n))  # type: ignore[misc]
        times = _groups(facts, lambda fact, n=number: fact.data[n].times)  # type: ignore[misc]
        line = None
        if bad:
            fault, places = next(iter(bad.items()))
            line = f"{fault} (seen on {_places(places)})" if len(faults) > 1 else fault
        elif len({(fact.data[number].content) for fact in facts}) > 1:
            line = f"{source.source} is {_listed(contents)}: bring the same files to all machines"
        elif source.is_documents and len(times) > 1:
            line = (
                f"{source.source} has other times of change on {_places(list(times.values())[-1])}, and would be "
                "tokenized there again: copy with times (rsync -t), or share the folder"
            )
        if line is not None:
            wrong = True
            yield _finding("refused", "data", bad or (contents if len(contents) > 1 else times), line)
    if not wrong:
        sizes = ", ".join(
            f"{one.source} ({one.files} files, {size_of(one.size)})" for one in facts[0].data if one.files
        )
        yield Finding(level="ok", subject="data", line=f"seen alike by all ranks{': ' * bool(sizes)}{sizes}")


def _seen_content(fact: RankFacts, number: int) -> str:
    seen = fact.data[number]
    return f"{seen.files} files of {seen.size:,} bytes, {seen.content}"


def check_folder(seen: Sequence[Seen]) -> Iterator[Finding]:
    """The run's folder is one and the same, and can be written, for all ranks.

    Args:
        seen: what each rank saw in the folder.
    """
    path_faults = {one.machine: one.fault for one in seen if one.fault is not None}
    for machine, fault in path_faults.items():
        line = f"run.folder on {machine}: {fault}: give a folder that every machine may write"
        yield Finding(level="refused", subject="run.folder", machines=[machine], line=line)
    apart = list(dict.fromkeys(one.machine for one in seen if 0 not in one.ranks and one.fault is None))
    if apart and seen[0].fault is None:
        line = (
            f"run.folder is not shared: {_joined(apart)} and {seen[0].machine} (rank 0) each have one of their own, so "
            "that no checkpoint would be whole: put run.folder on storage that all machines mount"
        )
        yield Finding(level="refused", subject="run.folder", machines=[seen[0].machine, *apart], line=line)
    elif not path_faults and (partial := not_all(seen)):
        late = list(dict.fromkeys(one.machine for one in partial))
        line = f"{_joined(late)} cannot see all that others write into run.folder: see how it is mounted there"
        yield Finding(level="refused", subject="run.folder", machines=late, line=line)
    elif not path_faults:
        line = "one folder: every rank sees what every other writes"
        yield Finding(level="ok", subject="run.folder", line=line)


def check_cache(facts: Facts, seen: Sequence[Seen]) -> Iterator[Finding]:
    """``data.cache`` is shared where rank 0 shards documents into it for all.

    Args:
        facts: of the ranks.
        seen: what each rank saw in the folder.
    """
    if not seen or seen[0].rank != 0:
        return
    first = seen[0]
    apart = list(dict.fromkeys(one.machine for one in seen if 0 not in one.ranks))
    documents = [source.source for source in facts[0].data if source.is_documents]
    if not documents or first.fault is not None:  # nothing will be written there, or nothing can be: it stays as it is
        return
    if not apart:
        if len({one.machine for one in seen}) > 1:
            yield Finding(level="ok", subject="data.cache", line="one folder for all machines")
    else:
        line = (
            f"data.cache is not shared: {_joined(apart)} cannot see what rank 0 on {first.machine} makes there of "
            f"{documents[0]}: put data.cache where all machines see it, or name folders of shards in data.train"
        )
        yield Finding(level="refused", subject="data.cache", machines=apart, line=line)


def check_clocks(clocks: Sequence[Clock]) -> Iterator[Finding]:
    """No machine's clock is far from rank 0's."""
    wrong = [clock for clock in clocks if abs(clock.offset_seconds) > SECONDS_OF_OFFSET + clock.delay_seconds / 2]
    for clock in wrong:
        way = "ahead of" if clock.offset_seconds > 0 else "behind"
        line = (
            f"the clock of {clock.machine} is {abs(clock.offset_seconds):,.1f} s {way} rank 0's: "
            "start its time service (chronyd or systemd-timesyncd)"
        )
        yield Finding(level="warning", subject="clocks", machines=[clock.machine], line=line)
    if clocks and not wrong:
        most = max(abs(clock.offset_seconds) for clock in clocks)
        yield Finding(level="ok", subject="clocks", line=f"within {most:.3f} s of rank 0's on {len(clocks)} machines")


def check_disk(facts: Facts, checkpoint_bytes: int | None) -> Iterator[Finding]:
    """Room for two checkpoints, those that are there counted.

    Args:
        facts: of the ranks.
        checkpoint_bytes: of one; None: not known.
    """
    faulty = next((fact for fact in facts if fact.disk.fault is not None), None)
    if faulty is not None:
        line = f"run.folder on {faulty.machine} cannot be used ({faulty.disk.fault}): give another"
        yield Finding(level="refused", subject="disk", machines=[faulty.machine], line=line)
        return
    worst = min(facts, key=lambda fact: fact.disk.free_bytes or 0)
    free = worst.disk.free_bytes or 0
    if checkpoint_bytes is None:
        line = f"{size_of(free)} free; a checkpoint's size is known once model.vocab_size is"
        yield Finding(level="ok", subject="disk", line=line)
        return
    needed = max(1, 2 - worst.disk.checkpoints) * checkpoint_bytes
    line = f"{size_of(free)} free in run.folder, where a checkpoint takes {size_of(checkpoint_bytes)}"
    if free < needed:
        line = f"{line} and {size_of(needed)} are wanted (on {worst.machine}): free some, or give another run.folder"
        yield Finding(level="refused", subject="disk", machines=[worst.machine], line=line)
    else:
        yield Finding(level="ok", subject="disk", line=line)


def check_shared_memory(facts: Facts) -> Iterator[Finding]:
    """Enough of /dev/shm for NCCL, where a machine has several GPUs; nothing else of ours needs it."""
    several = {fact.machine for fact in facts if fact.local_rank > 0 and fact.device != "cpu"}
    for fact in first_of_machines(facts):
        if fact.machine in several and (fact.shared_memory_bytes or 0) < GPU_SHARED_MEMORY:
            line = (
                f"/dev/shm of {fact.machine} has {size_of(fact.shared_memory_bytes or 0)}, and NCCL wants more between "
                "several GPUs: docker run --ipc host or --shm-size 8g, in Kubernetes an emptyDir of medium Memory"
            )
            yield Finding(level="warning", subject="shared memory", machines=[fact.machine], line=line)
            return
    least = min(fact.shared_memory_bytes or 0 for fact in facts)
    yield Finding(level="ok", subject="shared memory", line=f"{size_of(least)} in /dev/shm")


def check_open_files(facts: Facts) -> Iterator[Finding]:
    """As many file descriptors as sockets to the other ranks and files of data take."""
    needed = OPEN_FILES + GROUPS * len(facts) + sum(source.files for source in facts[0].data)
    for fact in facts:
        if fact.open_files is not None and fact.open_files < needed:
            fits = fact.most_open_files is None or fact.most_open_files >= needed
            fix = f"ulimit -n {needed} before the start" if fits else "raise nofile in /etc/security/limits.conf"
            line = f"{fact.machine} lets a process open {fact.open_files:,} files, but this takes {needed:,}: {fix}"
            yield Finding(level="refused", subject="open files", machines=[fact.machine], line=line)
            return
    yield Finding(level="ok", subject="open files", line=f"{needed:,} are enough for this world and its data")


def check_keepalive(facts: Facts) -> Iterator[Finding]:
    """Under ``deepspeed --hostfile``: the launcher notices a machine that is gone."""
    states = {fact.keepalive for fact in facts} - {"unused"}
    if not states:
        return
    lost = "without ssh keep-alives deepspeed's launcher waits for ever for a machine that is lost"
    if "missing" in states:
        yield Finding(level="warning", subject="keep-alives", line=f"{lost}: {KEEPALIVE} before the start")
    elif "set" in states:
        yield Finding(level="ok", subject="keep-alives", line="deepspeed's ssh notices a machine that is lost")
    else:
        line = f"not seen, for deepspeed was started on another machine; {lost}: there, {KEEPALIVE}"
        yield Finding(level="ok", subject="keep-alives", line=line)


def first_of_machines(facts: Facts) -> list[RankFacts]:
    """The first rank of each machine, in the order of ranks."""
    return list({fact.machine: fact for fact in reversed(facts)}.values())[::-1]


def check_speed(what: str, unit: str, by_place: dict[str, float], least: float) -> Iterator[Finding]:
    """Name the places that are slow against the median of the others.

    Args:
        what: was measured.
        unit: of the values, per second; more is better.
        by_place: machine, or rank of a single machine -> value.
        least: share of the others' median below which a place is slow.
    """
    for place, value in by_place.items():
        others = [other for name, other in by_place.items() if name != place]
        median = statistics.median(others) if others else value
        if value < least * median:
            line = (
                f"{what} of {place} is slow: {value / median:.2f} of the median of the others "
                f"({value:.3g} against {median:.3g} {unit}): look for other load, heat or a bad cable there"
            )
            yield Finding(level="warning", subject="speed", machines=[place], line=line)


def size_of(count: float) -> str:
    """Bytes for people, in powers of 1,024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} TiB"


def _groups(facts: Facts, value: Callable[[RankFacts], Any]) -> dict[Any, list[RankFacts]]:
    """Ranks by a value that they have, the largest group first."""
    groups: dict[Any, list[RankFacts]] = {}
    for fact in facts:
        groups.setdefault(value(fact), []).append(fact)
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))


def _listed(groups: dict[Any, list[RankFacts]]) -> str:
    """``2.13 on node1, node2; 2.11 on node3``."""
    return "; ".join(f"{value} on {_places(group)}" for value, group in groups.items())


def _places(group: list[RankFacts]) -> str:
    """The machines of ranks, and of a few ranks their numbers."""
    machines = list(dict.fromkeys(fact.machine for fact in group))
    if len(group) <= 2:
        return ", ".join(f"{fact.machine} (rank {fact.rank})" for fact in group)
    return _joined(machines)


def _joined(machines: list[str]) -> str:
    more = f" and {len(machines) - SAID} more" * (len(machines) > SAID)
    return ", ".join(machines[:SAID]) + more


def _finding(level: Level, subject: str, groups: dict[Any, list[RankFacts]], line: str) -> Finding:
    """A finding about the machines of all groups but the largest."""
    smaller = list(groups.values())[1:] or list(groups.values())
    machines = dict.fromkeys(fact.machine for group in smaller for fact in group)
    return Finding(level=level, subject=subject, machines=list(machines), line=line)
