"""Weights that are written one after the other, into a folder that is whole or not there."""

import math
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_mamba.checkpoint import store
from moe_mamba.checkpoint.shards import Shard
from moe_mamba.config import Config
from moe_mamba.convert.starting_point import write_starting_point
from moe_mamba.data.tokenizer import BytesTokenizer
from moe_mamba.errors import UserError


def later(number: int, read: "Reader") -> Shard:
    return Shard(f"weights/{number}", (3, 5), (0, 0), torch.empty(3, 5, device="meta"), partial(read, number))


class Reader:
    """Gives tensors, and counts those that are alive at once."""

    def __init__(self, error: Exception | None = None) -> None:
        self.given: list[weakref.ref[Tensor]] = []
        self.most = 0
        self.error = error

    def __call__(self, number: int) -> Tensor:
        if self.error and number == 2:
            raise self.error
        tensor = torch.full((3, 5), float(number))
        self.given.append(weakref.ref(tensor))
        self.most = max(self.most, sum(given() is not None for given in self.given))
        return tensor


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    read = Reader()
    step = write_starting_point(tmp_path / "run", Config(), BytesTokenizer(), [later(n, read) for n in range(6)])
    assert (len(read.given), read.most) == (6, 1)
    for number in range(6):
        assert torch.equal(store.read_tensor(step, f"weights/{number}"), torch.full((3, 5), float(number)))


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    shards = [later(n, Reader()) for n in range(4)]
    shards.append(
        Shard("weights/bad", (2,), (0,), torch.empty(2, device="meta"), lambda: torch.tensor([1.0, math.inf]))
    )
    with pytest.raises(UserError, match=r"^weights/bad holds NaN or Inf: give other weights$"):
        write_starting_point(tmp_path / "run", Config(), BytesTokenizer(), shards)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "Input/output error")])
def test_a_failing_disk_leaves_nothing(tmp_path: Path, error: OSError) -> None:
    read = Reader(error)
    with pytest.raises(UserError, match="step 0"):
        write_starting_point(tmp_path / "run", Config(), BytesTokenizer(), [later(n, read) for n in range(6)])
    assert not list(tmp_path.iterdir())
