import itertools

import pytest

from moe_mamba.config import TrainConfig
from moe_mamba.train.schedule import learning_rate


def rates(steps: int, **values: object) -> list[float]:
    config = TrainConfig(learning_rate=1.0, **values)  # type: ignore[arg-type]
    return [learning_rate(step, steps, config) for step in range(1, steps + 1)]


def test_cosine_rises_linearly_and_ends_at_the_minimum() -> None:
    curve = rates(100, warmup=0.1, minimum_rate=0.1)
    assert curve[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert curve[-1] == pytest.approx(0.1)
    assert curve[54] == pytest.approx(0.55, abs=1e-6)
    assert all(one >= other for one, other in itertools.pairwise(curve[9:]))


def test_stable_then_decay_falls_in_a_line_only_at_the_end() -> None:
    curve = rates(100, schedule="wsd", warmup=0.1, decay=0.2, minimum_rate=0.0)
    assert curve[9:80] == pytest.approx([1.0] * 71)
    assert curve[80:] == pytest.approx([1 - step / 20 for step in range(1, 21)])


def test_a_longer_stable_run_has_the_same_beginning() -> None:
    values = {"schedule": "wsd", "warmup": 0.0, "decay": 0.1}
    assert rates(100, **values)[:90] == rates(200, **values)[:90]
