"""Plans of many chunks and many ranks: fast, fair, and of memory of any stride."""

import pickle
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.planners import ShardSavePlanner
from moe_mamba.checkpoint.shards import Shard, chunks_of_flat_range
from tests.world import World

WHOLE = torch.arange(16 * 10 * 6, dtype=torch.float32).view(16, 10, 6)


def flat_part(name: str, tensor: Tensor, rank: int, ranks: int) -> list[Shard]:
    """A rank's part of the flat tensor, as ZeRO has it; ends lie inside rows."""
    start, stop = (tensor.numel() * edge // ranks for edge in (rank, rank + 1))
    return [
        Shard(name, tuple(tensor.shape), tuple(offsets), tensor.view(-1)[first : first + sizes.numel()].view(sizes))
        for offsets, sizes, first in chunks_of_flat_range(tensor.shape, start, stop)
    ]


def inner_halves(rank: int, shard: Tensor) -> list[Shard]:
    """Views of a rank's shard, as tensor parallelism has it: half of each of two blocks along an inner axis.

    The shard (16, 5 + 1, 6) has a padded row, which belongs to no logical tensor; blocks are rows 0 to 5 and 6 to 9.
    """
    blocks = [(0, 6), (6, 4)]
    shards, here = [], 0
    for first, width in blocks:
        half = width // 2
        shards.append(Shard("w", tuple(WHOLE.shape), (0, first + rank * half, 0), shard.narrow(1, here, half)))
        here += half
    return shards


def save_flat(folder: Path) -> str:
    shards = flat_part("w", WHOLE, dist.get_rank(), dist.get_world_size())
    return str(store.save(folder, 1, shards, {}))


def save_inner_halves(folder: Path) -> str:
    rank = dist.get_rank()
    memory = torch.full((16, 6, 6), -7.0)  # its padding must not be saved
    for shard in inner_halves(rank, memory):
        shard.tensor.copy_(WHOLE.narrow(1, shard.offsets[1], shard.tensor.shape[1]))
        assert not shard.tensor.is_contiguous()
    return str(store.save(folder, 1, inner_halves(rank, memory), {}))


def test_a_shard_that_lies_in_the_chunks_of_eight_files(world: World, tmp_path: Path) -> None:
    path = Path(world.run(save_flat, tmp_path, ranks=8)[0])
    assert len(list(path.glob("*.safetensors"))) == 8
    assert torch.equal(store.read_tensor(path, "w"), WHOLE)
    memory = torch.full((16, 6, 6), -7.0)
    store.load(path, inner_halves(1, memory))
    for shard in inner_halves(1, memory):
        assert torch.equal(shard.tensor, WHOLE.narrow(1, shard.offsets[1], shard.tensor.shape[1]))
    assert (memory[:, 5] == -7).all(), "padding is left alone"


def test_views_of_a_shard_along_an_inner_axis_are_saved(world: World, tmp_path: Path) -> None:
    path = Path(world.run(save_inner_halves, tmp_path, ranks=2)[0])
    assert torch.equal(store.read_tensor(path, "w"), WHOLE)


def plan(shards: list[list[Shard]]) -> list[list[tuple[str, tuple[int, ...]]]]:
    """What each rank writes, by way of the plans that travel between ranks."""
    planners = [ShardSavePlanner(mine) for mine in shards]
    plans: list[SavePlan] = [pickle.loads(pickle.dumps(planner.create_local_plan())) for planner in planners]
    shares, _ = planners[0].create_global_plan(plans)
    finished = [planner.finish_plan(share) for planner, share in zip(planners, shares, strict=True)]
    return [[(item.index.fqn, tuple(item.index.offset or ())) for item in share.items] for share in finished]


def test_chunks_that_several_ranks_offer_are_shared_out_evenly_by_bytes() -> None:
    shared = [Shard(f"shared-{n}", (100,), (0,), torch.zeros(100)) for n in range(18)]
    own = Shard("own", (600,), (0,), torch.zeros(600))
    twice = [*shared, shared[0]]
    written = plan([[own, *shared], twice, shared, shared])
    assert [len(chunks) for chunks in written] == [1, 6, 6, 6]
    assert set(Counter(chunk for chunks in written for chunk in chunks).values()) == {1}


@pytest.mark.slow
def test_fifty_thousand_chunks_are_planned_in_seconds() -> None:
    tensors = [(f"{kind}/layers.{n}.w", torch.empty(250, 67)) for n in range(95) for kind in ("w", "m", "v")]
    shards = [[shard for name, tensor in tensors for shard in flat_part(name, tensor, rank, 64)] for rank in range(64)]
    begin = time.perf_counter()
    written = plan(shards)
    assert time.perf_counter() - begin < 20, "2 s on an idle core, for all ranks one after another"
    assert sum(map(len, written)) == sum(map(len, shards)) > 50_000
