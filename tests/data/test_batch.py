"""Batches on their way to a device, of which this machine may have none: what torch is asked for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_mamba.data.batch import Batch
from moe_mamba.train.feed import Feed

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def batch(has_starts: bool = True) -> Batch:
    tokens = torch.arange(6).view(2, 3)
    return Batch(tokens, tokens + 1, torch.ones(2, 3, dtype=torch.bool) if has_starts else None)


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors that were pinned: copies, as torch gives them."""
    made: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        made.append(tensor.clone())
        return made[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return made


@pytest.mark.parametrize("has_starts", [True, False])
def test_all_of_a_batch_is_pinned_for_a_gpu_and_nothing_for_a_cpu(pinned: list[torch.Tensor], has_starts: bool) -> None:
    read = batch(has_starts)
    assert read.pinned_for(CPU) is read and not pinned
    found = read.pinned_for(GPU)
    parts = [found.tokens, found.targets] + [found.document_starts] * has_starts
    assert {id(part) for part in parts} == {id(tensor) for tensor in pinned}
    assert torch.equal(found.targets, read.targets) and (found.document_starts is None) == (not has_starts)


def test_a_batch_moves_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, dict[str, Any]]] = []

    def to(tensor: torch.Tensor, device: torch.device, **how: Any) -> torch.Tensor:
        asked.append((device, how))
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    batch().to(GPU)
    assert asked == [(GPU, {"non_blocking": True})] * 3


@pytest.mark.parametrize(("device", "count"), [(CPU, 0), (GPU, 6)])
def test_a_run_reads_pinned_batches(pinned: list[torch.Tensor], device: torch.device, count: int) -> None:
    """Two micro-steps of three tensors."""
    loader: Any = SimpleNamespace(batch=lambda first, count: batch())
    topology: Any = SimpleNamespace(data_rank=0, data=1, world=SimpleNamespace(device=device))
    assert len(Feed(loader, topology, 2, 2)._read(1).parts) == 2
    assert len(pinned) == count


@pytest.mark.gpu
def test_memory_on_a_gpu_is_pinned() -> None:
    read = batch().pinned_for(GPU)
    assert read.tokens.is_pinned() and read.targets.is_pinned()
    assert torch.equal(read.to(GPU).tokens.cpu(), batch().tokens)
