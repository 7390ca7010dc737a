import pytest
import torch

from moe_mamba.config_file import load_config
from moe_mamba.train.micro_batch import activation_bytes_per_token, choose_micro_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize(("length", "sequences", "chosen"), [(256, 64, 16), (256, 24, 12), (8192, 8, 1), (16, 6, 6)])
def test_a_cpu_works_on_about_4096_tokens_at_once(length: int, sequences: int, chosen: int) -> None:
    config = load_config(None, {"data.sequence_length": length})
    assert choose_micro_batch(config, sequences, 1000, CPU) == chosen


def test_what_is_given_is_taken() -> None:
    assert choose_micro_batch(load_config(None, {"train.micro_batch": 4}), 64, 1000, CPU) == 4


def test_a_gpu_leaves_room_for_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 80 * 10**9))
    small, large = (choose_micro_batch(config, 4096, size, torch.device("cuda", 0)) for size in (10**6, 39 * 10**8))
    assert 1 <= large < small


def test_recomputation_and_bf16_need_less() -> None:
    plain, half, again = (
        activation_bytes_per_token(load_config(None, keys))
        for keys in ({}, {"train.precision": "bf16"}, {"train.recompute": "true"})
    )
    assert half < plain
    assert again < plain
