import math

import pytest
import torch

from moe_mamba.config import ModelConfig
from moe_mamba.model.initialize import initialize
from moe_mamba.model.mixers.attention import Attention, rotary_frequencies, rotate
from moe_mamba.model.sequences import Sequences


def _attention(**keys: object) -> Attention:
    torch.manual_seed(0)
    attention = Attention(ModelConfig(pattern="*", d_model=16, heads=4, **keys)).double()
    initialize(attention, 0)
    with torch.no_grad():  # biases start as zeros
        for name, parameter in attention.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return attention


def _loop(attention: Attention, x: torch.Tensor, document_starts: torch.Tensor) -> torch.Tensor:
    """Attention of one sequence (length, d_model), token by token and head by head."""
    config, width = attention.config, attention.head_dim
    query, key, value = (p(x).view(len(x), -1, width) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    first, rows = 0, []
    for here in range(len(x)):
        first = here if document_starts[here] else first
        heads = []
        for head in range(config.heads):
            group = head * config.resolved_kv_heads // config.heads
            oldest = max(first, here + 1 - (config.sliding_window or len(x)))
            q, k, v = query[here, head], key[oldest : here + 1, group], value[oldest : here + 1, group]
            if config.positions == "rope":
                # A rotation of pairs is a product with complex numbers of length one.
                angle = config.rope_base ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
                q, k = (torch.complex(*part.chunk(2, -1)) for part in (q, k))
                turn = torch.polar(
                    torch.ones(len(k), width // 2, dtype=torch.float64),
                    (here - oldest - torch.arange(len(k))[:, None]) * angle,
                )
                score = (q * turn * k.conj()).real.sum(-1)
            else:
                score = k @ q
            heads.append((score / math.sqrt(width)).softmax(0) @ v)
        rows.append(torch.cat(heads))
    return attention.o_proj(torch.stack(rows))


@pytest.mark.parametrize(
    "keys",
    [
        *({"positions": positions, "kv_heads": kv_heads} for positions in ("rope", "none") for kv_heads in (4, 2, 1)),
        *({"sliding_window": window, "kv_heads": 2} for window in (1, 3, 8, 9)),
        {"sliding_window": 4, "positions": "none"},
        {"head_dim": 6, "attention_bias": True, "kv_heads": 2, "sliding_window": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("packed", [False, True])
def test_equals_a_plain_loop(keys: dict, packed: bool) -> None:
    attention = _attention(**keys)
    x = torch.randn(2 * 9, 16, dtype=torch.float64)
    document_starts = torch.zeros(2, 9, dtype=torch.bool)
    if packed:
        document_starts[0, [0, 4, 5]] = True
        document_starts[1, 7] = True
    y, statistics, state = attention(x, Sequences(2, 9, document_starts if packed else None))
    assert statistics == {}
    assert state is None
    expected = torch.cat([_loop(attention, x[:9], document_starts[0]), _loop(attention, x[9:], document_starts[1])])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [(1,) * 9, (4, 1, 4), (9,)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 8, 20])
def test_passes_from_a_state_equal_one_pass(lengths: tuple[int, ...], packed: bool, window: int | None) -> None:
    attention = _attention(kv_heads=2, sliding_window=window)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    document_starts = torch.zeros(2, 9, dtype=torch.bool)
    document_starts[0, [3, 4]] = document_starts[1, 6] = packed
    whole, _, _ = attention(x.flatten(0, 1), Sequences(2, 9, document_starts if packed else None))
    state, outputs, at = attention.initial_state(2), [], 0
    for length in lengths:
        chunk = slice(at, at + length)
        sequences = Sequences(2, length, document_starts[:, chunk] if packed else None)
        y, _, state = attention(x[:, chunk].flatten(0, 1), sequences, state)
        outputs.append(y.view(2, length, 16))
        at += length
        assert state.key.shape == state.value.shape == (2, 2, at if window is None else min(at, window - 1), 4)
        assert state.key.untyped_storage().nbytes() == state.key.nbytes, "what is dropped is let go of"
    torch.testing.assert_close(torch.cat(outputs, 1), whole.view(2, 9, 16), rtol=1e-10, atol=1e-10)


def test_rotation_keeps_bf16_and_turns_in_fp32() -> None:
    x, positions = torch.randn(1, 2, 8, 4).bfloat16(), torch.arange(1000, 1008)[None]
    frequency = rotary_frequencies(ModelConfig(head_dim=4), torch.float32, x.device)
    assert rotate(x, positions, frequency).dtype == torch.bfloat16
    torch.testing.assert_close(rotate(x, positions, frequency), rotate(x.float(), positions, frequency).bfloat16())


LLAMA_3_1 = {"rope_type": "llama3", "rope_base": 500000.0, "rope_factor": 8.0}


@pytest.mark.parametrize("keys", [{}, {"rope_type": "linear", "rope_factor": 3.0}, LLAMA_3_1], ids=str)
def test_frequencies_by_the_published_cases(keys: dict) -> None:
    """Frequency by frequency, with Llama 3.1's three cases written out."""
    config = ModelConfig(head_dim=128, **keys)
    low, high = 8192 / 1, 8192 / 4  # wavelengths, tokens
    expected = []
    for pair in range(64):
        frequency = config.rope_base ** (-2 * pair / 128)
        wavelength = 2 * math.pi / frequency
        slow = frequency / config.rope_factor
        if config.rope_type == "linear" or wavelength > low:
            expected.append(slow)
        elif wavelength < high:
            expected.append(frequency)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * slow + smooth * frequency)
    found = rotary_frequencies(config, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    if config.rope_type == "llama3":
        ratios = found * config.rope_base ** (torch.arange(64, dtype=torch.float64) / 64)
        assert [int((ratios > 1 - 1e-9).sum()), int((ratios < 0.125 + 1e-9).sum())] == [29, 29], "all three cases occur"
