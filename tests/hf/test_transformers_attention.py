"""Windows, biases, widths of heads and scaled positions in the class for Transformers: in steps, and with padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

modeling = pytest.importorskip("moe_mamba.hf.modeling_moe_mamba")

Pair = Callable[..., Any]
KEYS: list[dict[str, Any]] = [
    {"sliding_window": 4},
    {"sliding_window": 1, "positions": "none"},
    {"sliding_window": 3, "kv_heads": 2, "head_dim": 6, "attention_bias": True, "mlp_bias": True},
    {"rope_type": "llama3", "rope_factor": 4.0, "rope_original_length": 16, "sliding_window": 20},
    {"rope_type": "linear", "rope_factor": 2.0, "tied_head": True},
]


def _close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["*-", "M*E"])
@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_steps_and_passes_equal_the_trainers_model(pair: Pair, pattern: str, keys: dict[str, Any]) -> None:
    ours, theirs = pair(pattern, **keys)
    tokens = torch.randint(31, (2, 13))
    whole = ours(tokens).logits
    _close(theirs(tokens).logits, whole)
    for widths in ((1,) * 13, (6, 1, 6)):
        cache, logits = None, []
        for chunk in tokens.split(widths, dim=1):
            out = theirs(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        _close(torch.cat(logits, 1), whole)
    kept = [state.key.shape[2] for state in cache.states if hasattr(state, "key")]
    assert kept == [min(13, keys.get("sliding_window", 99) - 1)]


@torch.no_grad()
@pytest.mark.parametrize("keys", KEYS, ids=str)
def test_left_padding_is_not_seen(pair: Pair, keys: dict[str, Any]) -> None:
    _, theirs = pair("*-", **keys)
    rows = [torch.randint(31, (length,)) for length in (2, 7, 11)]
    tokens, mask = torch.ones(3, 11, dtype=torch.int64), torch.zeros(3, 11, dtype=torch.int64)
    for number, row in enumerate(rows):
        tokens[number, -len(row) :], mask[number, -len(row) :] = row, 1
    whole = theirs(tokens, mask).logits
    cache, steps = None, []
    for place in range(11):
        out = theirs(tokens[:, place : place + 1], mask[:, : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    for number, row in enumerate(rows):
        alone = theirs(row[None]).logits[0]
        _close(whole[number, -len(row) :], alone)
        _close(torch.cat(steps, 1)[number, -len(row) :], alone)
