import pytest
import torch

from moe_mamba.config import Config
from moe_mamba.config_file import load_config
from moe_mamba.parallel.run_plan import RunPlan
from moe_mamba.parallel.topology import Topology, World
from moe_mamba.planning.cluster import Cluster
from moe_mamba.planning.estimate import estimate
from moe_mamba.planning.load import Load
from moe_mamba.planning.micro_batch import choose_micro_batch


def choose(config: Config, ranks: int = 1) -> int:
    return choose_micro_batch(RunPlan.of(config, Topology.of(config, World(0, ranks, 0, ranks))))


@pytest.mark.parametrize(("length", "sequences", "chosen"), [(256, 64, 16), (256, 24, 12), (8192, 8, 1), (16, 6, 6)])
def test_a_cpu_works_on_about_4096_tokens_at_once(length: int, sequences: int, chosen: int) -> None:
    config = load_config(None, {"data.sequence_length": length, "train.global_batch": sequences})
    assert choose(config) == chosen


def test_what_is_given_is_taken() -> None:
    assert choose(load_config(None, {"train.micro_batch": 4})) == 4


def test_a_share_of_the_global_batch_is_divided() -> None:
    config = load_config(None, {"train.global_batch": 24, "data.sequence_length": 256})
    assert [choose(config, ranks) for ranks in (1, 2, 4, 8)] == [12, 12, 6, 3]


def test_tensor_ranks_can_share_it() -> None:
    keys = {"parallel.tensor": 4, "train.global_batch": 24}
    short = load_config(None, {**keys, "data.sequence_length": 6})  # 4 ranks share the tokens of two sequences
    assert choose(short, 4) % 2 == 0
    long = load_config(None, {**keys, "data.sequence_length": 8192})
    assert choose(long, 4) == 1
    by_sequences = {"moe.router": "expert_choice", "data.sequence_length": 8192}
    assert choose(load_config(None, {**keys, **by_sequences}), 4) == 4  # a whole one for each rank


def gpu_of(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))


def test_a_gpu_leaves_room_for_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, {"train.global_batch": 4096})
    chosen = []
    for free in (10 * 10**9, 40 * 10**9, 80 * 10**9):
        gpu_of(monkeypatch, free)
        chosen.append(choose(config))
    assert 1 <= chosen[0] < chosen[1] < chosen[2]


@pytest.mark.parametrize(("gib", "keys"), [(6, {}), (16, {"parallel.expert": 4}), (16, {"parallel.tensor": 2})])
def test_the_plan_expects_what_a_run_chooses(
    monkeypatch: pytest.MonkeyPatch, gib: int, keys: dict[str, object]
) -> None:
    gpu_of(monkeypatch, gib * 2**30)
    config = load_config(None, {"train.global_batch": 4096} | keys)
    cluster = Cluster.of("h100").changed(memory=gib * 2**30)
    expected = estimate(config, cluster, 4, Load())
    assert choose(config, 4) == expected.micro_batch > 1
    assert expected.fits


def test_devices_that_share_the_model_have_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_of(monkeypatch, 6 * 10**9)
    keys = {"train.global_batch": 4096}
    whole = choose(load_config(None, keys), 4)
    experts = choose(load_config(None, {**keys, "parallel.expert": 4}), 4)
    layers = choose(load_config(None, {**keys, "parallel.tensor": 4, "parallel.expert": 4}), 4)
    assert whole < experts < layers


def test_recomputation_and_bf16_leave_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_of(monkeypatch, 16 * 10**9)
    keys = {"train.global_batch": 4096}
    plain, half, again = (
        choose(load_config(None, keys | more))
        for more in ({}, {"train.precision": "bf16"}, {"train.recompute": "true"})
    )
    assert plain < half
    assert plain < again
