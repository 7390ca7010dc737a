"""Time and memory of a token do not grow with the context."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")

SHORT, LONG, CHUNK = 1024, 1 << 20, 8192


def _read(model: Any, length: int) -> Any:
    """The cache after a context of so many tokens."""
    cache = modeling.MoEMambaCache()
    generator = torch.Generator().manual_seed(0)
    for first in range(0, length, CHUNK):
        tokens = torch.randint(31, (1, min(CHUNK, length - first)), generator=generator)
        model(tokens, past_key_values=cache, logits_to_keep=1)
    assert cache.get_seq_length() == length
    return cache


def _seconds(model: Any, cache: Any) -> float:
    token = torch.zeros(1, 1, dtype=torch.int64)
    begin = time.perf_counter()
    model(token, past_key_values=cache)
    return time.perf_counter() - begin


@pytest.mark.long
@pytest.mark.parametrize("pattern", ["M", "ME"])
@torch.no_grad()
def test_a_million_tokens_of_context_cost_what_a_thousand_cost(pair: Callable[..., Any], pattern: str) -> None:
    _, model = pair(pattern, repeat=2)
    short, long = _read(model, SHORT), _read(model, LONG)
    assert [tensor.nbytes for tensor in long.tensors()] == [tensor.nbytes for tensor in short.tensors()]
    assert all(tensor.isfinite().all() for tensor in long.tensors())
    pairs = [(_seconds(model, short), _seconds(model, long)) for _ in range(1000)]
    fastest = [min(seconds) for seconds in zip(*pairs, strict=True)]
    size = sum(tensor.nbytes for tensor in long.tensors())
    print(f"\n{pattern}: {fastest[0] * 1e6:.0f} us per token at {SHORT:,}, {fastest[1] * 1e6:.0f} at {LONG:,}", end="")
    print(f" (x {fastest[1] / fastest[0]:.3f}); the state is {size:,} bytes at both")
