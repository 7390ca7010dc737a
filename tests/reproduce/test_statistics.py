"""Statistics by hand: Student's t of tables, paired differences, steps to a loss, a crossing."""

import math

import pytest

from moe_mamba.reproduce.statistics import crossing, mean, paired, share_of_steps, t_probability, t_quantile

# Two-sided 95 %, as every printed table of Student's t has them.
PRINTED = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 10: 2.228, 29: 2.045, 30: 2.042}


@pytest.mark.parametrize(("freedom", "t"), PRINTED.items())
def test_quantiles_of_t(freedom: int, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=5e-4)
    assert t_probability(t_quantile(freedom, 0.5), freedom) == pytest.approx(0.5)


def test_means_and_paired_differences() -> None:
    assert mean([]) is None
    assert mean([3.0]) == (3.0, None, 1)
    found = mean([1.0, 2.0, 4.0])
    assert found is not None
    assert found.error == pytest.approx(math.sqrt((16 / 9 + 1 / 9 + 25 / 9) / 2 / 3))
    difference = paired({1: 3.0, 2: 3.2, 3: 3.1, 9: 0.0}, {1: 3.1, 2: 3.25, 3: 3.25, 8: 0.0})
    assert difference is not None
    assert difference.seeds == 3  # 8 and 9 have no partner
    assert difference.value == pytest.approx(-0.1)
    reach = 4.30265 * math.sqrt((0.0 + 0.0025 + 0.0025) / 2 / 3)
    assert (difference.low, difference.high) == pytest.approx((-0.1 - reach, -0.1 + reach), abs=1e-5)
    assert paired({1: 1.0}, {1: 2.0}) == (-1.0, None, None, 1)
    assert paired({1: 1.0}, {2: 2.0}) is None


def test_steps_to_a_loss() -> None:
    curve = [(10, 5.0), (20, 4.0), (30, 4.2), (40, 3.0)]
    assert share_of_steps(curve, 4.5, 40) == pytest.approx(15 / 40)
    assert share_of_steps(curve, 4.0, 40) == pytest.approx(20 / 40)
    assert share_of_steps(curve, 6.0, 40) == pytest.approx(10 / 40)  # no earlier point is known
    assert share_of_steps(curve, 3.5, 80) == pytest.approx((30 + 10 * 0.7 / 1.2) / 80)
    assert share_of_steps(curve, 2.9, 40) is None


def test_where_a_curve_crosses() -> None:
    assert crossing([(1, 0.3), (4, 0.1), (16, -0.1)]) == pytest.approx(8)
    assert crossing([(1, 0.3), (4, 0.1)]) is None
    assert crossing([(1, -0.3), (4, -0.1)]) is None
