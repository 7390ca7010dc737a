"""Who talks to whom, and when."""

from collections import Counter

import pytest

from moe_mamba.parallel.topology import Topology, World
from moe_mamba.preflight.links import MOST_ROUNDS, chosen_rounds, expert_groups, rounds_of_pairs


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_all_pairs_meet_once_in_rounds_of_disjoint_pairs(count: int) -> None:
    rounds = rounds_of_pairs(count)
    for pairs in rounds:
        talking = [one for pair in pairs for one in pair]
        assert len(talking) == len(set(talking))
    met = Counter(pair for pairs in rounds for pair in pairs)
    assert met == Counter({(a, b): 1 for a in range(count) for b in range(a + 1, count)})


def test_machines_are_disjoint_in_every_round_and_as_many_rounds_as_time_allows() -> None:
    machines = {f"node{n}": [2 * n, 2 * n + 1] for n in range(40)}
    rounds = chosen_rounds(machines)
    assert len(rounds) == 1 + MOST_ROUNDS
    assert rounds[0] == [(2 * n, 2 * n + 1) for n in range(40)]
    for pairs in rounds[1:]:
        places = [rank // 2 for pair in pairs for rank in pair]
        assert len(places) == len(set(places)) == 40
    assert len(set(map(tuple, rounds))) == len(rounds)


def test_experts_are_spread_over_neighbours_or_over_those_of_one_tensor_rank() -> None:
    world = World(rank=3, size=8, local_rank=0, local_size=8)
    assert expert_groups(Topology(world, expert=4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    sharded = Topology(world, tensor=2, expert=2, expert_tensor=True)
    assert expert_groups(sharded) == [[0, 2], [1, 3], [4, 6], [5, 7]]
