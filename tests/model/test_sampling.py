"""Drawing tokens: from which, how often, and each row by itself."""

import pytest
import torch
from torch import Generator, Tensor

from moe_mamba.model import sampling
from moe_mamba.model.sampling import Sampling


def seeded(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("candidates", [2, 256])  # fewer than top_p needs, then as many as it likes
def test_top_k_and_top_p_draw_from_the_most_probable(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.3]]).log()

    def drawn(**keys: object) -> set[int]:
        generators = seeded(0)
        return {Sampling(**keys).draw(logits, generators)[0] for _ in range(200)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {2, 3}
    assert drawn(top_p=0.39) == {2}
    assert drawn(top_p=0.41) == {2, 3}
    assert drawn(top_p=0.91) == {0, 1, 2, 3}
    assert drawn(top_k=3, top_p=0.75) == {2, 3}
    assert drawn(top_k=100) == {0, 1, 2, 3}
    assert drawn(temperature=0) == drawn(temperature=1e-3) == {2}
    assert drawn(temperature=1e-6) == drawn(temperature=1e-40) == drawn(temperature=5e-324) == {2}


@pytest.mark.parametrize("keys", [{}, {"top_k": 3}, {"top_p": 0.999999}])
def test_frequencies_are_the_probabilities(keys: dict) -> None:
    generators, logits = seeded(0), torch.tensor([[1.0, 2.0, 3.0]])
    counts = torch.bincount(torch.tensor([Sampling(2.0, **keys).draw(logits, generators)[0] for _ in range(4000)]))
    torch.testing.assert_close(counts / 4000, (logits[0] / 2).softmax(0), rtol=0, atol=0.03)


@pytest.mark.parametrize("keys", [{}, {"top_k": 5}, {"top_p": 0.5}])
def test_a_row_does_not_depend_on_the_others(keys: dict) -> None:
    logits = torch.randn(3, 400)
    logits[1] *= 10  # of few likely tokens, beside rows that need more than the candidates

    def drawn(rows: Tensor, *seeds: int) -> list[list[int]]:
        generators = seeded(*seeds)
        return [list(row) for row in zip(*(Sampling(**keys).draw(rows, generators) for _ in range(30)), strict=True)]

    together = drawn(logits, 1, 2, 3)
    assert together == [drawn(logits[row : row + 1], row + 1)[0] for row in range(3)]
    assert together[0] != drawn(logits[:1], 4)[0]


def test_a_token_without_a_share_is_never_drawn() -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 20] = 0
    generators = seeded(0)
    assert {Sampling(top_k=top_k).draw(logits, generators)[0] for top_k in (None, 30) for _ in range(50)} == {20}
