"""How fast ranks talk: in pairs, while no other pair uses the same machines' links, and all together as in training."""

import math
import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moe_mamba.parallel.distributed import from_all, from_first
from moe_mamba.parallel.topology import Topology
from moe_mamba.preflight.report import Collective, Link

PINGS, MESSAGES = 10, 3
MESSAGE_BYTES = 4 << 20
MOST_ROUNDS = 16  # of pairs: each machine then has talked to as many others
PROBE_BYTES, MOST_BYTES = 1 << 20, 1 << 30
CALLS, SECONDS = 3, 5.0  # of a collective; what its calls may take together


def rounds_of_pairs(count: int) -> list[list[tuple[int, int]]]:
    """All pairs of 0 to count - 1 in rounds, in each of which nobody is in two pairs (the circle method)."""
    ring: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    rounds = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return rounds


def chosen_rounds(machines: dict[str, list[int]]) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of ranks: inside machines, all machines at once, then between their first ranks.

    Of more than `MOST_ROUNDS` of a kind, as many, spread evenly: machines that are numbered by rack meet near and far.
    """
    local = max(len(ranks) for ranks in machines.values())
    inside = [
        [(ranks[a], ranks[b]) for ranks in machines.values() for a, b in pairs if b < len(ranks)]
        for pairs in rounds_of_pairs(local)
    ]
    firsts = [ranks[0] for ranks in machines.values()]
    between = [[(firsts[a], firsts[b]) for a, b in pairs] for pairs in rounds_of_pairs(len(firsts))]
    return [*_spread(inside), *_spread(between)]


def measure_links(machines: dict[str, list[int]], device: torch.device) -> list[Link]:
    """Latency and rate of the chosen pairs; every rank calls it, and all get the whole list."""
    rank = dist.get_rank()
    places = {one: machine for machine, ranks in machines.items() for one in ranks}
    mine: list[Link] = []
    for pairs in chosen_rounds(machines):
        dist.all_reduce(torch.zeros(1, device=device))  # a round begins when the one before it has ended everywhere
        for first, second in pairs:
            if rank in (first, second):
                latency, rate = _talk(second if rank == first else first, rank == first, device)
                if rank == first:
                    link = Link(
                        ranks=(first, second),
                        machines=(places[first], places[second]),
                        latency_seconds=latency,
                        bytes_per_second=rate,
                        message_bytes=MESSAGE_BYTES,
                    )
                    mine.append(link)
    return [link for links in from_all(mine) for link in links]


def measure_collectives(topology: Topology, gradient_bytes: int, dispatch_bytes: int | None) -> list[Collective]:
    """The all-reduce of gradients over the world, and the all-to-all of tokens over expert-parallel ranks.

    Args:
        topology: the layout.
        gradient_bytes: of a rank.
        dispatch_bytes: of tokens that a rank sends to experts, once a layer; None: the model has none.
    """
    device, size = topology.world.device, topology.world.size
    measured = [_measure("all_reduce", None, size, gradient_bytes, device)]
    if dispatch_bytes is not None:
        # Where experts are not spread: what it would be over all ranks.
        group, ranks = _expert_group(topology) if topology.expert > 1 else (None, size)
        measured.append(_measure("all_to_all", group, ranks, dispatch_bytes, device))
    return measured


def expert_groups(topology: Topology) -> list[list[int]]:
    """The ranks over which each copy of the experts is spread."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(topology.world.size):
        one = replace(topology, world=replace(topology.world, rank=rank))
        place = (one.data_rank // one.expert, one.tensor_rank) if one.expert_tensor else (rank // one.expert,)
        groups.setdefault(place, []).append(rank)
    return list(groups.values())


def _expert_group(topology: Topology) -> tuple[dist.ProcessGroup | None, int]:
    mine = None
    for ranks in expert_groups(topology):
        group = dist.new_group(ranks)
        mine = group if topology.world.rank in ranks else mine
    return mine, topology.expert


def _measure(
    operation: str, group: dist.ProcessGroup | None, ranks: int, config_bytes: int, device: torch.device
) -> Collective:
    """Time a collective of the configuration's size, or of as much as `SECONDS` allow."""
    probe = _seconds(operation, group, _buffer(min(config_bytes, PROBE_BYTES), ranks, device))
    allowed = int(SECONDS / CALLS / probe * PROBE_BYTES)
    buffer = _buffer(from_first(min(config_bytes, max(allowed, PROBE_BYTES), MOST_BYTES)), ranks, device)
    seconds = statistics.median(_seconds(operation, group, buffer) for _ in range(CALLS))
    return Collective(
        operation="all_reduce" if operation == "all_reduce" else "all_to_all",
        group=ranks,
        bytes=buffer.nbytes,
        config_bytes=config_bytes,
        seconds=seconds,
    )


def _buffer(size: int, ranks: int, device: torch.device) -> Tensor:
    """fp32 of about `size` bytes, in as many equal parts as there are ranks."""
    return torch.zeros(max(1, math.ceil(size / 4 / ranks)) * ranks, device=device)


def _seconds(operation: str, group: dist.ProcessGroup | None, buffer: Tensor) -> float:
    """One call, from the time at which all ranks are there; of the slowest rank."""
    dist.all_reduce(torch.zeros(1, device=buffer.device))
    _synchronize(buffer.device)
    begin = time.perf_counter()
    if operation == "all_reduce":
        dist.all_reduce(buffer, group=group)
    else:
        dist.all_to_all_single(torch.empty_like(buffer), buffer, group=group)
    _synchronize(buffer.device)
    return max(from_all(time.perf_counter() - begin))


def _talk(peer: int, is_first: bool, device: torch.device) -> tuple[float, float]:
    """Seconds one way of a small message, and bytes per second of a large one; both ranks of a pair call it."""
    small, large = torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(MESSAGE_BYTES // 4, device=device)
    _round_trip(small, peer, is_first)
    latency = min(_round_trip(small, peer, is_first) for _ in range(PINGS)) / 2
    rate = MESSAGE_BYTES / (min(_round_trip(large, peer, is_first) for _ in range(MESSAGES)) / 2)
    return latency, rate


def _round_trip(tensor: Tensor, peer: int, is_first: bool) -> float:
    begin = time.perf_counter()
    for _ in range(2):
        if is_first:
            dist.send(tensor, peer)
        else:
            dist.recv(tensor, peer)
        is_first = not is_first
    _synchronize(tensor.device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _spread(rounds: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    if len(rounds) <= MOST_ROUNDS:
        return rounds
    return [rounds[number * len(rounds) // MOST_ROUNDS] for number in range(MOST_ROUNDS)]
