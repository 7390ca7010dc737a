import math

import pytest
import torch

from moe_mamba.config import ModelConfig
from moe_mamba.model.attention import Attention, rotate
from moe_mamba.model.initialize import initialize
from moe_mamba.model.sequences import Sequences


def _attention(**keys: object) -> Attention:
    torch.manual_seed(0)
    attention = Attention(ModelConfig(pattern="*", d_model=16, heads=4, **keys)).double()
    initialize(attention, 0)
    return attention


def _loop(attention: Attention, x: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Attention of one sequence (length, d_model), token by token and head by head."""
    config, width = attention.config, attention.head_dim
    query, key, value = (p(x).view(len(x), -1, width) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    first, rows = 0, []
    for here in range(len(x)):
        first = here if starts[here] else first
        heads = []
        for head in range(config.heads):
            group = head * config.resolved_kv_heads // config.heads
            q, k, v = query[here, head], key[first : here + 1, group], value[first : here + 1, group]
            if config.positions == "rope":
                # A rotation of pairs is a product with complex numbers of length one.
                angle = config.rope_base ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
                q, k = (torch.complex(*part.chunk(2, -1)) for part in (q, k))
                turn = torch.polar(
                    torch.ones(len(k), width // 2, dtype=torch.float64),
                    (here - first - torch.arange(len(k))[:, None]) * angle,
                )
                score = (q * turn * k.conj()).real.sum(-1)
            else:
                score = k @ q
            heads.append((score / math.sqrt(width)).softmax(0) @ v)
        rows.append(torch.cat(heads))
    return attention.o_proj(torch.stack(rows))


@pytest.mark.parametrize("positions", ["rope", "none"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_a_plain_loop(positions: str, kv_heads: int, packed: bool) -> None:
    attention = _attention(positions=positions, kv_heads=kv_heads)
    x = torch.randn(2 * 9, 16, dtype=torch.float64)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    if packed:
        starts[0, [0, 4, 5]] = True
        starts[1, 7] = True
    y, statistics, state = attention(x, Sequences(2, 9, starts if packed else None))
    assert statistics is None
    assert state is None
    expected = torch.cat([_loop(attention, x[:9], starts[0]), _loop(attention, x[9:], starts[1])])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cuts", [(1,) * 9, (4, 1, 4), (9,)])
@pytest.mark.parametrize("packed", [False, True])
def test_passes_from_a_state_equal_one_pass(cuts: tuple[int, ...], packed: bool) -> None:
    attention = _attention(kv_heads=2)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, [3, 4]] = starts[1, 6] = packed
    whole, _, _ = attention(x.flatten(0, 1), Sequences(2, 9, starts if packed else None))
    state, pieces, at = attention.initial_state(2), [], 0
    for cut in cuts:
        piece = slice(at, at + cut)
        sequences = Sequences(2, cut, starts[:, piece] if packed else None)
        y, _, state = attention(x[:, piece].flatten(0, 1), sequences, state)
        pieces.append(y.view(2, cut, 16))
        at += cut
    torch.testing.assert_close(torch.cat(pieces, 1), whole.view(2, 9, 16), rtol=1e-10, atol=1e-10)


def test_rotation_keeps_bf16_and_turns_in_fp32() -> None:
    x, positions = torch.randn(1, 2, 8, 4).bfloat16(), torch.arange(1000, 1008)[None]
    assert rotate(x, positions, 1e4).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, positions, 1e4), rotate(x.float(), positions, 1e4).bfloat16())
