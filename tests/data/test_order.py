import numpy as np
import pytest

from moe_mamba.data.order import blend, permute


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 255, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    assert sorted(permute(np.arange(size), size, "key")) == list(range(size))


def test_permute_takes_any_part_by_itself() -> None:
    whole = permute(np.arange(1000), 1000, "key")
    assert (permute(np.array([7, 900, 3]), 1000, "key") == whole[[7, 900, 3]]).all()
    huge = permute(np.array([0, 1, 2**39]), 2**40 - 1, "key")
    assert ((huge >= 0) & (huge < 2**40 - 1)).all()


def test_permute_looks_random() -> None:
    size = 20_000
    order = permute(np.arange(size), size, "key")
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.03
    assert (np.diff(order) == 1).sum() < 10
    other = permute(np.arange(size), size, "another key")
    assert (order == other).sum() < 10
    decades = np.histogram2d(np.arange(size), order, bins=10)[0]
    assert abs(decades - size / 100).max() < 5 * (size / 100) ** 0.5


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.7, 0.3], [5, 3, 1, 1], [1e-3, 1, 2]])
def test_blend_keeps_to_the_weights_at_every_length(weights: list[float]) -> None:
    positions = np.arange(20_000)
    corpus, within = blend(positions, weights)
    for number, weight in enumerate(weights):
        chosen = corpus == number
        assert (within[chosen] == np.arange(chosen.sum())).all()  # each corpus is taken in its own order, none left out
        expected = (positions + 1) * weight / sum(weights)
        assert abs(np.cumsum(chosen) - expected).max() <= len(weights)


def test_blend_takes_any_part_by_itself() -> None:
    corpus, within = blend(np.arange(1000), [2, 1, 1])
    part = blend(np.arange(400, 450), [2, 1, 1])
    assert (part[0] == corpus[400:450]).all()
    assert (part[1] == within[400:450]).all()
